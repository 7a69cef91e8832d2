"""What a sweep with workers shows on a terminal: it trains nothing itself, and reads how trials get on in the study."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import optuna
from optuna.trial import FrozenTrial, TrialState

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.reporting.progress import Progress
from agnews_lora.search.claims import is_done
from agnews_lora.search.confirmation import find_round
from agnews_lora.search.lines import STORAGE_FAULTS
from agnews_lora.search.standings import name_of
from agnews_lora.search.study import BASELINE, ENDED, REASON, SPEC
from agnews_lora.training.interface import EvalPoint


@dataclass
class _View:
    """One study on one screen. shown: the last evaluated step of each trial on it. ended: trials not to show."""

    study: optuna.Study
    screen: Progress
    total_steps: int
    shown: dict[str, int] = field(default_factory=dict)
    ended: set[int] = field(init=False)

    def __post_init__(self) -> None:
        self.ended = {trial.number for trial in self.study.get_trials(deepcopy=False, states=ENDED)}

    def look(self) -> None:
        for trial in self.study.get_trials(deepcopy=False):
            if trial.number not in self.ended and SPEC in trial.user_attrs:
                self._look_at(trial)

    def _look_at(self, trial: FrozenTrial) -> None:
        name, is_over = name_of(trial), trial.state in ENDED
        if name not in self.shown and (trial.state is TrialState.RUNNING or is_over):
            spec = TrialSpec(**trial.user_attrs[SPEC])
            label = f"{spec}{' (baseline)' if trial.user_attrs.get(BASELINE) else ''}"
            self.screen.trial_started(name, label, self.total_steps)
            # Of what it reported before, the newest: the time it has left is told from here on.
            self.shown[name] = max(sorted(trial.intermediate_values)[:-1], default=-1)
        if name not in self.shown:
            return
        values = trial.intermediate_values
        for step in sorted(values):
            if step > self.shown[name]:
                self.shown[name] = step
                self.screen.evaluated([_point(name, step, values[step])])
        if is_over:
            accuracy = trial.value if trial.state is TrialState.COMPLETE else values[max(values)] if values else None
            self.ended.add(trial.number)
            self.screen.trial_ended(name, trial.state.name, accuracy, trial.user_attrs.get(REASON))
        elif trial.state is TrialState.WAITING:  # given back
            del self.shown[name]
            self.screen.trial_ended(name, "INTERRUPTED", None, "goes on from its last checkpoint")


@dataclass
class Watch:
    """Shows the trials of a study, whoever trains them, and then those of its confirmation round.

    Use it as a context manager. screen: for a study, what shows it. total_steps: training steps of a trial that is not
    pruned.
    """

    study: optuna.Study
    screen: Callable[[optuna.Study], Progress]
    total_steps: int
    _view: _View = field(init=False)
    _confirms: bool = field(default=False, init=False)

    def __enter__(self) -> Self:
        self._open(self.study)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.look()  # what ended last
        self._view.screen.__exit__(kind, error, trace)

    def look(self) -> None:
        """Bring the screen up to the study, if that answers."""
        try:
            self._view.look()
            if not self._confirms and is_done(self.study) and (repeated := find_round(self.study)) is not None:
                self._view.screen.__exit__(None, None, None)
                self._confirms = True
                self._open(repeated)
                self._view.look()
        except STORAGE_FAULTS:
            return

    def say(self, text: str) -> None:
        """Show a line of its own."""
        self._view.screen.message(text)

    @property
    def is_live(self) -> bool:
        """Whether the terminal belongs to the screen, and nobody else may write to it."""
        return self._view.screen.mode == "live"

    def _open(self, study: optuna.Study) -> None:
        self._view = _View(study, self.screen(study).__enter__(), self.total_steps)


def _point(trial: str, step: int, accuracy: float) -> EvalPoint:
    nan = float("nan")
    return EvalPoint(trial, step, accuracy, macro_f1=nan, loss=nan, rows=0, final=False, timestamp=0)
