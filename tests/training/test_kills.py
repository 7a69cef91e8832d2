"""Killed anywhere and started again from the newest sound checkpoint, a trial ends as if nothing had been."""

import itertools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from agnews_lora.adapters.adapter_files import WEIGHTS
from agnews_lora.data.rows import LABELS
from agnews_lora.errors import StorageError, TrainingError
from agnews_lora.training import checkpoints
from agnews_lora.training.hf_trainer import TrainerEngine
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrainSettings, TrialPlan, TrialResult, Verdict
from agnews_lora.training.multilora.engine import MultiLoraEngine
from tests.training.conftest import SETTINGS, SPEC, Lab, Plans, Recorder, plan

ENGINES = ("trainer", "multilora")
# Ten steps, evaluated at 4 and 8 in two batches each and at 10 in four. Both engines draw dropout at each step.
SHORT = replace(SETTINGS, epochs=1, eval_every=4, eval_batch_size=11, log_every=3)
STEPS = 10
# Polls for a stop, which each engine makes in its own places; and each point, evaluation, checkpoint and end, twice.
MOMENTS = {"trainer": 20 + 2 * (4 + 3 + 3 + 1), "multilora": 22 + 2 * (4 + 3 + 3 + 1)}
SPECS = {
    "t0000": replace(SPEC, dropout=0.2),
    "t0001": replace(SPEC, targets="ffn", rank=1, dropout=0.1, head="out_proj"),
    "t0002": replace(SPEC, targets="all-linear", rank=5, alpha=20),
}


class Killed(BaseException):
    """The process is gone: nothing after this is done."""


@dataclass
class Mortal(Recorder):
    """Dies at its n-th moment: before a call is taken down, or after it was. kinds: the calls that count, or all."""

    dies_at: int | None = None
    kinds: tuple[str, ...] = ("logged", "evaluated", "checkpointed", "finished", "stop_requested")
    moments: int = 0

    def _pass(self, kind: str) -> None:
        if kind in self.kinds:
            self.moments += 1
            if self.moments == self.dies_at:
                raise Killed

    def logged(self, points: Sequence[TrainPoint]) -> None:
        self._pass("logged")
        super().logged(points)
        self._pass("logged")

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        self._pass("evaluated")
        verdicts = super().evaluated(points)
        self._pass("evaluated")
        return verdicts

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        self._pass("checkpointed")
        super().checkpointed(trial, step, path)
        self._pass("checkpointed")

    def finished(self, result: TrialResult) -> None:
        self._pass("finished")
        super().finished(result)
        self._pass("finished")

    def stop_requested(self) -> bool:
        self._pass("stop_requested")
        return super().stop_requested()


def train(
    engine: str, lab: Lab, plans: Iterable[TrialPlan], recorder: Recorder, settings: TrainSettings = SHORT
) -> Recorder:
    """What a new engine reports of some plans, until it is done or killed."""
    try:
        if engine == "trainer":
            own = replace(settings, base_dropout=0.1)
            TrainerEngine(lab.base, lab.corpus, own, LABELS).run(Plans(plans), recorder)
        else:
            MultiLoraEngine(lab.base, lab.corpus, settings, LABELS, slots=2).run(Plans(plans), recorder)
    except Killed:
        pass
    return recorder


def plans(folder: Path, parts: Sequence[Recorder] = (), trials: Iterable[str] = ("t0000",)) -> list[TrialPlan]:
    """What is left to train, from the newest sound checkpoints."""
    ended = {result.trial for part in parts for result in part.results}
    return [
        plan(folder, trial, SPECS[trial], checkpoint=checkpoints.newest(folder / trial))
        for trial in trials
        if trial not in ended
    ]


