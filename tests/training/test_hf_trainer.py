"""The reference engine against a training loop in torch and PEFT, and what it reports, loads, prints and downloads."""

import gc
import json
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from transformers import AutoModel, AutoModelForSequenceClassification, set_seed

from agnews_lora.adapters.adapter_files import load_with_peft
from agnews_lora.adapters.base_models import resolve
from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import TrainingError
from agnews_lora.training import device
from agnews_lora.training.data_order import batches
from agnews_lora.training.hf_trainer import TrainerEngine
from agnews_lora.training.interface import EvalPoint, TrainSettings
from agnews_lora.training.metrics import mean_cross_entropy, predict_logits, unpacked
from tests.tiny import tiny_base
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
    tiny_setup,
    untimed,
)

CPU = torch.device("cpu")
SEED = 7
TARGETS = {
    ("bert", "qv"): ["query", "value"],
    ("roberta", "ffn"): ["intermediate.dense", *(f"layer.{n}.output.dense" for n in range(2))],
    ("distilbert", "qv"): ["q_lin", "v_lin"],
    ("deberta-v2", "qv"): ["query_proj", "value_proj"],
    ("modernbert", "qkv"): ["Wqkv"],
    ("modernbert", "ffn"): ["mlp.Wi", "mlp.Wo"],
}
SAVED = {"distilbert": ["pre_classifier"], "deberta-v2": ["pooler"], "modernbert": ["head"]}
FROZEN = {  # of head `out_proj`
    "roberta": ["classifier.modules_to_save.default.dense"],
    "modernbert": ["head.modules_to_save.default"],
    "distilbert": ["pre_classifier.modules_to_save.default"],
}


def train(setup: TinySetup, plans: list, settings: TrainSettings = SETTINGS, **observer: object) -> Recorder:  # type: ignore[type-arg]
    return conftest.train("trainer", setup, plans, settings, Recorder(**observer))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def recorder(roberta: TinySetup, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    """The reports of one trial with the default settings."""
    return train(roberta, [plan(tmp_path_factory.mktemp("trained"))])


def fresh_base(setup: TinySetup) -> torch.nn.Module:
    return AutoModelForSequenceClassification.from_pretrained(
        setup.base.folder,
        num_labels=4,
        **dict.fromkeys(set(setup.base.shape.layout.dropouts) - {"cls_dropout"}, 0.0),
    )


def forward(model: torch.nn.Module, setup: TinySetup, split: str, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of some rows, padded without this package's code."""
    table = getattr(setup.corpus, split)
    tokens = [torch.from_numpy(table.row(row).astype(np.int64)) for row in rows]
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(tokens, batch_first=True, padding_value=table.pad_id)
    attention_mask = pad([torch.ones_like(row) for row in tokens], batch_first=True, padding_value=0)
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
    return logits, torch.from_numpy(table.labels[rows])


def plain_logits(setup: TinySetup, folder: Path, rows: list[int]) -> np.ndarray:
    """Logits of validation rows, by plain PEFT on a fresh base whose head is drawn from another seed."""
    torch.manual_seed(SEED + 1)
    model = peft.PeftModel.from_pretrained(fresh_base(setup), folder).eval()
    with torch.inference_mode():
        return forward(model, setup, "validation", rows)[0].numpy()


def same_trial(first: Recorder, second: Recorder, trial: str = "t0000") -> bool:
    """Tell whether two recorders saw the same numbers of a trial, to the last bit."""

    def reports(recorder: Recorder) -> list[object]:
        points = [*untimed(recorder.train_points), *untimed(recorder.eval_points)]
        return [point for point in points if point.trial == trial]

    one, other = adapter(first, trial), adapter(second, trial)
    equal = one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    return equal and reports(first) == reports(second)


# The same numbers as a plain loop ------------------------------------------------------------------------------------


def plain_loop(setup: TinySetup, spec: TrialSpec) -> tuple[list[float], list[float], torch.nn.Module]:
    """Train by AdamW, linear warm-up and decay, and clipping; (losses, learning rates, model)."""
    set_seed(SEED)
    config = peft.LoraConfig(
        task_type="SEQ_CLS",
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=TARGETS[setup.base.shape.family, spec.targets],
        modules_to_save=SAVED.get(setup.base.shape.family),
    )
    model = peft.get_peft_model(fresh_base(setup), config)
    if spec.head == "out_proj":
        for path in FROZEN[setup.base.shape.family]:
            model.base_model.model.get_submodule(path).requires_grad_(False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    undecayed = ("bias", "norm.weight")
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for name, p in trained.items() if name.endswith(undecayed)], "weight_decay": 0.0},
            {"params": [p for name, p in trained.items() if not name.endswith(undecayed)], "weight_decay": 0.01},
        ]
    )
    warmup = 2
    step_losses, learning_rates = [], []
    order = [rows for epoch in (0, 1) for rows in batches(setup.corpus.train.lengths.tolist(), 8, SEED, epoch)]
    for step, rows in enumerate(order):
        rate = spec.learning_rate * (step / warmup if step < warmup else (STEPS - step) / (STEPS - warmup))
        for group in optimizer.param_groups:
            group["lr"] = rate
        logits, labels = forward(model.train(), setup, "train", rows)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step_losses.append(loss.item())
        learning_rates.append(rate)
    return step_losses, learning_rates, model.eval()


