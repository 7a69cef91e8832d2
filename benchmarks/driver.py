"""What recording a trial costs the driver, without a worker and with one Ray worker: `python -m benchmarks.driver`.

The engine trains nothing (`tests/search/scripted.py`), so that all CPU time of the driver's process is its own: study,
trial logs, MLflow, and Ray's messages. Both ways must find the same study, whose hash is compared. Writes `results/`.
"""

import datetime
import hashlib
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from agnews_lora import ENVIRONMENT
from agnews_lora.tracking.provenance import provenance
from benchmarks import ROOT
from benchmarks.result_files import commit_of, slug, write

TRIALS: Final = 60
REPETITIONS: Final = 3
CASES: Final = [(tracking, worker) for tracking in ("none", "mlflow") for worker in ("inline", "ray")]


def main() -> int:
    """Measure each case in processes of its own, in turn; print and write the table; return the exit code."""
    if sys.argv[1:]:
        print(json.dumps(measure(*sys.argv[1:])))
        return 0
    measured: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in CASES}
    for _ in range(REPETITIONS):
        for case, found in measured.items():
            environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-m", "benchmarks.driver", *case]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
            found.append(json.loads(done.stdout.splitlines()[-1]))
    text = table(measured)
    if len({each["study"] for found in measured.values() for each in found}) > 1:
        print(f"{text}\nThe studies differ: nothing is written.", file=sys.stderr)
        return 1
    write(f"driver-{slug(provenance()['device'])}", text)
    return 0


def table(measured: dict[tuple[str, str], list[dict[str, Any]]]) -> str:
    """The result file."""
    tags = provenance()
    return "\n".join(
        [
            f"# What recording a trial costs the driver, {tags['device']}, {datetime.date.today()}",
            "",
            f"`python -m benchmarks.driver`. Commit {commit_of(tags)}, {os.cpu_count()} cores with a load of "
            f"{os.getloadavg()[0]:.1f}, optuna {version('optuna')}, mlflow {version('mlflow')}, ray {version('ray')}. "
            f"Studies of {TRIALS} trials in SQLite, an engine that trains nothing, six training and three evaluation "
            f"points a trial that is not pruned. Medians of {REPETITIONS} runs, in turn; CPU time of the driver's "
            "process alone.",
            "",
            "| runs recorded in | trained by | driver CPU a trial | study |",
            "| --- | --- | ---: | --- |",
            *(
                f"| {'MLflow (SQLite)' if tracking == 'mlflow' else 'nothing'} | "
                f"{'one Ray worker' if worker == 'ray' else 'the driver itself'} | "
                f"{sorted(each['cpu_ms'] for each in found)[len(found) // 2]:.0f} ms | `{found[0]['study']}` |"
                for (tracking, worker), found in measured.items()
            ),
            "",
        ]
    )


def measure(tracking: str, worker: str) -> dict[str, Any]:
    """Drive a study of one trial, so that all is imported and started, then the one that is measured."""
    from tests.search.scripted import RecordingTracker, ScriptedEngine, Session

    with TemporaryDirectory() as folder:
        for name, trials in (("first", 1), ("measured", TRIALS)):
            root = Path(folder) / name
            root.mkdir()
            session = Session(root, trials, tracker=mlflow(root) if tracking == "mlflow" else RecordingTracker())
            began = time.process_time()
            if worker == "inline":
                session.run()
            else:
                from agnews_lora.search import ray_cluster

                ray_cluster.train(session.driver, ScriptedEngine, workers=1, screen_message=session.screen.message)
            seconds = time.process_time() - began
        ended = session.study.get_trials(deepcopy=False)
    found = [[t.number, t.state.name, t.value, t.params, sorted(t.intermediate_values.items())] for t in ended]
    study = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]
    return {"cpu_ms": 1e3 * seconds / TRIALS, "study": study}


def mlflow(root: Path) -> Any:
    """A run store, with the parent run open."""
    from agnews_lora.reporting.figures import trial_curves
    from agnews_lora.tracking.runs import SweepRuns
    from agnews_lora.tracking.store import open_client

    runs = SweepRuns(open_client(root / "runs"), "scripted", {}, {}, trial_curves)
    runs.open_parent("scripted", identity="scripted", params={}, tags={}, texts={})
    return runs


if __name__ == "__main__":
    sys.exit(main())
