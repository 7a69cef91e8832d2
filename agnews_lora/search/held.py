"""A trial that this process holds: what it has reported, and what of that the study and its run have."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol

import optuna
from optuna.trial import TrialState

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.search import study as study_keys
from agnews_lora.search.trial_log import End, Journal, Point
from agnews_lora.training.interface import EvalPoint, TrainPoint

MAX_WAITING_POINTS: Final = 200  # training points go to the run with the next evaluation, or when so many wait


class Tracker(Protocol):
    """Where runs are recorded. Each call may raise StorageError, and may then be made again from its beginning."""

    def start_trial(self, trial: str, spec: TrialSpec, facts: dict[str, Any], run_id: str | None) -> str:
        """Open the trial's run, or open it again, and give its id."""
        ...

    def log_points(self, trial: str, points: Sequence[TrainPoint | EvalPoint]) -> None: ...

    def finish_trial(self, trial: str, end: End) -> None: ...

    def keep_checkpoint(self, trial: str, checkpoint: Path) -> None:
        """Keep a checkpoint with the run, where another machine could not come by it otherwise."""
        ...

    def fetch_checkpoints(self, trial: str, folder: Path) -> None:
        """Put what was kept into a folder."""
        ...


class Screen(Protocol):
    """Where progress is shown."""

    def trial_started(self, trial: str, label: str, total_steps: int) -> None: ...

    def logged(self, points: Sequence[TrainPoint]) -> None: ...

    def evaluated(self, points: Sequence[EvalPoint]) -> None: ...

    def trial_ended(self, trial: str, state: str, accuracy: float | None, reason: str | None) -> None: ...

    def message(self, text: str) -> None: ...


@dataclass
class Held:
    """A claimed trial, and how far its study and its run are behind its journal.

    spec: None where it has no configuration that could be trained. fault: why it is not to be trained. attempts: that
    began since its last new checkpoint, this one included. logged, reported: points of the journal that the run and the
    study have. opened, closed: its run.
    """

    name: str
    trial: optuna.Trial
    baseline: bool
    spec: TrialSpec | None = None
    fault: End | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    attempts: int = 1
    checkpoint_step: int = 0
    logged: int = 0
    reported: int = 0
    opened: bool = False
    closed: bool = False
    journal: Journal = field(init=False)

    @property
    def accuracy(self) -> float | None:
        """The last one that was measured."""
        return next((point.accuracy for point in reversed(self.journal.points) if isinstance(point, EvalPoint)), None)

    # The run

    @property
    def run_is_behind(self) -> bool:
        """Whether the run lacks something that it should have by now."""
        if self.spec is None:  # no run: it has no configuration to show
            return False
        waiting = self.journal.points[self.logged :]
        due = len(waiting) >= MAX_WAITING_POINTS or any(isinstance(point, EvalPoint) for point in waiting)
        return not self.opened or due or (self.journal.end is not None and not self.closed)

    def to_run(self, tracker: Tracker) -> None:
        """Bring the run up to the journal."""
        assert self.spec is not None
        if not self.opened:
            known = self.trial.user_attrs.get(study_keys.RUN_ID)
            self.run_id = tracker.start_trial(self.name, self.spec, self.facts, known)
            self.opened = True
        waiting: list[Point] = self.journal.points[self.logged :]
        if waiting:
            tracker.log_points(self.name, waiting)
            self.logged += len(waiting)
        if self.journal.end is not None and not self.closed:
            tracker.finish_trial(self.name, self.journal.end)
            self.closed = True

    # The study

    @property
    def study_is_behind(self) -> bool:
        """Whether the study lacks something that it should have by now."""
        waiting = self.journal.points[self.reported :]
        return any(isinstance(point, EvalPoint) for point in waiting) or bool(self._new_attributes())

    def to_study(self) -> None:
        """Bring the study up to the journal."""
        for key, value in self._new_attributes().items():
            self.trial.set_user_attr(key, value)
        for point in self.journal.points[self.reported :]:
            if isinstance(point, EvalPoint):
                self.trial.report(point.accuracy, point.step)
            self.reported += 1

    def _new_attributes(self) -> dict[str, Any]:
        known = self.trial.user_attrs
        present: dict[str, Any] = {}
        if self.checkpoint_step > known.get(study_keys.CHECKPOINT, 0):
            present[study_keys.ATTEMPTS] = self.attempts
        if self.checkpoint_step != known.get(study_keys.CHECKPOINT, 0):
            present[study_keys.CHECKPOINT] = self.checkpoint_step
        if self.run_id is not None:
            present[study_keys.RUN_ID] = self.run_id
        return {key: value for key, value in present.items() if known.get(key) != value}

    def is_told(self, study: optuna.Study) -> bool:
        """Whether the study knows how the trial ended."""
        return study._storage.get_trial(self.trial._trial_id).state.is_finished()

    def tell(self, study: optuna.Study) -> None:
        """Tell the study how the trial ended, unless it knows: an answer may have been lost on the way."""
        end = self.journal.end
        assert end is not None
        if self.is_told(study):
            return
        if end.reason is not None:
            self.trial.set_user_attr(study_keys.REASON, end.reason)
        if end.state != "COMPLETE":
            state = TrialState.PRUNED if end.state == "PRUNED" else TrialState.FAIL
            study.tell(self.trial, state=state, skip_if_finished=True)
            return
        assert end.result is not None and end.result.final is not None
        self.trial.set_user_attr(study_keys.LOSS, end.result.final.loss)
        self.trial.set_user_attr(study_keys.MACRO_F1, end.result.final.macro_f1)
        study.tell(self.trial, end.result.final.accuracy, state=TrialState.COMPLETE, skip_if_finished=True)
