"""Output that cannot be shown, or not any more: it never ends the work, nor changes what an exit code means."""

import os
import pty
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from agnews_lora.search.results import SweepResult
from tests.project import command, environment, write_project

ENCODINGS = [
    {"PYTHONIOENCODING": "ascii"},
    {"PYTHONIOENCODING": "cp437"},
    {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
]


def run(folder: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> tuple[int, bytes, bytes]:
    """(exit code, standard output, standard error) of a command."""
    done = subprocess.run(
        command(*arguments), cwd=folder, env={**environment(), **(variables or {})}, capture_output=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("variables", ENCODINGS, ids=lambda variables: " ".join(variables.values()))
def test_characters_that_a_terminal_lacks_are_replaced(finished_project: Path, variables: Mapping[str, str]) -> None:
    """`±` stands in the result of a confirmation, `≥` in a promotion check; a text may have any character."""
    asked = ["predict", "--sweep", "small", "Zürich–Börse 東京"]
    for arguments in (["sweep", "small"], ["promote", "small"], asked, ["predict", *asked[1:], "--json"]):
        code, output, error = run(finished_project, *arguments, variables=variables)
        assert (code, error) == (0, b"") and output, arguments


def test_a_terminal_without_a_size_shows_what_others_show(tmp_path: Path) -> None:
    folder = write_project(tmp_path)
    assert run(folder, "budget", "small", variables={"COLUMNS": "0"}) == run(folder, "budget", "small")


def test_json_has_every_character_in_any_encoding(finished_once: Path) -> None:
    asked = ("predict", "--sweep", "small", "--json", "Zürich–Börse 東京")
    _, ascii_output, _ = run(finished_once, *asked, variables={"PYTHONIOENCODING": "ascii"})
    _, output, _ = run(finished_once, *asked)
    assert ascii_output == output and b"Z\\u00fcrich" in output


@pytest.mark.parametrize(("arguments", "code"), [(("budget", "small"), 2), (("budget", "nothing"), 2)])
def test_a_command_that_only_prints_fails_where_its_output_cannot_be_written(
    tmp_path: Path, arguments: tuple[str, ...], code: int
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command(*arguments), cwd=write_project(tmp_path), env=environment(), stdout=full, stderr=subprocess.PIPE,
            check=False,
        )  # fmt: skip
    assert done.returncode == code and b"Traceback" not in done.stderr and done.stderr


@pytest.mark.parametrize("arguments", [("sweep", "small"), ("promote", "small")])
@pytest.mark.parametrize("where", ["a full disk", "a pipe that nobody reads", "nowhere"])
def test_a_command_that_works_does_not_need_its_output(
    finished_project: Path, arguments: tuple[str, ...], where: str
) -> None:
    shell = {"a full disk": ">/dev/full 2>&1", "a pipe that nobody reads": "2>&1 | true", "nowhere": ">&- 2>&-"}[where]
    line = f'set -o pipefail; "$@" {shell}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", line, "bash", *command(*arguments)], cwd=finished_project, env=environment(), check=False
    )
    assert done.returncode == 0


def test_forced_colours_bring_no_live_table_into_a_log(tmp_path: Path) -> None:
    write_project(tmp_path, {"data.train_rows": 48}, {"trials": 1})
    code, output, _ = run(tmp_path, "train", "small", variables={"FORCE_COLOR": "1"})
    assert code == 0 and b"started" in output
    assert b"\x1b[2K" not in output and b"\x1b[?25l" not in output, "lines that stay, and no movement of the cursor"


@pytest.mark.proof
def test_a_sweep_whose_terminal_was_closed_goes_on_to_its_end(tmp_path: Path) -> None:
    write_project(tmp_path)
    ours, terminal = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", 'trap "" HUP; exec "$@"', "bash", *command("sweep", "small")],  # as nohup starts it
        cwd=tmp_path,
        env={**environment(), "TERM": "xterm"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    seen = b""
    while b"t0001" not in seen:
        seen += os.read(ours, 65536)
    os.close(ours)
    assert process.wait() == 0
    result = SweepResult.from_json((tmp_path / "mlruns" / "results" / "small.json").read_text(encoding="utf-8"))
    assert result.state == "COMPLETE" and result.counts["failed"] == 0
