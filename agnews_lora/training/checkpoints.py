"""Checkpoints as folders: sealed by the hashes of their files, and the newest kept.

Both engines write theirs through `written`; a trial is resumed from `newest`. The seal is written last: a folder
without a matching seal is no checkpoint, whether a killed process or a failing disk left it there.
"""

import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from safetensors import SafetensorError

from agnews_lora.errors import StorageError
from agnews_lora.paths import sha256_of

KEPT: Final = 2
SEAL: Final = "seal.json"
PARTIAL: Final = ".partial"

_NAME = re.compile(r"checkpoint-(0|[1-9][0-9]{0,17})")


def folder_of(trial_folder: Path, step: int) -> Path:
    """Name the folder of a step's checkpoint."""
    return trial_folder / f"checkpoint-{step}"


def step_of(checkpoint: Path) -> int:
    """Read the step of a checkpoint from its folder's name.

    Raises:
        ValueError: `folder_of` gives no such name.
    """
    if (match := _NAME.fullmatch(checkpoint.name)) is None:
        raise ValueError(f"A checkpoint's folder must be named checkpoint-<step>, but got {checkpoint.name!r}.")
    return int(match[1])


def partial_of(trial_folder: Path) -> Path:
    """Name the folder in which a checkpoint lies, under its own name, until it is whole."""
    return trial_folder / f"checkpoint{PARTIAL}"


def seal(checkpoint: Path) -> None:
    """Write the hash of every file of a checkpoint beside them, once all of them are on the disk.

    Raises:
        OSError: a file cannot be read, or the seal not be written.
        ValueError: it holds something else than files and folders.
    """
    files = _files(checkpoint)
    for path in files.values():
        _sync(path)
    (checkpoint / SEAL).write_text(
        json.dumps({name: sha256_of(path) for name, path in files.items()}, indent=2), encoding="utf-8"
    )
    _sync(checkpoint / SEAL)
    for folder, _, _ in os.walk(checkpoint):
        _sync(Path(folder))


def is_sound(checkpoint: Path) -> bool:
    """Tell whether the seal lists exactly the folder's files, with their hashes. Reads nothing outside of the folder.

    Garbage of any kind is not sound, and neither is a folder with nothing but a seal.
    """
    try:
        if not stat.S_ISREG((checkpoint / SEAL).lstat().st_mode):
            return False
        digests = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
        files = _files(checkpoint)
        if not isinstance(digests, dict) or not files or digests.keys() != files.keys():
            return False
        return all(sha256_of(path) == digests[name] for name, path in files.items())
    except (OSError, ValueError, RecursionError):
        return False


def newest(trial_folder: Path) -> Path | None:
    """Find the sound checkpoint of the latest step."""
    return next((each for each in _by_step(trial_folder) if is_sound(each)), None)


def drop_old(trial_folder: Path) -> None:
    """Keep the newest `KEPT` sound checkpoints; remove all others, and partial ones.

    A folder that cannot be removed only takes space; the next checkpoint tries again.
    """
    kept = 0
    for checkpoint in _by_step(trial_folder):
        if kept < KEPT and is_sound(checkpoint):
            kept += 1
        else:
            shutil.rmtree(checkpoint, ignore_errors=True)
    for left in trial_folder.glob(f"*{PARTIAL}"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def written(trial: str, trial_folder: Path, step: int) -> Iterator[Path]:
    """Give an empty folder to write a checkpoint into; seal it, move it to its place and drop the old ones.

    Checkpoints of later steps go too: the trial started again before them. A write that fails changes nothing.

    Raises:
        StorageError: the checkpoint cannot be written.
    """
    checkpoint = folder_of(trial_folder, step)
    beside = partial_of(trial_folder) / checkpoint.name
    try:
        shutil.rmtree(beside.parent, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        seal(beside)
        if checkpoint.exists():
            checkpoint.replace(beside.with_name("replaced"))
        beside.replace(checkpoint)
        _sync(trial_folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _is_torch_writer(error):
            raise
        shutil.rmtree(beside.parent, ignore_errors=True)
        raise StorageError(
            f"Cannot write the checkpoint of {trial} at step {step} to {trial_folder}: "
            f"{getattr(error, 'strerror', None) or error}. Free or unlock that folder, and start again: the trial "
            "resumes from the checkpoint before."
        ) from error
    for later in _by_step(trial_folder):
        if step_of(later) > step:
            shutil.rmtree(later, ignore_errors=True)
    drop_old(trial_folder)


def _is_torch_writer(error: RuntimeError) -> bool:
    """Tell whether torch could not write a file: it raises a plain RuntimeError."""
    return any(sign in str(error) for sign in ("inline_container", "PytorchStreamWriter", "Parent directory"))


def _by_step(trial_folder: Path) -> list[Path]:
    """List the folders named as checkpoints, sound or not, the latest step first; none if they cannot be listed."""
    try:
        named = [path for path in trial_folder.iterdir() if _NAME.fullmatch(path.name)]
    except OSError:
        return []
    return sorted(named, key=step_of, reverse=True)


def _files(checkpoint: Path) -> dict[str, Path]:
    """List a checkpoint's files but for the seal: {name relative to the checkpoint: path}.

    Raises:
        OSError: it cannot be listed.
        ValueError: a link, or anything else that is neither file nor folder.
    """

    files = {}
    for path in checkpoint.rglob("*"):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            files[path.relative_to(checkpoint).as_posix()] = path
        elif not stat.S_ISDIR(mode):
            raise ValueError(f"{path} is neither a file nor a folder")
    files.pop(SEAL, None)
    return files


def _sync(path: Path) -> None:
    """Flush a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
