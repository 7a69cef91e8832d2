"""`agnews-lora report`: what a sweep found, as an HTML page and a PDF, from its stores alone."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlflow import MlflowClient
from rich.console import Console

from agnews_lora.commands.dossiers import gather
from agnews_lora.errors import StorageError, StudyError
from agnews_lora.paths import REPORTS, STORES
from agnews_lora.reporting.report.composition import compose
from agnews_lora.reporting.report.dossier import Dossier
from agnews_lora.reporting.report.page import html
from agnews_lora.reporting.report.paper import pdf
from agnews_lora.search.study import IDENTITY, answering, open_storage
from agnews_lora.tracking.reading import newest_sweep
from agnews_lora.tracking.store import DATABASE, open_client, reaching


@dataclass(frozen=True)
class Written:
    """The files of a report, and what it was written from."""

    html: Path
    pdf: Path
    dossier: Dossier


def run(name: str, to: Path | None, tracking: str | None, storage: str | None, as_json: bool) -> int:
    """Write the report of a sweep's newest study, and keep it on its parent run.

    name: the sweep's, or the path of its file, which is not read. tracking, storage: URLs, or None for the project's
    own stores.

    Raises:
        StudyError: the sweep has never run. StorageError: a store or the folder cannot be read or written.
    """
    sweep = Path(name).stem if "/" in name or name.endswith((".yaml", ".yml")) else name
    never = StudyError(
        f"a report needs a sweep that has run, but this store has no run of {sweep}; `agnews-lora sweep {sweep}` "
        "starts it"
    )
    if tracking is None and not (STORES / DATABASE).exists():
        raise never
    client = open_client(tracking or STORES)
    with reaching(client):
        parent = newest_sweep(client, sweep)
    if parent is None:
        raise never
    written = write(client, parent.run_id, _attributes(parent.tags.get("study_id", ""), storage), to or REPORTS)
    if as_json:
        print(json.dumps({"study": written.dossier.study, "html": str(written.html), "pdf": str(written.pdf)}))
        return 0
    console, dossier = Console(highlight=False, markup=False), written.dossier
    console.print(f"study {dossier.study}{_found(dossier)}", soft_wrap=True)
    console.print(f"{written.html}\n{written.pdf}", soft_wrap=True)
    console.print("Both are also on the sweep's parent run, as report.html and report.pdf.", soft_wrap=True)
    return 0


def write(client: MlflowClient, parent: str, attributes: Mapping[str, Any], to: Path) -> Written:
    """Write `<study>.html` and `<study>.pdf`, and log them to the parent run in place of older ones.

    parent: id of the sweep's parent run; what it says of its state is what the report says, so that it is to be closed
    first. attributes: the study's user attributes; empty where it is gone. to: a folder, created where it is missing.

    Raises:
        StorageError: the run store cannot be read or written, or the folder cannot be written.
    """
    with TemporaryDirectory() as folder, reaching(client):
        dossier = gather(client, parent, attributes, Path(folder))
        document = compose(dossier)
        beside = {"report.html": html(document).encode("utf-8"), "report.pdf": pdf(document)}
        for name, content in beside.items():
            path = Path(folder, name)
            path.write_bytes(content)
            client.log_artifact(parent, str(path))
        page, paper = to / f"{dossier.study}.html", to / f"{dossier.study}.pdf"
        _place({page: Path(folder, "report.html"), paper: Path(folder, "report.pdf")})
    return Written(page, paper, dossier)


def _place(files: Mapping[Path, Path]) -> None:
    """Copy each file to its place, beside and renamed."""
    for place, source in files.items():
        beside = place.with_name(f".{place.name}.part")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, beside)
            beside.replace(place)
        except OSError as error:
            raise StorageError(
                f"the report must be written to {place}, but that is not possible ({error.strerror}); free or unlock "
                "its folder, or name another with --to"
            ) from error


def _attributes(identity: str, storage: str | None) -> Mapping[str, Any]:
    """User attributes of the study that a parent run belongs to; empty where it is gone.

    Raises:
        StorageError: the storage cannot be read.
    """
    if storage is None and not (STORES / "optuna.db").exists():
        return {}
    rdb = open_storage(storage or STORES, create=False)
    with answering():
        attributes = [study.user_attrs for study in rdb.get_all_studies()]
    return next((each for each in attributes if each.get(IDENTITY) == identity), {})


def _found(dossier: Dossier) -> str:
    winner = dossier.trial(dossier.winner)
    if winner is None:
        return ": no trial was trained to its end"
    kind = "winner" if dossier.is_complete else "unfinished, best so far"
    return f": {kind} {winner.trial}, {winner.accuracy:.2%} of the validation split"
