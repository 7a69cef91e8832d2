"""What produced a run: code, library versions, Python and device, as tags. No host name and no path of the machine."""

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import agnews_lora
from agnews_lora.training.device import device_name, training_device

LIBRARIES = ("torch", "transformers", "peft", "optuna", "mlflow")
PACKAGE_FOLDER = Path(agnews_lora.__file__).parent
GIT_TIMEOUT_SECONDS = 2


def provenance() -> dict[str, str]:
    """Tags of the code and machine at hand.

    `mlflow.source.git.commit` and `git.dirty` (uncommitted changes inside the package) are there only where the package
    lies in a git checkout that tracks it.
    """
    libraries = {f"version.{library}": version(library) for library in LIBRARIES}
    return {
        "version.agnews_lora": agnews_lora.__version__,
        "version.python": platform.python_version(),
        **libraries,
        "device": device_name(training_device()),
        **_git_tags(PACKAGE_FOLDER),
    }


def _git_tags(package_folder: Path) -> dict[str, str]:
    try:
        # An installed copy may lie in the environment of another project: that project's commit says nothing about it.
        if not _git(package_folder, "ls-files", "__init__.py"):
            return {}
        commit = _git(package_folder, "rev-parse", "HEAD")
        dirty = bool(_git(package_folder, "status", "--porcelain", "."))
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, no commit yet, or no answer in time
        return {}
    return {"mlflow.source.git.commit": commit, "git.dirty": str(dirty).lower()}


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=GIT_TIMEOUT_SECONDS
    ).stdout.strip()
