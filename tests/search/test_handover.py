"""What a machine leaves with a trial's run, so that another can go on: a checkpoint, and all points before it."""

from pathlib import Path

import pytest

from agnews_lora.errors import StoreAway
from agnews_lora.search import lines
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import EvalPoint, TrainPoint
from tests.search.scripted import EVAL_EVERY, LOG_EVERY, RecordingTracker, ScriptedEngine, Session


class KeepingTracker(RecordingTracker):
    """Notes what the run and the study have of a trial whenever a checkpoint of it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.session: Session
        self.away = False
        self.kept: dict[int, tuple[list[int], list[int], list[int]]] = {}

    def log_points(self, trial: str, points: object) -> None:
        if self.away:
            raise StoreAway("the run store is away")
        super().log_points(trial, points)  # type: ignore[arg-type]

    def keep_checkpoint(self, trial: str, checkpoint: Path) -> None:
        points = self.trials[trial].points
        reported = self.session.study.trials[int(trial[1:])].intermediate_values
        self.kept[checkpoints.step_of(checkpoint)] = (
            [point.step for point in points if isinstance(point, TrainPoint)],
            [point.step for point in points if isinstance(point, EvalPoint)],
            sorted(reported),
        )


def test_who_goes_on_elsewhere_finds_every_point_up_to_the_checkpoint(tmp_path: Path) -> None:
    tracker = KeepingTracker()
    tracker.session = Session(tmp_path, trials=1, tracker=tracker)
    tracker.session.run()
    assert sorted(tracker.kept) == [10, 20, 30]
    require_all_before(tracker)


def test_nothing_is_kept_that_is_ahead_of_a_run_which_cannot_take_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "RETRY_SECONDS", 0.0)
    tracker = KeepingTracker()

    def away() -> None:
        tracker.away = True

    def back() -> None:
        tracker.away = False

    engine = ScriptedEngine(script={("t0000", 8): away, ("t0000", 25): back})
    tracker.session = Session(tmp_path, trials=1, tracker=tracker, engine=engine)
    tracker.session.run()
    assert sorted(tracker.kept) == [30]
    require_all_before(tracker)


def require_all_before(tracker: KeepingTracker) -> None:
    """The evaluation of a checkpoint's own step comes after it, and is made again by who goes on from it."""
    for step, (trained, evaluated, reported) in tracker.kept.items():
        assert trained == list(range(LOG_EVERY, step + 1, LOG_EVERY))
        assert evaluated == reported == list(range(EVAL_EVERY, step, EVAL_EVERY))
