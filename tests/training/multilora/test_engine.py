"""The engine's trials: the same as the reference engine's, independent of their neighbours, and never lost."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from agnews_lora.adapters.adapter_files import CONFIG, WEIGHTS, load_with_peft
from agnews_lora.adapters.spec import HEADS, Family, TrialSpec
from agnews_lora.data.rows import LABELS
from agnews_lora.errors import ConfigError, TrainingError
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrainSettings, TrialPlan, Verdict
from agnews_lora.training.metrics import predict_logits
from agnews_lora.training.multilora.engine import MultiLoraEngine
from agnews_lora.training.multilora.model import MultiLoraModel
from tests.training.conftest import (
    MONITOR_ROWS,
    SETTINGS,
    SPEC,
    STEPS,
    TRAIN_ROWS,
    VALIDATION_ROWS,
    Lab,
    Plans,
    Recorder,
    losses,
    plan,
    scores,
)
from tests.training.conftest import train as train_by_reference

CPU = torch.device("cpu")
DROPPING = replace(SPEC, dropout=0.3)
# Seven trials unlike any other, one of them to be put into a place that falls free.
UNLIKE = [
    replace(SPEC, targets="all-linear", rank=5, alpha=20, dropout=0.5),
    replace(SPEC, targets="ffn", rank=1, head="out_proj", learning_rate=3e-2),
    replace(SPEC, targets="qk", rank=7, alpha=7, dropout=0.1),
    replace(SPEC, targets="qkvo", rank=3),
    replace(SPEC, targets="qkv", rank=4, learning_rate=1e-4, head="out_proj"),
    replace(SPEC, targets="qv", rank=8, alpha=64, dropout=0.2),
    replace(SPEC, targets="all-linear", rank=9, alpha=3),
]


def train(
    lab: Lab,
    plans: Iterable[TrialPlan],
    settings: TrainSettings = SETTINGS,
    slots: int = 8,
    asked: Callable[[], None] = lambda: None,
    **observer: object,
) -> Recorder:
    """What a new engine reports of some plans."""
    recorder = Recorder(**observer)  # type: ignore[arg-type]
    MultiLoraEngine(lab.base, lab.corpus, settings, LABELS, slots).run(Plans(plans, asked), recorder)
    return recorder


def of_trial(recorder: Recorder, trial: str = "t0000") -> list[float]:
    return [point.loss for point in recorder.train_points if point.trial == trial]


def adapter(recorder: Recorder, trial: str = "t0000") -> Path:
    [folder] = [result.adapter for result in recorder.results if result.trial == trial]
    assert folder is not None
    return folder


# The same computation as the reference engine -------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("targets", ["qv", "all-linear"])
def test_trains_as_the_reference_does(
    labs: dict[Family, Lab], tmp_path: Path, family: Family, head: str, targets: str
) -> None:
    lab, spec = labs[family], replace(SPEC, head=head, targets=targets)
    own = train(lab, [plan(tmp_path / "own", spec=spec)])
    reference = train_by_reference(lab, [plan(tmp_path / "reference", spec=spec)])
    assert len(own.train_points) == STEPS
    for one, other in zip(own.train_points, reference.train_points, strict=True):
        assert (one.trial, one.step, one.learning_rate) == (other.trial, other.step, pytest.approx(other.learning_rate))
        assert one.loss == pytest.approx(other.loss, rel=1e-4)
    for point, expected in zip(own.eval_points, reference.eval_points, strict=True):
        assert (point.step, point.rows, point.final) == (expected.step, expected.rows, expected.final)
        assert point.loss == pytest.approx(expected.loss, rel=1e-3)
        assert point.accuracy == pytest.approx(expected.accuracy, abs=1.5 / point.rows)
    [result], [wanted] = own.results, reference.results
    for field in ("steps", "total_steps", "trainable_parameters", "rows_seen"):
        assert getattr(result, field) == getattr(wanted, field)
    one, other = load_file(adapter(own) / WEIGHTS), load_file(adapter(reference) / WEIGHTS)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-2, atol=2e-3)
    assert (adapter(own) / CONFIG).read_text() == (adapter(reference) / CONFIG).read_text()


@pytest.mark.parametrize("log_every", [3, 5])
def test_losses_are_reported_when_the_reference_reports_them(roberta: Lab, tmp_path: Path, log_every: int) -> None:
    settings = replace(SETTINGS, log_every=log_every, warmup=0.25)
    own = train(roberta, [plan(tmp_path / "own")], settings).train_points
    reference = train_by_reference(roberta, [plan(tmp_path / "reference")], settings).train_points
    assert [point.step for point in own] == [point.step for point in reference]
    np.testing.assert_allclose([p.loss for p in own], [p.loss for p in reference], rtol=1e-4)
    np.testing.assert_allclose([p.learning_rate for p in own], [p.learning_rate for p in reference], rtol=1e-9)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_exported_adapters_give_the_scores_in_plain_peft(
    labs: dict[Family, Lab], tmp_path: Path, family: Family
) -> None:
    lab = labs[family]
    recorder = train(lab, [plan(tmp_path, f"t{n}", spec) for n, spec in enumerate([SPEC, *UNLIKE])], slots=3)
    assert len(recorder.results) == 1 + len(UNLIKE)
    validation = lab.corpus.validation
    for result in recorder.results:
        assert result.adapter is not None and result.final is not None
        model = load_with_peft(result.adapter, lab.base)
        logits = torch.from_numpy(predict_logits(model, validation, range(VALIDATION_ROWS), 16, CPU))
        labels = torch.from_numpy(np.array(validation.labels))
        assert result.final.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert result.final.accuracy == pytest.approx((logits.argmax(-1) == labels).float().mean().item())


# Independence ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, DROPPING, replace(DROPPING, targets="all-linear", head="out_proj")])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_neighbours_change_nothing(labs: dict[Family, Lab], tmp_path: Path, family: Family, spec: TrialSpec) -> None:
    """Among seven, one of which is pruned on the way and its place filled with another."""
    lab = labs[family]
    alone = train(lab, [plan(tmp_path / "alone", spec=spec)], slots=1)
    neighbours = [plan(tmp_path / "among", f"t{n + 1:04}", other, seed=n) for n, other in enumerate(UNLIKE)]
    late = plan(tmp_path / "among", "late", replace(DROPPING, targets="all-linear", rank=11), seed=99)
    among = Pruning({"t0003": 5})
    plans = [*neighbours[:3], plan(tmp_path / "among", spec=spec), *neighbours[3:], late]
    MultiLoraEngine(lab.base, lab.corpus, SETTINGS, LABELS, 8).run(Plans(plans), among)
    steps = [(p.trial, p.step) for p in among.train_points]
    assert steps.index(("late", 1)) < steps.index(("t0000", 7))
    np.testing.assert_allclose(of_trial(among), of_trial(alone), rtol=1e-5)
    assert len(of_trial(among)) == STEPS


def test_dropout_drops_by_the_trials_seed(roberta: Lab, tmp_path: Path) -> None:
    trials = {"none": plan(tmp_path, "none"), "some": plan(tmp_path, "some", DROPPING)}
    recorder = train(roberta, trials.values())
    none, some = of_trial(recorder, "none"), of_trial(recorder, "some")
    assert none[0] == pytest.approx(some[0], rel=1e-6)  # B is zero: what is dropped does not show yet
    assert not np.allclose(none[3:], some[3:], rtol=1e-3)


class Pruning(Recorder):
    """Prunes {trial: step}."""

    def __init__(self, pruned: dict[str, int]) -> None:
        super().__init__()
        self.pruned = pruned

    def evaluated(self, points):  # type: ignore[no-untyped-def]
        super().evaluated(points)
        return [Verdict.PRUNE if self.pruned.get(point.trial) == point.step else Verdict.CONTINUE for point in points]


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_trial_that_diverges_fails_alone(labs: dict[Family, Lab], tmp_path: Path, family: Family) -> None:
    lab = labs[family]
    wild = replace(SPEC, learning_rate=1e30)
    alone = train(lab, [plan(tmp_path / "alone")], slots=1)
    others = [plan(tmp_path, "wild", wild), plan(tmp_path), plan(tmp_path, "next", UNLIKE[0])]
    recorder = train(lab, others, slots=2)
    [(trial, error)] = recorder.failures
    assert trial == "wild"
    assert isinstance(error, TrainingError)
    assert "lr=1e+30" in str(error) and "by step" in str(error)
    np.testing.assert_allclose(of_trial(recorder), of_trial(alone), rtol=1e-5)
    assert {result.trial for result in recorder.results} == {"t0000", "next"}
    assert all(np.isfinite(point.loss) for point in recorder.train_points)


def test_the_padding_of_ranks_stays_zero(roberta: Lab, tmp_path: Path) -> None:
    engine = MultiLoraEngine(roberta.base, roberta.corpus, SETTINGS, LABELS, 2)
    padded: list[float] = []

    class Watching(Recorder):
        def logged(self, points):  # type: ignore[no-untyped-def]
            slots = engine.model.slots
            for slot, spec in enumerate(slots.specs):
                for matrix in (slots.weights, slots.first_moment, slots.second_moment):
                    own = matrix[slot].clone()
                    if spec is not None:
                        for _, part in slots.tensors(own, spec):
                            part.zero_()
                    padded.append(own.abs().max().item())
                    padded.append(-matrix[slot].abs().max().item() if spec is not None else 0.0)

    plans = [plan(tmp_path, "narrow", DROPPING), plan(tmp_path, "wide", UNLIKE[6])]
    engine.run(Plans(plans), Watching())
    assert max(padded) == 0.0
    assert min(padded) < 0.0


def test_a_head_that_is_not_trained_stays_as_drawn(roberta: Lab, tmp_path: Path) -> None:
    specs = {"frozen": replace(SPEC, head="out_proj"), "still": replace(SPEC, learning_rate=1e-30), "full": SPEC}
    recorder = train(roberta, [plan(tmp_path, trial, spec) for trial, spec in specs.items()])
    dense = "base_model.model.classifier.dense.weight"
    frozen, still, full = (load_file(adapter(recorder, trial) / WEIGHTS)[dense] for trial in specs)
    assert torch.equal(frozen, still)
    assert not torch.equal(full, still)


# Places ---------------------------------------------------------------------------------------------------------------


def test_places_are_filled_and_never_more_than_there_are(roberta: Lab, tmp_path: Path) -> None:
    recorder, running = Recorder(), []
    plans = [plan(tmp_path, f"t{n:04}", spec) for n, spec in enumerate([*UNLIKE, SPEC])]
    total = len(plans)
    source = Plans(plans)
    source.asked = lambda: running.append(total - len(source.plans) - len(recorder.results))
    MultiLoraEngine(roberta.base, roberta.corpus, SETTINGS, LABELS, 3).run(source, recorder)
    assert max(running) == 2  # when asked for a third
    assert {result.trial for result in recorder.results} == {f"t{n:04}" for n in range(total)}


def test_trials_in_step_are_judged_together(roberta: Lab, tmp_path: Path) -> None:
    judged: list[int] = []

    class Counting(Recorder):
        def evaluated(self, points):  # type: ignore[no-untyped-def]
            judged.append(len(points))
            return super().evaluated(points)

    engine = MultiLoraEngine(roberta.base, roberta.corpus, SETTINGS, LABELS, 3)
    engine.run(Plans([plan(tmp_path, f"t{n}", UNLIKE[n]) for n in range(3)]), Counting())
    assert judged == [3, 3, 3, 3]


def test_a_pruned_trial_makes_room_for_the_next(roberta: Lab, tmp_path: Path) -> None:
    settings = replace(SETTINGS, log_every=3)
    recorder = train(roberta, [plan(tmp_path, "t0"), plan(tmp_path, "t1")], settings, slots=1, prune_at=(10,))
    assert [result.trial for result in recorder.results] == ["t0", "t1"]
    for result in recorder.results:
        assert (result.steps, result.total_steps, result.final, result.adapter) == (10, STEPS, None, None)
        assert result.rows_seen < TRAIN_ROWS + 1
    assert [(p.trial, p.step) for p in recorder.train_points] == [(t, s) for t in ("t0", "t1") for s in (3, 6, 9, 10)]
    assert [p.rows for p in recorder.eval_points] == [MONITOR_ROWS] * 4


def test_the_engine_can_run_again(roberta: Lab, tmp_path: Path) -> None:
    engine = MultiLoraEngine(roberta.base, roberta.corpus, SETTINGS, LABELS, 2)
    first, second = Recorder(), Recorder()
    engine.run(Plans([plan(tmp_path / "first", "other", UNLIKE[0]), plan(tmp_path / "first")]), first)
    engine.run(Plans([plan(tmp_path / "second")]), second)
    np.testing.assert_allclose(of_trial(first), of_trial(second), rtol=1e-5)


# Stopping and going on ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop_at", [4, 6, 7, 8, 9, 31])
def test_stopped_and_resumed_is_the_same_as_undisturbed(roberta: Lab, tmp_path: Path, stop_at: int) -> None:
    """Stops at plain steps, around and inside of an evaluation, and inside of the last one."""
    settings = replace(SETTINGS, log_every=3)
    specs = {"t0000": DROPPING, "t0001": UNLIKE[0], "t0002": UNLIKE[1]}

    def plans(folder: str, checkpoints: dict[str, Path] | None = None) -> list[TrialPlan]:
        found = checkpoints or {}
        return [plan(tmp_path / folder, t, spec, checkpoint=found.get(t)) for t, spec in specs.items()]

    whole = train(roberta, plans("whole"), settings, slots=3)
    stopped = train(roberta, plans("parts"), settings, slots=3, stop_at=stop_at)
    assert not stopped.results
    checkpoints = {trial: path for trial, _, path in stopped.checkpoints}
    assert checkpoints.keys() == specs.keys()
    assert {path.suffix for path in (tmp_path / "parts").rglob("checkpoint-*/*")} == {".safetensors", ".json"}
    resumed = train(roberta, plans("parts", checkpoints), settings, slots=3)

    def by_step(point: TrainPoint | EvalPoint) -> tuple[str, int]:
        return point.trial, point.step

    for kind, same in (("train_points", losses), ("eval_points", scores)):
        together = [*getattr(stopped, kind), *getattr(resumed, kind)]
        one, other = (
            sorted(same(points), key=lambda p: (p.trial, p.step)) for points in (together, getattr(whole, kind))
        )
        assert [(p.trial, p.step) for p in one] == [(p.trial, p.step) for p in other]
        np.testing.assert_allclose([p.loss for p in one], [p.loss for p in other], rtol=1e-6)
    for trial in specs:
        first, second = (load_file(adapter(recorder, trial) / WEIGHTS) for recorder in (whole, resumed))
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-6, atol=1e-7)


def test_a_checkpoint_of_another_trial_is_refused(roberta: Lab, tmp_path: Path) -> None:
    [(_, _, path)] = train(roberta, [plan(tmp_path)], slots=1, stop_at=3).checkpoints
    for other in (plan(tmp_path, spec=DROPPING, checkpoint=path), plan(tmp_path, checkpoint=tmp_path)):
        recorder = train(roberta, [other, plan(tmp_path, "sound")], slots=1)
        [(trial, error)] = recorder.failures
        assert trial == "t0000" and isinstance(error, TrainingError)
        assert [result.trial for result in recorder.results] == ["sound"]


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gradients", "logits"])
def test_out_of_memory_halves_the_slots_and_loses_nothing(
    roberta: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    specs = {f"t{n:04}": spec for n, spec in enumerate([DROPPING, *UNLIKE[:4]])}
    undisturbed = train(roberta, [plan(tmp_path / "whole", t, spec) for t, spec in specs.items()], slots=5)
    whole_pass, passes = getattr(MultiLoraModel, where), []

    def tight(self: MultiLoraModel, *args: object) -> object:
        passes.append(len([spec for spec in self.slots.specs if spec is not None]))
        if len(passes) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_pass(self, *args)

    monkeypatch.setattr(MultiLoraModel, where, tight)
    recorder = train(roberta, [plan(tmp_path / "tight", t, spec) for t, spec in specs.items()], slots=4)
    assert passes[2] == 4 and set(passes[4:]) <= {1, 2}  # the fourth may run beside the third, on another thread
    assert not recorder.failures
    assert {result.trial for result in recorder.results} == specs.keys()
    for trial in specs:
        np.testing.assert_allclose(of_trial(recorder, trial), of_trial(undisturbed, trial), rtol=1e-5)


def test_a_trial_that_does_not_fit_alone_fails(roberta: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole_pass = MultiLoraModel.gradients

    def tight(self: MultiLoraModel, *args: object) -> object:
        if any(spec is not None and spec.targets == "all-linear" for spec in self.slots.specs):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole_pass(self, *args)

    monkeypatch.setattr(MultiLoraModel, "gradients", tight)
    recorder = train(roberta, [plan(tmp_path, "big", UNLIKE[0]), plan(tmp_path, "small")], slots=2)
    [(trial, error)] = recorder.failures
    assert trial == "big" and isinstance(error, TrainingError) and "batch_size" in str(error)
    assert [result.trial for result in recorder.results] == ["small"]


# Refusals -------------------------------------------------------------------------------------------------------------


def test_dropout_in_the_base_is_refused(roberta: Lab) -> None:
    with pytest.raises(ConfigError, match=r"engine: trainer"):
        MultiLoraEngine(roberta.base, roberta.corpus, replace(SETTINGS, base_dropout=0.1), LABELS, 1)


def test_what_is_no_trials_fault_is_reported_for_all_and_raised(
    roberta: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MultiLoraModel, "gradients", lambda *_: 1 / 0)
    recorder = Recorder()
    engine = MultiLoraEngine(roberta.base, roberta.corpus, SETTINGS, LABELS, 2)
    with pytest.raises(ZeroDivisionError):
        engine.run(Plans([plan(tmp_path, "t0"), plan(tmp_path, "t1"), plan(tmp_path, "t2")]), recorder)
    assert [trial for trial, _ in recorder.failures] == ["t0", "t1"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_bf16_on_a_gpu_follows_fp32(labs: dict[Family, Lab], tmp_path: Path, family: Family) -> None:
    """Tokens without padding, flash attention and grouped products against padded rows and one product a slot."""
    lab = labs[family]
    specs = [SPEC, *UNLIKE[3:5]]  # without dropout, whose masks follow the layout
    recorders = [
        train(lab, [plan(tmp_path / precision, f"t{n}", spec) for n, spec in enumerate(specs)], settings)
        for precision in ("fp32", "bf16")
        for settings in [replace(SETTINGS, precision=precision)]  # type: ignore[arg-type]
    ]
    for n in range(len(specs)):
        exact, rounded = (of_trial(recorder, f"t{n}") for recorder in recorders)
        np.testing.assert_allclose(rounded[:10], exact[:10], rtol=0.1)
