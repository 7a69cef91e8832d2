"""A study looked at and steered: a real storage and a real driver, over an engine that trains nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.pruners import NopPruner

from agnews_lora.cli import main
from agnews_lora.commands import control
from agnews_lora.paths import STORES, WORK
from agnews_lora.search import study as keys
from agnews_lora.search.results import SweepResult
from agnews_lora.search.study import sole_driver
from agnews_lora.search.trials import TrialSummary, summaries
from tests.project import write_project
from tests.search.conftest import no_wait_for_the_disk  # noqa: F401  # it speeds up every database
from tests.search.scripted import BUDGET, SHAPE, SPACE, ScriptedEngine, Session
from tests.search.test_results import facts

GOOD = ("targets=qv", "rank=9", "alpha=18", "dropout=0.1", "learning_rate=2e-3")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A project whose sweep `scripted` is the one of a `Session`."""
    space = {"targets": list(SPACE.targets), "dropout": SPACE.dropout.model_dump()}
    space["learning_rate"] = SPACE.learning_rate.model_dump()
    write_project(tmp_path, sweep={"budget": BUDGET, "space": space, "trials": 4})
    (tmp_path / "sweeps" / "small.yaml").rename(tmp_path / "sweeps" / "scripted.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(control, "shape_of", lambda base, num_labels: SHAPE)


def session(**options: Any) -> Session:
    return Session(STORES, 4, pruner=NopPruner(), **options)


def enqueue(*values: str) -> int:
    return main(["enqueue", "scripted", *values])


def stop(trial: str) -> int:
    return main(["stop", trial, "--sweep", "scripted"])


def status(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", "scripted", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def drive(driven: Session, at: dict[tuple[str, int], Callable[[], Any]]) -> list[TrialSummary]:
    """Run a session as the sole driver, and the calls at (trial, step) beside it."""
    driven.engine.script.update(at)
    with sole_driver(WORK / "scripted", "scripted"):
        return summaries(driven.run())


@pytest.mark.parametrize("num_slots", [1, 3])
def test_a_stopped_trial_ends_as_pruned_at_its_next_evaluation_and_the_sweep_goes_on(
    num_slots: int, capsys: pytest.CaptureFixture[str]
) -> None:
    driven = session(engine=ScriptedEngine(num_slots))
    rows = drive(driven, {("t0001", 12): lambda: stop("t0001"), ("t0002", 25): lambda: stop("2")})
    assert [row.state for row in rows] == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    for name, row, step in (
        ("t0001", rows[1], 20),
        ("t0002", rows[2], 30),
    ):  # the last one is asked for its end as well
        assert row.reason == f"stopped by a person at step {step} of 30"
        assert [(state, reason) for state, _, reason in driven.tracker.trials[name].ends] == [("PRUNED", row.reason)]
        assert f"{name} PRUNED: {row.reason}" in driven.screen.lines
    result = SweepResult.from_study(driven.study, None, facts(), state="COMPLETE")
    assert result.counts == {"complete": 2, "pruned": 2, "failed": 0} and result.winner in (rows[0], rows[3])
    assert [row["stopped"] for row in status(capsys)["rows"]] == [False, True, True, False]


def test_a_trial_that_is_stopped_between_two_starts_is_not_resumed() -> None:
    first = session()
    drive(first, {("t0001", 12): first.stop})
    assert stop("t0001") == 0
    second = session()
    rows = drive(second, {})
    assert (rows[1].state, rows[1].reason) == ("PRUNED", "stopped by a person at step 10 of 30")
    assert "t0001" not in [plan.trial for plan in second.engine.plans]
    assert [row.state for row in rows] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize(
    ("trial", "cause"), [("t0001", "has ended (complete)"), ("9", "no such trial"), ("t0O01", "did you mean t0001?")]
)
def test_what_cannot_be_stopped_is_named(trial: str, cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    drive(session(), {})
    assert stop(trial) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"agnews-lora: Cannot stop {trial.replace('9', 't0009')}: ") and cause in error


def test_a_repetition_is_not_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    driven = session(confirmation=(1, 2))
    drive(driven, {})
    rounds = keys.SweepStudy(f"scripted{keys.CONFIRMATION}", driven.study._storage)
    assert stop(rounds.trials[0].user_attrs[keys.NAME]) == 2
    assert "confirm" in capsys.readouterr().err


def test_an_enqueued_trial_is_next_and_on_top_and_a_copy_of_it_is_enqueued_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    codes: list[int] = []

    def ask_twice() -> None:
        codes.extend([enqueue(*GOOD), enqueue(*GOOD)])

    driven = session()
    rows = drive(
        driven, {("t0000", 5): ask_twice, ("t0003", 5): lambda: codes.append(enqueue("targets=ffn", "rank=2"))}
    )
    assert codes == [0, 0, 0]
    assert [row.state for row in rows] == ["COMPLETE"] * 6 and driven.screen.total_trials == 6
    assert [str(row.spec) for row in rows][1] == "qv r=9 alpha=18 dropout=0.1 lr=0.002"
    assert (rows[4].spec.targets, rows[4].spec.rank) == ("ffn", 2)  # type: ignore[union-attr]
    assert [row.enqueued for row in rows] == [False, True, False, False, True, False]
    found = status(capsys)
    assert (found["state"], found["planned"], found["trials"]["complete"]) == ("COMPLETE", 6, 6)


def test_what_is_enqueued_after_the_end_waits_for_the_next_start(capsys: pytest.CaptureFixture[str]) -> None:
    before = drive(session(), {})
    assert enqueue(*GOOD) == 0
    found = status(capsys)
    assert (found["state"], found["rows"][4]["state"], found["trials"]["waiting"]) == ("INTERRUPTED", "WAITING", 1)
    rows = drive(session(), {})
    assert rows[:4] == before and (len(rows), rows[4].state) == (5, "COMPLETE")


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ([], "no KEY=VALUE"),
        (["rank"], "'rank' is no KEY=VALUE"),
        (["target=qv"], "did you mean targets?"),
        (["targets=qv", "targets=qk"], "targets is given twice"),
        (["targets=qv", "rank=2", "rank_share=0.5"], "rank_share is given twice"),
        (["targets=qkvo"], "'qkvo' is not among"),
        (["rank=4"], "no targets beside it"),
        (["targets=qv", "rank=1.5"], "no whole number"),
        (["targets=qv", "rank=19"], "the largest rank that fits is 18"),
        (["targets=qv", "rank_share=1.5"], "budget 6,000"),
        (["targets=qv", "rank=2", "alpha=6"], "alpha_ratio 3.0 is not among"),
        (["alpha=6"], "no rank beside it"),
        (["dropout=0.9", "learning_rate=nan"], "learning_rate nan is no number within"),
        (["head=out_proj"], "is no parameter of the space"),
    ],
)
def test_what_no_trial_can_have_is_refused_before_anything_is_written(
    values: list[str], cause: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = session().study
    assert enqueue(*values) == 2
    error = capsys.readouterr().err
    assert error.startswith("agnews-lora: Cannot enqueue a trial of scripted: ") and cause in error
    assert len(study.trials) == 1


def test_a_file_that_no_longer_says_what_the_study_searches_enqueues_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    study, path = session().study, Path("sweeps/scripted.yaml")
    path.write_text(path.read_text().replace(f"budget: {BUDGET}", "budget: 7000"))
    assert enqueue("targets=qv", "rank=20") == 2
    assert "budget: 6000 -> 7000" in capsys.readouterr().err and len(study.trials) == 1


def test_attributes_that_were_copied_stop_and_add_nothing() -> None:
    driven = session()
    drive(driven, {("t0000", 5): lambda: enqueue(*GOOD), ("t0001", 5): lambda: stop("t0001")})
    by_hand = optuna.load_study(study_name="scripted", storage=driven.study._storage)
    by_hand.enqueue_trial({"targets": "qk"}, user_attrs=by_hand.trials[1].user_attrs)
    rows = summaries(Session(STORES, 5, pruner=NopPruner()).run())
    assert [row.state for row in rows] == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "COMPLETE", "COMPLETE"]


