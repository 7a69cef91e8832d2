"""The log: what was written is read again, whatever a kill left behind it, and nothing is taken down twice."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agnews_lora.errors import StorageError
from agnews_lora.search.trial_log import FILE, TrialLog
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialEnd, TrialResult

TRAIN = TrainPoint("t0000", 10, 1.25, 1e-3, 1_000)
EVAL = EvalPoint("t0000", 10, 0.5, 0.4, 1.1, 50, False, 1_001, "gA==")
RESULT = TrialResult("t0000", 30, 30, replace(EVAL, final=True), None, 5_000, 480, 1.0, 0.5, 1_000)


def test_points_and_the_end_are_read_again(tmp_path: Path) -> None:
    folder = tmp_path / "t0000"
    log = TrialLog(folder)
    log.append([TRAIN, EVAL])
    assert log.points == [TRAIN, EVAL]
    log.finish(TrialEnd("COMPLETE", replace(RESULT, adapter=folder / "adapter")))
    again = TrialLog(folder)
    assert again.points == [TRAIN, EVAL]
    assert again.end == TrialEnd("COMPLETE", replace(RESULT, adapter=folder / "adapter"))


@pytest.mark.parametrize(
    "end", [TrialEnd("PRUNED", replace(RESULT, final=None), "below"), TrialEnd("FAILED", None, "nan", "…")]
)
def test_ends_without_an_adapter(tmp_path: Path, end: TrialEnd) -> None:
    TrialLog(tmp_path).finish(end)
    assert TrialLog(tmp_path).end == end


def test_a_step_is_taken_down_once_by_kind(tmp_path: Path) -> None:
    log = TrialLog(tmp_path)
    log.append([TRAIN])
    later = [replace(TRAIN, loss=9.0, timestamp=2_000), EVAL, replace(TRAIN, step=20)]
    log.append(later)
    assert TrialLog(tmp_path).points == [TRAIN, EVAL, replace(TRAIN, step=20)]


@given(st.integers(0, 600), st.integers(0, 9))
@settings(max_examples=60)
def test_wherever_a_kill_cuts_it_off_what_was_whole_is_there_and_it_goes_on(
    tmp_path_factory: pytest.TempPathFactory, cut: int, garbage: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    points = [replace(TRAIN, step=step) for step in range(1, 7)]
    TrialLog(folder).append(points)
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[:cut] + b"\x00" * garbage)
    whole = content[:cut].count(b"\n")
    log = TrialLog(folder)
    assert log.points == points[:whole]
    log.append(points)
    assert log.points == points
    assert TrialLog(folder).points == points


def test_an_adapter_is_looked_for_in_the_folder_alone(tmp_path: Path) -> None:
    TrialLog(tmp_path).finish(TrialEnd("COMPLETE", replace(RESULT, adapter=tmp_path / "adapter")))
    text = (tmp_path / FILE).read_text().replace('"adapter": "adapter"', '"adapter": "../../elsewhere"')
    (tmp_path / FILE).write_text(text)
    end = TrialLog(tmp_path).end
    assert end is not None and end.result is not None
    assert end.result.adapter == tmp_path / "elsewhere"


def test_a_folder_that_cannot_be_written_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Cannot write the trial log .*trial.jsonl: Not a dir"):
        TrialLog(tmp_path / "file" / "t0000")
    log = TrialLog(tmp_path / "t0000")
    (tmp_path / "t0000" / FILE).mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        log.append([TRAIN])
