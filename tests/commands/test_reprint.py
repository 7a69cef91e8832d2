"""A finished sweep answers at once from its result, and only while that stands."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agnews_lora.commands.reprint import standing
from agnews_lora.config.sweep import load_sweep
from agnews_lora.paths import RESULTS
from agnews_lora.tracking.store import open_client
from tests.project import environment
from tests.test_imports import HEAVY

LIGHT = {"optuna", "scipy"}  # what reads the study


def test_a_finished_sweep_is_shown_without_what_trains_or_records(finished_once: Path) -> None:
    script = (
        "import sys; from agnews_lora.cli import main; code = main(['sweep', 'small', '--json']); "
        f"print(*sorted(set({HEAVY}) & set(sys.modules) - {LIGHT}), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=finished_once,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr.split()) == (0, [])
    assert json.loads(done.stdout) == json.loads((finished_once / RESULTS / "small.json").read_text(encoding="utf-8"))


def test_a_result_stands_until_anything_that_it_was_made_from_changes(
    finished_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished_project)

    def stands(trials: int | None = None) -> bool:
        return standing(load_sweep("small"), trials) is not None

    @contextmanager
    def away(path: Path) -> Iterator[None]:
        hidden = path.with_name("hidden")
        path.rename(hidden)
        yield
        hidden.rename(path)

    assert not stands(), "the run store still names the place that it was copied from"
    client = open_client(Path("mlruns"))
    assert stands() and stands(3) and not stands(4)
    for name in ("optuna.db", "mlflow.db", "artifacts", "results"):
        with away(Path("mlruns", name)):
            assert not stands(), name
    for file in ("sweeps/small.yaml", "experiments/small.yaml"):
        text = Path(file).read_text(encoding="utf-8")
        Path(file).write_text(text.replace("seed: 13", "seed: 14"), encoding="utf-8")
        assert not stands(), file
        Path(file).write_text(text, encoding="utf-8")
    version = client.get_model_version_by_alias("small", "champion")
    client.set_registered_model_alias("small", "previous", version.version)
    assert not stands(), "its version has another alias"
    client.delete_registered_model_alias("small", "previous")
    client.delete_run(str(version.run_id))
    assert not stands(), "a run is gone"
    client.restore_run(str(version.run_id))
    assert stands()
