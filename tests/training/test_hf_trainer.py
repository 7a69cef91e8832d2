"""The reference engine's trials: what is reported when, how they end, and that nothing else changes their numbers."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import AutoModelForSequenceClassification

from agnews_lora.adapters.adapter_files import WEIGHTS, load_with_peft
from agnews_lora.adapters.base_models import resolve
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.data.rows import LABELS
from agnews_lora.errors import BudgetError, TrainingError
from agnews_lora.training import device
from agnews_lora.training.hf_trainer import TrainerEngine
from agnews_lora.training.interface import EvalPoint
from agnews_lora.training.metrics import mean_cross_entropy, predict_logits
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
    train,
)

DROPPING = replace(SPEC, dropout=0.2, targets="ffn")
CPU = torch.device("cpu")


def plain_logits(lab: Lab, adapter: Path, rows: list[int]) -> np.ndarray:
    """By plain PEFT on a fresh base, a row at a time: no batch, no padding, none of this package's loading."""
    base = AutoModelForSequenceClassification.from_pretrained(lab.base.folder, num_labels=len(LABELS))
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    with torch.inference_mode():
        tokens = [torch.from_numpy(lab.corpus.validation.row(row).astype(np.int64))[None] for row in rows]
        return torch.cat([model(input_ids=row).logits for row in tokens]).numpy()


def require_scores(point: EvalPoint, logits: np.ndarray, labels: np.ndarray) -> None:
    probabilities = torch.from_numpy(logits).double().softmax(dim=-1).numpy()
    predicted = logits.argmax(axis=-1)
    assert point.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert point.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert point.loss == pytest.approx(log_loss(labels, probabilities, labels=range(4)), rel=1e-5)


def tensors(recorder: Recorder, trial: str = "t0000") -> dict[str, torch.Tensor]:
    [adapter] = [result.adapter for result in recorder.results if result.trial == trial]
    assert adapter is not None
    return load_file(adapter / WEIGHTS)


def same_trial(first: Recorder, second: Recorder, trial: str) -> bool:
    """Whether two recorders saw the same numbers of a trial, to the last bit."""
    own = [
        (
            losses(point for point in recorder.train_points if point.trial == trial),
            scores(point for point in recorder.eval_points if point.trial == trial),
        )
        for recorder in (first, second)
    ]
    one, other = tensors(first, trial), tensors(second, trial)
    return own[0] == own[1] and one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# What is reported ----------------------------------------------------------------------------------------------------


def test_evaluations_come_at_their_steps_and_the_last_on_all_rows(roberta: Lab, tmp_path: Path) -> None:
    recorder = train(roberta, [plan(tmp_path)])
    got = [(point.step, point.rows, point.final) for point in recorder.eval_points]
    assert got == [*((step, MONITOR_ROWS, False) for step in (5, 10, 15)), (STEPS, VALIDATION_ROWS, True)]
    assert {point.trial for point in recorder.eval_points} == {"t0000"}


def test_the_last_step_is_evaluated_where_nothing_else_is(roberta: Lab, tmp_path: Path) -> None:
    recorder = train(roberta, [plan(tmp_path)], replace(SETTINGS, eval_every=3000))
    assert [(point.step, point.final) for point in recorder.eval_points] == [(STEPS, True)]


def test_losses_are_reported_at_every_log_step_and_cover_all_batches(roberta: Lab, tmp_path: Path) -> None:
    """Evaluations at log steps (5, 15) must not swallow a point, and the last window may be a short one."""
    every = train(roberta, [plan(tmp_path / "every")]).train_points
    thirds = train(roberta, [plan(tmp_path / "thirds")], replace(SETTINGS, log_every=3)).train_points
    fifths = train(roberta, [plan(tmp_path / "fifths")], replace(SETTINGS, log_every=5)).train_points
    assert [point.step for point in every] == list(range(1, STEPS + 1))
    assert [point.step for point in thirds] == [3, 6, 9, 12, 15, 18, STEPS]
    assert [point.step for point in fifths] == [5, 10, 15, STEPS]
    for points in (thirds, fifths):
        start = 0
        for point in points:
            window = every[start : point.step]
            assert point.loss == pytest.approx(np.mean([each.loss for each in window]), rel=1e-5)
            assert point.learning_rate == window[-1].learning_rate
            start = point.step


def test_scores_are_those_of_plain_peft(labs: dict[str, Lab], tmp_path: Path) -> None:
    for family, lab in labs.items():
        recorder = train(lab, [plan(tmp_path / family)])
        [result] = recorder.results
        assert result.adapter is not None
        assert result.final == recorder.eval_points[-1]
        rows = list(range(VALIDATION_ROWS))
        logits = plain_logits(lab, result.adapter, rows)
        require_scores(result.final, logits, lab.corpus.validation.labels)
        loaded = load_with_peft(result.adapter, lab.base)
        batched = predict_logits(loaded, lab.corpus.validation, rows, 16, CPU)
        np.testing.assert_allclose(batched, logits, atol=1e-5)


