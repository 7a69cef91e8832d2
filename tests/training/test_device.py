import pytest
import torch

from agnews_lora.errors import TrainingError
from agnews_lora.training import device
from agnews_lora.training.device import computes_in_bf16, device_name, has_bf16, training_device

CPU = torch.device("cpu")


def test_the_device_is_named_and_tells_whether_it_has_bf16() -> None:
    assert device_name(CPU) == f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    assert training_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(has_bf16(training_device()), bool)


@pytest.mark.gpu
def test_a_gpu_names_itself() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    assert device_name(training_device()) == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    ("precision", "there", "expected"),
    [("fp32", True, False), ("fp32", False, False), ("auto", True, True), ("auto", False, False), ("bf16", True, True)],
)
def test_precision_follows_the_setting_and_the_device(
    precision: device.Precision, there: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: there)
    assert computes_in_bf16(CPU, precision) is expected


def test_bf16_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_bf16", lambda _: False)
    with pytest.raises(TrainingError, match=r"CPU .* threads has none. Use `precision: auto`"):
        computes_in_bf16(CPU, "bf16")
