"""The device that trials train on, and the precision it computes in."""

import resource
import sys

import torch

from agnews_lora.errors import TrainingError
from agnews_lora.training.interface import Precision


def training_device() -> torch.device:
    """Choose the current CUDA device where there is one, else the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name(device: torch.device) -> str:
    """Name the device, with the instruction set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def has_bf16(device: torch.device) -> bool:
    """Tell whether the device multiplies in bf16 itself; a CPU that emulates it would only be slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def computes_in_bf16(device: torch.device, precision: Precision) -> bool:
    """Tell whether training computes in bf16 (weights, moments and the adapter's files stay fp32).

    Raises:
        TrainingError: the precision is bf16 and the device does not have it.
    """
    if precision == "bf16" and not has_bf16(device):
        raise TrainingError(f"Cannot train in bf16: {device_name(device)} has none. Use `precision: auto`.")
    return precision != "fp32" and has_bf16(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Read the peak memory of the device since its last reset (CUDA), or of the process (CPU)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
