"""The threads of a CPU, each with passes of its own."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from math import ceil
from typing import TypeVar

import torch

MIN_SHARE = 8  # rows: a pass over fewer takes hardly less time

Item = TypeVar("Item")
Value = TypeVar("Value")


class Threads:
    """A number of threads (by default as many as torch's own); each computes its products alone."""

    def __init__(self, number: int | None = None) -> None:
        self.number = number or torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.number, initializer=torch.set_num_threads, initargs=(1,))

    def shares(self, batches: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
        """Cut each batch of rows into the shares that passes of their own compute.

        Every thread gets whole batches as long as there are enough. Those left over are cut into even shares of at
        least `MIN_SHARE`, one a thread.
        """
        num_left = len(batches) % self.number
        num_whole = len(batches) - num_left

        def cut(rows: Sequence[int], number: int) -> list[Sequence[int]]:
            most = 1 if number < num_whole else self.number // num_left
            size = ceil(len(rows) / max(1, min(most, len(rows) // MIN_SHARE)))
            return [rows[start : start + size] for start in range(0, len(rows), size)]

        return [cut(rows, number) for number, rows in enumerate(batches)]

    def map(self, call: Callable[[Item], Value], items: Sequence[Item]) -> Iterator[Value]:
        """Call `call` on every item and give the values in order; no more calls start than there are threads.

        If a call raises, those beside it have ended before its error is raised here.
        """
        for start in range(0, len(items), self.number):
            group = [self.pool.submit(call, item) for item in items[start : start + self.number]]
            wait(group)
            yield from (each.result() for each in group)

    def alone(self, call: Callable[[], Value]) -> Value:
        """Call `call` on one of the threads: torch's own would go on spinning for a while, in the way of the passes."""
        return self.pool.submit(call).result()