@pytest.mark.parametrize(
    ("family", "head", "targets"),
    [
        ("roberta", "out_proj", "ffn"),
        ("bert", "full", "qv"),
        ("distilbert", "out_proj", "qv"),
        ("deberta-v2", "full", "qv"),
        ("modernbert", "full", "qkv"),
        ("modernbert", "out_proj", "ffn"),
    ],
)
def test_trains_as_a_plain_loop_does(
    setups: dict[Family, TinySetup], tmp_path: Path, family: Family, head: str, targets: str
) -> None:
    setup = setups.get(family)
    if setup is None:
        folder = tiny_base(tmp_path / "base", family)
        AutoModel.from_pretrained(folder).save_pretrained(folder)  # the plain loop would take the language model's head
        setup = tiny_setup(folder, tmp_path / "cache")
    spec = replace(SPEC, targets=targets, head=head)
    recorder = train(setup, [plan(tmp_path, spec=spec, seed=SEED)])
    expected_losses, expected_rates, model = plain_loop(setup, spec)
    np.testing.assert_allclose(losses(recorder), expected_losses, rtol=1e-4)
    np.testing.assert_allclose([point.learning_rate for point in recorder.train_points], expected_rates, rtol=1e-9)
    rows = list(range(VALIDATION_ROWS))
    with torch.inference_mode():
        expected = forward(model, setup, "validation", rows)[0].numpy()
    np.testing.assert_allclose(plain_logits(setup, adapter_folder(recorder), rows), expected, atol=2e-4)
    assert np.abs(expected).max() > 0.1


# Reports -------------------------------------------------------------------------------------------------------------


def test_evaluations_come_at_their_steps_and_the_last_on_all_rows(recorder: Recorder) -> None:
    got = [(point.step, point.rows, point.final) for point in recorder.eval_points]
    assert got == [*((step, MONITOR_ROWS, False) for step in (5, 10, 15)), (STEPS, VALIDATION_ROWS, True)]
    assert [point.step for point in recorder.train_points] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(("log_every", "logged"), [(3, [3, 6, 9, 12, 15, 18, STEPS]), (5, [5, 10, 15, STEPS])])
def test_losses_are_reported_at_every_log_step_and_cover_all_batches(
    roberta: TinySetup, recorder: Recorder, tmp_path: Path, log_every: int, logged: list[int]
) -> None:
    """Evaluations at log steps must not swallow a point, and the last window may be a short one."""
    points = train(roberta, [plan(tmp_path)], replace(SETTINGS, log_every=log_every, eval_every=5)).train_points
    assert [point.step for point in points] == logged
    every = recorder.train_points
    for start, point in zip([0, *logged], points, strict=False):
        window = every[start : point.step]
        assert point.loss == pytest.approx(np.mean([each.loss for each in window]), rel=1e-5)
        assert point.learning_rate == window[-1].learning_rate


def require_scores(point: EvalPoint, logits: np.ndarray, labels: np.ndarray) -> None:
    probabilities = torch.from_numpy(logits).double().softmax(dim=-1).numpy()
    predicted = logits.argmax(axis=-1)
    assert point.accuracy == pytest.approx(accuracy_score(labels, predicted))
    assert unpacked(point.right, point.rows).tolist() == (predicted == labels).tolist()
    assert point.macro_f1 == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert point.loss == pytest.approx(log_loss(labels, probabilities, labels=range(4)), rel=1e-5)


def test_final_scores_are_those_of_the_adapter_in_plain_peft(roberta: TinySetup, recorder: Recorder) -> None:
    [result] = recorder.results
    assert result.final == recorder.eval_points[-1]
    rows = list(range(VALIDATION_ROWS))
    logits = plain_logits(roberta, adapter_folder(recorder), rows)
    require_scores(result.final, logits, roberta.corpus.validation.labels)
    loaded = load_with_peft(adapter_folder(recorder), roberta.base)
    np.testing.assert_allclose(predict_logits(loaded, roberta.corpus.validation, rows, 16, CPU), logits, atol=1e-5)