def require_same(engine: str, parts: Sequence[Recorder], whole: Recorder) -> None:
    """All parts together are the undisturbed trials: to the last bit, or within a millionth in engine multilora."""
    tolerance = 0.0 if engine == "trainer" else 1e-6
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
    ends = {result.trial: result for part in parts for result in part.results}
    assert ends.keys() == {result.trial for result in whole.results}
    for wanted in whole.results:
        got = ends[wanted.trial]
        for name in ("steps", "total_steps", "rows_seen", "trainable_parameters"):
            assert getattr(got, name) == getattr(wanted, name)
        assert (got.final is None, got.adapter is None) == (wanted.final is None, wanted.adapter is None)
        if wanted.final is not None:
            assert got.final.loss == pytest.approx(wanted.final.loss, rel=tolerance, abs=0)
            assert replace(got.final, timestamp=0, loss=0.0) == replace(wanted.final, timestamp=0, loss=0.0)
            own, other = load_file(got.adapter / WEIGHTS), load_file(wanted.adapter / WEIGHTS)
            assert own.keys() == other.keys()
            for tensor in other:
                torch.testing.assert_close(own[tensor], other[tensor], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def undisturbed(labs: dict[str, Lab], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recorder]:
    """What an engine reports of trials that nobody disturbs; trained once."""
    known: dict[object, Recorder] = {}

    def of(
        engine: str, settings: TrainSettings = SHORT, prune_at: int = 0, trials: Iterable[str] = ("t0000",)
    ) -> Recorder:
        key = (engine, settings, prune_at, tuple(trials))
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            mortal = Mortal(prune_at=(prune_at,))
            known[key] = train(engine, labs["roberta"], plans(folder, trials=trials), mortal, settings)
        return known[key]

    return of


# Kills ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_moments_of_an_undisturbed_trial(undisturbed: Callable[..., Recorder], engine: str) -> None:
    """What the numbers above rest on."""
    whole, pruned = undisturbed(engine), undisturbed(engine, prune_at=8)
    assert whole.moments == MOMENTS[engine]
    assert [point.step for point in whole.train_points] == [3, 6, 9, 10]
    assert [point.step for point in pruned.train_points] == [3, 6, 8]
    assert (pruned.results[0].steps, pruned.results[0].final) == (8, None)


@pytest.mark.parametrize(
    ("engine", "moment"), [(engine, moment) for engine in ENGINES for moment in range(1, MOMENTS[engine] + 1)]
)
def test_killed_anywhere_it_ends_as_undisturbed(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, moment: int
) -> None:
    parts = [train(engine, roberta, plans(tmp_path), Mortal(dies_at=moment))]
    assert parts[0].moments == moment
    parts.append(train(engine, roberta, plans(tmp_path, parts), Mortal()))
    require_same(engine, parts, undisturbed(engine))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moment", range(5, 17))
def test_killed_around_its_pruning_it_keeps_its_last_point(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, moment: int
) -> None:
    """From the first checkpoint on to the end, without the polls."""
    fate = {"prune_at": (8,), "kinds": ("logged", "checkpointed", "evaluated", "finished")}
    parts = [train(engine, roberta, plans(tmp_path), Mortal(dies_at=moment, **fate))]  # type: ignore[arg-type]
    assert parts[0].moments == moment
    parts.append(train(engine, roberta, plans(tmp_path, parts), Mortal(prune_at=(8,))))
    require_same(engine, parts, undisturbed(engine, prune_at=8))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("log_every", "eval_every"), [(1, 4), (4, 3), (100, 3), (7, 2)])
def test_no_loss_is_lost_or_counted_twice_whatever_is_logged_when(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, log_every: int, eval_every: int
) -> None:
    """Killed before each point and each checkpoint in turn."""
    settings = replace(SHORT, log_every=log_every, eval_every=eval_every)
    whole = undisturbed(engine, settings)
    for moment in itertools.count(1, 2):
        mortal = Mortal(dies_at=moment, kinds=("logged", "checkpointed"))
        parts = [train(engine, roberta, plans(tmp_path / str(moment)), mortal, settings)]
        if parts[0].results:
            break
        parts.append(train(engine, roberta, plans(tmp_path / str(moment), parts), Mortal(), settings))
        require_same(engine, parts, whole)
    assert moment == 1 + 2 * (len(whole.train_points) + len(whole.eval_points))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("life", [13, 17, 23])
def test_killed_again_and_again_it_ends(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, life: int
) -> None:
    parts: list[Recorder] = []
    while todo := plans(tmp_path, parts):
        parts.append(train(engine, roberta, todo, Mortal(dies_at=life)))
        assert len(parts) < 8
    require_same(engine, parts, undisturbed(engine))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("moment", range(4, 100, 6))
