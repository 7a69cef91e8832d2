"""What a trial trains, and the arithmetic of the budget: every number that bounds a rank, spelled out."""

from collections.abc import Sequence

from agnews_lora.adapters.budget import head_parameters, max_rank, parameters_per_rank
from agnews_lora.adapters.spec import HEADS, PRESETS, ModelShape, TrialSpec, module_shape
from agnews_lora.reporting.report.document import (
    Block,
    Cite,
    Code,
    Column,
    Inline,
    Paragraph,
    Ref,
    Section,
    Sum,
    Table,
    Text,
    say,
    sentences,
)
from agnews_lora.reporting.report.dossier import Dossier, spec_of
from agnews_lora.reporting.report.wording import capital, listed, number, percent, whole


def adapters(dossier: Dossier) -> Section | None:
    """What a trial trains, and the arithmetic of the budget; None where the base's shape is not known."""
    if dossier.shape is None:
        return None
    shape = dossier.shape
    blocks: list[Block] = [Paragraph(_rule(dossier, shape)), _presets(dossier, shape)]
    winner, baseline = dossier.trial(dossier.winner), dossier.trial(dossier.baseline)
    if winner is not None:
        blocks += [Paragraph(_introduce_sum(dossier, spec_of(winner), shape)), _sum(spec_of(winner), shape)]
    compared = [(dossier.best_called, winner)] if winner is not None else []
    if baseline is not None and dossier.baseline != dossier.winner:
        compared.append(("baseline", baseline))
    if compared:
        blocks.append(_configurations([(name, spec_of(row)) for name, row in compared], shape))
    if dossier.definition:
        blocks.append(_space(dossier))
    return Section("Adapter configurations and the budget", tuple(blocks))


def _rule(dossier: Dossier, shape: ModelShape) -> Text:
    heads = dossier.definition.space.heads if dossier.definition else ("full",)
    head = " or ".join(f"{whole(head_parameters(each, shape))} ({each})" for each in heads)
    if len(heads) == 1:
        head = whole(head_parameters(heads[0], shape))
    return sentences(
        say(
            "A LoRA adapter of rank r on a matrix of d outputs and k inputs adds two matrices with r · (d + k) "
            "parameters in all ({lora}); the base itself stays as it is, and the classifier's head trains in full "
            "beside the adapter.",
            lora=Cite("hu"),
        )
        if heads == ("full",)
        else say(
            "A LoRA adapter of rank r on a matrix of d outputs and k inputs adds two matrices with r · (d + k) "
            "parameters in all ({lora}); the base itself stays as it is, and a head trains beside the adapter.",
            lora=Cite("hu"),
        ),
        say(
            "The base has {layers} encoder layers of width {hidden} (feed-forward {inner}), its head {head} "
            "parameters. The number of trainable parameters is thus head + r · (parameters of one rank step), and the "
            "budget of {budget} bounds the rank of each preset of target modules ({table}).",
            layers=str(shape.num_layers),
            hidden=whole(shape.hidden_size),
            inner=whole(shape.intermediate_size),
            head=head,
            budget=whole(dossier.budget),
            table=Ref("presets"),
        ),
        "Ranks beyond it are never sampled; the count is made again on the tensors that are built, and on the file "
        "that is exported.",
    )


def _presets(dossier: Dossier, shape: ModelShape) -> Table:
    space = dossier.definition.space if dossier.definition else None
    rows = []
    for preset in space.targets if space else PRESETS:
        for head in space.heads if space else HEADS[:1]:
            step, rank = parameters_per_rank(preset, shape), max_rank(preset, head, shape, dossier.budget)
            count = head_parameters(head, shape) + rank * step
            rows.append(
                (
                    (Code(preset),),
                    (_matrices(preset),),
                    *(((head,),) if space and len(space.heads) > 1 else ()),
                    (whole(step),),
                    (str(rank) if rank else "none fits",),
                    (whole(count) if rank else "–",),
                    (percent(count / dossier.budget, 1) if rank else "–",),
                )
            )
    head_column = (Column("head"),) if space and len(space.heads) > 1 else ()
    return Table(
        "presets",
        say(
            "Presets of target modules, and the largest rank of each that fits {budget}.", budget=whole(dossier.budget)
        ),
        (
            Column("preset"),
            Column("matrices of a layer", wide=True),
            *head_column,
            Column("a rank step", "right"),
            Column("largest r", "right"),
            Column("trainable", "right"),
            Column("of budget", "right"),
        ),
        tuple(rows),
    )


