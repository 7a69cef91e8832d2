"""The engine's trials: the same as the reference engine's, independent of their neighbours, and as many as fit."""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agnews_lora.adapters.adapter_files import CONFIG, load_base, load_with_peft
from agnews_lora.adapters.base_models import CONFIG as BASE_CONFIG
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import PRESETS, TrialSpec
from agnews_lora.errors import ConfigError, TrainingError
from agnews_lora.training.checkpoints import newest
from agnews_lora.training.interface import TrainSettings, TrialPlan, Verdict
from agnews_lora.training.metrics import predict_logits, unpacked
from agnews_lora.training.multilora.encoder import Encoder
from agnews_lora.training.multilora.engine import (
    MAX_SLOTS,
    MAX_SLOTS_CPU,
    MultiLoraEngine,
    _Run,
    choose_slots,
    fitting_slots,
    heaviest_step,
    place_heaviest,
)
from agnews_lora.training.multilora.model import MultiLoraModel
from agnews_lora.training.multilora.packing import DeviceTokens
from tests.training import conftest
from tests.training.conftest import (
    MONITOR_ROWS,
    SETTINGS,
    SPEC,
    STEPS,
    TRAIN_ROWS,
    VALIDATION_ROWS,
    Plans,
    Recorder,
    TinySetup,
    adapter,
    adapter_folder,
    losses,
    plan,
    untimed,
)

CPU = torch.device("cpu")
DROPPING = replace(SPEC, dropout=0.3)
UNLIKE = [
    replace(SPEC, targets="all-linear", rank=5, alpha=20, dropout=0.5),
    replace(SPEC, targets="ffn", rank=1, head="out_proj", learning_rate=3e-2),
    replace(SPEC, targets="qk", rank=7, alpha=7, dropout=0.1),
    replace(SPEC, targets="qkvo", rank=3),
    replace(SPEC, targets="qkv", rank=4, learning_rate=1e-4, head="out_proj"),
    replace(SPEC, targets="qv", rank=8, alpha=64, dropout=0.2),
    replace(SPEC, targets="all-linear", rank=9, alpha=3),
]
DENSE = "base_model.model.classifier.dense.weight"


def train(
    setup: TinySetup,
    plans: list[TrialPlan],
    settings: TrainSettings = SETTINGS,
    slots: int = 8,
    recorder: Recorder | None = None,
) -> Recorder:
    return conftest.train("multilora", setup, plans, settings, recorder, slots)


# The same computation as the reference engine -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "head", "targets", "log_every"),
    [
        ("bert", "full", "all-linear", 1),
        ("bert-no-pooler", "full", "qv", 1),
        ("roberta", "out_proj", "qv", 3),
        ("xlm-roberta", "full", "qkvo", 1),
        ("camembert", "out_proj", "ffn", 1),
        ("electra", "full", "all-linear", 1),
        ("electra", "out_proj", "qkv", 1),
        ("distilbert", "full", "all-linear", 1),
        ("distilbert", "out_proj", "ffn", 1),
    ],
)
def test_trains_as_the_reference_does(
    setups: dict[Family, TinySetup], tmp_path: Path, family: Family, head: str, targets: str, log_every: int
) -> None:
    setup, spec = setups[family], replace(SPEC, head=head, targets=targets)
    settings = replace(SETTINGS, log_every=log_every, warmup=0.25)
    own, reference = (
        conftest.train(engine, setup, [plan(tmp_path / engine, spec=spec)], settings)
        for engine in ("multilora", "trainer")
    )
    assert own.train_points[-1].step == STEPS
    for one, other in zip(own.train_points, reference.train_points, strict=True):
        assert (one.trial, one.step) == (other.trial, other.step)
        assert one.learning_rate == pytest.approx(other.learning_rate, rel=1e-9)
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    for point, expected in zip(own.eval_points, reference.eval_points, strict=True):
        assert (point.step, point.rows, point.final) == (expected.step, expected.rows, expected.final)
        assert point.loss == pytest.approx(expected.loss, rel=1e-3)
        assert point.accuracy == pytest.approx(expected.accuracy, abs=1.5 / point.rows)
    [result], [wanted] = own.results, reference.results
    for name in ("steps", "total_steps", "trainable_parameters", "rows_seen"):
        assert getattr(result, name) == getattr(wanted, name)
    tensors, expected_tensors = adapter(own), adapter(reference)
    assert tensors.keys() == expected_tensors.keys()
    for name in tensors:
        torch.testing.assert_close(tensors[name], expected_tensors[name], rtol=1e-2, atol=2e-3)
    assert (adapter_folder(own) / CONFIG).read_text() == (adapter_folder(reference) / CONFIG).read_text()


