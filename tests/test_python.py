"""The package from Python, as a notebook uses it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import TextClassificationPipeline

from agnews_lora import SweepResult, champion, load_sweep, promote, run_sweep
from agnews_lora.errors import DataError
from tests.project import agnews_lora, environment


@pytest.fixture
def project(finished_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished project as the working directory."""
    monkeypatch.chdir(finished_project)
    return finished_project


def test_a_finished_sweep_gives_its_result_and_a_frame_of_its_trials(project: Path) -> None:
    result = run_sweep("small", quiet=True)
    assert isinstance(result, SweepResult) and result.state == "COMPLETE" and result.trials_left == 0
    frame = result.frame()
    assert len(frame) == load_sweep("small").trials == frame["trial"].nunique()
    assert result.winner is not None and frame.loc[frame["winner"], "trial"].tolist() == [result.winner.trial]


def test_a_sweep_that_is_out_of_time_says_how_many_trials_are_left(project: Path) -> None:
    result = run_sweep(load_sweep(project / "sweeps" / "small.yaml"), trials=5, timeout=1e-3, quiet=True)
    assert result.state == "INTERRUPTED" and result.trials_left == 2
    assert len(result.frame()) == 3


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'mlflow', 'optuna', 'pandas', 'pydantic'}"
    code = f"import agnews_lora, sys; agnews_lora.__version__; print({heavy} & set(sys.modules) or 'light')"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "light\n"
    with pytest.raises(ImportError):
        exec("from agnews_lora import no_such_name")


def test_the_champion_is_a_pipeline_of_transformers(project: Path) -> None:
    assert promote("small").passed
    ask = champion("small")
    text = "Shares of the chip maker rose after it raised its forecast for the quarter."
    assert isinstance(ask, TextClassificationPipeline)
    [every] = ask([text], top_k=None)
    [prediction] = json.loads("[" + agnews_lora(project, "predict", "--sweep", "small", "--json", text).stdout + "]")
    assert {each["label"]: each["score"] for each in every} == pytest.approx(prediction["probabilities"], abs=1e-5)
    assert ask(text * 50)[0]["label"] in prediction["probabilities"], "longer texts than the model takes are cut"
    with pytest.raises(DataError):
        ask("\u200b")


def test_the_page_on_python_shows_calls_that_work(project: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "scripting.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    shown = code.replace('"embedded"', '"small"').replace("trials=6", "trials=3")
    names: dict[str, Any] = {}
    exec(shown, names)
    assert names["result"].state == "COMPLETE"
