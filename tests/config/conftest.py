"""A working directory with the folders of a project."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

Write = Callable[[str, str], Path]


def lines_and_faults(message: str) -> list[str]:
    """`LINE: KEY: MESSAGE` of every fault in an error."""
    found = re.findall(r"^ +\S+\.yaml:(\d+):\d+: (.*)$", message, flags=re.MULTILINE)
    return [f"{line}: {fault}" for line, fault in found]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project, and the working directory."""
    for folder in ("experiments", "sweeps"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def write(project: Path) -> Write:
    """Write a file of the project, by its path in it without the ending."""

    def write_file(name: str, content: str) -> Path:
        path = project / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        return path

    return write_file