def test_killed_among_others_all_end_as_undisturbed(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, moment: int
) -> None:
    """Three trials in two slots, or one after another."""
    parts: list[Recorder] = []
    for dies_at in (moment, 11, 40, None):
        parts.append(train(engine, roberta, plans(tmp_path, parts, SPECS), Mortal(dies_at=dies_at)))
    require_same(engine, parts, undisturbed(engine, trials=tuple(SPECS)))


@pytest.mark.parametrize("engine", ENGINES)
def test_killed_and_stopped_in_turn(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str
) -> None:
    parts: list[Recorder] = []
    for fate in ({"stop_at": 4}, {"dies_at": 9}, {"stop_at": 7}, {"dies_at": 12}, {"stop_at": 3}, {}):
        parts.append(train(engine, roberta, plans(tmp_path, parts), Mortal(**fate)))  # type: ignore[arg-type]
    require_same(engine, parts, undisturbed(engine))


# A real kill: the process is gone while a checkpoint is being written

SCRIPT = """
import sys, time, warnings
from pathlib import Path

warnings.simplefilter("ignore")
from agnews_lora.training import checkpoints
from tests.training.conftest import make_lab
from tests.training.test_kills import Recorder, plans, train

engine, base, folder = sys.argv[1], *map(Path, sys.argv[2:])
seal = checkpoints.seal


def slow(checkpoint):
    if checkpoints.step_of(checkpoint) == 8:
        print("sealing", flush=True)
        time.sleep(600)
    seal(checkpoint)


checkpoints.seal = slow
train(engine, make_lab(base, folder / "cache"), plans(folder), Recorder())
"""


@pytest.mark.parametrize("engine", ENGINES)
def test_kill_9_while_a_checkpoint_is_written(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str
) -> None:
    command = [sys.executable, "-c", SCRIPT, engine, str(roberta.base.folder), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sealing\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "t0000").glob("checkpoint*/checkpoint-8/*")), "something of it was written"
    assert checkpoints.newest(tmp_path / "t0000") == tmp_path / "t0000" / "checkpoint-4"
    recorder = train(engine, roberta, plans(tmp_path), Recorder())
    whole = undisturbed(engine)
    before = Recorder(
        train_points=[point for point in whole.train_points if point.step <= 4],
        eval_points=[point for point in whole.eval_points if point.step < 4],
    )
    require_same(engine, [before, recorder], whole)


# What is written when -------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of all checkpoints that are written, as they are."""
    steps: list[int] = []
    seal = checkpoints.seal

    def counting(checkpoint: Path) -> None:
        steps.append(checkpoints.step_of(checkpoint))
        seal(checkpoint)

    monkeypatch.setattr(checkpoints, "seal", counting)
    return steps


