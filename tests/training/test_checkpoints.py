"""Checkpoints as folders: what is sound, which is the newest, what is kept, and a disk that does not take them."""

import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from agnews_lora.errors import StorageError
from agnews_lora.training import checkpoints
from agnews_lora.training.checkpoints import SEAL, drop_old, folder_of, is_sound, newest, seal, step_of, written


def write(trial_folder: Path, step: int) -> Path:
    """A sealed checkpoint of two files, one of them in a folder."""
    checkpoint = folder_of(trial_folder, step)
    (checkpoint / "inner").mkdir(parents=True)
    (checkpoint / "tensors").write_bytes(bytes(range(256)) * step)
    (checkpoint / "inner" / "state").write_text(str(step))
    seal(checkpoint)
    return checkpoint


def steps(trial_folder: Path) -> list[int]:
    return sorted(step_of(path) for path in trial_folder.iterdir())


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """A disk that takes no file larger than this: the system refuses to write on, as it does where none is left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Seals ----------------------------------------------------------------------------------------------------------------


def test_a_seal_lists_every_file_with_its_hash(tmp_path: Path) -> None:
    checkpoint = write(tmp_path, 0)
    assert json.loads((checkpoint / SEAL).read_text()) == {
        "tensors": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "inner/state": "5feceb66ffc86f38d952786c6d696c79c2dbc239dd4e91b46729d73a27fb57e9",
    }
    assert is_sound(checkpoint)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs to see which file a descriptor is of")
def test_the_seal_comes_last_and_everything_is_on_the_disk_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, bool]] = []

    def sync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        synced.append((path.relative_to(tmp_path).as_posix(), (tmp_path / "checkpoint-3" / SEAL).exists()))

    monkeypatch.setattr(os, "fsync", sync)
    write(tmp_path, 3)
    files, last, folders = synced[:2], synced[2], synced[3:]
    assert sorted(files) == [("checkpoint-3/inner/state", False), ("checkpoint-3/tensors", False)]
    assert last == (f"checkpoint-3/{SEAL}", True)
    assert sorted(folders) == [("checkpoint-3", True), ("checkpoint-3/inner", True)]


def _flip(checkpoint: Path) -> None:
    whole = bytearray((checkpoint / "tensors").read_bytes())
    whole[-1] ^= 1
    (checkpoint / "tensors").write_bytes(whole)


def _reseal(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        digests = json.loads((checkpoint / SEAL).read_text())
        change(digests)
        (checkpoint / SEAL).write_text(json.dumps(digests))

    return apply


def _link(name: str, target: str) -> Callable[[Path], None]:
    def apply(checkpoint: Path) -> None:
        (checkpoint / name).unlink(missing_ok=True)
        (checkpoint / name).symlink_to(target)

    return apply


def _moved_seal(checkpoint: Path) -> None:
    (checkpoint / SEAL).replace(checkpoint.parent / "outside.json")
    (checkpoint / SEAL).symlink_to("../outside.json")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no seal": lambda c: (c / SEAL).unlink(),
    "empty seal": lambda c: (c / SEAL).write_bytes(b""),
    "half a seal": lambda c: (c / SEAL).write_bytes((c / SEAL).read_bytes()[:40]),
    "seal in no encoding": lambda c: (c / SEAL).write_bytes(b"\xff\xfe\xfd"),
    "seal that is a list": lambda c: (c / SEAL).write_text('["tensors"]'),
    "seal without an end": lambda c: (c / SEAL).write_text("[" * 100_000),
    "seal that is a folder": lambda c: ((c / SEAL).unlink(), (c / SEAL).mkdir()),
    "seal from outside": _moved_seal,
    "number for a hash": _reseal(lambda d: d.update(tensors=7)),
    "hash of another file": _reseal(lambda d: d.update(tensors=d["inner/state"])),
    "name from above": _reseal(lambda d: d.update({"../secret": d["tensors"]})),
    "only names from above": lambda c: (c / SEAL).write_text('{"../secret": "0"}'),
    "one bit": _flip,
    "truncated file": lambda c: os.truncate(c / "tensors", 100),
    "file lost": lambda c: (c / "inner" / "state").unlink(),
    "file too many": lambda c: (c / "more").write_text("more"),
    "link to a file outside": _link("more", "../secret"),
    "link in place of a file": _link("tensors", "../secret"),
    "link to a folder": _link("more", ".."),
    "pipe": lambda c: os.mkfifo(c / "more"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_no_checkpoint_and_nothing_outside_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(range(256)))
    before, checkpoint = write(tmp_path, 1), write(tmp_path, 2)
    assert newest(tmp_path) == checkpoint
    DAMAGES[damage](checkpoint)
    opened: list[Path] = []
    own = Path.open

    def watching(path: Path, *args: object, **kwargs: object) -> object:
        opened.append(path)
        return own(path, *args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", watching)
    assert not is_sound(checkpoint)
    assert all(path.resolve().is_relative_to(checkpoint.resolve()) for path in opened)
    assert newest(tmp_path) == before
    drop_old(tmp_path)
    assert not checkpoint.exists()
    assert is_sound(before)


@pytest.mark.parametrize("left", ["nothing", "file", "empty folder", "seal alone"])
def test_what_is_no_folder_of_files_is_no_checkpoint(tmp_path: Path, left: str) -> None:
    checkpoint = folder_of(tmp_path, 1)
    if left == "file":
        checkpoint.write_text("{}")
    elif left != "nothing":
        checkpoint.mkdir()
    if left == "seal alone":
        seal(checkpoint)
    assert not is_sound(checkpoint)
    assert newest(tmp_path) is None
    drop_old(tmp_path)


# Names, order and number ----------------------------------------------------------------------------------------------


def test_names_and_steps_are_of_each_other(tmp_path: Path) -> None:
    assert folder_of(tmp_path, 40) == tmp_path / "checkpoint-40"
    assert [step_of(folder_of(tmp_path, step)) for step in (0, 7, 10**9)] == [0, 7, 10**9]
    for name in ("checkpoint-", "checkpoint-07", "checkpoint-+7", "checkpoint-7.partial", "checkpoint-٧", "adapter"):
        with pytest.raises(ValueError, match="checkpoint-<step>"):
            step_of(tmp_path / name)


def test_the_newest_is_that_of_the_latest_step(tmp_path: Path) -> None:
    assert newest(tmp_path / "not there") is None
    assert newest(tmp_path) is None
    for step in (100, 20, 3):
        write(tmp_path, step)
    (tmp_path / "checkpoint-999.partial").mkdir()
    (tmp_path / "checkpoint-").mkdir()
    (tmp_path / f"checkpoint-{'9' * 100}").mkdir()
    assert newest(tmp_path) == tmp_path / "checkpoint-100"


def test_the_newest_two_sound_ones_are_kept_and_nothing_else_of_checkpoints(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        write(tmp_path, step)
    _flip(folder_of(tmp_path, 8))
    for left in ("checkpoint.partial/checkpoint-12", "adapter.partial", "adapter"):
        (tmp_path / left).mkdir(parents=True)
    drop_old(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "checkpoint-10", "checkpoint-6"]
    drop_old(tmp_path / "not there")


# Writing --------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_sealed_and_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 15):
        with written("t0007", tmp_path, step) as folder:
            assert newest(tmp_path) != folder
            assert list(folder.iterdir()) == []
            (folder / "state").write_text(str(step))
        assert newest(tmp_path) == folder_of(tmp_path, step)
    assert steps(tmp_path) == [10, 15]
    assert (tmp_path / "checkpoint-15" / "state").read_text() == "15"


def test_what_lies_ahead_of_a_written_one_goes(tmp_path: Path) -> None:
    """A trial that started again must not go on from where it was before."""
    for step in (5, 10, 15):
        write(tmp_path, step)
    with written("t0007", tmp_path, 6) as folder:
        (folder / "state").write_text("again")
    assert steps(tmp_path) == [5, 6]


def test_a_kill_while_writing_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    before = write(tmp_path, 5)
    for _ in range(2):
        with pytest.raises(Killed), written("t0007", tmp_path, 10) as folder:
            (folder / "state").write_text("half")
            raise Killed
        assert newest(tmp_path) == before
    with written("t0007", tmp_path, 10) as folder:
        (folder / "other").write_text("whole")
    assert {path.name for path in (tmp_path / "checkpoint-10").iterdir()} == {"other", SEAL}
    assert steps(tmp_path) == [5, 10]


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda folder: (folder / "state").write_text("x" * 10_000),
    "safetensors": lambda folder: save_file({"x": torch.zeros(10_000)}, folder / "state"),
    "torch": lambda folder: torch.save({"x": torch.zeros(10_000)}, folder / "state"),
    "torch, many": lambda folder: torch.save({str(n): torch.zeros(50) for n in range(100)}, folder / "state"),
}


@pytest.mark.parametrize("step", [10, 5], ids=["new", "again"])
@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_said_and_changes_nothing(tmp_path: Path, writer: str, step: int) -> None:
    write(tmp_path, 5)
    with (
        room_for(4096),
        pytest.raises(StorageError) as caught,
        written("t0007", tmp_path, step) as folder,
    ):
        WRITERS[writer](folder)
    said = str(caught.value)
    assert said.startswith(f"Cannot write the checkpoint of t0007 at step {step} to {tmp_path}: ")
    assert ("File too large" in said) == (not writer.startswith("torch"))
    assert newest(tmp_path) == tmp_path / "checkpoint-5"
    assert steps(tmp_path) == [5]


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.partial").write_text("in the way")
    with pytest.raises(StorageError, match=r"File exists|Not a directory"), written("t0007", tmp_path, 5):
        pytest.fail("there is nothing to write into")


@pytest.mark.parametrize("where", ["seal", "_sync"])
def test_a_seal_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    before = write(tmp_path, 5)

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, where, full)
    with pytest.raises(StorageError, match="No space left on device"), written("t0007", tmp_path, 10) as folder:
        (folder / "state").write_text("whole")
    assert newest(tmp_path) == before


@pytest.mark.parametrize("error", [ZeroDivisionError("a fault"), RuntimeError("a fault"), torch.OutOfMemoryError("x")])
def test_a_fault_of_the_program_is_no_fault_of_the_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, written("t0007", tmp_path, 5):
        raise error
    assert caught.value is error
