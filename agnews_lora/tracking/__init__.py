"""The records in MLflow: runs and registered versions."""

import os

# Read while mlflow is imported, hence here, before any module of this room imports it: no usage statistics over the
# network, and no warning where git is not installed.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
