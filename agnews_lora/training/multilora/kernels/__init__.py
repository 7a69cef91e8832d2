"""The operations of the pass through the encoder, and the choice of the code that computes them."""

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from agnews_lora.training.multilora.encoder import Layer
from agnews_lora.training.multilora.kernels.reference import Kernels

Value = TypeVar("Value")


class UnsuitableError(Exception):
    """Kernels that do not compute such a model on such a device: the message names what they lack."""


class KernelChoice:
    """The fastest kernels that there are for a model, until they fail; then those in plain torch.

    kernels: those in use. reason: for them, in one line.
    """

    def __init__(self, layers: Sequence[Layer], device: torch.device, dtype: torch.dtype) -> None:
        self.layers = layers
        self.kernels, self.reason = Kernels(layers), ""
        try:
            self.kernels, self.reason = _fastest(device)(layers, dtype), "the fastest that there are"
        except UnsuitableError as error:
            self.reason = str(error)
        except Exception as error:  # a compiler may raise anything
            self._fall_back(error)

    def run(self, call: Callable[[], Value]) -> Value:
        """Call `call`, which asks for `kernels`; where it fails by kernels of our own, call it again by torch's."""
        used = self.kernels
        if type(used) is Kernels:
            return call()
        try:
            return call()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may raise anything; a fault of the program is raised again below
            if self.kernels is used:  # else another thread has met it
                self._fall_back(error)
        return call()

    def _fall_back(self, error: Exception) -> None:
        cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        logging.getLogger(__name__).warning("layers are computed by torch alone, which is slower (%s)", cause)
        self.kernels, self.reason = Kernels(self.layers), f"the faster ones failed ({cause})"


def described(device: torch.device) -> str:
    """Name the kernels that there are for passes in bf16 on a device, or the reason for torch alone."""
    try:
        _fastest(device)
        if device.type == "cpu":
            from agnews_lora.training.multilora.kernels.cpu import compiler

            return f"in C, for training in bf16, compiled by {' '.join(compiler())}"
    except UnsuitableError as error:
        return f"torch alone, which is slower: {error}"
    return "in Triton, for training in bf16"


def _fastest(device: torch.device) -> Callable[[Sequence[Layer], torch.dtype], Kernels]:
    """Give the constructor of the kernels for a device.

    Raises:
        UnsuitableError: there are none.
    """
    if device.type == "cpu":
        from agnews_lora.training.multilora.kernels.cpu import CpuKernels

        return CpuKernels
    if device.type == "cuda":
        try:
            from agnews_lora.training.multilora.kernels.cuda import CudaKernels
        except ImportError as error:
            raise UnsuitableError(f"Triton cannot be imported ({error})") from error
        return CudaKernels
    raise UnsuitableError(f"there are none for {device.type}")