@pytest.mark.parametrize("engine", ENGINES)
def test_each_evaluation_finds_its_checkpoint_written_once(
    roberta: Lab, tmp_path: Path, sealed: list[int], engine: str
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


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stop_writes_what_is_not_written_yet(roberta: Lab, tmp_path: Path, sealed: list[int], engine: str) -> None:
    """Wherever it comes, its trial is reported last, with the newest checkpoint; no step is written for nothing."""
    for poll in itertools.count(2):
        folder, recorder = tmp_path / str(poll), Recorder(stop_at=poll)
        sealed.clear()
        train(engine, roberta, plans(folder), recorder)
        if recorder.results:
            break
        (trial, step, path) = recorder.checkpoints[-1]
        assert path == checkpoints.newest(folder / trial) == checkpoints.folder_of(folder / trial, step)
        evaluated = [point.step for point in recorder.eval_points]
        again = engine == "multilora" and step in evaluated  # that step's evaluation need not be repeated
        assert sealed == [*(each for each in (4, 8, 10) if each < step), *([step] if again else []), step]
    assert poll > 15


@pytest.mark.parametrize("engine", ENGINES)
def test_who_goes_on_at_an_evaluation_does_not_write_again(
    roberta: Lab, tmp_path: Path, sealed: list[int], engine: str
) -> None:
    train(engine, roberta, plans(tmp_path), Mortal(dies_at=1, kinds=("evaluated",)))
    assert sealed == [4]
    train(engine, roberta, plans(tmp_path), Recorder())
    assert sealed == [4, 8, 10]


# Damage ---------------------------------------------------------------------------------------------------------------


def _damage_tensors(checkpoint: Path) -> None:
    largest = max((path for path in checkpoint.iterdir()), key=lambda path: path.stat().st_size)
    whole = bytearray(largest.read_bytes())
    whole[len(whole) // 2] ^= 1
    largest.write_bytes(whole)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit": _damage_tensors,
    "no seal": lambda checkpoint: (checkpoint / checkpoints.SEAL).unlink(),
    "half of it": lambda checkpoint: min(p for p in checkpoint.iterdir() if p.name != checkpoints.SEAL).unlink(),
    "all of it": lambda checkpoint: [path.write_bytes(b"") for path in checkpoint.iterdir()],
    "something beside": lambda checkpoint: (checkpoint / "beside").write_text("it"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str, damage: str
) -> None:
    parts = [train(engine, roberta, plans(tmp_path), Mortal(dies_at=3, kinds=("evaluated",)))]
    folder = tmp_path / "t0000"
    assert checkpoints.newest(folder) == folder / "checkpoint-8"
    DAMAGES[damage](folder / "checkpoint-8")
    [onward] = plans(tmp_path)
    assert onward.checkpoint == folder / "checkpoint-4"
    parts.append(train(engine, roberta, [onward], Recorder()))
    require_same(engine, parts, undisturbed(engine))
    assert all(checkpoints.is_sound(folder / f"checkpoint-{step}") for step in (8, 10))


@pytest.mark.parametrize("engine", ENGINES)
def test_with_no_sound_checkpoint_it_starts_again(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, engine: str
) -> None:
    parts = [train(engine, roberta, plans(tmp_path), Mortal(dies_at=3, kinds=("evaluated",)))]
    for step in (4, 8):
        _damage_tensors(tmp_path / "t0000" / f"checkpoint-{step}")
    [again] = plans(tmp_path)
    assert again.checkpoint is None
    parts.append(train(engine, roberta, [again], Recorder()))
    require_same(engine, parts, undisturbed(engine))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_the_other_engine_is_refused(roberta: Lab, tmp_path: Path, engine: str) -> None:
    [other] = [each for each in ENGINES if each != engine]
    train(other, roberta, plans(tmp_path), Mortal(dies_at=1, kinds=("evaluated",)))
    recorder = train(engine, roberta, [*plans(tmp_path), plan(tmp_path, "t0001")], Recorder())
    [(trial, error)] = recorder.failures
    assert trial == "t0000"
    assert isinstance(error, TrainingError)
    assert f"must be a checkpoint of engine {engine}" in str(error)
    assert [result.trial for result in recorder.results] == ["t0001"]


# Storage that fails is no trial's fault -------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_that_cannot_be_written_fails_no_trial(
    roberta: Lab, undisturbed: Callable[..., Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    seal, first = checkpoints.seal, Recorder()

    def full(checkpoint: Path) -> None:
        if checkpoints.step_of(checkpoint) == 8:
            raise OSError(28, "No space left on device")
        seal(checkpoint)

    monkeypatch.setattr(checkpoints, "seal", full)
    with pytest.raises(StorageError, match=r"t0000 at step 8 cannot be written .* \(No space left on device\); free"):
        train(engine, roberta, plans(tmp_path), first)
    assert first.failures == []
    assert [step for _, step, _ in first.checkpoints] == [4]
    assert [path.name for path in (tmp_path / "t0000").iterdir()] == ["checkpoint-4"]
    monkeypatch.setattr(checkpoints, "seal", seal)
    second = train(engine, roberta, plans(tmp_path), Recorder())
    require_same(engine, [first, second], undisturbed(engine))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("call", ["logged", "evaluated", "checkpointed", "finished", "stop_requested"])
def test_a_store_that_fails_in_the_observer_fails_no_trial(
    roberta: Lab, tmp_path: Path, engine: str, call: str
) -> None:
    recorder = Recorder()

    def lost(*_: object) -> None:
        raise StorageError("the study is gone")

    setattr(recorder, call, lost)
    with pytest.raises(StorageError, match="the study is gone"):
        train(engine, roberta, plans(tmp_path, trials=SPECS), recorder)
    assert recorder.failures == []
