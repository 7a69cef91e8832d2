"""Files as a run store keeps them: read again without the folders that they came from."""

from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from agnews_lora.config.experiment import Experiment
from agnews_lora.config.sweep import Sweep
from agnews_lora.config.yaml import faults_of, load, parse
from agnews_lora.errors import ConfigError


def read_experiment(name: str, text: str) -> Experiment:
    """The experiment of a file's text. name: the file's, without its ending.

    Raises:
        ConfigError: the text is not one that this version accepts.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder, f"{name}.yaml")
        path.write_text(text, encoding="utf-8")
        return load(Experiment, path)


def read_sweep(name: str, text: str, experiment: Experiment) -> Sweep:
    """The sweep of a file's text, over an experiment whatever the text calls it. name: the file's, without its ending.

    Raises:
        ConfigError: the text is not one that this version accepts.
    """
    path = Path(f"{name}.yaml")
    document = parse(text, path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: must be a sweep, but is no mapping of keys to values")
    try:
        return Sweep.model_validate(document | {"experiment": experiment}, context={"path": path})
    except ValidationError as error:
        raise ConfigError(faults_of(Sweep, path, error)) from error
