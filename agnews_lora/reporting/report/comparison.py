"""The winner against the baseline, on the same rows."""

from agnews_lora.reporting.report.document import (
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
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.report.wording import counted, percent, points, whole
from agnews_lora.reporting.winner import classes
from agnews_lora.serving.stats import Pairs, accuracy_interval, count_pairs, difference_interval, two_sided_p_value

SIGNIFICANT = 0.05


def pairs_of(dossier: Dossier) -> Pairs | None:
    """Rows by which of the two answers them rightly; None where the answers of one were not kept, or of other rows."""
    first, second = dossier.answers.winner, dossier.answers.baseline
    if first is None or second is None or dossier.winner == dossier.baseline or first.empty:
        return None
    if not first["row"].equals(second["row"]) or not first["label"].equals(second["label"]):
        return None
    return count_pairs(
        (first["label"] == first["predicted"]).to_numpy(), (second["label"] == second["predicted"]).to_numpy()
    )


def against_baseline(dossier: Dossier) -> Section | None:
    """The paired table and its test; None where the answers of both are not known."""
    pairs = pairs_of(dossier)
    if pairs is None:
        return None
    return Section(
        "The winner against the baseline",
        (
            Paragraph(_question(dossier)),
            _table(pairs),
            Paragraph(_answer(pairs)),
            Paragraph(sentences(_guessing(dossier), _limits(dossier, pairs))),
        ),
    )


def _question(dossier: Dossier) -> Text:
    return sentences(
        say(
            "The baseline is trial {baseline}: the configuration that experiment {experiment} names, run first and "
            "never pruned, with everything but the adapter as in all other trials.",
            baseline=Code(str(dossier.baseline)),
            experiment=Code(dossier.params.get("experiment", "")),
        ),
        say(
            "Both answered the same validation rows, so they are compared row by row ({table}): only rows that one of "
            "them alone answers rightly tell them apart.",
            table=Ref("paired"),
        ),
        _other_scores(dossier),
    )


def _other_scores(dossier: Dossier) -> Text | None:
    """Why the table's shares are not quite those of the leaderboard, where they are not."""
    first, second = dossier.answers.winner, dossier.answers.baseline
    assert first is not None and second is not None
    shares = [float((answers["label"] == answers["predicted"]).mean()) for answers in (first, second)]
    scores = [float(dossier.trial(name).accuracy) for name in (dossier.winner, dossier.baseline)]
    if all(abs(share - score) < 5e-5 for share, score in zip(shares, scores, strict=True)):
        return None
    return say(
        "The answers are those of the exported adapters in full precision, right on {first} and {second}; the last "
        "evaluation of training, in its own number format, found {own} and {others}.",
        first=percent(shares[0]),
        second=percent(shares[1]),
        own=percent(scores[0]),
        others=percent(scores[1]),
    )


def _table(pairs: Pairs) -> Table:
    def cells(*counts: int) -> tuple[Text, ...]:
        return tuple((f"{whole(count)} ({percent(count / pairs.num_rows, 1)})",) for count in counts)

    first, second = pairs.both + pairs.only_first, pairs.both + pairs.only_second
    return Table(
        "paired",
        say("Validation rows by who answers them rightly."),
        (
            Column(""),
            Column("baseline right", "right"),
            Column("baseline wrong", "right"),
            Column("all", "right"),
        ),
        (
            (("Winner right",), *cells(pairs.both, pairs.only_first, first)),
            (("Winner wrong",), *cells(pairs.only_second, pairs.neither, pairs.num_rows - first)),
            (("All",), *cells(second, pairs.num_rows - second, pairs.num_rows)),
        ),
    )


def _answer(pairs: Pairs) -> Text:
    low, high = difference_interval(pairs)
    p = two_sided_p_value(pairs)
    told_apart = pairs.only_first + pairs.only_second
    return sentences(
        say(
            "The winner alone is right on {first}, the baseline alone on {second}: a difference in accuracy of "
            "{difference}, with a 95% interval of {low} to {high} points ({bonett}).",
            first=counted(pairs.only_first, "row"),
            second=counted(pairs.only_second, "row"),
            difference=points(pairs.difference, signed=True),
            low=f"{100 * low:+.2f}".replace("-", "−"),
            high=f"{100 * high:+.2f}".replace("-", "−"),
            bonett=Cite("bonett"),
        ),
        say(
            "If neither were better, a division of these {rows} at least so uneven would come up with a probability of "
            "{p} (exact two-sided test, {mcnemar}).",
            rows=f"{whole(told_apart)} rows",
            p="less than 0.001" if p < 0.001 else f"{p:.3f}",
            mcnemar=Cite("mcnemar"),
        )
        if told_apart
        else say("No row tells them apart, so nothing speaks for either."),
        _reading(pairs, p),
    )


def _reading(pairs: Pairs, p: float) -> Text:
    if p >= SIGNIFICANT:
        return say("That is well within chance: these rows do not show that one is better than the other.")
    better = "winner" if pairs.difference > 0 else "baseline"
    return say("Chance does not explain it: on rows like these, the {better} is the better classifier.", better=better)


def _guessing(dossier: Dossier) -> Text | None:
    """A baseline that has learnt nothing is easily beaten."""
    answers = dossier.answers.baseline
    assert answers is not None
    guess = 1 / len(classes(answers))
    right = int((answers["label"] == answers["predicted"]).sum())
    if accuracy_interval(right, len(answers))[0] > guess:
        return None
    return say("The baseline is not better than a guess, which is right on {guess}.", guess=percent(guess, 0))


def _limits(dossier: Dossier, pairs: Pairs) -> Text:
    return say(
        "The test takes both classifiers as given. The winner was chosen among {tried} by these very rows, so it "
        "looks better on them than on new ones{lead}.",
        tried=counted(dossier.count("COMPLETE"), "finished trial"),
        lead="; the smaller its lead, the more this counts" if pairs.difference > 0 else "",
    )