def _matrices(preset: str) -> str:
    names = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "attention output",
        "intermediate.dense": "feed-forward in",
        "output.dense": "feed-forward out",
    }
    return ", ".join(names[module] for module in PRESETS[preset])


def _introduce_sum(dossier: Dossier, spec: TrialSpec, shape: ModelShape) -> Text:
    matrices = " + ".join(
        f"({whole(outputs)} + {whole(inputs)})"
        for outputs, inputs in (module_shape(module, shape) for module in PRESETS[spec.targets])
    )
    return say(
        "For the {winner}, one rank step on {targets} costs {layers} layers × [{matrices}] = {step} parameters, and:",
        winner=dossier.best_called,
        targets=Code(spec.targets),
        layers=str(shape.num_layers),
        matrices=matrices,
        step=whole(parameters_per_rank(spec.targets, shape)),
    )


def _sum(spec: TrialSpec, shape: ModelShape) -> Sum:
    head, step = head_parameters(spec.head, shape), parameters_per_rank(spec.targets, shape)
    return Sum(
        (
            (whole(head), "head"),
            ("+", ""),
            (str(spec.rank), "rank"),
            ("×", ""),
            (whole(step), "a rank step"),
            ("=", ""),
            (whole(head + spec.rank * step), "trainable"),
        )
    )


def _configurations(named: list[tuple[str, TrialSpec]], shape: ModelShape) -> Table:
    def sum_of(spec: TrialSpec) -> str:
        head, step = head_parameters(spec.head, shape), parameters_per_rank(spec.targets, shape)
        return f"{whole(head)} + {spec.rank} × {whole(step)} = {whole(head + spec.rank * step)}"

    lines: list[tuple[str, list[Text]]] = [
        ("target modules", [(Code(spec.targets),) for _, spec in named]),
        ("rank r", [(str(spec.rank),) for _, spec in named]),
        ("alpha", [(number(spec.alpha),) for _, spec in named]),
        ("scale of the update, alpha / r", [(number(spec.alpha / spec.rank),) for _, spec in named]),
        ("dropout on the adapter's input", [(number(spec.dropout),) for _, spec in named]),
        ("peak learning rate", [(number(spec.learning_rate),) for _, spec in named]),
        ("head that trains", [(spec.head,) for _, spec in named]),
        ("trainable parameters", [(sum_of(spec),) for _, spec in named]),
    ]
    return Table(
        "configurations",
        say("The configurations of {names}, and their counts.", names=listed([f"the {name}" for name, _ in named])),
        (Column("setting"), *(Column(name, "right") for name, _ in named)),
        tuple(((capital(label),), *values) for label, values in lines),
    )


def _space(dossier: Dossier) -> Table:
    assert dossier.definition is not None
    space = dossier.definition.space
    dropout, rate = space.dropout, space.learning_rate
    rows: list[tuple[Text, ...]] = [
        (("Target modules",), _codes(space.targets), ("one of",)),
        (("Rank",), say("1 up to the largest of {table}", table=Ref("presets")), ("whole number, a range a preset",)),
        (("Alpha / rank",), (", ".join(map(str, space.alpha_ratio)),), ("one of",)),
        (("Dropout",), (f"{number(dropout.low)} to {number(dropout.high)}",), ("uniform",)),
        (("Learning rate",), (f"{number(rate.low)} to {number(rate.high)}",), ("uniform in the logarithm",)),
    ]
    if len(space.heads) > 1:
        rows.append((("Head",), (", ".join(space.heads),), ("one of",)))
    return Table(
        "space",
        say("The search space. Everything else is the same for all trials."),
        (Column("dimension"), Column("values", wide=True), Column("how it is drawn")),
        tuple(rows),
    )


def _codes(names: Sequence[str]) -> Text:
    """`a`, `b`, `c`."""
    parts: list[Inline] = []
    for name in names:
        parts += [", ", Code(name)] if parts else [Code(name)]
    return tuple(parts)
