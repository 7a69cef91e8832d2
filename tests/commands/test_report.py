"""`agnews-lora report` over real stores: of a real sweep on a tiny base, and of sweeps in every other state."""

import re
import shutil
import subprocess
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts

from agnews_lora.cli import main
from agnews_lora.commands import report
from agnews_lora.tracking.reading import newest_sweep
from agnews_lora.tracking.runs import State, SweepRuns
from agnews_lora.tracking.store import open_client
from agnews_lora.training.interface import EvalPoint, TrainPoint
from tests.project import agnews_lora, write_project
from tests.tiny import tiny_base

SHARED = {
    "experiment": "small",
    "base": "sentence-transformers/all-MiniLM-L6-v2",
    "budget": 100_000,
    "engine": "multilora",
    "seed": 13,
}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stores of a sweep that was run to its end, and nothing else: no file of the project, no base, no data."""
    folder = tmp_path_factory.mktemp("project")
    tiny_base(folder / "base", "bert")
    write_project(folder, experiment={"base": "base"}, sweep={"trials": 4, "confirmation": {"trials": 2, "seeds": 2}})
    done = agnews_lora(folder, "sweep", "small")
    assert done.returncode == 0, done.stderr
    for name in ("experiments", "sweeps", "base", ".cache"):
        shutil.rmtree(folder / name)
    return folder


def parent(folder: Path) -> str:
    run = newest_sweep(open_client(folder / "mlruns"), "small")
    assert run is not None
    return run.run_id


def pages(pdf: Path) -> str:
    """The text of a PDF; of its pages' number where no tool reads it."""
    if shutil.which("pdftotext") is None:
        pytest.skip("pdftotext is not installed")
    return subprocess.run(["pdftotext", pdf, "-"], capture_output=True, text=True, check=True).stdout


