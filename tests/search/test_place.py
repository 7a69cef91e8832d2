"""The work folder of one start: held until its last process ends, whoever of them that is."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from agnews_lora.errors import StorageError, StudyError
from agnews_lora.search import place
from agnews_lora.search.place import exclusive

HOLD = """
import subprocess, sys, time
from pathlib import Path
from agnews_lora.search.place import exclusive
with exclusive(Path(sys.argv[1]), "embedded") as held:
    if len(sys.argv) > 2:
        subprocess.Popen(["sleep", sys.argv[2]], pass_fds=[held.lock], stdout=subprocess.DEVNULL)
    print(held.id, flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_until_its_process_ends_however_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "work" / "embedded"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            identity = holder.stdout.readline().strip()
            with monkeypatch.context() as patched, exclusive(tmp_path / "work" / "another", "another") as another:
                patched.setattr(place, "ORPHANS_SECONDS", 0.3)
                assert another.id != identity
                with (
                    pytest.raises(StudyError, match="sweep embedded is being run by another process; wait for it"),
                    exclusive(folder, "embedded"),
                ):
                    pytest.fail("two processes hold one folder")
        finally:
            holder.kill()  # SIGKILL: nothing of the holder's own runs any more
    for _ in range(2):
        with exclusive(folder, "embedded") as held:
            assert held.id == identity


def test_a_worker_that_inherits_the_folder_holds_it_beyond_its_supervisor(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path), "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as supervisor:
        assert supervisor.stdout is not None
        supervisor.stdout.readline()
        supervisor.kill()
    began = time.monotonic()
    with exclusive(tmp_path, "embedded"):
        assert time.monotonic() - began > 1


def test_every_process_has_a_name_of_its_own(tmp_path: Path) -> None:
    with exclusive(tmp_path, "embedded") as held:
        owners = {held.new_owner() for _ in range(3)}
        assert len(owners) == 3
        assert all(owner.startswith(f"{held.id}/") for owner in owners)


def test_a_folder_is_let_go_of_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path, "embedded"):
        raise KeyboardInterrupt
    with exclusive(tmp_path, "embedded"):
        pass


def test_a_work_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match=r"work folder .*file/work cannot be written \(Not a directory\)"),
        exclusive(tmp_path / "file" / "work", "embedded"),
    ):
        pytest.fail("a lock where no file can be")
