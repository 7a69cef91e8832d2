"""`agnews-lora worker`: join a study that a sweep has opened, on this machine or another, and train its trials."""

from uuid import uuid4

from rich.console import Console

from agnews_lora.commands import study as studies
from agnews_lora.commands.interrupts import Supervisor, orderly_stop
from agnews_lora.commands.stage import prepare
from agnews_lora.commands.work import Work, log_data, tidy_up
from agnews_lora.config.sweep import load_sweep
from agnews_lora.paths import STORES
from agnews_lora.reporting.progress import Progress
from agnews_lora.search.leases import Heart, Leases
from agnews_lora.search.study import IDENTITY, answering
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client


def run(
    name: str,
    storage: str | None,
    tracking: str | None,
    patience: float,
    quiet: bool,
    supervisor: Supervisor | None = None,
) -> int:
    """Train trials until none is left; the exit code: 0, or 128 + signal when stopped.

    storage, tracking: URLs of the stores, or None for the project's own. patience: seconds that they may be away.
    quiet: show no progress. supervisor: of a worker that a sweep started; once it is gone, the worker stops.

    Raises:
        AgnewsLoraError: anything that the user can mend; the study is as it was before.
    """
    sweep = load_sweep(name)
    with orderly_stop() as request:
        stage = prepare(sweep.experiment)
        with answering():
            study = studies.joined(sweep, stage, storage)
            runs = SweepRuns(open_client(tracking or STORES), sweep.name, sweep.name)
            with runs.reaching():
                runs.join_parent(study.study_name, study.user_attrs[IDENTITY])
                log_data(runs, sweep, stage)
            tidy_up(sweep, study)
            owner = supervisor.owner if supervisor else f"worker/{uuid4().hex}"
            leases = Leases.of(study, owner)
            with Heart(leases):
                Work(
                    sweep,
                    stage,
                    study,
                    leases,
                    runs,
                    lambda: bool(request) or (supervisor is not None and supervisor.is_gone),
                    patience,
                ).run(lambda _: Progress(quiet=quiet))
    if request:
        return request.exit_code
    if not quiet and supervisor is None:
        Console(highlight=False).print(f"No trial of study {study.study_name} is left to train.")
    return 0
