"""The first minutes on a GPU: what is found is kept, whatever becomes of a stage."""

import time
from pathlib import Path

import pytest

from benchmarks.first_gpu_run import ROOT, TOTAL, Stage, main, run, stages
from tests import bare
from tests.test_bare_machine import run as run_python


def timed(setup: str, statement: str) -> tuple[str, ...]:
    """A module with arguments that runs two statements."""
    return ("timeit", "-n", "1", "-r", "1", "-s", setup, statement)


def test_a_stage_that_fails_or_takes_too_long_leaves_what_it_found(tmp_path: Path) -> None:
    child = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])"
    fake = [
        Stage("fine", 60, timed("pass", "print('- device: CHIP (R) 9')")),
        Stage("failing", 60, timed("print('one figure', flush=True)", "raise OSError('no such kernel')")),
        Stage("slow", 6, timed(f"{child}; print('another figure', flush=True)", "child.wait()")),
        Stage("late", 60, timed("pass", "print('never')")),
    ]
    began = time.monotonic()
    file = run(fake, tmp_path, "subject", total=24)
    took = time.monotonic() - began
    assert file.name.startswith("first-gpu-run-subject-chip-r-9-20") and list(tmp_path.iterdir()) == [file]
    parts = file.read_text(encoding="utf-8").split("\n## ")
    assert [part.splitlines()[0] for part in parts[1:]] == ["fine", "failing", "slow", "late"]
    assert "Done in" in parts[1]
    assert "one figure" in parts[2] and "Failed with exit code 1" in parts[2] and "OSError: no such kernel" in parts[2]
    assert "another figure" in parts[3] and "Stopped at its time limit" in parts[3]
    assert ("Left out" in parts[4]) == ("never" not in parts[4])
    assert took < 60, "its child was stopped as well"


def test_the_stages_fit_into_nine_minutes_but_for_the_last(tmp_path: Path) -> None:
    assert sum(stage.seconds for stage in stages(dry=False)[:-1]) <= TOTAL
    assert [stage.name for stage in stages(dry=True)] == [stage.name for stage in stages(dry=False)]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="Use --dry"):
        main(["--stage", "machine"])


@pytest.mark.proof
def test_all_stages_run_dry_on_a_bare_machine(tmp_path: Path) -> None:
    python = bare.make(tmp_path / "bare")
    run_python(python, "-m", "benchmarks.first_gpu_run", "--dry", "--out", str(tmp_path / "out"), folder=ROOT)
    [page] = (tmp_path / "out").glob("first-gpu-run-dry-cpu-*.md")
    text = page.read_text(encoding="utf-8")
    assert text.count("Done in") == len(stages(dry=True)), text
    for found in ("kernels, error of gradients: ", "samples/s: ", "multilora, K = 2", "test_cuda.py", "ms a layer"):
        assert found in text