# Independence --------------------------------------------------------------------------------------------------------


@dataclass
class Watching(Recorder):
    """Prunes one trial, and looks at the padding of the slots' ranks after every step.

    padding, own: the largest absolute value in the slots' padding, and in their own tensors.
    """

    engine: MultiLoraEngine | None = None
    padding: float = 0.0
    own: float = 0.0

    def logged(self, points):  # type: ignore[no-untyped-def]
        super().logged(points)
        assert self.engine is not None
        slots = self.engine.model.slots
        for slot, spec in enumerate(slots.specs):
            for matrix in (slots.weights, slots.first_moment, slots.second_moment):
                rest = matrix[slot].clone()
                for _, part in slots.tensors(rest, spec) if spec is not None else ():
                    part.zero_()
                self.padding = max(self.padding, rest.abs().max().item())
                self.own = max(self.own, matrix[slot].abs().max().item())

    def evaluated(self, points):  # type: ignore[no-untyped-def]
        super().evaluated(points)
        pruned = [(point.trial, point.step) == ("u2", 5) for point in points]
        return [Verdict.PRUNE if each else Verdict.CONTINUE for each in pruned]


@dataclass
class Crowd:
    """Eleven unlike trials in eight slots; one is pruned on the way, and the last three fill free slots."""

    setup: TinySetup
    specs: dict[str, TrialSpec]
    recorder: Watching
    running: list[int] = field(default_factory=list)  # trials in slots, whenever the source was asked


@pytest.fixture(scope="module", params=["bert", "roberta"])
def crowd(
    request: pytest.FixtureRequest, setups: dict[Family, TinySetup], tmp_path_factory: pytest.TempPathFactory
) -> Crowd:
    setup, folder = setups[request.param], tmp_path_factory.mktemp("crowd")
    specs = {f"u{n}": spec for n, spec in enumerate(UNLIKE[:4])}
    specs |= {"plain": SPEC, "dropping": DROPPING}
    specs |= {f"u{n}": spec for n, spec in enumerate(UNLIKE) if n > 3}
    specs |= {"wide": replace(DROPPING, targets="all-linear", rank=11, head="out_proj")}
    specs |= {"still": replace(SPEC, learning_rate=1e-30)}
    engine = MultiLoraEngine(setup.base, setup.corpus, SETTINGS, 8)
    found = Crowd(setup, specs, Watching(engine=engine))
    source = Plans([plan(folder, trial, spec) for trial, spec in specs.items()])
    source.asked = lambda: found.running.append(len(specs) - len(source.plans) - len(found.recorder.results))
    engine.run(source, found.recorder)
    return found


@pytest.mark.parametrize("trial", ["plain", "dropping", "wide"])
def test_neighbours_change_nothing(crowd: Crowd, tmp_path: Path, trial: str) -> None:
    alone = train(crowd.setup, [plan(tmp_path, trial, crowd.specs[trial])], slots=1)
    assert len(losses(alone, trial)) == STEPS
    np.testing.assert_allclose(losses(crowd.recorder, trial), losses(alone, trial), rtol=1e-5)


def test_free_slots_are_filled_and_trials_in_step_are_judged_together(crowd: Crowd) -> None:
    assert {result.trial for result in crowd.recorder.results} == crowd.specs.keys()
    assert max(crowd.running) == 7  # when the source is asked for an eighth
    steps = [(point.trial, point.step) for point in crowd.recorder.train_points]
    assert steps.index(("u6", 1)) < steps.index(("plain", 7))  # it took the place of the pruned one
    first = [point.trial for point in crowd.recorder.eval_points[:8]]
    assert first == list(crowd.specs)[:8]


def test_the_padding_of_ranks_stays_zero(crowd: Crowd) -> None:
    assert crowd.recorder.padding == 0.0 < crowd.recorder.own


def test_exported_adapters_give_the_scores_in_plain_peft(crowd: Crowd) -> None:
    validation = crowd.setup.corpus.validation
    for result in crowd.recorder.results:
        if result.trial == "u2":
            assert (result.steps, result.final, result.adapter) == (5, None, None)
            continue
        assert result.adapter is not None and result.final is not None
        model = load_with_peft(result.adapter, crowd.setup.base)
        logits = torch.from_numpy(predict_logits(model, validation, range(VALIDATION_ROWS), 16, CPU))
        labels = torch.from_numpy(np.array(validation.labels))
        assert result.final.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert result.final.accuracy == pytest.approx((logits.argmax(-1) == labels).float().mean().item())
        assert unpacked(result.final.right, VALIDATION_ROWS).tolist() == (logits.argmax(-1) == labels).tolist()