def test_scores_on_the_way_are_those_of_the_monitored_rows(roberta: Lab, tmp_path: Path) -> None:
    """A trial whose learning rate is zero from the start is at step 5 what it is at the last."""
    still = plan(tmp_path, spec=replace(SPEC, learning_rate=0.0))
    recorder = train(roberta, [still])
    [result] = recorder.results
    assert result.adapter is not None
    monitor = list(roberta.corpus.monitor)
    logits = plain_logits(roberta, result.adapter, monitor)
    for point in recorder.eval_points[:-1]:
        require_scores(point, logits, roberta.corpus.validation.labels[monitor])


def test_a_result_says_what_was_done(roberta: Lab, tmp_path: Path) -> None:
    [result] = train(roberta, [plan(tmp_path)]).results
    assert (result.steps, result.total_steps) == (STEPS, STEPS)
    assert result.rows_seen == 2 * TRAIN_ROWS
    assert result.trainable_parameters == 2 * 2 * 2 * 64 + (32 * 32 + 32) + (32 * 4 + 4)
    assert result.peak_memory_bytes > 0
    assert result.train_seconds >= 0
    assert result.eval_seconds >= 0


# Data order and initialisation follow the seed -----------------------------------------------------------------------


def test_numbers_do_not_depend_on_what_else_is_trained(roberta: Lab, tmp_path: Path) -> None:
    specs = {"t0000": SPEC, "t0001": DROPPING, "t0002": replace(SPEC, head="out_proj", rank=3)}
    settings = replace(SETTINGS, base_dropout=0.1)

    def trained(folder: str, trials: list[str]) -> Recorder:
        return train(roberta, [plan(tmp_path / folder, trial, specs[trial]) for trial in trials], settings)

    forwards, backwards = trained("forwards", sorted(specs)), trained("backwards", sorted(specs, reverse=True))
    assert all(same_trial(forwards, backwards, trial) for trial in specs)


def test_another_seed_gives_other_numbers(roberta: Lab, tmp_path: Path) -> None:
    recorder = train(roberta, [plan(tmp_path, "t0000", seed=1), plan(tmp_path, "t0001", seed=2)])
    assert not torch.equal(*(next(iter(tensors(recorder, trial).values())) for trial in ("t0000", "t0001")))


def test_a_model_is_gone_before_the_next_is_built(roberta: Lab, tmp_path: Path) -> None:
    def models() -> int:
        return sum(issubclass(type(thing), peft.PeftModel) for thing in gc.get_objects())

    gc.collect()
    before, alive = models(), []
    engine = TrainerEngine(roberta.base, roberta.corpus, SETTINGS, LABELS)
    source = Plans([plan(tmp_path, "t0000"), plan(tmp_path, "t0001")], asked=lambda: alive.append(models()))
    engine.run(source, Recorder())
    assert alive == [before] * 3


# How trials end ------------------------------------------------------------------------------------------------------


def test_a_pruned_trial_ends_there_and_the_next_starts(roberta: Lab, tmp_path: Path) -> None:
    recorder = train(roberta, [plan(tmp_path, "t0000"), plan(tmp_path, "t0001")], recorder=Recorder(prune_at=(10,)))
    assert [result.trial for result in recorder.results] == ["t0000", "t0001"]
    for result in recorder.results:
        assert (result.steps, result.total_steps, result.final, result.adapter) == (10, STEPS, None, None)
        assert result.rows_seen < TRAIN_ROWS + 1
    assert [point.step for point in recorder.eval_points] == [5, 10, 5, 10]
    assert not (tmp_path / "t0000" / "adapter").exists()


def test_the_last_verdict_is_not_read(roberta: Lab, tmp_path: Path) -> None:
    [result] = train(roberta, [plan(tmp_path)], recorder=Recorder(prune_at=(STEPS,))).results
    assert result.final is not None
    assert result.adapter is not None


