"""Which steps are captured, and what happens where that fails. The tests of the kernels capture real ones."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from agnews_lora.training.multilora.graphs import Captured, StepGraphs
from agnews_lora.training.multilora.packing import empty_buffer, in_one_copy

CPU = torch.device("cpu")


class Noting(StepGraphs):
    """Notes what is captured. error: raised by a capture."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(CPU)
        self.reason, self.error, self.calls = "", error, 0

    def _capture(self, arrays: Any, compute: Any) -> Captured:
        self.calls += 1
        if self.error is not None:
            raise self.error
        buffer, result = empty_buffer(arrays, CPU), torch.zeros(1, dtype=torch.int64)
        parts = in_one_copy(arrays, CPU, buffer)
        return Captured(lambda: result.copy_(compute(parts)), buffer, result)  # type: ignore[arg-type, return-value]


def doubled(parts: Sequence[Tensor]) -> Tensor:
    return 2 * parts[0]


def steps(graphs: StepGraphs, *given: tuple[int, str, int]) -> list[int]:
    return [graphs.run(version, sizes, [np.array([value])], doubled).item() for version, sizes, value in given]  # type: ignore


def test_a_step_is_captured_where_its_sizes_occur_again() -> None:
    graphs = Noting()
    assert steps(graphs, (1, "a", 1), (1, "b", 2), (1, "a", 3), (1, "a", 4), (1, "c", 5)) == [2, 4, 6, 8, 10]
    assert graphs.calls == 1 and list(graphs.captured) == ["a"] and str(graphs) == "steps replayed as CUDA graphs"
    assert steps(graphs, (2, "a", 6)) == [12]  # other slots
    assert not graphs.captured


def test_where_a_capture_fails_steps_are_launched_and_the_reason_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    graphs = Noting(RuntimeError("operation not permitted\nwhen stream is capturing"))
    assert steps(graphs, *[(1, "a", value) for value in range(5)]) == [0, 2, 4, 6, 8]
    assert graphs.calls == 1
    assert "RuntimeError: operation not permitted when stream is capturing" in str(graphs)
    assert len(caplog.messages) == 1


def test_without_memory_for_another_step_the_captured_ones_are_dropped() -> None:
    graphs = Noting()
    steps(graphs, (1, "a", 1), (1, "a", 1))
    full = Mock(side_effect=[torch.OutOfMemoryError("full"), torch.tensor([7])])
    assert graphs.run(1, "b", [np.array([1])], full).item() == 7
    assert not graphs.captured
    assert steps(graphs, (1, "a", 2)) == [4] and list(graphs.captured) == ["a"]
    with pytest.raises(torch.OutOfMemoryError):
        Noting().run(1, "a", [np.array([1])], Mock(side_effect=torch.OutOfMemoryError("full")))
