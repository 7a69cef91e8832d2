"""Processes that take turns: what they find, or how they ended."""

import os
from collections.abc import Callable

import pytest

from benchmarks.throughput.turns import Process


def twice(text: str, wait: Callable[[], None]) -> str:
    for _ in range(2):
        print("a library's own words")
        wait()
    return 2 * text


def fails(text: str, wait: Callable[[], None]) -> None:
    wait()
    raise ValueError(f"no such\n{text}")


def dies(text: str, wait: Callable[[], None]) -> None:
    os._exit(7)


@pytest.mark.parametrize(
    ("function", "turns", "found"),
    [("twice", 3, "abab"), ("fails", 2, "ValueError: no such ab"), ("dies", 1, "the process died (exit code 7)")],
)
def test_a_process_works_in_its_turns_and_tells_its_end(
    function: str, turns: int, found: str, capfd: pytest.CaptureFixture[str]
) -> None:
    process = Process(__name__, function, "ab")
    while process.found is None:
        process.next_turn()
    assert (process.turns, process.found) == (turns, found)
    assert capfd.readouterr().out == ""
