"""A trial that is stopped or killed anywhere resumes from its newest sound checkpoint and ends as if undisturbed."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from agnews_lora.errors import StorageError, TrainingError
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import EvalPoint, TrainSettings, TrialPlan, Verdict
from tests.training import conftest
from tests.training.conftest import SETTINGS, SPEC, Recorder, TinySetup, adapter, plan

# Ten steps, evaluated at 4 and 8 in two batches each and at 10 in four. Both engines draw dropout at each step.
SHORT = replace(SETTINGS, epochs=1, eval_every=4, eval_batch_size=11, log_every=3)
SPECS = {
    "t0000": replace(SPEC, dropout=0.2, head="out_proj"),
    "t0001": replace(SPEC, targets="ffn", rank=1, dropout=0.1),
    "t0002": replace(SPEC, targets="all-linear", rank=5, alpha=20),
}
KINDS = ("logged", "evaluated", "checkpointed", "finished")

both_engines = pytest.mark.parametrize("engine", ["trainer", "multilora"])


class Killed(BaseException):
    """Stands for a kill: nothing after it is done."""


@dataclass
class Mortal(Recorder):
    """Dies at its n-th moment: each report of `kinds` is two, one before it is recorded and one after."""

    dies_at: int | None = None
    kinds: tuple[str, ...] = KINDS
    moments: int = 0

    def _pass(self, kind: str) -> None:
        if kind in self.kinds:
            self.moments += 1
            if self.moments == self.dies_at:
                raise Killed

    def __post_init__(self) -> None:
        for kind in KINDS:
            setattr(self, kind, partial(self._report, kind, getattr(self, kind)))

    def _report(self, kind: str, record: Callable[..., Any], *reported: Any) -> Any:
        self._pass(kind)
        answer = record(*reported)
        self._pass(kind)
        return answer


def train(
    engine: str,
    setup: TinySetup,
    plans: Iterable[TrialPlan],
    recorder: Recorder,
    settings: TrainSettings = SHORT,
    slots: int = 1,
) -> Recorder:
    """Train plans until all have ended, a stop or a kill."""
    own = replace(settings, base_dropout=0.1) if engine == "trainer" else settings
    try:
        return conftest.train(engine, setup, plans, own, recorder, slots)
    except Killed:
        return recorder


def plans(folder: Path, parts: Sequence[Recorder] = (), trials: Iterable[str] = ("t0000",)) -> list[TrialPlan]:
    """The trials that have not ended, each with its newest sound checkpoint."""
    ended = {result.trial for part in parts for result in part.results}
    return [
        plan(folder, trial, SPECS[trial], checkpoint=checkpoints.newest(folder / trial))
        for trial in trials
        if trial not in ended
    ]


def require_same(parts: Sequence[Recorder], whole: Recorder, tolerance: float = 0.0) -> None:
    """All parts together are the undisturbed trials, to the last bit or within the tolerance."""
    assert not any(part.failures for part in parts)
    for kind in ("train_points", "eval_points"):
        expected = {(point.trial, point.step): replace(point, timestamp=0) for point in getattr(whole, kind)}
        seen = set()
        for point in (point for part in parts for point in getattr(part, kind)):
            wanted = expected[point.trial, point.step]
            assert point.loss == pytest.approx(wanted.loss, rel=tolerance, abs=0)
            assert replace(point, timestamp=0, loss=wanted.loss) == wanted
            seen.add((point.trial, point.step))
        assert seen == expected.keys(), "a point was lost"
    ends = {result.trial: (result, part) for part in parts for result in part.results}
    assert ends.keys() == {result.trial for result in whole.results}
    for wanted in whole.results:
        got, part = ends[wanted.trial]
        for name in ("steps", "total_steps", "rows_seen", "trainable_parameters"):
            assert getattr(got, name) == getattr(wanted, name)
        assert (got.final is None, got.adapter is None) == (wanted.final is None, wanted.adapter is None)
        if wanted.final is not None:
            assert got.final.loss == pytest.approx(wanted.final.loss, rel=tolerance, abs=0)
            own, other = adapter(part, wanted.trial), adapter(whole, wanted.trial)
            assert own.keys() == other.keys()
            for tensor in other:
                torch.testing.assert_close(own[tensor], other[tensor], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def undisturbed(roberta: TinySetup, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recorder]:
    """Gives an engine's reports of undisturbed trials, each trained once."""
    known: dict[object, Recorder] = {}

    def of(
        engine: str, settings: TrainSettings = SHORT, prune_at: int = 0, trials: Iterable[str] = ("t0000",)
    ) -> Recorder:
        key = (engine, settings, prune_at, tuple(trials))
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            recorder = Mortal(prune_at=(prune_at,))
            known[key] = train(
                engine, roberta, plans(folder, trials=trials), recorder, settings, slots=len(key[3]) or 1
            )
        return known[key]

    return of


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of all checkpoints in the order in which they are written."""
    steps: list[int] = []
    seal = checkpoints.seal

    def counting(checkpoint: Path) -> None:
        steps.append(checkpoints.step_of(checkpoint))
        seal(checkpoint)

    monkeypatch.setattr(checkpoints, "seal", counting)
    return steps


# Checkpoints and stops -----------------------------------------------------------------------------------------------


@both_engines
def test_each_evaluation_finds_its_checkpoint_written_once(
    roberta: TinySetup, tmp_path: Path, sealed: list[int], engine: str
) -> None:
    folder = tmp_path / "t0000"
    kept: list[list[int]] = []

    class Looking(Recorder):
        def checkpointed(self, trial: str, step: int, path: Path) -> None:
            super().checkpointed(trial, step, path)
            assert path == checkpoints.newest(folder) == checkpoints.folder_of(folder, step)
            assert [point.step for point in self.train_points] == [s for s in (3, 6, 9, 10) if s <= step]

        def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
            verdicts = super().evaluated(points)
            assert [point.step for point in self.eval_points] == [step for _, step, _ in self.checkpoints]
            kept.append(sorted(checkpoints.step_of(path) for path in folder.iterdir()))
            return verdicts

    recorder = train(engine, roberta, plans(tmp_path), Looking())
    assert sealed == [step for _, step, _ in recorder.checkpoints] == [4, 8, 10]
    assert kept == [[4], [4, 8], [8, 10]]
    assert all(checkpoints.is_sound(checkpoints.folder_of(folder, step)) for step in (8, 10))


@both_engines
@pytest.mark.parametrize("poll", [2, 5, 6, 7, 10, 13, 15, 18])
def test_stopped_at_a_step_or_inside_an_evaluation_it_ends_as_undisturbed(
    roberta: TinySetup,
    undisturbed: Callable[..., Recorder],
    tmp_path: Path,
    sealed: list[int],
    engine: str,
    poll: int,
) -> None:
    """The stop writes a checkpoint where there is none, reports it last, and starts no other trial."""
    both = [*plans(tmp_path), plan(tmp_path, "t0001")]
    stopped = train(engine, roberta, both, Recorder(stop_at=poll))
    (trial, step, path) = stopped.checkpoints[-1]
    assert path == checkpoints.newest(tmp_path / trial) == checkpoints.folder_of(tmp_path / trial, step)
    again = step in [point.step for point in stopped.eval_points]  # a second one: that evaluation is not repeated
    assert sealed == [*(each for each in (4, 8, 10) if each < step), *([step] if again else []), step]
    assert not stopped.results and not (tmp_path / "t0001").exists()
    require_same([stopped, train(engine, roberta, plans(tmp_path), Recorder())], undisturbed(engine))


@both_engines
def test_a_stop_before_the_first_trial_starts_none(roberta: TinySetup, tmp_path: Path, engine: str) -> None:
    recorder = train(engine, roberta, plans(tmp_path), Recorder(stop_at=1))
    assert recorder == Recorder(stop_at=1, polls=1)
    assert not list(tmp_path.iterdir())


# Kills ---------------------------------------------------------------------------------------------------------------


@both_engines
@pytest.mark.parametrize("moment", [2, 3, 4, 5, 6, 8, 10, 16, 18, 20, 21, 22])
def test_killed_around_any_report_it_ends_as_undisturbed(
    roberta: TinySetup,
    undisturbed: Callable[..., Recorder],
    tmp_path: Path,
    sealed: list[int],
    engine: str,
    moment: int,
) -> None:
    parts = [train(engine, roberta, plans(tmp_path), Mortal(dies_at=moment))]
    assert parts[0].moments == moment
    parts.append(train(engine, roberta, plans(tmp_path, parts), Mortal()))
    assert sealed == [4, 8, 10], "a checkpoint is not written again where the trial resumes"
    whole = undisturbed(engine)
    assert whole.moments == 22, "the moments above are all there are, or lie between them"  # type: ignore[attr-defined]
    require_same(parts, whole)


@both_engines
@pytest.mark.parametrize("moment", [10, 12, 14, 16])
def test_killed_around_its_pruning_it_keeps_its_last_point(
    roberta: TinySetup, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, moment: int
) -> None:
    """From the checkpoint before the pruning to the end."""
    parts = [train(engine, roberta, plans(tmp_path), Mortal(dies_at=moment, prune_at=(8,)))]
    assert parts[0].moments == moment
    parts.append(train(engine, roberta, plans(tmp_path, parts), Mortal(prune_at=(8,))))
    whole = undisturbed(engine, prune_at=8)
    assert [point.step for point in whole.train_points] == [3, 6, 8]
    assert (whole.results[0].steps, whole.results[0].final) == (8, None)
    require_same(parts, whole)


@both_engines
@pytest.mark.parametrize(("log_every", "eval_every", "life"), [(3, 4, 7), (1, 4, 15), (4, 3, 5), (100, 3, 6)])
def test_killed_again_and_again_no_loss_is_lost_or_counted_twice(
    roberta: TinySetup,
    undisturbed: Callable[..., Recorder],
    tmp_path: Path,
    engine: str,
    log_every: int,
    eval_every: int,
    life: int,
) -> None:
    settings = replace(SHORT, log_every=log_every, eval_every=eval_every)
    parts: list[Recorder] = []
    while todo := plans(tmp_path, parts):
        parts.append(train(engine, roberta, todo, Mortal(dies_at=life), settings))
        assert len(parts) < 9
    assert len(parts) > 1
    require_same(parts, undisturbed(engine, settings))


@both_engines
@pytest.mark.parametrize("moment", [10, 40])
def test_killed_among_others_all_end_as_undisturbed(
    roberta: TinySetup, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, moment: int
) -> None:
    """Three trials in two slots, or one after another."""
    parts: list[Recorder] = []
    for dies_at in (moment, 11, None):
        parts.append(train(engine, roberta, plans(tmp_path, parts, SPECS), Mortal(dies_at=dies_at), slots=2))
    require_same(parts, undisturbed(engine, trials=tuple(SPECS)), tolerance=0.0 if engine == "trainer" else 1e-6)


@both_engines
def test_killed_and_stopped_in_turn_it_ends_as_undisturbed(
    roberta: TinySetup, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str
) -> None:
    parts: list[Recorder] = []
    for fate in ({"stop_at": 4}, {"dies_at": 5}, {"stop_at": 2}, {"dies_at": 7}, {"stop_at": 3}, {}):
        parts.append(train(engine, roberta, plans(tmp_path, parts), Mortal(**fate)))  # type: ignore[arg-type]
    require_same(parts, undisturbed(engine))


# A process that is killed while it writes a checkpoint.
SCRIPT = """
import sys, time, warnings
from pathlib import Path