def test_scores_on_the_way_are_those_of_the_monitored_rows(roberta: TinySetup, tmp_path: Path) -> None:
    """A trial whose learning rate is zero is at every step as at the last, whose verdict is not read."""
    recorder = train(roberta, [plan(tmp_path, spec=replace(SPEC, learning_rate=0.0))], prune_at=(STEPS,))
    monitor = list(roberta.corpus.monitor)
    logits = plain_logits(roberta, adapter_folder(recorder), monitor)
    for point in recorder.eval_points[:-1]:
        require_scores(point, logits, roberta.corpus.validation.labels[monitor])


def test_a_result_counts_steps_rows_parameters_and_memory(recorder: Recorder) -> None:
    [result] = recorder.results
    assert (result.steps, result.total_steps, result.rows_seen) == (STEPS, STEPS, 2 * TRAIN_ROWS)
    assert result.trainable_parameters == 2 * 2 * 2 * 64 + (32 * 32 + 32) + (32 * 4 + 4)
    assert result.peak_memory_bytes > 0
    assert result.train_seconds >= 0 and result.eval_seconds >= 0


# Independence --------------------------------------------------------------------------------------------------------


def test_numbers_do_not_depend_on_other_trials(roberta: TinySetup, tmp_path: Path) -> None:
    specs = {
        "t0000": SPEC,
        "t0001": replace(SPEC, dropout=0.2, targets="ffn"),
        "t0002": replace(SPEC, head="out_proj", rank=3),
    }
    settings = replace(SETTINGS, epochs=1, base_dropout=0.1)

    def trained(folder: str, trials: list[str]) -> Recorder:
        return train(roberta, [plan(tmp_path / folder, trial, specs[trial]) for trial in trials], settings)

    forwards, backwards = trained("forwards", sorted(specs)), trained("backwards", sorted(specs, reverse=True))
    assert all(same_trial(forwards, backwards, trial) for trial in specs)


def test_a_model_is_gone_before_the_next_is_built(roberta: TinySetup, tmp_path: Path) -> None:
    def models() -> int:
        return sum(issubclass(type(thing), peft.PeftModel) for thing in gc.get_objects())

    gc.collect()
    before, alive = models(), []
    engine = TrainerEngine(roberta.base, roberta.corpus, replace(SETTINGS, epochs=1))
    source = Plans([plan(tmp_path, "t0000"), plan(tmp_path, "t0001")], asked=lambda: alive.append(models()))
    engine.run(source, Recorder())
    assert alive == [before] * 3


# Ends ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("log_every", "eval_every", "name"),
    [(1, 3000, "training loss"), (3000, 5, "validation loss"), (3000, 3000, "training loss")],
    ids=["at a log step", "at an evaluation", "at the last step alone"],
)
def test_a_loss_that_is_not_finite_fails_the_trial(
    roberta: TinySetup, recorder: Recorder, tmp_path: Path, log_every: int, eval_every: int, name: str
) -> None:
    settings = replace(SETTINGS, log_every=log_every, eval_every=eval_every)
    diverging = replace(SPEC, learning_rate=1e30)
    found = train(roberta, [plan(tmp_path, "diverging", diverging), plan(tmp_path)], settings)
    [(trial, error)] = found.failures
    assert trial == "diverging" and isinstance(error, TrainingError)
    assert f"the {name} became nan" in str(error) and "lr=1e+30" in str(error)
    assert all(math.isfinite(point.loss) for point in [*found.train_points, *found.eval_points])
    assert not (tmp_path / "diverging" / "adapter").exists()
    [result] = found.results
    assert result.final is not None
    assert untimed([result.final]) == untimed(recorder.eval_points[-1:])


def test_an_unexpected_error_is_reported_and_raised(roberta: TinySetup, tmp_path: Path) -> None:
    class Broken(Recorder):
        def logged(self, points: object) -> None:
            raise RuntimeError("the screen is gone")

    recorder = Broken()
    engine = TrainerEngine(roberta.base, roberta.corpus, SETTINGS)
    source = Plans([plan(tmp_path, "t0000"), plan(tmp_path, "t0001")])
    with pytest.raises(RuntimeError, match="the screen is gone"):
        engine.run(source, recorder)
    assert [trial for trial, _ in recorder.failures] == ["t0000"]
    assert [left.trial for left in source.plans] == ["t0001"]


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(roberta: TinySetup, tmp_path: Path) -> None:
    [(_, _, checkpoint)] = train(roberta, [plan(tmp_path)], stop_at=4).checkpoints
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        whole = (checkpoint / name).read_bytes()
        torch.save(Payload(tmp_path / "created"), checkpoint / name)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            train(roberta, [plan(tmp_path, checkpoint=checkpoint)])
        (checkpoint / name).write_bytes(whole)
    assert not (tmp_path / "created").exists()


