"""The Optuna study: its space, its storage, and the runner that feeds an engine from it."""