@pytest.mark.parametrize(
    ("log_every", "eval_every", "what"),
    [(1, 3000, "training loss"), (3000, 5, "validation loss"), (3000, 3000, "training loss")],
    ids=["at a log step", "at an evaluation", "at the last step alone"],
)
def test_a_loss_that_is_not_finite_fails_the_trial(
    roberta: Lab, tmp_path: Path, log_every: int, eval_every: int, what: str
) -> None:
    settings = replace(SETTINGS, log_every=log_every, eval_every=eval_every)
    wild, sound = plan(tmp_path, "t0000", replace(SPEC, learning_rate=1e30)), plan(tmp_path, "t0001")
    recorder = train(roberta, [wild, sound], settings)
    [(trial, error)] = recorder.failures
    assert trial == "t0000"
    assert isinstance(error, TrainingError)
    assert f"the {what} became nan" in str(error)
    assert "lr=1e+30" in str(error)
    assert "a lower learning rate or alpha keeps it finite" in str(error)
    assert all(math.isfinite(point.loss) for point in [*recorder.train_points, *recorder.eval_points])
    assert not (tmp_path / "t0000" / "adapter").exists()
    assert [result.trial for result in recorder.results] == ["t0001"]
    assert same_trial(recorder, train(roberta, [plan(tmp_path / "alone", "t0001")], settings), "t0001")


def test_a_base_of_another_shape_breaks_the_budget(roberta: Lab, tmp_path: Path) -> None:
    base = replace(roberta.base, shape=replace(roberta.base.shape, hidden_size=16))
    recorder = train(replace(roberta, base=base), [plan(tmp_path)])
    [(_, error)] = recorder.failures
    assert isinstance(error, BudgetError)
    assert "the built model has 1,700 trainable parameters" in str(error)
    assert not recorder.results


def test_what_nobody_foresaw_is_reported_and_raised(roberta: Lab, tmp_path: Path) -> None:
    class Broken(Recorder):
        def logged(self, points: object) -> None:
            raise RuntimeError("the screen is gone")

    recorder = Broken()
    engine = TrainerEngine(roberta.base, roberta.corpus, SETTINGS, LABELS)
    source = Plans([plan(tmp_path, "t0000"), plan(tmp_path, "t0001")])
    with pytest.raises(RuntimeError, match="the screen is gone"):
        engine.run(source, recorder)
    [(trial, error)] = recorder.failures
    assert (trial, str(error)) == ("t0000", "the screen is gone")
    assert [left.trial for left in source.plans] == ["t0001"]


# Precision -----------------------------------------------------------------------------------------------------------


def test_bf16_where_there_is_none_is_refused_before_any_trial(roberta: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    with pytest.raises(TrainingError, match=r"precision bf16 was asked for, but .* has none; use `precision: auto`"):
        TrainerEngine(roberta.base, roberta.corpus, replace(SETTINGS, precision="bf16"), LABELS)


def test_auto_is_fp32_where_there_is_no_bf16(roberta: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    auto = train(roberta, [plan(tmp_path / "auto")], replace(SETTINGS, precision="auto"))
    assert same_trial(auto, train(roberta, [plan(tmp_path / "fp32")]), "t0000")


def test_bf16_computes_otherwise_and_keeps_fp32_files(roberta: Lab, tmp_path: Path) -> None:
    if not device.has_bf16(device.training_device()):
        pytest.skip("this device does not compute in bf16")
    exact = train(roberta, [plan(tmp_path / "fp32")])
    auto = train(roberta, [plan(tmp_path / "auto")], replace(SETTINGS, precision="auto"))
    assert same_trial(auto, train(roberta, [plan(tmp_path / "bf16")], replace(SETTINGS, precision="bf16")), "t0000")
    assert auto.train_points[0].loss != exact.train_points[0].loss
    assert auto.train_points[0].loss == pytest.approx(exact.train_points[0].loss, rel=0.02)
    assert {tensor.dtype for tensor in tensors(auto).values()} == {torch.float32}
    assert same_trial(exact, train(roberta, [plan(tmp_path / "fp32 again")]), "t0000")


@pytest.mark.gpu
def test_what_cuda_trained_answers_alike_on_the_cpu(roberta: Lab, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = TrialSpec("all-linear", rank=2, alpha=8, dropout=0.1, learning_rate=1e-2)
    recorder = train(roberta, [plan(tmp_path, spec=spec)], replace(SETTINGS, base_dropout=0.1))
    [result] = recorder.results
    assert result.adapter is not None
    assert result.final is not None
    assert 0 < result.peak_memory_bytes == torch.cuda.max_memory_allocated()
    rows = list(range(VALIDATION_ROWS))
    base = resolve(str(roberta.base.folder))
    on_cpu = predict_logits(load_with_peft(result.adapter, base), roberta.corpus.validation, rows, 16, CPU)
    cuda = torch.device("cuda")
    on_cuda = predict_logits(load_with_peft(result.adapter, base).to(cuda), roberta.corpus.validation, rows, 16, cuda)
    np.testing.assert_allclose(on_cpu, on_cuda, atol=1e-3)
    expected = mean_cross_entropy(on_cpu, roberta.corpus.validation.labels)
    assert result.final.loss == pytest.approx(expected, rel=1e-3)
