"""`agnews-lora report`: the result of a sweep, as an HTML page and a PDF, from the run store alone."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from mlflow import MlflowClient
from rich.console import Console

from agnews_lora.errors import StudyError
from agnews_lora.paths import REPORTS, RUNS_DATABASE, STORES, temporary_files
from agnews_lora.reporting.figures import draw
from agnews_lora.reporting.report import write_report
from agnews_lora.search.results import SweepResult
from agnews_lora.tracking.runs import newest_parent, page_of, read_curve
from agnews_lora.tracking.store import open_client, reaching
from agnews_lora.training.interface import SCORES

RESULT: Final = "result.json"  # artifact of the parent run


@temporary_files()
def run(name: str, to: Path | None, tracking: str | None, as_json: bool) -> int:
    """Write the report of a sweep's newest study, and keep it on its parent run, unless the project is read-only.

    Args:
        name: the sweep's, or the path of its file, which is not read.
        to: a folder; `reports/` where None.
        tracking: URL of the run store; the project's own where None.

    Raises:
        StudyError: the sweep has never run, or is not finished.
        StorageError: the store or the folder cannot be read or written.
    """
    sweep = Path(name).stem if "/" in name or name.endswith((".yaml", ".yml")) else name
    remedy = f"Run `agnews-lora sweep {sweep}`"
    never = StudyError(f"Cannot write a report of {sweep}: the run store has no run of this sweep. {remedy}.")
    if tracking is None and not (STORES / RUNS_DATABASE).exists():
        raise never
    keep = tracking is not None or all(os.access(path, os.W_OK) for path in (STORES, STORES / RUNS_DATABASE))
    client = open_client(tracking or STORES, read=not keep)
    with reaching(client):
        parent = newest_parent(client, sweep)
        if parent is None:
            raise never
        text = page_of(client, parent.info.run_id).read_text(RESULT)
    study, state = parent.data.tags.get("study", parent.info.run_name), parent.data.tags.get("state", "RUNNING")
    if text is None or state != "COMPLETE":
        cause = f"its state is {state}" if state != "COMPLETE" else f"its run has no {RESULT}"
        raise StudyError(
            f"Cannot write a report of {sweep}: study {study} is not finished ({cause}). {remedy} to finish it."
        )
    try:
        result = SweepResult.from_json(text)
    except ValueError as error:
        raise StudyError(f"Cannot read {RESULT} of study {study}: {error}. {remedy} to write it anew.") from error
    with reaching(client):
        page, paper = write(client, parent.info.run_id, result, to or REPORTS, keep=keep)
    if as_json:
        print(json.dumps({"study": result.study, "html": str(page), "pdf": str(paper)}))
        return 0
    winner = result.winner
    found = "no winner"
    if winner:
        scores = (f"{SCORES[name]} {winner.score(name) or 0.0:.2%}" for name in SCORES)
        rows = f"{result.facts.num_validation_rows:,} validation rows"
        found = f"winner {winner.trial} by {SCORES[result.objective]}, {', '.join(scores)} on {rows}"
    console = Console(highlight=False, markup=False)
    console.print(f"study {result.study}: {found}\n{page}\n{paper}", soft_wrap=True)
    if keep:
        console.print("Both are also on the sweep's parent run, as report.html and report.pdf.", soft_wrap=True)
    return 0


def write(
    client: MlflowClient,
    parent: str,
    result: SweepResult,
    to: Path,
    pictures: Mapping[str, Path] | None = None,
    keep: bool = True,
) -> tuple[Path, Path]:
    """Write `<study>.html` and `<study>.pdf`, and keep them on the parent run in place of older ones.

    Args:
        parent: id of the parent run.
        result, to: see `write_report`.
        pictures: figures by name; where None, they are drawn from the curves of the trials' runs.
        keep: on the parent run as well.

    Raises:
        StorageError: the folder cannot be written.
    """
    with TemporaryDirectory() as folder:
        if pictures is None:
            curves = {row.trial: read_curve(client, row.run_id, row.trial) for row in result.trials if row.run_id}
            pictures = draw(result, curves, Path(folder, "pictures"))
        written = write_report(result, pictures, to)
        for path in written if keep else ():
            client.log_artifact(parent, shutil.copyfile(path, Path(folder, f"report{path.suffix}")))
    return written
