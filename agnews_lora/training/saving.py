"""Checkpoints of Trainer's, sealed, and with the training loss that has no point yet."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agnews_lora.errors import TrainingError
from agnews_lora.training import checkpoints
from agnews_lora.training.interface import TrialPlan
from agnews_lora.training.loading import PrecutTrainer

WINDOW = "window.json"


@dataclass(frozen=True)
class LossWindow:
    """The training loss since its last point, which Trainer's own checkpoint does not hold.

    loss_sum: of the steps after `logged`, the step of that point. learning_rate: of the last step.
    """

    loss_sum: float
    logged: int
    learning_rate: float

    @classmethod
    def read(cls, checkpoint: Path) -> "LossWindow":
        """What `SealingTrainer` wrote into a checkpoint.

        Raises:
            TrainingError: not a checkpoint of this engine, or damaged.
        """
        try:
            return cls(**json.loads((checkpoint / WINDOW).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise TrainingError(
                f"{checkpoint} must be a checkpoint of engine trainer, but cannot be read as one ({error}); go on with "
                "the engine that wrote it, or start the trial again"
            ) from error


class SealingTrainer(PrecutTrainer):
    """Trainer whose checkpoints are sealed, and hold the window of the training loss.

    learning_rate: of the last step. save_seconds: wall time inside checkpoints.
    """

    def __init__(self, *args: Any, plan: TrialPlan, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plan = plan
        self.learning_rate = self.save_seconds = 0.0

    @property
    def window(self) -> LossWindow:
        """Of this moment; set as training begins, where it goes on."""
        return LossWindow(self._tr_loss.item(), self._globalstep_last_logged, self.learning_rate)

    @window.setter
    def window(self, window: LossWindow) -> None:
        self._tr_loss.fill_(window.loss_sum)
        self._globalstep_last_logged, self.learning_rate = window.logged, window.learning_rate

    def _get_output_dir(self, trial: Any) -> str:
        return str(checkpoints.partial_of(self.plan.folder))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        began = time.perf_counter()
        with checkpoints.written(self.plan.trial, self.plan.folder, self.state.global_step) as folder:
            super()._save_checkpoint(model, trial)
            (folder / WINDOW).write_text(json.dumps(asdict(self.window)) + "\n", encoding="utf-8")
        self.save_seconds += time.perf_counter() - began
