"""Stopping and going on: wherever a stop comes, nothing is lost and the numbers are those of an undisturbed trial."""

import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerState

from agnews_lora.adapters.adapter_files import WEIGHTS
from agnews_lora.adapters.spec import Family
from agnews_lora.errors import StorageError
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import TrialPlan
from tests.training.conftest import SETTINGS, SPEC, TRAIN_ROWS, Lab, Recorder, losses, plan, scores, train

# Ten steps, evaluated at 4 and 8 in two batches each and at 10 in four. Dropout draws from the generators at each step.
SHORT = replace(SETTINGS, epochs=1, eval_every=4, eval_batch_size=11, log_every=3, base_dropout=0.1)
STEPS = 10
POLLS_AT_STEP = {3: 4, 4: 5, 10: 15}  # how often was asked when the step had just ended
SPECS = {
    "bert": replace(SPEC, targets="ffn", dropout=0.2),
    "roberta": replace(SPEC, dropout=0.2, head="out_proj"),
}


@pytest.fixture(scope="module")
def undisturbed(labs: dict[Family, Lab], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recorder]:
    folder = tmp_path_factory.mktemp("undisturbed")
    return {family: train(lab, [plan(folder, family, SPECS[family])], SHORT) for family, lab in labs.items()}


def resumed(folder: Path, family: str, stopped: Recorder) -> TrialPlan:
    """The plan that goes on where a stop left the trial."""
    *_, (_, _, checkpoint) = stopped.checkpoints
    assert checkpoint == checkpoints.newest(folder / family)
    return plan(folder, family, SPECS[family], checkpoint=checkpoint)


def sessions(lab: Lab, family: str, folder: Path, stop_at: list[int]) -> Iterator[Recorder]:
    """A trial stopped at these polls, one engine after another, and then left alone."""
    recorder = train(lab, [plan(folder, family, SPECS[family])], SHORT, Recorder(stop_at=stop_at[0]))
    yield recorder
    for poll in [*stop_at[1:], None]:
        recorder = train(lab, [resumed(folder, family, recorder)], SHORT, Recorder(stop_at=poll))
        yield recorder


def require_same(parts: list[Recorder], whole: Recorder) -> None:
    """The sessions together did what the undisturbed trial did: all points and the adapter alike to the last bit."""
    *stopped, last = parts
    at = 0
    for part in stopped:
        assert (part.results, part.failures) == ([], [])
        *evaluated, (_, stop, _) = part.checkpoints
        assert [step for _, step, _ in evaluated] in (
            [s for s in (4, 8, 10) if at < s < stop + more] for more in (0, 1)
        )
        at = stop
    assert scores(point for part in parts for point in part.eval_points) == scores(whole.eval_points)
    [result], [expected] = last.results, whole.results
    assert scores([result.final]) == scores([expected.final])
    assert (result.steps, result.total_steps, result.rows_seen) == (STEPS, STEPS, TRAIN_ROWS)
    assert result.trainable_parameters == expected.trainable_parameters
    got, wanted = load_file(result.adapter / WEIGHTS), load_file(expected.adapter / WEIGHTS)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert losses(point for part in parts for point in part.train_points) == losses(whole.train_points)


def test_the_polls_of_an_undisturbed_trial(undisturbed: dict[str, Recorder]) -> None:
    """Before each trial, after each step and each batch of an evaluation: what the numbers above rest on."""
    assert {recorder.polls for recorder in undisturbed.values()} == {1 + STEPS + 2 + 2 + 4 + 1}


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("poll", range(2, 20))
def test_goes_on_wherever_it_was_stopped(
    labs: dict[Family, Lab], undisturbed: dict[str, Recorder], tmp_path: Path, family: Family, poll: int
) -> None:
    require_same(list(sessions(labs[family], family, tmp_path, [poll])), undisturbed[family])


@pytest.mark.parametrize(
    "stop_at",
    [[4, 4], [6, 2, 2, 3], [16, 2, 3, 5], [2] * 4],
    ids=["twice", "again and again in one evaluation", "again and again in the final one", "after every step"],
)
def test_goes_on_after_several_stops(
    roberta: Lab, undisturbed: dict[str, Recorder], tmp_path: Path, stop_at: list[int]
) -> None:
    parts = list(sessions(roberta, "roberta", tmp_path, stop_at))
    assert len(parts) == len(stop_at) + 1
    require_same(parts, undisturbed["roberta"])


