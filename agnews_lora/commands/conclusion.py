"""How a sweep ends: its winner registered, and everything that was found put on the parent run."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import optuna
from mlflow.artifacts import download_artifacts

from agnews_lora.commands import board
from agnews_lora.commands.cards import MODEL_METRICS, MODEL_PARAMS, model_card, version_card, winner_card
from agnews_lora.commands.predictions import Answers
from agnews_lora.commands.stage import Stage
from agnews_lora.commands.story import Story, arithmetic
from agnews_lora.config.sweep import Sweep
from agnews_lora.data import sources
from agnews_lora.search.confirmation import Confirmed, confirmed, winner_of
from agnews_lora.search.standings import Standing, baseline_of, standings
from agnews_lora.serving.model_package import Winner, register
from agnews_lora.tracking.registry import Registry, Version
from agnews_lora.tracking.runs import SweepRuns

WINNER: Final = "winner"  # tag of a trial's run


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
        rounds = confirmed(self.study) if self.sweep.confirmation else []
        winner = winner_of(rows, rounds)
        answers = Answers(self.runs, self.stage)
        version = self._register(winner, answers, rounds) if winner else None
        trials = board.trials_frame(rows)
        trials["winner"] = trials["trial"] == (winner.trial if winner else None)
        self.runs.page().log_table("leaderboard", board.leaderboard(trials))
        best = board.result_metrics(rows, winner)
        repeats = [row for each in rounds for row in each.repeats]
        with TemporaryDirectory() as folder:
            bound = self.stage.corpus.best_accuracy
            artifacts = board.draw(self.study, trials, repeats, self.runs, self.sweep.budget, bound, Path(folder))
            artifacts |= self._show_answers(rows, winner, answers, Path(folder))
            artifacts |= board.thumbnails(artifacts, Path(folder))
            if rounds:
                best |= board.confirmation_metrics(rounds[0])
                artifacts["confirmation.csv"] = Path(folder, "confirmation.csv")
                board.confirmation_frame(rounds).to_csv(artifacts["confirmation.csv"], index=False)
            if winner and version:
                self._present(rows, winner, version)
            story = Story(self.sweep, self.stage, self.runs, rows, winner, rounds, version)
            self.runs.page().describe(story.told())
            self.runs.close_parent(
                "COMPLETE",
                metrics={name: round(value, 6) for name, value in {**metrics, **best}.items()},
                tags={"best_trial": winner.trial, "best_run": str(winner.run_id)} if winner else {},
                artifacts=artifacts,
            )
        return version

    def _show_answers(
        self, rows: list[Standing], winner: Standing | None, answers: Answers, folder: Path
    ) -> dict[str, Path]:
        """Predictions of the winner and of the baseline go to their runs; the winner's figures."""
        baseline = baseline_of(rows)
        if baseline is not None and baseline.run_id is not None and self.runs.is_there(baseline.run_id):
            answers.of_run(baseline.run_id)
        if winner is None:
            return {}
        assert winner.run_id is not None, "a trial that ended has its run"
        return answers.show(winner.trial, winner.run_id, folder)

    def _present(self, rows: list[Standing], winner: Standing, version: Version) -> None:
        """The winner's run and its registered version say what they are, and so does a run that won before."""
        standing = {row.run_id: row for row in rows}
        parent = self.runs.page()
        for run_id, tags in self.runs.children().items():
            row, won = standing.get(run_id), run_id == winner.run_id
            if row is None or row.spec is None or not (won or tags.get(WINNER) == "true"):
                continue
            page, budget = self.runs.page(run_id), arithmetic(row.spec, self.stage.base.shape, self.sweep.budget)
            page.describe(winner_card(row, page, parent, version if won else None, budget))
            page.set_tags({WINNER: str(won).lower()})
        registry, rows_of = Registry(self.runs.client, self.sweep.experiment.name), self.stage.corpus.validation_rows
        data = f"{self.sweep.experiment.data_settings.source}-validation", rows_of.digest()
        registry.link(version, parent.run_id, MODEL_PARAMS, MODEL_METRICS, data)
        registry.introduce(model_card(version.model, self.sweep.name))
        registry.describe(version, version_card(version, self.runs.page(winner.run_id), parent))

    def _register(self, winner: Standing, answers: Answers, rounds: list[Confirmed]) -> Version:
        assert winner.run_id is not None, "a trial that ended has its run"
        client = self.runs.client
        adapter = download_artifacts(run_id=winner.run_id, artifact_path="adapter", tracking_uri=client.tracking_uri)
        registry = Registry(client, self.sweep.experiment.name)
        version = register(
            registry,
            Winner(winner.run_id, Path(adapter), self.sweep.name, self.study.study_name, self.sweep.budget),
            self.stage.base,
            self.stage.corpus,
            sources.describe(self.sweep.experiment.data_settings),
            partial(answers.logits, winner.run_id),
        )
        if rounds:
            registry.set_tags(version, board.confirmation_tags(rounds[0]))
        return registry.version(version.number)
