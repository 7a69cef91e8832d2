"""Variables, folders and users that commands meet: none of them changes a result or ends in a traceback."""

import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from agnews_lora import hub
from agnews_lora.errors import StorageError
from agnews_lora.search.study import sole_driver
from agnews_lora.tracking.store import open_client


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