def test_a_finished_sweep_is_reported_from_its_stores_alone(
    swept: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(swept)
    assert main(["report", "small"]) == 0
    shown = capsys.readouterr().out
    page, paper = swept / "reports/small.html", swept / "reports/small.pdf"
    assert "reports/small.html" in shown
    winner = str(newest_sweep(open_client(swept / "mlruns"), "small").tags["best_trial"])  # type: ignore[union-attr]
    assert winner in shown
    text = page.read_text(encoding="utf-8")
    assert winner in text
    assert "budget: 100000" in text  # the sweep's file, from the run
    assert not re.search(r'(src|href)="(?!data:image/png|#)', text)
    assert paper.read_bytes().startswith(b"%PDF")
    words = pages(paper)
    assert winner in words
    headings = ["Adapter configurations and the budget", "Results", "Error analysis", "How to reproduce"]
    captions = ["The confirmation: the best trials over several seeds", "Confusion matrix of"]
    if winner != "t0000":  # on so few rows, the baseline may win
        headings.append("The winner against the baseline")
        captions.append("Validation rows by who answers them rightly.")
    flat = " ".join(words.split())
    assert [heading for heading in headings if heading not in words] == []
    assert [caption for caption in captions if caption not in flat] == []
    assert words.count("\f") >= 4  # pages
    assert sorted(path.name for path in (swept / "reports").iterdir()) == ["small.html", "small.pdf"]


def test_it_is_on_the_parent_run_and_the_same_when_written_again(swept: Path, tmp_path: Path) -> None:
    client = open_client(swept / "mlruns")
    before = client.get_run(parent(swept)).info
    first = report.write(client, parent(swept), {}, tmp_path / "first")
    second = report.write(client, parent(swept), {}, tmp_path / "second")
    assert first.html.read_bytes() == second.html.read_bytes()
    assert first.pdf.read_bytes() == second.pdf.read_bytes()
    for name, written in (("report.html", second.html), ("report.pdf", second.pdf)):
        kept = download_artifacts(run_id=parent(swept), artifact_path=name, tracking_uri=client.tracking_uri)
        assert Path(kept).read_bytes() == written.read_bytes()
    after = client.get_run(parent(swept)).info
    assert (after.status, after.end_time) == (before.status, before.end_time)


def test_a_study_that_is_gone_is_not_needed(swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(swept)
    assert main(["report", "small", "--to", str(tmp_path / "with")]) == 0
    study = swept / "mlruns/optuna.db"
    study.rename(tmp_path / "optuna.db")
    try:
        assert main(["report", "sweeps/small.yaml", "--to", str(tmp_path / "without")]) == 0
        assert main(["report", "small", "--storage", f"sqlite:///{tmp_path / 'optuna.db'}", "--to", "elsewhere"]) == 0
    finally:
        (tmp_path / "optuna.db").rename(study)
    with_study, without = (tmp_path / name / "small.html" for name in ("with", "without"))
    assert with_study.read_text() == without.read_text() == (swept / "elsewhere/small.html").read_text()


def test_a_sweep_that_never_ran(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, swept):
        monkeypatch.chdir(folder)
        assert main(["report", "other"]) == 2
        message = capsys.readouterr().err
        assert message.startswith("agnews-lora: a report needs a sweep that has run")
        assert "agnews-lora sweep other" in message
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(swept)
    (tmp_path / "file").touch()
    assert main(["report", "small", "--to", str(tmp_path / "file")]) == 2
    assert "name another with --to" in capsys.readouterr().err


class Store:
    """A store with the runs of a sweep that nothing trained."""

    def __init__(self, folder: Path) -> None:
        self.client: MlflowClient = open_client(folder / "mlruns")
        self.runs = SweepRuns(self.client, "small", "small")
        tags = {"device": "CPU", "version.agnews_lora": "0.1.0"}
        self.parent = self.runs.open_parent("small", identity="1", params=SHARED, tags=tags, texts={})

    def trial(self, number: int, state: State | None, accuracy: float = 0.5, error: str | None = None) -> str:
        trial = f"t{number:04d}"
        params = {"targets": "qv", "lora_r": 2, "lora_alpha": "4", "lora_dropout": 0.1, "learning_rate": 1e-3}
        params |= {"head": "full", "trainable_parameters": 19_972, "seed": number, **SHARED}
        run = self.runs.start_trial(trial, trial, params, {"baseline": str(number == 0).lower()})
        if state != "FAILED":
            points = [
                TrainPoint(trial, 10, 1.0, 1e-3, 1_000),
                EvalPoint(trial, 10, accuracy, 0.5, 0.9, 100, True, 2_000),
            ]
            self.runs.log_points(trial, points)
        if state:
            self.runs.finish_trial(trial, state, error=error)
        return run

    def report(self, to: Path) -> tuple[str, str]:
        written = report.write(self.client, self.parent, {}, to)
        return written.html.read_text(encoding="utf-8"), pages(written.pdf)


def test_a_sweep_that_is_under_way(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.trial(0, "COMPLETE", 0.5)
    store.trial(1, "COMPLETE", 0.7)
    store.trial(2, None, 0.6)
    for text in store.report(tmp_path / "reports"):
        flat = " ".join(text.split())
        assert "Unfinished" in flat
        assert "still under way" in flat
        assert "best trial so far" in flat
        assert "t0001" in flat
        assert "Optimisation history" in flat  # drawn, as the parent run has no figure yet


def test_a_sweep_without_any_complete_trial(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.trial(0, "FAILED", error="out of memory: <b>4 GiB</b> #panic() $1$")
    store.runs.close_parent("COMPLETE")
    page, paper = store.report(tmp_path / "reports")
    assert "No result." in page
    assert "&lt;b&gt;4 GiB&lt;/b&gt; #panic() $1$" in page
    assert "<b>4 GiB</b> #panic() $1$" in " ".join(paper.split())


def test_a_sweep_that_has_just_begun(tmp_path: Path) -> None:
    for text in Store(tmp_path).report(tmp_path / "reports"):
        assert "No trial has been started yet." in " ".join(text.split())


def test_repetitions_are_no_trials_of_the_search(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.trial(0, "COMPLETE", 0.5)
    best = store.trial(1, "COMPLETE", 0.7)
    repeated = store.trial(2, "COMPLETE", 0.9)
    for key, value in {"confirms": "t0001", "trial": "t0001-s2"}.items():
        store.client.set_tag(repeated, key, value)
    frame = pd.DataFrame(
        {
            "trial": ["t0001"],
            "seeds": [2],
            "failed": [0],
            "own_accuracy": [0.7],
            "mean_accuracy": [0.8],
            "std_accuracy": [0.1414],
            "drop": [-0.1],
            "chosen": [True],
            "runs": [
                '[{"trial": "t0001", "seed": 1, "accuracy": 0.7}, {"trial": "t0001-s2", "seed": 2, "accuracy": 0.9}]'
            ],
        }
    )
    store.client.log_text(store.parent, frame.to_csv(index=False), "confirmation.csv")
    store.runs.close_parent("COMPLETE", tags={"best_trial": "t0001", "best_run": best})
    page, _ = store.report(tmp_path / "reports")
    assert "Both trials were trained to their end." in page
    assert "t0001-s2" not in page
    assert "80.00% on average over two runs" in page
