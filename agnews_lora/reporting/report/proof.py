"""How the winner was made sure of: the confirmation over seeds, the gate, and the one score on the test split."""

import json

from agnews_lora.reporting.report.document import Block, Code, Column, Paragraph, Ref, Table, Text, say, sentences
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.report.wording import capital, counted, interval, one_line, percent, points, whole


def confirmation(dossier: Dossier) -> list[Block]:
    """The best trials over several seeds; nothing where none was trained again."""
    if dossier.confirmation is None or dossier.confirmation.empty:
        return []
    return [Paragraph(_confirmation_read(dossier)), _confirmation(dossier)]


def _confirmation_read(dossier: Dossier) -> Text:
    frame = dossier.confirmation
    assert frame is not None
    chosen = next(frame[frame["chosen"]].itertuples(), None)
    first = next(dossier.complete().itertuples())
    outcome = None
    if chosen is not None:
        same = chosen.trial == first.trial
        outcome = sentences(
            say(
                "Trial {trial} has the best mean and is the winner{same}.",
                trial=Code(chosen.trial),
                same=", as it was in the search"
                if same
                else say(", in the place of {first}, which led the search", first=Code(first.trial)),
            ),
            say(
                "Its mean is {drop} {side} the accuracy that it had in the search.",
                drop=points(abs(chosen.drop)),
                side="below" if chosen.drop >= 0 else "above",
            ),
        )
    failed = int(frame["failed"].sum())
    return sentences(
        say(
            "The best {num} of the search were trained again from other seeds, and the winner was chosen by the mean "
            "({table}).",
            num=counted(len(frame), "trial"),
            table=Ref("confirmation"),
        ),
        outcome,
        say(
            "{failed} failed and {do} not count.",
            failed=capital(counted(failed, "repetition")),
            do="does" if failed == 1 else "do",
        )
        if failed
        else None,
    )


def _confirmation(dossier: Dossier) -> Table:
    frame = dossier.confirmation
    assert frame is not None
    rows: list[tuple[Text, ...]] = []
    strong: list[int] = []
    for index, row in enumerate(frame.itertuples()):
        runs = json.loads(row.runs) if isinstance(row.runs, str) else []
        if row.chosen:
            strong.append(index)
        spread = f"{100 * row.std_accuracy:.2f}" if row.std_accuracy == row.std_accuracy else "–"
        rows.append(
            (
                (Code(str(row.trial)),),
                (str(int(row.seeds)),),
                (percent(row.own_accuracy),),
                (percent(row.mean_accuracy),),
                (spread,),
                (f"{100 * row.drop:.2f}".replace("-", "−"),),
                (", ".join(percent(float(run["accuracy"])) for run in runs) or "–",),
            )
        )
    return Table(
        "confirmation",
        say(
            "The confirmation: the best trials over several seeds, the winner in bold. Deviation (of the sample) and "
            "drop from the search's figure to the mean are in percentage points."
        ),
        (
            Column("trial"),
            Column("runs", "right"),
            Column("in the search", "right"),
            Column("mean", "right"),
            Column("deviation", "right"),
            Column("drop", "right"),
            Column("each run", "right"),
        ),
        tuple(rows),
        strong=tuple(strong),
    )


def promotion(dossier: Dossier) -> list[Block]:
    """Where the winner stands in the registry, what the gate found, and the test score."""
    registered = dossier.registered
    if registered is None:
        return []
    version, score = registered.version, registered.score
    aliases = f", as {' and '.join(version.aliases)}" if version.aliases else ""
    placed = say(
        "The winner is registered as version {number} of {model}{aliases}.",
        number=str(version.number),
        model=Code(version.model),
        aliases=aliases,
    )
    if not registered.checks:
        return [
            Paragraph(sentences(placed, "It has not been put through the gate yet, so the test split was not scored."))
        ]
    passed = all(check.get("passed") for check in registered.checks)
    tested = None
    if score:
        tested = say(
            "Then the test split was scored, once for this version: accuracy {accuracy} (95% interval {range}), "
            "macro-F1 {f1}, on {rows} rows.",
            accuracy=percent(score.accuracy),
            range=interval(score.low, score.high),
            f1=percent(score.macro_f1),
            rows=whole(score.rows),
        )
    verdict = "It passed" if passed else "It did not pass"
    return [
        Paragraph(sentences(placed, say("{verdict} the gate ({table}).", verdict=verdict, table=Ref("gate")), tested)),
        Table(
            "gate",
            say("What a version must fulfil before it is used, and what was found."),
            (Column("rule", wide=True), Column("found", wide=True), Column("")),
            tuple(
                (
                    (one_line(check.get("rule", "")),),
                    (one_line(check.get("found", "")),),
                    ("passed" if check.get("passed") else "FAILED",),
                )
                for check in registered.checks
            ),
        ),
    ]
