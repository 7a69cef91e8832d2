"""A sweep harness for LoRA text classifiers under a hard budget of trainable parameters.

From Python, in a project's folder:

    from agnews_lora import champion, promote, run_sweep

    result = run_sweep("embedded")
    result.frame()  # a row per trial
    promote("embedded")
    champion("embedded")("Shares of the chip maker rose.")
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from agnews_lora.commands.predict import champion as champion
    from agnews_lora.commands.promote import promote as promote
    from agnews_lora.commands.sweep import Stopped as Stopped
    from agnews_lora.commands.sweep import run_sweep as run_sweep
    from agnews_lora.config.experiment import load_experiment as load_experiment
    from agnews_lora.config.sweep import load_sweep as load_sweep
    from agnews_lora.search.results import SweepResult as SweepResult

__version__ = "0.1.0"

# Imported when they are first asked for: `agnews-lora --help` needs none of them.
_MODULES: Final = {
    "champion": "agnews_lora.commands.predict",
    "promote": "agnews_lora.commands.promote",
    "load_experiment": "agnews_lora.config.experiment",
    "load_sweep": "agnews_lora.config.sweep",
    "run_sweep": "agnews_lora.commands.sweep",
    "Stopped": "agnews_lora.commands.sweep",
    "SweepResult": "agnews_lora.search.results",
}
__all__ = ["Stopped", "SweepResult", "champion", "load_experiment", "load_sweep", "promote", "run_sweep"]

# Set before any library is imported, unless the user did. None of it changes a result.
ENVIRONMENT: Final = {
    # Threads that wait for work sleep. OpenMP's default lets them spin, and two processes that train on the same cores
    # then take ten times as long as one after the other.
    "OMP_WAIT_POLICY": "passive",
    # What libraries would print, send or ask beside what the program says.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # A server that does not answer is noticed within seconds: what it is to get is kept, and delivered later. MLflow's
    # own client would hold up the training for minutes.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
}

REMOVED: Final = (
    # They would let fp32 products be computed with fewer bits.
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    # MLflow would log every metric as that model's, which another store may have.
    "MLFLOW_ACTIVE_MODEL_ID",
    "_MLFLOW_ACTIVE_MODEL_ID",
)


def set_environment() -> None:
    """Set the variables that libraries read when they are imported, and remove those that would change a result."""
    if os.path.expanduser("~") == "~":  # noqa: PTH111  # no HOME, and a user without a name: imports would fail
        os.environ["HOME"] = "/"
    for name in REMOVED:
        os.environ.pop(name, None)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def unset(unwanted: Callable[[str], bool]) -> Iterator[None]:
    """Take variables out of the environment for the time of the block."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if unwanted(name)}
    try:
        yield
    finally:
        os.environ.update(taken)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    set_environment()
    return getattr(import_module(_MODULES[name]), name)