warnings.simplefilter("ignore")
from agnews_lora.training import checkpoints
from tests.training.conftest import Recorder, tiny_setup
from tests.training.test_resume import plans, train

base, folder = map(Path, sys.argv[1:])
seal = checkpoints.seal


def slow(checkpoint):
    if checkpoints.step_of(checkpoint) == 8:
        print("sealing", flush=True)
        time.sleep(600)
    seal(checkpoint)


checkpoints.seal = slow
train("multilora", tiny_setup(base, folder / "cache"), plans(folder), Recorder())
"""


def test_kill_9_while_a_checkpoint_is_written(
    roberta: TinySetup, undisturbed: Callable[..., Recorder], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(roberta.base.folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sealing\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "t0000").glob("checkpoint*/checkpoint-8/*")), "something of it was written"
    assert checkpoints.newest(tmp_path / "t0000") == tmp_path / "t0000" / "checkpoint-4"
    whole = undisturbed("multilora")
    before = Recorder(
        train_points=[point for point in whole.train_points if point.step <= 4],
        eval_points=[point for point in whole.eval_points if point.step < 4],
    )
    require_same([before, train("multilora", roberta, plans(tmp_path), Recorder())], whole)


# Damage --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["trainer", "multilora"])
def killed_at_8(
    request: pytest.FixtureRequest, roberta: TinySetup, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Recorder, Path]:
    """(engine, its reports, its folder) of a trial killed after the checkpoint of step 8."""
    folder = tmp_path_factory.mktemp("killed")
    recorder = train(request.param, roberta, plans(folder), Mortal(dies_at=3, kinds=("evaluated",)))
    assert checkpoints.newest(folder / "t0000") == folder / "t0000" / "checkpoint-8"
    return request.param, recorder, folder


@pytest.mark.parametrize(("damaged", "left"), [((8,), 4), ((4, 8), None)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_or_the_start(
    roberta: TinySetup,
    undisturbed: Callable[..., Recorder],
    killed_at_8: tuple[str, Recorder, Path],
    tmp_path: Path,
    damaged: Sequence[int],
    left: int | None,
) -> None:
    engine, before, killed_folder = killed_at_8
    shutil.copytree(killed_folder, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "t0000"
    for step in damaged:
        largest = max((folder / f"checkpoint-{step}").iterdir(), key=lambda path: path.stat().st_size)
        whole = bytearray(largest.read_bytes())
        whole[len(whole) // 2] ^= 1
        largest.write_bytes(whole)
    [onward] = plans(tmp_path)
    assert onward.checkpoint == (folder / f"checkpoint-{left}" if left else None)
    require_same([before, train(engine, roberta, [onward], Recorder())], undisturbed(engine))
    assert all(checkpoints.is_sound(folder / f"checkpoint-{step}") for step in (8, 10))


def test_a_checkpoint_of_the_other_engine_is_refused(
    roberta: TinySetup, killed_at_8: tuple[str, Recorder, Path], tmp_path: Path
) -> None:
    engine, _, killed_folder = killed_at_8
    [other] = {"trainer", "multilora"} - {engine}
    foreign = plan(tmp_path, spec=SPECS["t0000"], checkpoint=killed_folder / "t0000" / "checkpoint-8")
    recorder = train(other, roberta, [foreign, plan(tmp_path, "t0001")], Recorder())
    [(trial, error)] = recorder.failures
    assert trial == "t0000"
    assert isinstance(error, TrainingError)
    assert f"no sound checkpoint of engine {other}" in str(error)
    assert [result.trial for result in recorder.results] == ["t0001"]


# Storage that fails is no trial's fault ------------------------------------------------------------------------------


@both_engines
def test_a_checkpoint_that_cannot_be_written_fails_no_trial(
    roberta: TinySetup,
    undisturbed: Callable[..., Recorder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    engine: str,
) -> None:
    whole, seal, first = undisturbed(engine), checkpoints.seal, Recorder()

    def full(checkpoint: Path) -> None:
        if checkpoints.step_of(checkpoint) == 8:
            raise OSError(28, "No space left on device")
        seal(checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "seal", full)
        with pytest.raises(StorageError, match=r"t0000 at step 8 .*No space left on device"):
            train(engine, roberta, plans(tmp_path), first)
    assert first.failures == []
    assert [step for _, step, _ in first.checkpoints] == [4]
    assert [path.name for path in (tmp_path / "t0000").iterdir()] == ["checkpoint-4"]
    require_same([first, train(engine, roberta, plans(tmp_path), Recorder())], whole)


@both_engines
@pytest.mark.parametrize("call", [*KINDS, "stop_requested"])
def test_a_store_that_fails_in_the_observer_fails_no_trial(
    roberta: TinySetup, tmp_path: Path, engine: str, call: str
) -> None:
    recorder = Recorder()

    def lost(*_: object) -> None:
        raise StorageError("the study is gone")

    setattr(recorder, call, lost)
    with pytest.raises(StorageError, match="the study is gone"):
        train(engine, roberta, plans(tmp_path, trials=SPECS), recorder, slots=2)
    assert recorder.failures == []
