"""A Python environment with some of the installed distributions and what they need, and nothing else."""

import importlib.metadata
import venv
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement

# Of a CUDA machine on which the training core is measured and tested; no datasets, evaluate, mlflow, optuna, ...
ON_A_BARE_MACHINE = ("torch", "transformers", "peft", "numpy", "pytest", "hypothesis")


def make(folder: Path, distributions: Iterable[str] = ON_A_BARE_MACHINE) -> Path:
    """Make a virtual environment of links to the distributions' own files; its Python."""
    venv.create(folder, symlinks=True)
    [packages] = folder.glob("lib/python*/site-packages")
    for distribution in closure(distributions):
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return folder / "bin" / "python"


def closure(names: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """Find distributions and all that they require, extras left out."""
    found: dict[str, importlib.metadata.Distribution] = {}
    todo = list(names)
    while todo:
        name = todo.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        required = (Requirement(each) for each in found[name].requires or ())
        todo += [each.name for each in required if each.marker is None or each.marker.evaluate({"extra": ""})]
    return list(found.values())
