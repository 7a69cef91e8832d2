"""The kernels that are used, and training that outlives their failure."""

import logging
import platform
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from agnews_lora.training.multilora import kernels
from agnews_lora.training.multilora.encoder import Layer
from agnews_lora.training.multilora.kernels import KernelChoice, UnsuitableError
from agnews_lora.training.multilora.kernels.reference import Kernels
from agnews_lora.training.multilora.model import MultiLoraModel, SlotBatch
from agnews_lora.training.multilora.packing import DeviceTokens
from tests.training.conftest import TinySetup
from tests.training.multilora.test_model import NEIGHBOUR, ROWS, model_of, state_of, trained_model

CPU = torch.device("cpu")


class Fast(Kernels):
    """Kernels of a device, that fail in a pass with `fault`, or when they are built with `unbuilt`."""

    name = "fast"
    fault: Exception | None = None
    unbuilt: Exception | None = None
    passes = 0

    def __init__(self, layers: Sequence[Layer], dtype: torch.dtype) -> None:
        super().__init__(layers)
        if Fast.unbuilt is not None:
            raise Fast.unbuilt

    def gelu(self, z: torch.Tensor, training: bool) -> Any:
        Fast.passes += 1
        if Fast.fault is not None:
            raise Fast.fault
        return super().gelu(z, training)


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_fastest", lambda _: Fast)
    for name in ("fault", "unbuilt"):
        monkeypatch.setattr(Fast, name, None)
    monkeypatch.setattr(Fast, "passes", 0)


def gradients(model: MultiLoraModel, setup: TinySetup) -> torch.Tensor:
    tokens = DeviceTokens(setup.corpus.train, CPU, model.encoder.padding_id)
    model.slots.place(0, NEIGHBOUR, state_of(trained_model(setup, NEIGHBOUR)))
    model.step(tokens, [SlotBatch(0, ROWS, 1e-2, 1, 0)], 0.0, 0.0)
    return model.slots.weights


def test_the_fast_ones_are_used_where_there_are_any(roberta: TinySetup, caplog: pytest.LogCaptureFixture) -> None:
    model = model_of(roberta, 1)
    gradients(model, roberta)
    assert model.choice.kernels.name == "fast" and Fast.passes == 2 and not caplog.messages


def test_training_goes_on_where_they_fail_in_a_pass(
    roberta: TinySetup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = gradients(model_of(roberta, 1), roberta)
    monkeypatch.setattr(Fast, "fault", RuntimeError("an illegal instruction"))
    model = model_of(roberta, 1)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(gradients(model, roberta), expected)
    [warning] = caplog.messages
    assert "torch alone" in warning and "an illegal instruction" in warning
    assert model.choice.kernels.name == "torch" and "an illegal instruction" in model.choice.reason


@pytest.mark.parametrize(
    ("error", "warns"), [(UnsuitableError("this CPU has no AVX512-BF16"), False), (OSError("no cc"), True)]
)
def test_torch_computes_where_they_cannot_be_built(
    roberta: TinySetup,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    warns: bool,
) -> None:
    monkeypatch.setattr(Fast, "unbuilt", error)
    with caplog.at_level(logging.WARNING):
        choice = model_of(roberta, 1).choice
    assert choice.kernels.name == "torch" and str(error) in choice.reason
    assert bool(caplog.messages) == warns


@pytest.mark.parametrize("fault", [ZeroDivisionError("no"), torch.OutOfMemoryError("no")])
def test_a_fault_that_is_not_theirs_is_raised(roberta: TinySetup, fault: Exception) -> None:
    choice = KernelChoice(model_of(roberta, 1).encoder.layers, CPU, torch.float32)

    def failing() -> None:
        raise fault

    with pytest.raises(type(fault)):
        choice.run(failing)
    assert choice.kernels.name == ("fast" if isinstance(fault, torch.OutOfMemoryError) else "torch")


def test_it_is_said_what_would_compute_or_what_is_lacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the real ones
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert "torch alone" in kernels.described(CPU) and "riscv64" in kernels.described(CPU)
    assert "torch alone" in kernels.described(torch.device("mps"))
