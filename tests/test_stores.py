"""Stores that others also write, copy, move, delete and protect: what the commands of a finished project make of it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from agnews_lora.cli import main
from tests.project import command, environment

# Characters that URLs and URIs give a meaning, and some that nothing does.
NAME = "a%20b %41?c#d&e [f] \N{LATIN SMALL LETTER U WITH DIAERESIS}'$HOME"

COMMANDS = {
    "report": ["report", "small"],
    "promote": ["promote", "small"],
    "predict": ["predict", "--sweep", "small", "Oil prices rose."],
    "export": ["export", "small", "--to", "exported"],
    "sweep": ["sweep", "small", "--quiet"],
    "doctor": ["doctor"],
}


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of all that lies below a folder."""
    found = {str(path): path.lstat() for path in folder.rglob("*")}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def succeeds(*arguments: str) -> bool:
    return main(arguments) == 0


# Moved ---------------------------------------------------------------------------------------------------------------


def test_copied_project_works_and_writes_in_its_own_place_alone(
    finished_once: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, project = files(finished_once), tmp_path / NAME
    shutil.copytree(finished_once, project)
    monkeypatch.chdir(project)
    for name, arguments in COMMANDS.items():
        assert succeeds(*arguments), name
        assert files(finished_once) == before, f"{name} changed the original"
    assert list(tmp_path.iterdir()) == [project]


def test_renamed_project_works_and_makes_nothing_at_its_old_place(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = finished_project.rename(finished_project.with_name("moved"))
    (moved.parent / "linked").symlink_to(moved)
    monkeypatch.chdir(moved.parent / "linked")
    for name in ("predict", "report", "export"):
        assert succeeds(*COMMANDS[name]), name
    assert not finished_project.exists()


def test_read_only_project_is_read_and_nothing_else(finished_project: Path, tmp_path: Path) -> None:
    """In another place than it was made at."""
    moved = finished_project.rename(finished_project.with_name("moved"))
    plain_user = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    if plain_user and shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere (util-linux is not installed)")
    subprocess.run(["chmod", "-R", "a-w", moved], check=True)
    elsewhere = tmp_path / "elsewhere"

    def asked(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*plain_user, *command(*arguments)],
            cwd=moved,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
        )

    before = files(moved)
    for arguments in (
        COMMANDS["predict"],
        ["report", "small", "--to", str(elsewhere / "reports")],
        ["export", "small", "--to", str(elsewhere / "exported")],
    ):
        assert (done := asked(*arguments)).returncode == 0, done.stderr
    assert (elsewhere / "reports" / "small.html").is_file()
    stores = json.loads(asked("doctor", "--json").stdout)
    assert all("cannot be written" in value for name, value in stores.items() if name.startswith("store"))
    for name in ("sweep", "promote", "report"):
        refused = asked(*COMMANDS[name])
        assert refused.returncode == 2
        assert refused.stderr.startswith("agnews-lora: Cannot "), name
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
    assert files(moved) == before
    subprocess.run(["chmod", "-R", "u+w", moved], check=True)  # pytest removes it