@pytest.mark.parametrize(
    ("poll", "steps"),
    [
        (POLLS_AT_STEP[3], [3]),
        (POLLS_AT_STEP[4], [4]),
        (6, [4, 4]),
        (POLLS_AT_STEP[10], [4, 8, 10]),
        (17, [4, 8, 10, 10]),
    ],
)
def test_a_stop_is_checkpointed_last_and_nothing_else_is_done(
    roberta: Lab, tmp_path: Path, poll: int, steps: list[int]
) -> None:
    """Where it comes inside of an evaluation, the checkpoint before that is reported once more."""
    recorder = train(roberta, [plan(tmp_path, "first"), plan(tmp_path, "second")], SHORT, Recorder(stop_at=poll))
    assert recorder.checkpoints == [("first", step, tmp_path / "first" / f"checkpoint-{step}") for step in steps]
    assert (recorder.results, recorder.failures) == ([], [])
    assert [point.step for point in recorder.train_points] == [step for step in (3, 6, 9, 10) if step <= steps[-1]]
    assert [point.step for point in recorder.eval_points] == [step for step in (4, 8, 10) if step < steps[-1]]
    assert not (tmp_path / "second").exists()


def test_a_stop_before_the_first_trial_starts_none(roberta: Lab, tmp_path: Path) -> None:
    recorder = train(roberta, [plan(tmp_path)], SHORT, Recorder(stop_at=1))
    assert recorder == Recorder(stop_at=1, polls=1)
    assert not list(tmp_path.iterdir())


def test_a_trial_that_is_pruned_as_it_goes_on_ends_at_its_step(roberta: Lab, tmp_path: Path) -> None:
    stopped = train(roberta, [plan(tmp_path, "roberta", SPECS["roberta"])], SHORT, Recorder(stop_at=POLLS_AT_STEP[4]))
    recorder = train(roberta, [resumed(tmp_path, "roberta", stopped)], SHORT, Recorder(prune_at=(4,)))
    [result] = recorder.results
    assert (result.steps, result.final, result.adapter) == (4, None, None)
    assert [point.step for point in recorder.eval_points] == [4]
    whole = train(roberta, [plan(tmp_path / "whole", "roberta", SPECS["roberta"])], SHORT, Recorder(prune_at=(4,)))
    assert [point.step for point in whole.train_points] == [3, 4]
    assert losses([*stopped.train_points, *recorder.train_points]) == losses(whole.train_points)


def test_the_frozen_part_of_the_head_stays_frozen(roberta: Lab, tmp_path: Path) -> None:
    """Wherever it is stopped: as it was drawn, in the checkpoint and in the adapter."""
    drawn = train(roberta, [plan(tmp_path, "still", replace(SPECS["roberta"], learning_rate=0.0))], SHORT).results[0]
    *_, last = sessions(roberta, "roberta", tmp_path, [5, 5])
    dense = "base_model.model.classifier.dense.weight"
    out_proj = "base_model.model.classifier.out_proj.weight"
    start, end = load_file(drawn.adapter / WEIGHTS), load_file(last.results[0].adapter / WEIGHTS)
    assert torch.equal(start[dense], end[dense])
    assert not torch.equal(start[out_proj], end[out_proj])


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_that_could_not_be_written_is_not_reported(
    roberta: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written last cannot be: everything else lies there, and nothing is left of it."""
    seen: list[str] = []

    def full(state: TrainerState, path: str) -> None:
        seen.extend(each.name for each in Path(path).parent.iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainerState, "save_to_json", full)
    recorder = Recorder(stop_at=POLLS_AT_STEP[3])
    with pytest.raises(StorageError, match=r"of t0000 at step 3 cannot be written .*\(No space left on device\)"):
        train(roberta, [plan(tmp_path)], SHORT, recorder)
    assert (recorder.checkpoints, recorder.failures) == ([], [])
    assert "optimizer.pt" in seen
    assert not list((tmp_path / "t0000").iterdir())


def test_what_a_killed_process_left_is_written_over(
    roberta: Lab, undisturbed: dict[str, Recorder], tmp_path: Path
) -> None:
    for left in ("checkpoint-3", "checkpoint.partial/checkpoint-3"):
        (tmp_path / "roberta" / left).mkdir(parents=True)
        for name in (WEIGHTS, "optimizer.pt", "rng_state.pth", "left"):
            (tmp_path / "roberta" / left / name).write_bytes(b"half")
    require_same(list(sessions(roberta, "roberta", tmp_path, [POLLS_AT_STEP[3]])), undisturbed["roberta"])


class Bomb:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_code_in_a_checkpoint_is_not_run(roberta: Lab, tmp_path: Path, name: str) -> None:
    stopped = train(roberta, [plan(tmp_path)], SHORT, Recorder(stop_at=POLLS_AT_STEP[3]))
    [(trial, _, checkpoint)] = stopped.checkpoints
    assert (checkpoint / name).is_file()
    torch.save(Bomb(tmp_path / "boom"), checkpoint / name)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(roberta, [plan(tmp_path, trial, checkpoint=checkpoint)], SHORT)
    assert not (tmp_path / "boom").exists()
