"""What was given: the data, and how all trials were trained."""

from agnews_lora.data.rows import LABELS
from agnews_lora.reporting.report.document import (
    Block,
    Cite,
    Code,
    Column,
    Paragraph,
    Section,
    Table,
    Text,
    say,
    sentences,
)
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.report.wording import capital, counted, listed, number, percent, whole

DIGEST_LENGTH = 16  # characters of a hash that are shown
PURPOSES = {
    "training": "gradients",
    "validation": "pruning, and the choice of the winner",
}


def data(dossier: Dossier) -> Section | None:
    """Where the rows come from, and how many are used for what."""
    blocks: list[Block] = []
    if source := _source(dossier):
        blocks.append(Paragraph(source))
    if dossier.datasets:
        blocks.append(_splits(dossier))
    return Section("Data", tuple(blocks)) if blocks else None


def _source(dossier: Dossier) -> Text | None:
    if dossier.experiment is None:
        return None
    settings = dossier.experiment.data_settings
    classes = say("Every row is a short news item with one of {num} labels: {labels}.", num="four", labels=_labels())
    held_out = say(
        "{share} of the train split, stratified by class, is held out for validation{kept}; the test split has no part "
        "in the search.",
        share=percent(settings.validation, 0),
        kept=f", and {whole(settings.train_rows)} of the rest are trained on" if settings.train_rows else "",
    )
    match settings.source:
        case "newswire":
            origin = say(
                "The rows are {name}, a corpus of news items that the project writes itself from a grammar, the same "
                "for the same seed: {rows} for the train split and {test} for the test split.",
                name=Code("newswire"),
                rows=whole(settings.rows or 0),
                test=whole(settings.test_rows or 0),
            )
        case "hub":
            origin = say("The rows are those of AG News ({zhang}), from the published data set.", zhang=Cite("zhang"))
        case _:
            origin = say("The rows are those of AG News ({zhang}), read from CSV files.", zhang=Cite("zhang"))
    bound = None
    if dossier.bound is not None:
        bound = say(
            "Some of its stories tell two topics and carry either's label, so that no classifier can expect to label "
            "more than {bound} rightly: accuracies are to be read against that, not against 100%.",
            bound=percent(dossier.bound),
        )
    return sentences(origin, classes, bound, held_out)


def _labels() -> str:
    return listed(LABELS)


def _splits(dossier: Dossier) -> Table:
    rows: list[tuple[Text, ...]] = []
    for used in dossier.datasets:
        purpose = PURPOSES.get(used.context, used.context)
        rows.append(
            ((capital(used.context),), (whole(used.num_rows),), (purpose,), (Code(used.digest[:DIGEST_LENGTH]),))
        )
    score = dossier.registered.score if dossier.registered else None
    if score:
        digest = Code(score.digest[:DIGEST_LENGTH])
        rows.append((("Test",), (whole(score.rows),), ("one score, at promotion",), (digest,)))
    return Table(
        "splits",
        say("The rows by what they are used for. The digest is the beginning of a SHA-256 over all rows in order."),
        (Column("split"), Column("rows", "right"), Column("used for", wide=True), Column("digest")),
        tuple(rows),
    )


def schedule(dossier: Dossier) -> Section | None:
    """How every trial was trained and judged; None where the settings are not known."""
    if dossier.settings is None:
        return None
    blocks: list[Block] = [Paragraph(_training(dossier))]
    if search := _search(dossier):
        blocks.append(Paragraph(search))
    return Section("Training schedule", (*blocks, _settings(dossier)))


def _training(dossier: Dossier) -> Text:
    settings = dossier.settings
    assert settings is not None
    rows = dossier.num_rows("training")
    steps = settings.epochs * -(-rows // settings.batch_size) if rows else None
    return sentences(
        say(
            "Every trial trains with AdamW ({adamw}) on the cross-entropy of the labels{steps}.",
            adamw=Cite("loshchilov"),
            steps=f", for {whole(steps)} steps of {settings.batch_size} rows" if steps else "",
        ),
        say(
            "The learning rate rises linearly to its peak over the first {warmup} of the steps and then falls linearly "
            "to zero.",
            warmup=percent(settings.warmup, 0),
        ),
        say(
            "On the way, every {every} steps, a fixed stratified subset of {rows} validation rows is scored; after the "
            "last step, the whole validation split. That last score is what trials are compared by, and the adapter is "
            "that of the last step: no checkpoint is picked by its score.",
            every=whole(settings.eval_every),
            rows=whole(min(settings.eval_rows, dossier.num_rows("validation") or settings.eval_rows)),
        ),
    )


def _search(dossier: Dossier) -> Text | None:
    definition = dossier.definition
    if definition is None:
        return None
    pruner = definition.pruner
    engine = dossier.params.get("engine", definition.engine)
    return sentences(
        say(
            "The first trial is the baseline. The next configurations are drawn at random until {startup} "
            "finished, then by a tree-structured Parzen estimator ({tpe}), which learns from all that came before.",
            startup=_have(definition.startup_trials),
            tpe=Cite("bergstra"),
        ),
        say(
            "A trial is given up at an evaluation{warmup} where it is below the median of all other trials at the same "
            "step, once at least {peers} came as far ({median}); the baseline never is.",
            warmup=f" from step {pruner.warmup_steps} on" if pruner.warmup_steps else "",
            peers=counted(pruner.startup_trials, "other"),
            median=Cite("golovin"),
        ),
        "Many trials train at once through one frozen base, each with its own rank, learning rate and order of the "
        "data."
        if engine == "multilora"
        else "Trials train one after another, with Hugging Face's Trainer and PEFT.",
    )


def _have(count: int) -> str:
    return f"{counted(count, 'trial')} {'has' if count == 1 else 'have'}"


def _settings(dossier: Dossier) -> Table:
    settings, definition = dossier.settings, dossier.definition
    assert settings is not None
    precision = {
        "auto": "bf16 where the device computes in it, else fp32",
        "fp32": "fp32",
        "bf16": "bf16",
    }[settings.precision]
    rows = [
        ("epochs", str(settings.epochs)),
        ("batch size", f"{settings.batch_size} rows; {settings.eval_batch_size} in evaluations"),
        ("longest text", f"{settings.max_length} tokens, the rest is cut"),
        ("warm-up, then decay", f"{percent(settings.warmup, 0)} of the steps, linear; then linear to zero"),
        ("weight decay", number(settings.weight_decay)),
        ("gradient clipping", f"norm {number(settings.max_grad_norm)} over all trainable parameters"),
        ("dropout in the frozen base", number(settings.base_dropout)),
        ("number format", precision),
        ("evaluation", f"every {whole(settings.eval_every)} steps on {whole(settings.eval_rows)} rows at most"),
        ("engine", dossier.params.get("engine", "")),
    ]
    if definition:
        asked = dossier.asked or definition.trials
        rows += [
            ("trials asked for", str(asked)),
            ("seed of the sweep; of the experiment", f"{definition.seed}; {definition.experiment.seed}"),
        ]
    return Table(
        "settings",
        say("What all trials share."),
        (Column("setting"), Column("value", wide=True)),
        tuple(((capital(name),), (value,)) for name, value in rows if value),
    )
