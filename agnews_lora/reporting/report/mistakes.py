"""Error analysis: where the winner is wrong, how it confuses the classes, and whether it knows."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from agnews_lora.reporting.report import gallery
from agnews_lora.reporting.report.document import (
    Block,
    Cite,
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
from agnews_lora.reporting.report.wording import counted, one_line, percent, points, whole
from agnews_lora.reporting.winner import classes, confusion, expected_calibration_error, reliability

LONGEST_TEXT = 220  # characters of a row that are shown
AS_SURE = 0.01  # a smaller gap between confidence and accuracy is not worth a word
SHOWN = 15  # with texts of that length, they fit a page


@dataclass(frozen=True)
class ClassScore:
    """Precision, recall and F1 of one class (0 where it was never predicted, or has no row), and its rows."""

    name: str
    precision: float
    recall: float
    f1: float
    num_rows: int


def class_scores(predictions: pd.DataFrame) -> list[ClassScore]:
    """The scores of every class, in the model's order."""
    counts = confusion(predictions)
    scores = []
    for index, name in enumerate(classes(predictions)):
        right, predicted, labelled = counts[index, index], counts[:, index].sum(), counts[index].sum()
        precision = float(right / predicted) if predicted else 0.0
        recall = float(right / labelled) if labelled else 0.0
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        scores.append(ClassScore(name, precision, recall, f1, int(labelled)))
    return scores


def errors(dossier: Dossier) -> Section | None:
    """None where neither the winner's answers nor its mistakes were kept."""
    blocks: list[Block] = []
    predictions = dossier.answers.winner
    if predictions is not None and not predictions.empty:
        blocks += [Paragraph(_overview(predictions)), _by_class(predictions)]
        blocks += gallery.pictured(dossier, gallery.CONFUSION)
        blocks.append(Paragraph(_sureness(predictions)))
        blocks += gallery.pictured(dossier, gallery.CALIBRATION)
    if dossier.answers.mistakes is not None and not dossier.answers.mistakes.empty:
        blocks += [Paragraph(_surest_intro(dossier)), _surest(dossier.answers.mistakes)]
    return Section("Error analysis", tuple(blocks)) if blocks else None


def _overview(predictions: pd.DataFrame) -> Text:
    scores, counts = class_scores(predictions), confusion(predictions)
    names = classes(predictions)
    wrong = int(counts.sum() - np.trace(counts))
    best, worst = max(scores, key=lambda each: each.f1), min(scores, key=lambda each: each.f1)
    off = counts.copy()
    np.fill_diagonal(off, 0)
    label, predicted = np.unravel_index(int(off.argmax()), off.shape)
    return sentences(
        say(
            "The exported adapter, loaded anew and run in full precision, is wrong on {wrong} of {rows} validation "
            "rows ({share}).",
            wrong=whole(wrong),
            rows=whole(len(predictions)),
            share=percent(wrong / len(predictions)),
        ),
        say(
            "It is best at {best} (F1 {high}) and worst at {worst} (F1 {low}; {table}).",
            best=best.name,
            high=percent(best.f1),
            worst=worst.name,
            low=percent(worst.f1),
            table=Ref("classes"),
        )
        if best.f1 > worst.f1
        else say("{table} has the scores of each class.", table=Ref("classes")),
        say(
            "Its commonest mistake is to take {label} for {predicted} ({count}).",
            label=names[int(label)],
            predicted=names[int(predicted)],
            count=counted(int(off.max()), "row"),
        )
        if wrong
        else None,
    )


def _by_class(predictions: pd.DataFrame) -> Table:
    scores = class_scores(predictions)
    rows: list[tuple[Text, ...]] = [
        (
            (each.name,),
            (percent(each.precision),),
            (percent(each.recall),),
            (percent(each.f1),),
            (whole(each.num_rows),),
        )
        for each in scores
    ]
    means = [float(np.mean([getattr(each, name) for each in scores])) for name in ("precision", "recall", "f1")]
    rows.append((("Mean of the classes",), *((percent(mean),) for mean in means), (whole(len(predictions)),)))
    return Table(
        "classes",
        say(
            "The winner by class. Precision: how many of the rows it gives this label have it. Recall: how many of "
            "those that have it get it. F1: their harmonic mean."
        ),
        (
            Column("class"),
            Column("precision", "right"),
            Column("recall", "right"),
            Column("F1", "right"),
            Column("rows", "right"),
        ),
        tuple(rows),
        strong=(len(rows) - 1,),
    )


def _sureness(predictions: pd.DataFrame) -> Text:
    bins = reliability(predictions)
    confidence = float((bins["confidence"] * bins["count"]).sum() / bins["count"].sum())
    accuracy = float((predictions["label"] == predictions["predicted"]).mean())
    gap = confidence - accuracy
    tendency = f"too sure of itself by {points(gap)}" if gap > 0 else f"less sure than it could be, by {points(-gap)}"
    return sentences(
        say(
            "On average it gives its answer a probability of {confidence}, and is right on {accuracy}: it is "
            "{tendency}.",
            confidence=percent(confidence),
            accuracy=percent(accuracy),
            tendency="about as sure as it is right" if abs(gap) < AS_SURE else tendency,
        ),
        say(
            "Its expected calibration error over ten bins is {error} ({guo}).",
            error=percent(expected_calibration_error(bins)),
            guo=Cite("guo"),
        ),
    )


def _surest_intro(dossier: Dossier) -> Text:
    ceiling = None
    if dossier.bound is not None:
        ceiling = say(
            "Some of them cannot be had: a story of two topics may carry the label of the one it tells second."
        )
    return sentences(
        say("{table} has the mistakes that the winner is surest of.", table=Ref("surest")),
        ceiling,
    )


def _surest(mistakes: pd.DataFrame) -> Table:
    return Table(
        "surest",
        say("The mistakes that the winner is surest of, the surest first. Row: in the validation split, from 0."),
        (
            Column("row", "right"),
            Column("label"),
            Column("predicted"),
            Column("sure", "right"),
            Column("text", wide=True),
        ),
        tuple(
            (
                (str(row.row),),
                (str(row.label),),
                (str(row.predicted),),
                (percent(float(row.confidence), 1),),
                (one_line(row.text, LONGEST_TEXT),),
            )
            for row in mistakes.head(SHOWN).itertuples()
        ),
    )
