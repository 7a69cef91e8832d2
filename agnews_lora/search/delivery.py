"""What is delivered to the stores, and when: the study and the runs of the trials that this process holds."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError

from agnews_lora.errors import StorageError
from agnews_lora.search import study as study_keys
from agnews_lora.search.claims import give_back
from agnews_lora.search.held import Held, Screen, Tracker
from agnews_lora.search.leases import Leases
from agnews_lora.search.lines import Line
from agnews_lora.search.trial_log import End, FolderGone, Journal, Point


@dataclass
class Deliveries:
    """Brings study and tracker up to the journals of the held trials, now or when they answer again.

    folder: where each trial's work folder lies. patience: seconds that a store may be away. held: by trial.
    """

    study: optuna.Study
    leases: Leases
    tracker: Tracker
    screen: Screen
    folder: Path
    patience: float
    held: dict[str, Held] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.storage = Line("the studies' storage", self.patience)
        self.runs = Line("the run store", self.patience)

    @property
    def loss(self) -> StorageError | None:
        """What to tell the user once a store is lost."""
        return self.storage.loss or self.runs.loss

    def admit(self, held: Held) -> None:
        """Hold a trial from now on, with what an earlier process left of its journal."""
        held.journal = Journal(self.folder / held.name)
        self.held[held.name] = held

    def note(self, points: Sequence[Point]) -> None:
        """Write points down, each in its trial's journal, and deliver what is due."""
        for point in points:
            with self._unless_taken(point.trial):
                self.held[point.trial].journal.add([point])
        self.catch_up()

    def finish(self, name: str, end: End) -> None:
        """Write down how a trial ended, and deliver it."""
        held = self.held[name]
        with self._unless_taken(name):
            held.journal.finish(end)
        self.deliver(held)

    def keep_checkpoint(self, held: Held, path: Path) -> None:
        """Deliver that there is a checkpoint, and itself once the study has all that came before it."""
        self.deliver(held)
        if held.opened and not held.study_is_behind and self._is_mine(held):
            self.runs.deliver(partial(self._keep, held, path))

    def _keep(self, held: Held, path: Path) -> None:
        """Whoever goes on from it elsewhere has no points before it but the stores' own."""
        held.to_run(self.tracker)
        self.tracker.keep_checkpoint(held.name, path)

    def fetch_checkpoints(self, held: Held) -> None:
        """Get what the trial's run has of checkpoints into its folder, if the store answers."""
        if held.opened:
            self.runs.deliver(partial(self.tracker.fetch_checkpoints, held.name, self.folder / held.name))

    def catch_up(self) -> None:
        """Deliver whatever is due, of all trials."""
        for held in list(self.held.values()):
            self.deliver(held)

    def deliver(self, held: Held) -> None:
        """Bring run and study up to the trial's journal; once it has ended and both know all, the trial is told.

        While this process cannot be sure that the trial is still its own, nothing is: somebody else may go on with it.
        """
        if not self._is_mine(held):
            return
        with self._unless_taken(held.name):
            if held.run_is_behind:
                self.runs.deliver(partial(held.to_run, self.tracker))
            if held.study_is_behind:
                self.storage.deliver(held.to_study)
            end, is_behind = held.journal.end, held.run_is_behind or held.study_is_behind
            if end and not is_behind and self.storage.deliver(partial(self._settle, held)):
                self._drop(held, end)

    @contextmanager
    def _unless_taken(self, name: str) -> Iterator[None]:
        """A context that notices when somebody else has taken a trial over and ended it: this process was away."""
        try:
            yield
        except (UpdateFinishedTrialError, FolderGone):
            self.leases.lose(name)

    def _is_mine(self, held: Held) -> bool:
        return self.leases.sure() and held.name not in self.leases.lost

    def _settle(self, held: Held) -> None:
        held.tell(self.study)
        self.leases.release(held.name)

    def _drop(self, held: Held, end: End) -> None:
        del self.held[held.name]
        shutil.rmtree(self.folder / held.name, ignore_errors=True)  # what is kept of an ended trial is in its run
        state = "FAIL" if end.state == "FAILED" else end.state
        self.screen.trial_ended(held.name, state, held.accuracy, end.reason)

    def close(self) -> None:
        """Give back to the study what did not end, to go on from its checkpoint, and close its runs.

        A store that is known to be away is not waited for: the next start delivers what it lacks.
        """
        self.storage.deliver(self.leases.beat)
        for name in self.leases.lost:
            self.leases.forget(name)
            if held := self.held.pop(name, None):
                if self.storage.ask(partial(held.is_told, self.study), False):
                    shutil.rmtree(self.folder / name, ignore_errors=True)  # the engine has written it anew
                self.screen.trial_ended(name, "INTERRUPTED", None, "another process goes on with it: this one was away")
        try:
            self.catch_up()
        finally:
            for held in list(self.held.values()):
                self._let_go(held)

    def _let_go(self, held: Held) -> None:
        """Close the run of a trial that did not end, then give the trial back: the next one opens the run again."""
        step = held.checkpoint_step
        reason = f"goes on from {f'checkpoint-{step}' if step else 'its first step'} at the next start"
        try:
            if held.opened and held.journal.end is None and self._is_mine(held):
                end = End("INTERRUPTED", reason=f"stopped; {reason}")
                self.runs.deliver(partial(self.tracker.finish_trial, held.name, end))
        finally:
            with self._unless_taken(held.name):
                self.storage.deliver(partial(self._put_back, held))
            self.screen.trial_ended(held.name, "INTERRUPTED", None, reason)
            del self.held[held.name]

    def _put_back(self, held: Held) -> None:
        if self.leases.holder(held.name) != self.leases.owner:
            return
        held.trial.set_user_attr(study_keys.ATTEMPTS, 0)
        give_back(self.study, held.trial._trial_id)
        self.leases.release(held.name)
