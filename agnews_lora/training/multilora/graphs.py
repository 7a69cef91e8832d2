"""Steps that a GPU replays: the host launches the hundreds of kernels of a step as one CUDA graph.

A graph holds kernels with their sizes, and the addresses of all that they read and write. A step is captured if another
one with the same sizes is known; whatever else differs between the two lies in arrays that are copied to the same place
on the device before each replay.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from agnews_lora.training.multilora.packing import empty_buffer, in_one_copy, on_device

# A pass over more takes the device longer than the host needs to launch its kernels one by one (an estimate: not
# measured), and the tokens that fill its bucket would be computed for nothing.
MOST_TOKENS = 32_768

Compute = Callable[[Sequence[Tensor]], Tensor]  # what a step computes on the device of the arrays that it is told


@dataclass(frozen=True)
class Captured:
    """A step that can be replayed. buffer: of its arrays. result: of every replay, until the next one."""

    replay: Callable[[], None]
    buffer: Tensor
    result: Tensor


class StepGraphs:
    """The steps of a model that have been captured. reason: for which none are, or empty."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reason = "" if device.type == "cuda" else f"there are no CUDA graphs for {device.type}"
        self.version: Hashable = None
        self.clear()

    def __str__(self) -> str:
        return f"no replayed steps: {self.reason}" if self.reason else "steps replayed as CUDA graphs"

    def clear(self) -> None:
        """Forget all steps, and free their memory."""
        self.seen: set[Hashable] = set()
        self._free()

    def _free(self) -> None:
        self.captured: dict[Hashable, Captured] = {}
        self.pool: Any = None  # of memory that the graphs share: no two run at once

    def run(self, version: Hashable, sizes: Hashable, arrays: Sequence[npt.NDArray[Any]], compute: Compute) -> Tensor:
        """Compute a step of `arrays`, by a replay where there is one.

        Args:
            version: of the tensors that steps read beside the arrays: with another one, all are captured anew.
            sizes: all on which the step's operations depend, beside the values of the arrays.
        """
        if version != self.version:
            self.version = version
            self.clear()
        if self.reason or sizes not in self.seen:
            self.seen.add(sizes)
            return self._at_first(arrays, compute)
        if sizes not in self.captured:
            try:
                self.captured[sizes] = self._capture(arrays, compute)
            except Exception as error:  # a driver may raise anything
                self.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                logging.getLogger(__name__).warning("steps are not replayed, which is slower (%s)", self.reason)
        if self.reason:  # outside of the handler, whose traceback keeps the failed pass's memory alive
            self.clear()
            return compute(on_device(arrays, self.device))
        step = self.captured[sizes]
        in_one_copy(arrays, self.device, step.buffer)
        step.replay()
        return step.result.clone()

    def _at_first(self, arrays: Sequence[npt.NDArray[Any]], compute: Compute) -> Tensor:
        """Compute a step without a graph: it compiles its kernels, and the next with these sizes may be captured."""
        try:
            return compute(on_device(arrays, self.device))
        except torch.OutOfMemoryError:
            if not self.captured:
                raise
        self._free()  # outside of the handler, for the same reason
        return compute(on_device(arrays, self.device))

    def _capture(self, arrays: Sequence[npt.NDArray[Any]], compute: Compute) -> Captured:
        buffer = empty_buffer(arrays, self.device)
        parts = in_one_copy(arrays, self.device, buffer)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        # Other threads write checkpoints meanwhile: what they ask of the driver is not part of the step.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = compute(parts)
        return Captured(graph.replay, buffer, result)
