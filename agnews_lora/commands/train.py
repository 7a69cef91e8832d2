"""`agnews-lora train`: one experiment, trained once, kept as a folder with checkpoint and tokenizer."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import head_parameters, trainable_parameters
from agnews_lora.commands.interrupts import StopRequest, orderly_stop
from agnews_lora.commands.records import Records
from agnews_lora.commands.stage import Stage, prepare
from agnews_lora.config.experiment import Experiment, load_experiment
from agnews_lora.data.tokens import load_tokenizer
from agnews_lora.paths import STORES, TRAINED, WORK
from agnews_lora.reporting.figures import trial_curves
from agnews_lora.reporting.progress import Progress
from agnews_lora.search.trial_log import End
from agnews_lora.tracking.provenance import provenance
from agnews_lora.tracking.runs import SweepRuns
from agnews_lora.tracking.store import open_client
from agnews_lora.training.interface import EvalPoint, TrainPoint, TrialPlan, TrialResult, Verdict

TRIAL = "train"


def run(name: str, quiet: bool, as_json: bool) -> int:
    """Train an experiment and give the exit code: 0, 1 where the training failed, 128 + signal when stopped.

    Writes `trained_models/final_model/`, `accuracy_curve.png` and `loss_curve.png`, and a run in MLflow.

    quiet: show the result alone. as_json: show it as JSON, and nothing else.

    Raises:
        AgnewsLoraError: anything that the user can mend.
    """
    experiment = load_experiment(name)
    stage = prepare(experiment)
    runs = SweepRuns(open_client(STORES), experiment.name, experiment.name)
    records = Records(runs, {"experiment": experiment.name, "base": stage.base.hub_id}, provenance())
    with (
        TemporaryDirectory(dir=_made(WORK)) as folder,
        orderly_stop() as request,
        Progress(total_trials=1, quiet=quiet or as_json) as progress,
    ):
        training = _Solo(stage, Path(folder) / TRIAL, records, progress, request)
        stage.engine("trainer").run(training, training)
        if training.result is not None:
            _keep(training.result, stage, records)
    if training.result is None:
        training.close()
        _say_unfinished(experiment.name, training.failure, as_json)
        return 1 if training.failure else request.exit_code
    _say_finished(experiment, training.result, as_json)
    return 0


def _say_unfinished(experiment: str, failure: str | None, as_json: bool) -> None:
    if as_json:
        state = "FAILED" if failure else "INTERRUPTED"
        print(json.dumps({"experiment": experiment, "state": state, "reason": failure}))
        return
    stopped = "Stopped. Nothing is kept of an unfinished training; start it again."
    Console(highlight=False, markup=False).print(failure or stopped)


def _say_finished(experiment: Experiment, result: TrialResult, as_json: bool) -> None:
    final, spec, written = result.final, experiment.spec, TRAINED / "final_model"
    assert final is not None, "nothing prunes a single training"
    if as_json:
        found = {
            "experiment": experiment.name,
            "state": "COMPLETE",
            "configuration": spec.as_dict(),
            "accuracy": final.accuracy,
            "macro_f1": final.macro_f1,
            "loss": final.loss,
            "validation_rows": final.rows,
            "trainable_parameters": result.trainable_parameters,
            "folder": str(written),
        }
        print(json.dumps(found))
        return
    shape = shape_of(experiment.base)
    head = head_parameters(spec.head, shape)
    Console(highlight=False).print(
        f"\n[bold]{experiment.name}[/]: {spec}\n"
        f"validation accuracy   {final.accuracy:.2%}  (macro-F1 {final.macro_f1:.4f}, {final.rows:,} rows)\n"
        f"trainable parameters  {result.trainable_parameters:,}"
        f"  ({head:,} head + {trainable_parameters(spec, shape) - head:,} adapter)\n"
        f"written               {written}/  accuracy_curve.png  loss_curve.png",
        soft_wrap=True,
    )


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _keep(result: TrialResult, stage: Stage, records: Records) -> None:
    """Put checkpoint, tokenizer and curves where the seed project put them."""
    assert result.adapter is not None, "a training that ended has its adapter"
    beside = _made(TRAINED) / "final_model.partial"
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(result.adapter, beside)
    load_tokenizer(stage.base.folder).save_pretrained(str(beside))
    final = TRAINED / "final_model"
    shutil.rmtree(final, ignore_errors=True)
    beside.replace(final)
    with TemporaryDirectory(dir=TRAINED) as folder:
        title = f"{TRIAL}-{stage.experiment.spec.targets}-r{stage.experiment.spec.rank}"
        for path in trial_curves(records.runs.curve(TRIAL), title, Path(folder)).values():
            if path.parent == Path(folder):  # not the thumbnails
                path.replace(Path(path.name))


@dataclass
class _Solo:
    """The engine's source and observer for one plan; nothing prunes it."""

    stage: Stage
    folder: Path
    records: Records
    screen: Progress
    request: StopRequest
    result: TrialResult | None = None
    failure: str | None = None
    _given: bool = field(default=False, init=False)

    def next(self) -> TrialPlan | None:
        if self._given:
            return None
        self._given = True
        experiment = self.stage.experiment
        facts = {
            "seed": experiment.seed,
            "baseline": False,
            "trainable_parameters": trainable_parameters(experiment.spec, self.stage.base.shape),
        }
        self.records.start_trial(TRIAL, experiment.spec, facts, None)
        self.screen.trial_started(TRIAL, str(experiment.spec), self.stage.total_steps)
        return TrialPlan(TRIAL, experiment.spec, experiment.seed, self.folder)

    def logged(self, points: Sequence[TrainPoint]) -> None:
        self.records.log_points(TRIAL, points)
        self.screen.logged(points)

    def evaluated(self, points: Sequence[EvalPoint]) -> Sequence[Verdict]:
        self.records.log_points(TRIAL, points)
        self.screen.evaluated(points)
        return [Verdict.CONTINUE for _ in points]

    def checkpointed(self, trial: str, step: int, path: Path) -> None:
        """Not gone on from: a single training starts again."""

    def finished(self, result: TrialResult) -> None:
        self.result = result
        self.records.finish_trial(TRIAL, End("COMPLETE", result))
        self.screen.trial_ended(TRIAL, "COMPLETE", result.final.accuracy if result.final else None, None)

    def failed(self, trial: str, error: Exception) -> None:
        self.failure = str(error)
        self.records.finish_trial(TRIAL, End("FAILED", reason=self.failure))
        self.screen.trial_ended(TRIAL, "FAIL", None, self.failure)

    def stop_requested(self) -> bool:
        return bool(self.request)

    def close(self) -> None:
        """End the run of a training that was stopped."""
        if self._given and self.failure is None:
            self.records.finish_trial(TRIAL, End("INTERRUPTED", reason="stopped"))
