"""What a finished sweep found: for the last screen, and as JSON for scripts."""

from dataclasses import dataclass
from typing import Any

import optuna

from agnews_lora.commands.stage import Stage
from agnews_lora.config.sweep import Sweep
from agnews_lora.reporting.summary import SweepSummary
from agnews_lora.search.confirmation import Confirmed, confirmed, winner_of
from agnews_lora.search.standings import Standing, baseline_of, count_ended, standings
from agnews_lora.tracking.registry import Version


@dataclass(frozen=True)
class Result:
    """A study whose trials have ended. version: what was registered; None without a winner."""

    sweep: Sweep
    study: str
    rows: list[Standing]
    winner: Standing | None
    confirmation: Confirmed | None
    bound: float | None
    version: Version | None
    wall_seconds: float

    @classmethod
    def of(cls, sweep: Sweep, stage: Stage, study: optuna.Study, version: Version | None, seconds: float) -> "Result":
        """Read it from the study."""
        rows, rounds = standings(study), confirmed(study) if sweep.confirmation else []
        return cls(
            sweep,
            study.study_name,
            rows,
            winner_of(rows, rounds),
            rounds[0] if rounds else None,
            stage.corpus.best_accuracy,
            version,
            seconds,
        )

    @property
    def _baseline_accuracy(self) -> float | None:
        baseline = baseline_of(self.rows)
        return baseline.accuracy if baseline else None

    def summary(self) -> SweepSummary:
        """For the last screen."""
        winner, counts, confirmation = self.winner, count_ended(self.rows), self.confirmation
        named = "" if self.sweep.name == "embedded" else f" SWEEP={self.sweep.name}"
        version = self.version
        return SweepSummary(
            study=self.study,
            num_complete=counts["complete"],
            num_pruned=counts["pruned"],
            num_failed=counts["failed"],
            winner=winner.trial if winner else None,
            configuration=str(winner.spec) if winner else None,
            accuracy=winner.accuracy if winner else None,
            mean_accuracy=confirmation.mean_accuracy if confirmation else None,
            std_accuracy=confirmation.std_accuracy if confirmation else None,
            num_seeds=len(confirmation.runs) if confirmation else None,
            trainable_parameters=winner.trainable_parameters if winner else None,
            budget=self.sweep.budget,
            baseline_accuracy=self._baseline_accuracy,
            bound=self.bound,
            wall_seconds=self.wall_seconds,
            registered=f"{version} as {', '.join(version.aliases) or 'a version'}" if version else None,
            next_commands=(
                ("make ui", "browse the runs"),
                (f"make promote{named}", "check the winner, and make it champion"),
                (f"make report{named}", "write what was found as a page and a PDF"),
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """For scripts: plain values, accuracies as shares."""
        version = self.version
        return {
            "study": self.study,
            "state": "COMPLETE",
            "trials": count_ended(self.rows),
            "winner": self._winner(),
            "baseline_accuracy": self._baseline_accuracy,
            "best_possible_accuracy": self.bound,
            "budget": self.sweep.budget,
            "registered": (
                {"model": version.model, "version": version.number, "aliases": list(version.aliases)}
                if version
                else None
            ),
            "wall_seconds": round(self.wall_seconds, 1),
        }

    def _winner(self) -> dict[str, Any] | None:
        winner, confirmation = self.winner, self.confirmation
        if winner is None:
            return None
        return {
            "trial": winner.trial,
            "run_id": winner.run_id,
            "configuration": winner.spec.as_dict() if winner.spec else None,
            "accuracy": winner.accuracy,
            "trainable_parameters": winner.trainable_parameters,
            "confirmation": {
                "seeds": len(confirmation.runs),
                "failed": confirmation.num_failed,
                "mean_accuracy": confirmation.mean_accuracy,
                "std_accuracy": confirmation.std_accuracy,
                "drop": confirmation.drop,
            }
            if confirmation
            else None,
        }
