"""What a trial reported, on disk in its work folder before any store has it.

A line a point, then one for how it ended: whatever happens to a store or to this process, nothing that was observed is
lost, and nothing is taken down twice. A point is known by (kind, step): a trial that goes on from a checkpoint reports
the steps behind it again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from agnews_lora.errors import StorageError
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialResult

FILE: Final = "journal.jsonl"

Point = TrainPoint | EvalPoint
RunState = Literal["COMPLETE", "PRUNED", "FAILED", "INTERRUPTED"]


@dataclass(frozen=True)
class End:
    """How a trial ended. reason: one line, for the study. report: in full, for the run of a failed trial."""

    state: RunState
    result: TrialResult | None = None
    reason: str | None = None
    report: str | None = None


class FolderGone(StorageError):
    """The work folder is not there any more: another process on this machine has ended the trial and removed it."""


class Journal:
    """The journal of one trial; what an earlier process left of it is read first.

    folder: the trial's work folder, made where there is none.

    Raises:
        StorageError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.points: list[Point] = []
        self.end: End | None = None
        self._known: set[tuple[type[Point], int]] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            sound = [line for line in lines if self._read(line, folder)]
            if len(sound) < len(lines):  # torn by a kill or a power cut: the next line must be whole
                beside = self.path.with_suffix(".partial")
                beside.write_bytes(b"".join(sound))
                beside.replace(self.path)
        except OSError as error:
            raise self._fault(error) from error

    def add(self, points: Sequence[Point]) -> list[Point]:
        """Write points down; those of them that were not known."""
        new = [point for point in points if (type(point), point.step) not in self._known]
        self._write([{type(point).__name__: asdict(point)} for point in new])
        for point in new:
            self._take(point)
        return new

    def finish(self, end: End) -> None:
        """Write down how the trial ended."""
        result = asdict(end.result) if end.result else None
        if result is not None:
            result["adapter"] = end.result.adapter.name if end.result and end.result.adapter else None
        self._write([{"End": {**asdict(end), "result": result}}])
        self.end = end

    def _take(self, point: Point) -> None:
        if (type(point), point.step) not in self._known:  # two may have written, one of them after a long pause
            self.points.append(point)
            self._known.add((type(point), point.step))

    def _write(self, entries: Sequence[dict[str, Any]]) -> None:
        if not entries:
            return
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError as error:
            raise FolderGone(self._fault(error)) from error
        except OSError as error:
            raise self._fault(error) from error

    def _read(self, line: bytes, folder: Path) -> bool:
        """Take in a line; False where it is not whole."""
        if not line.endswith(b"\n"):
            return False
        try:
            [(kind, entry)] = json.loads(line).items()
            match kind:
                case "TrainPoint":
                    self._take(TrainPoint(**entry))
                case "EvalPoint":
                    self._take(EvalPoint(**entry))
                case _:
                    self.end = _end(entry, folder)
        except (ValueError, TypeError, KeyError, AttributeError):
            return False
        return True

    def _fault(self, error: OSError) -> StorageError:
        return StorageError(
            f"what a trial reports is kept in {self.path} first, but it cannot be written ({error.strerror}); free or "
            "unlock that folder, and start again: the trial goes on from its last checkpoint"
        )


def _end(entry: dict[str, Any], folder: Path) -> End:
    result = entry["result"]
    if result is not None:
        final, adapter = result["final"], result["adapter"]
        result = TrialResult(
            **{
                **result,
                "final": EvalPoint(**final) if final else None,
                "adapter": folder / Path(adapter).name if adapter else None,
            }
        )
    return End(entry["state"], result, entry["reason"], entry["report"])
