"""What was found: how trials ended, what they cost, and the leaderboard."""

from typing import Any

from agnews_lora.reporting.report.document import (
    Block,
    Cite,
    Code,
    Column,
    Paragraph,
    Ref,
    Section,
    Table,
    Text,
    say,
    sentences,
)
from agnews_lora.reporting.report.dossier import STATES, Dossier
from agnews_lora.reporting.report.proof import confirmation, promotion
from agnews_lora.reporting.report.wording import (
    accuracy_range,
    capital,
    counted,
    mebibytes,
    number,
    one_line,
    percent,
    seconds,
    whole,
)

TOP = 10
MAX_FAILURES = 10


def results(dossier: Dossier) -> Section | None:
    """None before the first trial."""
    if dossier.trials.empty:
        return None
    blocks: list[Block] = [Paragraph(_ends(dossier)), _states(dossier)]
    if dossier.count("FAIL"):
        blocks.append(_failures(dossier))
    if dossier.count("COMPLETE"):
        blocks += [Paragraph(_caveat(dossier)), _leaderboard(dossier)]
    return Section("Results", (*blocks, *confirmation(dossier), *promotion(dossier)))


def _ends(dossier: Dossier) -> Text:
    pruned, ended = dossier.count("PRUNED"), sum(dossier.count(state) for state in ("COMPLETE", "PRUNED", "FAIL"))
    share = None
    if pruned:
        share = say(
            "Pruning gave up {share} of the trials that ended; their accuracies are those of a subset, before the last "
            "step, and do not compare with the finished ones'.",
            share=percent(pruned / ended, 0),
        )
    return sentences(say("{table} shows how trials ended and what they cost.", table=Ref("states")), share)


def _states(dossier: Dossier) -> Table:
    rows: list[tuple[Text, ...]] = []
    for state, name in STATES.items():
        of_state = dossier.trials[dossier.trials["state"] == state]
        if not of_state.empty:
            rows.append((*_costs(name, of_state, len(dossier.trials)),))
    rows.append((*_costs("all", dossier.trials, len(dossier.trials)),))
    shared = ""
    if dossier.params.get("engine") == "multilora":
        shared = " Trials that train at once each count the same second, so these are no seconds of a device."
    return Table(
        "states",
        say(
            "Trials by how they ended. Seconds are wall time inside training steps and evaluations, summed over "
            "trials.{shared}",
            shared=shared,
        ),
        (
            Column("state"),
            Column("trials", "right"),
            Column("share", "right"),
            Column("rows trained on", "right"),
            Column("training", "right"),
            Column("evaluation", "right"),
            Column("peak memory", "right"),
        ),
        tuple(rows),
        strong=(len(rows) - 1,),
    )


def _costs(name: str, trials: Any, total: int) -> list[Text]:
    def measured(column: str, write: Any, most: bool = False) -> Text:
        values = trials[column].astype(float).dropna()
        return ("–" if values.empty else write(values.max() if most else values.sum()),)

    return [
        (capital(name),),
        (str(len(trials)),),
        (percent(len(trials) / total, 0),),
        measured("rows_seen", whole),
        measured("train_seconds", seconds),
        measured("eval_seconds", seconds),
        measured("peak_memory_bytes", mebibytes, most=True),
    ]


def _failures(dossier: Dossier) -> Table:
    failed = dossier.trials[dossier.trials["state"] == "FAIL"]
    shown = failed.head(MAX_FAILURES)
    more = f" {counted(len(failed) - len(shown), 'more failure')} not shown." if len(failed) > len(shown) else ""
    return Table(
        "failures",
        say("Trials that failed, with the beginning of their error.{more}", more=more),
        (Column("trial"), Column("error", wide=True)),
        tuple(((Code(row.trial),), (one_line(row.reason or "unknown"),)) for row in shown.itertuples()),
    )


def _caveat(dossier: Dossier) -> Text:
    tried = dossier.count("COMPLETE")
    confirmed = dossier.confirmation is not None and not dossier.confirmation.empty
    return sentences(
        say(
            "{table} ranks the trials that were trained to their end by their accuracy on the whole validation split, "
            "with Wilson's 95% intervals ({wilson}).",
            table=Ref("leaderboard"),
            wilson=Cite("wilson"),
        ),
        say(
            "The intervals speak of each trial alone. The first of {tried} on the same rows owes a part of its place "
            "to luck, and its accuracy is optimistic by as much.",
            tried=counted(tried, "trial"),
        )
        if tried > 1
        else None,
        say("The mean over fresh seeds ({table}) owes it less.", table=Ref("confirmation")) if confirmed else None,
        "Only the test split, which is scored once and after the choice, is free of it.",
    )


def _leaderboard(dossier: Dossier) -> Table:
    ranked = dossier.complete()
    rows: list[tuple[Text, ...]] = []
    strong: list[int] = []
    for place, row in enumerate(ranked.itertuples(), start=1):
        if place > TOP and row.trial not in (dossier.baseline, dossier.winner):
            continue
        if row.trial == dossier.winner:
            strong.append(len(rows))
        rows.append(_leader(place, row, dossier))
    kept = f"the best {TOP} of {len(ranked)}" if len(ranked) > TOP else f"all {len(ranked)}"
    return Table(
        "leaderboard",
        say(
            "Leaderboard of the finished trials ({kept}), the {best} in bold{baseline}.",
            best=dossier.best_called,
            kept=kept,
            baseline="; * marks the baseline" if dossier.baseline in set(ranked["trial"]) else "",
        ),
        (
            Column("", "right"),
            Column("trial"),
            Column("targets"),
            Column("r", "right"),
            Column("alpha", "right"),
            Column("dropout", "right"),
            Column("learning rate", "right"),
            Column("trainable", "right"),
            Column("accuracy", "right"),
            Column("95% interval", "right"),
        ),
        tuple(rows),
        strong=tuple(strong),
    )


def _leader(place: int, row: Any, dossier: Dossier) -> tuple[Text, ...]:
    num_rows = dossier.num_rows("validation")
    trial: Text = (Code(row.trial), "*") if row.trial == dossier.baseline else (Code(row.trial),)
    return (
        (str(place),),
        trial,
        (Code(row.targets),),
        (str(int(row.lora_r)),),
        (number(float(row.lora_alpha)),),
        (number(float(row.lora_dropout)),),
        (number(float(row.learning_rate)),),
        (whole(row.trainable_parameters),),
        (percent(row.accuracy),),
        (accuracy_range(row.accuracy, num_rows) if num_rows else "–",),
    )
