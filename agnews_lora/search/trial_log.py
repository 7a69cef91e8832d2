"""The trial log: a trial's events, appended and fsynced in its work folder before any store has them.

A line per point, then one for how the trial ended. So nothing is lost, whatever happens to a store or to this process,
and nothing is recorded twice: a point is known by (kind, step), and a trial that resumes from a checkpoint reports the
steps behind it again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from agnews_lora.errors import StorageError
from agnews_lora.paths import write_whole
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialEnd, TrialResult

FILE: Final = "trial.jsonl"

Point = TrainPoint | EvalPoint


class TrialLog:
    """Reads what an earlier process left of a trial's log, and appends to it.

    Args:
        folder: the trial's work folder, created if missing.

    Raises:
        StorageError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.points: list[Point] = []
        self.end: TrialEnd | None = None
        self._known: set[tuple[type[Point], int]] = set()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
            sound = [line for line in lines if self._read(line, folder)]
            if len(sound) < len(lines):  # torn by a kill or a power cut: the next line must be whole
                write_whole(self.path, b"".join(sound))
        except OSError as error:
            raise self._fault(error) from error

    @property
    def evaluation(self) -> EvalPoint | None:
        """The last one."""
        return next((point for point in reversed(self.points) if isinstance(point, EvalPoint)), None)

    def append(self, points: Sequence[Point]) -> None:
        """Write the points that are new."""
        new = [point for point in points if (type(point), point.step) not in self._known]
        self._write([{type(point).__name__: asdict(point)} for point in new])
        for point in new:
            self._take(point)

    def finish(self, end: TrialEnd) -> None:
        """Write how the trial ended."""
        result = asdict(end.result) if end.result else None
        if result is not None:
            result["adapter"] = end.result.adapter.name if end.result and end.result.adapter else None
        self._write([{"TrialEnd": {**asdict(end), "result": result}}])
        self.end = end

    def _take(self, point: Point) -> None:
        if (type(point), point.step) not in self._known:
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
            f"Cannot write the trial log {self.path}: {error.strerror}. Free space or fix the folder's permissions, "
            "and start again: the trial resumes from its last checkpoint."
        )


def _end(entry: dict[str, Any], folder: Path) -> TrialEnd:
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
    return TrialEnd(entry["state"], result, entry["reason"], entry["report"])
