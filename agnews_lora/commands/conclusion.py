"""How a sweep ends: its winner registered, and everything that was found put on the parent run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import optuna
from mlflow.artifacts import download_artifacts

from agnews_lora.commands import board
from agnews_lora.commands.stage import Stage
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.search.study import Standing, best_of, standings
from agnews_lora.serving.registration import Winner, register
from agnews_lora.tracking.registry import Registry, Version
from agnews_lora.tracking.runs import SweepRuns


@dataclass(frozen=True)
class Conclusion:
    """Concludes a study whose trials have all ended. Doing it again changes nothing but what is new."""

    sweep: Sweep
    stage: Stage
    study: optuna.Study
    runs: SweepRuns

    def draw(self, metrics: Mapping[str, float]) -> Version | None:
        """Leaderboard, figures and the winner's registration; the version, or None without a winner.

        metrics: of this start of the sweep, for the parent run.
        """
        rows = standings(self.study)
        winner = best_of(rows)
        version = self._register(winner) if winner else None
        trials = board.trials_frame(rows)
        self.runs.log_leaderboard(board.leaderboard(trials))
        best = {"best/accuracy": winner.accuracy} if winner and winner.accuracy is not None else {}
        with TemporaryDirectory() as folder:
            artifacts = board.draw(
                self.study, trials, self.runs, self.sweep.budget, self.stage.corpus.best_accuracy, Path(folder)
            )
            self.runs.close_parent(
                "COMPLETE",
                metrics={**metrics, **best},
                tags={"best_trial": winner.trial, "best_run": str(winner.run_id)} if winner else {},
                artifacts=artifacts,
            )
        return version

    def _register(self, winner: Standing) -> Version:
        assert winner.run_id is not None, "a trial that ended has its run"
        client = self.runs.client
        adapter = download_artifacts(run_id=winner.run_id, artifact_path="adapter", tracking_uri=client.tracking_uri)
        return register(
            Registry(client, self.sweep.experiment.name),
            Winner(winner.run_id, Path(adapter), self.sweep.name, self.study.study_name, self.sweep.budget),
            self.stage.base,
            self.stage.corpus,
            sources.describe(self.sweep.experiment.data_settings),
        )