def test_dropout_drops_and_a_frozen_head_stays_as_drawn(crowd: Crowd) -> None:
    plain, dropping = losses(crowd.recorder, "plain"), losses(crowd.recorder, "dropping")
    assert plain[0] == pytest.approx(dropping[0], rel=1e-6)  # B is zero: dropout has no effect yet
    assert not np.allclose(plain[3:], dropping[3:], rtol=1e-3)
    if crowd.setup.base.shape.family == "roberta":
        frozen, still, full = (adapter(crowd.recorder, trial)[DENSE] for trial in ("wide", "still", "plain"))
        assert torch.equal(frozen, still)
        assert not torch.equal(full, still)


def test_a_trial_that_diverges_fails_alone(roberta: TinySetup, tmp_path: Path) -> None:
    settings = replace(SETTINGS, epochs=1)
    alone = train(roberta, [plan(tmp_path / "alone")], settings, slots=1)
    diverging = plan(tmp_path, "diverging", replace(SPEC, learning_rate=1e30))
    recorder = train(roberta, [diverging, plan(tmp_path), plan(tmp_path, "next", UNLIKE[0])], settings, slots=2)
    [(trial, error)] = recorder.failures
    assert trial == "diverging" and isinstance(error, TrainingError)
    assert "lr=1e+30" in str(error) and "by step" in str(error)
    np.testing.assert_allclose(losses(recorder), losses(alone), rtol=1e-5)
    assert {result.trial for result in recorder.results} == {"t0000", "next"}
    assert all(np.isfinite(point.loss) for point in recorder.train_points)


@pytest.mark.parametrize("engine", ["multilora", "trainer"])
def test_a_pruned_trial_makes_room_for_the_next(roberta: TinySetup, tmp_path: Path, engine: str) -> None:
    plans, settings = [plan(tmp_path, "t0"), plan(tmp_path, "t1")], replace(SETTINGS, log_every=3)
    recorder = conftest.train(engine, roberta, plans, settings, Recorder(prune_at=(10,)))
    assert [result.trial for result in recorder.results] == ["t0", "t1"]
    for result in recorder.results:
        assert (result.steps, result.total_steps, result.final, result.adapter) == (10, STEPS, None, None)
        assert result.rows_seen < TRAIN_ROWS + 1
    assert [(p.trial, p.step) for p in recorder.train_points] == [(t, s) for t in ("t0", "t1") for s in (3, 6, 9, 10)]
    assert [p.rows for p in recorder.eval_points] == [MONITOR_ROWS] * 4


def test_the_engine_can_run_again(roberta: TinySetup, tmp_path: Path) -> None:
    engine = MultiLoraEngine(roberta.base, roberta.corpus, replace(SETTINGS, epochs=1), 2)
    first, second = Recorder(), Recorder()
    engine.run(Plans([plan(tmp_path / "first", "other", UNLIKE[0]), plan(tmp_path / "first")]), first)
    engine.run(Plans([plan(tmp_path / "second")]), second)
    np.testing.assert_allclose(losses(first), losses(second), rtol=1e-5)