# Precision -----------------------------------------------------------------------------------------------------------


def test_bf16_where_there_is_none_is_refused_before_any_trial(
    roberta: TinySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    with pytest.raises(TrainingError, match=r"bf16.*`precision: auto`"):
        TrainerEngine(roberta.base, roberta.corpus, replace(SETTINGS, precision="bf16"))
    assert not TrainerEngine(roberta.base, roberta.corpus, replace(SETTINGS, precision="auto")).bf16


def test_bf16_computes_otherwise_and_keeps_fp32_files(roberta: TinySetup, recorder: Recorder, tmp_path: Path) -> None:
    if not device.has_bf16(device.training_device()):
        pytest.skip("this device does not compute in bf16")
    auto, bf16 = (
        train(roberta, [plan(tmp_path / precision)], replace(SETTINGS, precision=precision))  # type: ignore[arg-type]
        for precision in ("auto", "bf16")
    )
    assert same_trial(auto, bf16)
    assert losses(auto)[0] != losses(recorder)[0]
    assert losses(auto)[0] == pytest.approx(losses(recorder)[0], rel=0.02)
    assert {tensor.dtype for tensor in adapter(auto).values()} == {torch.float32}


@pytest.mark.gpu
def test_an_adapter_trained_on_cuda_gives_the_same_logits_on_the_cpu(roberta: TinySetup, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    spec = TrialSpec("all-linear", rank=2, alpha=8, dropout=0.1, learning_rate=1e-2)
    recorder = train(roberta, [plan(tmp_path, spec=spec)], replace(SETTINGS, base_dropout=0.1))
    [result] = recorder.results
    assert result.final is not None
    assert 0 < result.peak_memory_bytes == torch.cuda.max_memory_allocated()
    rows, base = list(range(VALIDATION_ROWS)), resolve(str(roberta.base.folder))
    on_cpu, on_cuda = (
        predict_logits(
            load_with_peft(adapter_folder(recorder), base).to(place), roberta.corpus.validation, rows, 16, place
        )
        for place in (CPU, torch.device("cuda"))
    )
    np.testing.assert_allclose(on_cpu, on_cuda, atol=1e-3)
    expected = mean_cross_entropy(on_cpu, roberta.corpus.validation.labels)
    assert result.final.loss == pytest.approx(expected, rel=1e-3)


# In a process of its own, as the command line sets it up -------------------------------------------------------------

# Trains, is stopped, resumes, prunes, fails and loads an adapter, and writes down imports and network calls.
SCRIPT = """
import json, os, sys, warnings
from pathlib import Path

from agnews_lora import ENVIRONMENT

os.environ |= ENVIRONMENT
warnings.simplefilter("ignore")
asked = []
CALLS = {"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
sys.addaudithook(lambda event, args: asked.append(repr(args)) if event in CALLS else None)

from dataclasses import replace

from agnews_lora.adapters.adapter_files import load_with_peft
from tests.training.conftest import SETTINGS, SPEC, Recorder, plan, tiny_setup, train

base, folder, report = map(Path, sys.argv[1:])
setup = tiny_setup(base, folder / "cache")
*_, (_, _, checkpoint) = train("trainer", setup, [plan(folder)], recorder=Recorder(stop_at=9)).checkpoints
[result] = train("trainer", setup, [plan(folder, checkpoint=checkpoint)]).results
load_with_peft(result.adapter, setup.base)
diverging = plan(folder, "t0001", replace(SPEC, learning_rate=1e30))
recorder = train("trainer", setup, [diverging, plan(folder, "t0002")], recorder=Recorder(prune_at=(5,)))
ended = [len(recorder.failures), recorder.results[0].steps]
imported = sorted({"optuna", "mlflow", "pydantic", "matplotlib", "ruamel"} & set(sys.modules))
report.write_text(json.dumps({"imported": imported, "asked": asked, "ended": ended}))
"""


def test_the_engine_is_silent_offline_and_loads_no_library_of_search_or_tracking(
    roberta: TinySetup, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", SCRIPT, str(roberta.base.folder), str(tmp_path), str(report)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.stdout, process.stderr) == ("", "")
    assert json.loads(report.read_text()) == {"imported": [], "asked": [], "ended": [1, 5]}


LAUNCHED = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29512",
    "OMPI_COMM_WORLD_SIZE": "2",
    "PMI_SIZE": "2",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "FSDP_VERSION": "2",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
    "SLURM_NTASKS": "2",
}


def test_variables_of_a_launcher_change_nothing(
    roberta: TinySetup, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainer would wait for the second process for ever."""
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    assert same_trial(train(roberta, [plan(tmp_path)]), recorder)
    assert {name: os.environ.get(name) for name in LAUNCHED} == LAUNCHED
