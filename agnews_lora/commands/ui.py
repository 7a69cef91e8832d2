"""`agnews-lora ui`: the MLflow UI over the project's runs, on loopback."""

import os
import sys

from agnews_lora.commands.serve import HOST, bound
from agnews_lora.paths import STORES
from agnews_lora.tracking.runs import newest_sweeps
from agnews_lora.tracking.store import open_client, tracking_uri

LAYOUT = "workflowType=machine_learning"  # without it the UI shows what language-model applications need


def run(port: int) -> int:
    """Become MLflow's server; Ctrl-C ends it.

    Raises:
        StorageError: the run store cannot be opened, or the port is taken.
    """
    sweeps = newest_sweeps(open_client(STORES))
    bound(port).close()  # MLflow would say that it is taken in a traceback
    print(f"Runs: http://{HOST}:{port}/#/experiments?{LAYOUT}  (Ctrl-C ends it)", flush=True)
    for study, page in sweeps.items():
        print(f"{study}: http://{HOST}:{port}/{page.url}?{LAYOUT}", flush=True)
    os.environ.setdefault("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")  # its processes end in tracebacks at Ctrl-C
    command = ["mlflow", "server", "--backend-store-uri", tracking_uri(STORES), "--host", HOST, "--port", str(port)]
    os.execv(sys.executable, [sys.executable, "-m", *command, "--workers", "1"])
