"""Where things lie, below the working directory."""

from pathlib import Path
from typing import Final

STORES: Final = Path("mlruns")  # mlflow.db, artifacts/, optuna.db
WORK: Final = STORES / "work"  # checkpoints of trials that have not ended
TOKENS: Final = Path(".cache/tokens")  # token tables, made again when missing
TRAINED: Final = Path("trained_models")
REPORTS: Final = Path("reports")
