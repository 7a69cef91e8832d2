"""Variables, folders and users that commands meet: none of them changes a result or ends in a traceback."""

import errno
import fcntl
import json
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from agnews_lora import hub
from agnews_lora.errors import StorageError
from agnews_lora.paths import temporary_files
from agnews_lora.search.study import sole_driver
from agnews_lora.tracking.store import open_client
from tests.project import command, environment

SCRIPTS = ("tokenizers", "optuna", "torch", "numpy", "argparse", "rich")  # that a user may have in the folder
# A user without a name, who may read everything (the interpreter may lie below another's home) and write nothing.
NAMELESS = [
    *("setpriv", "--reuid=12345", "--regid=12345", "--clear-groups"),
    *("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"),
]
# A full folder for temporary files, seen by this process alone.
SMALL = 'mount -t tmpfs -o size=64k none "$TMPDIR" && head -c 60k /dev/zero > "$TMPDIR/full" && exec "$@"'
as_root = pytest.mark.skipif(
    os.getuid() != 0 or not (shutil.which("setpriv") and shutil.which("unshare")), reason="only root becomes others"
)


def run(
    folder: Path, *line: str, variables: Mapping[str, str] | None = None, unset: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in environment().items() if name not in unset}
    return subprocess.run(
        line, cwd=folder, env=kept | (variables or {}), capture_output=True, text=True, check=False, timeout=300
    )


# Locks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    def refused(*_: Any) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="has no locks"):
        open_client(Path("mlruns"))
    with pytest.raises(StorageError, match="has no locks"):
        hub.record("models/some@main", commit="0" * 40)
    with pytest.raises(StorageError, match="has no locks"), sole_driver(Path("mlruns/work/small"), "small"):
        pass


def test_locks_are_on_files_that_are_open_for_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS gives an exclusive lock on no others."""

    def seen(file: Any, operation: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        assert stat.S_ISREG(os.fstat(descriptor).st_mode)
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
        kinds.append(operation)

    kinds: list[int] = []
    monkeypatch.setattr(fcntl, "flock", seen)
    monkeypatch.chdir(tmp_path)
    open_client(Path("mlruns"))
    hub.record("models/some@main", commit="0" * 40)
    with sole_driver(Path("mlruns/work/small"), "small"):
        pass
    assert len(kinds) == 3


# Variables and scripts -----------------------------------------------------------------------------------------------


def test_scripts_in_the_folder_and_variables_change_nothing(finished_project: Path) -> None:
    """`promote` loads the version in a new process, and then draws the report; `sweep` writes runs."""
    for name in SCRIPTS:
        (finished_project / f"{name}.py").write_text("raise SystemExit('my own script')\n")
    variables = {
        "PYTHONWARNINGS": "error",
        "PYTHONOPTIMIZE": "1",
        "TOKENIZERS_PARALLELISM": "maybe",
        "OMP_NUM_THREADS": "1,1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": "2",
        "RANK": "1",
        "HF_HOME": "/proc/nowhere",
        "HOME": "/proc/nobody",
        "TMPDIR": "/proc/nothing",
        "MPLBACKEND": "of a notebook",
        "MLFLOW_ACTIVE_MODEL_ID": "m-of-another-store",
        "MLFLOW_RUN_ID": "of-another-store",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    for name in ("promote", "sweep"):
        done = run(finished_project, *command(name, "small"), variables=variables)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_without_docstrings_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, *command("doctor"), variables={"PYTHONOPTIMIZE": "2"})
    assert done.returncode == 2 and "PYTHONOPTIMIZE" in done.stderr and "Traceback" not in done.stderr


# Users and folders ---------------------------------------------------------------------------------------------------


@as_root
def test_a_user_without_name_and_home_can_work(finished_project: Path) -> None:
    subprocess.run(["chown", "-R", "12345:12345", finished_project], check=True)
    done = run(finished_project, *NAMELESS, *command("promote", "small"), unset=("HOME", "USER", "LOGNAME"))
    assert done.returncode == 0, done.stderr


@as_root
def test_doctor_says_what_another_user_may_not_write(finished_project: Path) -> None:
    done = run(finished_project, *NAMELESS, *command("doctor", "--json"))
    found = json.loads(done.stdout)
    for what in ("store mlruns/mlflow.db", "store mlruns/optuna.db", "folder mlruns/work", "cache .cache/tokens"):
        assert found[what].startswith("cannot be written"), what
    assert found["temporary files"] == f"in {tempfile.gettempdir()}"


@as_root
@pytest.mark.parametrize("writable", [True, False])
def test_a_full_folder_for_temporary_files_is_not_needed_or_named(
    finished_project: Path, tmp_path: Path, writable: bool
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    user = [] if writable else NAMELESS
    shell = ["unshare", "-m", "bash", "-c", SMALL, "bash", *user]
    line = [*shell, *command("report", "small", "--to", str(tmp_path))]
    done = run(finished_project, *line, variables={"TMPDIR": str(small)})
    if writable:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode == 2 and str(small) in done.stderr and "TMPDIR" in done.stderr


def test_temporary_files_lie_beside_the_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = tempfile.gettempdir()
    with temporary_files():
        assert tempfile.gettempdir() == before, "there are no stores yet"
    Path("mlruns").mkdir()
    with temporary_files():
        alive = Path(tempfile.gettempdir())
        assert alive.parent == tmp_path / "mlruns" / "work"
        dead = alive.with_name("temporary-of-a-killed-process")
        dead.mkdir()
        with temporary_files():
            assert alive.is_dir() and not dead.exists()
        assert tempfile.gettempdir() == str(alive)
    assert not alive.exists() and tempfile.gettempdir() == before


def test_where_the_project_cannot_be_written_the_system_keeps_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlruns").write_text("in the way")
    before = tempfile.gettempdir()
    with temporary_files():
        assert tempfile.gettempdir() == before
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(StorageError, match="TMPDIR"), temporary_files():
        pass
