"""The Optuna study: its space, its storage, and the driver that feeds an engine from it."""
