"""The figures of a report: which there are, what each shows, and what is to be seen in it.

A figure is in the report where its file is there, and in no other case.
"""

from dataclasses import dataclass
from typing import Final

from agnews_lora.reporting.report.document import Cite, Code, Figure, Paragraph, Picture, Ref, Section, Text, say
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.report.wording import percent, whole

HISTORY: Final = "optimization_history.png"
SIZE: Final = "accuracy_against_parameters.png"
CURVES: Final = "learning_curves.png"
PARALLEL: Final = "parallel_coordinates.png"
IMPORTANCE: Final = "parameter_importance.png"
SLOTS: Final = "slot_occupancy.png"
CONFUSION: Final = "confusion_matrix.png"
CALIBRATION: Final = "calibration.png"
TRAINING: Final = "winner_training.png"

OF_SWEEP: Final = (HISTORY, SIZE, CURVES, PARALLEL, IMPORTANCE, SLOTS, CONFUSION, CALIBRATION)  # on the parent run
DRAWN: Final = (HISTORY, SIZE, CURVES, PARALLEL, CONFUSION, CALIBRATION, TRAINING)  # where it is not there
_SHOWN: Final = (HISTORY, CURVES, SIZE, IMPORTANCE, PARALLEL, SLOTS, TRAINING)
MIN_TRIALS_FOR_IMPORTANCE: Final = 5  # finished, the baseline among them: with fewer, the figure cannot tell
_WIDTHS: Final = {CONFUSION: 0.62, CALIBRATION: 0.7}  # both and the table of classes fit one page


@dataclass(frozen=True)
class _Entry:
    """caption: what to see. alt: what the picture shows."""

    caption: Text
    alt: str


def search(dossier: Dossier) -> Section | None:
    """Figures of the search as a whole, and of the winner's training; None where there is none."""
    few = len(dossier.complete()) < MIN_TRIALS_FOR_IMPORTANCE
    shown = [name for name in _SHOWN if not (few and name == IMPORTANCE)]
    found = [figure for name in shown for figure in pictured(dossier, name)]
    if not found:
        return None
    first, last = Ref(found[0].key), Ref(found[-1].key)
    lead = say("{first} shows the search as a whole.", first=first)
    if len(found) > 1:
        lead = say(
            "{first} to {last} show the search as a whole{winner}.",
            first=first,
            last=last,
            winner=" and, at the end, the training of its best trial" if TRAINING in dossier.pictures else "",
        )
    return Section("The search in figures", (Paragraph(lead), *found))


def pictured(dossier: Dossier, name: str) -> list[Figure]:
    """The figure of a file, where the file is there."""
    if name not in dossier.pictures:
        return []
    entry = _entries(dossier)[name]
    picture = Picture(dossier.pictures[name], entry.alt)
    return [Figure(name.removesuffix(".png"), entry.caption, picture, _WIDTHS.get(name, 0.94))]


def _entries(dossier: Dossier) -> dict[str, _Entry]:
    return _of_study(dossier) | _of_winner(dossier)


def _of_study(dossier: Dossier) -> dict[str, _Entry]:
    bound = f" The dotted line is the best accuracy possible, {percent(dossier.bound)}." if dossier.bound else ""
    return {
        HISTORY: _Entry(
            say(
                "Optimisation history: validation accuracy of every trial in the order they were started, and the best "
                "so far. Crosses are trials that were given up, at their last score; the star is the baseline.{bound}",
                bound=bound,
            ),
            "Validation accuracy of each trial by number, with the best so far as a stepped line.",
        ),
        CURVES: _Entry(
            say(
                "Learning curves of all trials: the best in orange, the baseline dashed; trials that were given up end "
                "in a cross. On the way a subset is scored, at the end the whole split: a small step there may come "
                "from the rows alone."
            ),
            "Validation accuracy of all trials by training step.",
        ),
        SIZE: _Entry(
            say(
                "Accuracy against size: each mark is a trial, coloured by the matrices it adapts, hollow where it was "
                "given up. The grey line is the best accuracy for a size; nothing lies right of the budget, {budget}.",
                budget=whole(dossier.budget),
            ),
            "Validation accuracy of each trial by its number of trainable parameters, with the budget as a line.",
        ),
        IMPORTANCE: _Entry(
            say(
                "What matters: the share of the variance in accuracy among finished trials that each dimension "
                "explains (functional ANOVA, {fanova}). With few trials this is a hint, not a measurement.",
                fanova=Cite("hutter"),
            ),
            "Bars of the importance of each searched dimension.",
        ),
        PARALLEL: _Entry(
            say(
                "Configurations: one line a trial through the searched dimensions, darker where it is more accurate, "
                "the best in orange."
            ),
            "Parallel coordinates of all trials through the searched dimensions and their accuracy.",
        ),
        SLOTS: _Entry(
            say("Slots: which trials trained at the same time, and how many there were at once."),
            "Bars of the time that each trial trained, by slot.",
        ),
    }


def _of_winner(dossier: Dossier) -> dict[str, _Entry]:
    trial = Code(str(dossier.winner))
    return {
        TRAINING: _Entry(
            say(
                "The training of {trial}: validation accuracy (left) and loss (right) by step. The last point is "
                "scored on the whole validation split, those before it on the fixed subset.",
                trial=trial,
            ),
            "Two curves: validation accuracy by step, and training and validation loss by step.",
        ),
        CONFUSION: _Entry(
            say(
                "Confusion matrix of {trial} on the validation split: labels down, predictions across, as counts and "
                "as shares of their label's rows. All that is off the diagonal is wrong.",
                trial=trial,
            ),
            "A matrix of counts, labels against predictions.",
        ),
        CALIBRATION: _Entry(
            say(
                "Calibration of {trial}: how often its answer is right (bars) and how sure it is (orange), by "
                "confidence. Where the orange lies above its bar, it is too sure. The numbers on top count answers.",
                trial=trial,
            ),
            "Bars of accuracy by confidence, with the line on which both are equal.",
        ),
    }