@pytest.mark.parametrize("driver", ["runs", "was killed", "ended"])
def test_the_status_says_how_far_a_study_is_and_writes_nothing(driver: str, capsys: pytest.CaptureFixture[str]) -> None:
    driven, found = session(), {}

    def look() -> None:
        before = {path: path.read_bytes() for path in STORES.rglob("*") if path.is_file()}
        found.update(status(capsys))
        assert main(["status", "scripted"]) == 0
        assert {path: path.read_bytes() for path in STORES.rglob("*") if path.is_file()} == before

    if driver == "runs":
        drive(driven, {("t0001", 15): look})
    elif driver == "was killed":
        driven.engine.script["t0001", 15] = look
        driven.run()
    else:
        drive(driven, {})
        look()
    state, first = {"runs": ("RUNNING", "RUNNING"), "was killed": ("INTERRUPTED",) * 2, "ended": ("COMPLETE",) * 2}[
        driver
    ]
    [baseline, row, *_] = found["rows"]
    assert (found["state"], found["budget"], found["planned"], row["state"]) == (state, BUDGET, 4, first)
    assert (baseline["state"], baseline["step"], baseline["total_steps"]) == ("COMPLETE", 30, 30)
    assert row["accuracy"] is not None and row["configuration"]["targets"] in SPACE.targets
    assert found["best"] in found["rows"] and found["best"]["state"] == "COMPLETE"
    shown = capsys.readouterr().out
    assert "t0001" in shown and "budget 6,000" in shown


@pytest.mark.parametrize(
    "arguments",
    [["status", "scripted"], ["stop", "t0001", "--sweep", "scripted"], ["enqueue", "scripted", "dropout=0.1"]],
)
def test_without_a_study_nothing_is_made(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(STORES, ignore_errors=True)
    assert main(arguments) == 2
    assert "has no study in this storage. Start `agnews-lora sweep scripted`." in capsys.readouterr().err
    assert not STORES.exists()


def test_a_path_with_signs_of_a_url_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "50 % #1?x=ü"
    shutil.copytree(tmp_path / "sweeps", odd / "sweeps")
    shutil.copytree(tmp_path / "experiments", odd / "experiments")
    monkeypatch.chdir(odd)
    session()
    assert main(["status", "scripted"]) == 0