# Steps read late, as on CUDA ------------------------------------------------------------------------------------------


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Engines read each step after the next one has been taken; the slots of every step taken ahead."""
    made, step, ahead = MultiLoraEngine.__init__, _Run._step, []

    def reads_late(self: MultiLoraEngine, *args: object) -> None:
        made(self, *args)  # type: ignore[arg-type]
        self.reads_late = True

    def counted(self: _Run) -> None:
        ahead.append(sum(self._ahead(slot) for slot in self.running))
        step(self)

    monkeypatch.setattr(MultiLoraEngine, "__init__", reads_late)
    monkeypatch.setattr(_Run, "_step", counted)
    return ahead


def by_trial(recorder: Recorder) -> dict[str, list[object]]:
    """Everything reported of each trial but for times, and the tensors of its adapter, in order."""
    found: dict[str, list[object]] = defaultdict(list)
    for point in untimed([*recorder.train_points, *recorder.eval_points]):
        found[point.trial].append(point)
    for trial, step, _ in recorder.checkpoints:
        found[trial].append(step)
    for trial, error in recorder.failures:
        found[trial].append(str(error))
    for result in recorder.results:
        tensors = {} if result.adapter is None else adapter(recorder, result.trial)
        parts = {name: tensor.tolist() for name, tensor in tensors.items()}
        found[result.trial] += [result.steps, result.rows_seen, result.final is None, parts]
    return found


DIVERGING = replace(SPEC, learning_rate=1e30)


@pytest.mark.parametrize(("log_every", "prune_at"), [(1, ()), (3, (5,))])
def test_reading_late_changes_nothing(
    roberta: TinySetup, tmp_path: Path, request: pytest.FixtureRequest, log_every: int, prune_at: tuple[int, ...]
) -> None:
    settings = replace(SETTINGS, epochs=1, log_every=log_every)
    specs = [*UNLIKE[:2], DIVERGING, DROPPING, UNLIKE[4]]

    def trained(folder: Path) -> Recorder:
        plans = [plan(folder, f"t{number}", spec) for number, spec in enumerate(specs)]
        return train(roberta, plans, settings, slots=3, recorder=Recorder(prune_at=prune_at))

    at_once = trained(tmp_path / "at once")
    ahead = request.getfixturevalue("late")
    found = trained(tmp_path / "late")
    assert max(ahead) == 3 and [trial for trial, _ in found.failures] == ["t2"]
    assert by_trial(found) == by_trial(at_once)


@pytest.mark.parametrize("ends", [3, 7])
def test_stopped_or_short_of_memory_it_counts_the_step_that_was_not_read(
    roberta: TinySetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, ends: int
) -> None:
    """A stop, at 5 of 10 steps the checkpoint of an evaluation, and memory that is short in the same step."""
    settings, specs = replace(SETTINGS, epochs=1), {"t0": DROPPING, "t1": UNLIKE[0]}

    def trained(folder: Path, recorder: Recorder) -> Recorder:
        plans = [plan(folder, trial, spec, checkpoint=newest(folder / trial)) for trial, spec in specs.items()]
        return train(roberta, plans, settings, slots=2, recorder=recorder)

    whole = trained(tmp_path / "whole", Recorder())
    request.getfixturevalue("late")
    first = trained(tmp_path / "stopped", Recorder(stop_at=ends))
    second = trained(tmp_path / "stopped", Recorder())
    points = [untimed(each.train_points) for each in (first, second, whole)]
    assert {step for _, step, _ in first.checkpoints} >= {points[0][-1].step}
    by_step = {(point.trial, point.step): point for point in points[2]}
    assert {(point.trial, point.step): point for point in points[0] + points[1]} == by_step
    assert len(points[0] + points[1]) == len(by_step)
    for trial in specs:
        assert all(torch.equal(adapter(second, trial)[name], t) for name, t in adapter(whole, trial).items())

    whole_pass, passes = MultiLoraModel.gradients, []

    def tight(self: MultiLoraModel, *args: object) -> object:
        passes.append(1)
        if len(passes) == 2 * ends:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_pass(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(MultiLoraModel, "gradients", tight)
    halved = trained(tmp_path / "halved", Recorder())
    assert {trial: losses(halved, trial) for trial in specs} == {trial: losses(whole, trial) for trial in specs}


# Memory --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gradients", "logits"])
@pytest.mark.parametrize("crowd", ["roberta"], indirect=True)
def test_out_of_memory_halves_the_slots_and_loses_nothing(
    crowd: Crowd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    trials = ["dropping", "u0", "u1", "u3", "u4"]
    whole_pass, passes = getattr(MultiLoraModel, where), []

    def tight(self: MultiLoraModel, *args: object) -> object:
        passes.append(len([spec for spec in self.slots.specs if spec is not None]))
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_pass(self, *args)

    monkeypatch.setattr(MultiLoraModel, where, tight)
    recorder = train(crowd.setup, [plan(tmp_path, trial, crowd.specs[trial]) for trial in trials], slots=4)
    assert passes[2] == 4 and set(passes[4:]) <= {1, 2}  # the fourth may run beside the third, on another thread
    assert not recorder.failures
    assert {result.trial for result in recorder.results} == set(trials)
    for trial in trials:
        np.testing.assert_allclose(losses(recorder, trial), losses(crowd.recorder, trial), rtol=1e-5)


def test_a_trial_that_does_not_fit_alone_fails(
    roberta: TinySetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_pass = MultiLoraModel.gradients

    def tight(self: MultiLoraModel, *args: object) -> object:
        if any(spec is not None and spec.targets == "all-linear" for spec in self.slots.specs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_pass(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(MultiLoraModel, "gradients", tight)
    recorder = train(roberta, [plan(tmp_path, "big", UNLIKE[0]), plan(tmp_path, "small")], slots=2)
    [(trial, error)] = recorder.failures
    assert trial == "big" and isinstance(error, TrainingError) and "batch_size" in str(error)
    assert [result.trial for result in recorder.results] == ["small"]


@pytest.mark.parametrize(
    ("free_gib", "slot_gib", "expected"), [(100, 10, 8), (100, 100, 1), (1, 100, 1), (1000, 1, MAX_SLOTS)]
)
def test_slots_fill_most_of_the_free_memory(free_gib: int, slot_gib: int, expected: int) -> None:
    assert fitting_slots(free_gib << 30, slot_gib << 30) == expected


def test_the_measured_step_goes_through_every_module(roberta: TinySetup) -> None:
    model = MultiLoraModel(Encoder(load_base(roberta.base, 4), "roberta", CPU, torch.float32), roberta.base.shape, 1)
    tokens = DeviceTokens(roberta.corpus.train, CPU, padding_id=1)
    place_heaviest(model)
    assert model.slots.ranks.keys() == set(PRESETS["all-linear"])
    heaviest_step(model, tokens, batch_size=8)
    assert model.slots.first_moment.any()
    assert not model.slots.weights.any()


# Refusals ------------------------------------------------------------------------------------------------------------


def test_dropout_in_the_base_and_another_activation_are_refused(roberta: TinySetup, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine: trainer"):
        MultiLoraEngine(roberta.base, roberta.corpus, replace(SETTINGS, base_dropout=0.1), 1)
    folder = shutil.copytree(roberta.base.folder, tmp_path / "base")
    described = json.loads((folder / BASE_CONFIG).read_text())
    (folder / BASE_CONFIG).write_text(json.dumps(described | {"hidden_act": "relu"}))
    with pytest.raises(ConfigError, match=r"'relu'.*engine: trainer"):
        MultiLoraEngine(replace(roberta.base, folder=folder), roberta.corpus, SETTINGS, 1)


def test_a_checkpoint_of_another_trial_is_refused(roberta: TinySetup, tmp_path: Path) -> None:
    [(_, _, path)] = train(roberta, [plan(tmp_path)], slots=1, recorder=Recorder(stop_at=3)).checkpoints
    others = [plan(tmp_path, "spec", DROPPING, checkpoint=path), plan(tmp_path, "empty", checkpoint=tmp_path)]
    recorder = train(roberta, [*others, plan(tmp_path, "sound")], replace(SETTINGS, epochs=1), slots=1)
    assert [(trial, type(error)) for trial, error in recorder.failures] == [
        ("spec", TrainingError),
        ("empty", TrainingError),
    ]
    assert [result.trial for result in recorder.results] == ["sound"]


def test_a_fault_of_the_program_is_reported_for_all_and_raised(
    roberta: TinySetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultiLoraModel, "gradients", lambda *_: 1 / 0)
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError):
        train(roberta, [plan(tmp_path, f"t{n}") for n in range(3)], slots=2, recorder=recorder)
    assert [trial for trial, _ in recorder.failures] == ["t0", "t1"]


def test_on_a_cpu_there_is_a_slot_a_thread(roberta: TinySetup) -> None:
    engine = MultiLoraEngine(roberta.base, roberta.corpus, SETTINGS)
    assert len(engine.model.slots) == min(MAX_SLOTS_CPU, torch.get_num_threads())


# On a GPU ------------------------------------------------------------------------------------------------------------


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(skip(test))  # type: ignore[no-any-return]


@gpu
@pytest.mark.parametrize("family", ["bert", "roberta", "electra", "distilbert"])
def test_bf16_on_a_gpu_follows_fp32(setups: dict[Family, TinySetup], tmp_path: Path, family: Family) -> None:
    specs = [SPEC, *UNLIKE[3:5]]
    exact, rounded = (
        train(setups[family], [plan(tmp_path / precision, f"t{n}", spec) for n, spec in enumerate(specs)], settings)
        for precision in ("fp32", "bf16")
        for settings in [replace(SETTINGS, precision=precision)]  # type: ignore[arg-type]
    )
    for n in range(len(specs)):
        np.testing.assert_allclose(losses(rounded, f"t{n}")[:10], losses(exact, f"t{n}")[:10], rtol=0.1)


@gpu
def test_a_gpu_takes_as_many_slots_as_its_memory_says(roberta: TinySetup) -> None:
    device = torch.device("cuda", 0)
    encoder = Encoder(load_base(roberta.base, 4), "roberta", device, torch.bfloat16)
    model = MultiLoraModel(encoder, roberta.base.shape, 1)
    assert choose_slots(model, DeviceTokens(roberta.corpus.train, device, padding_id=1), 8) == MAX_SLOTS
    assert model.slots.specs == [None]
