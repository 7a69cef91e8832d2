"""A sweep: what to search, from which experiment, under which budget. A file in `sweeps/`."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Final, Generic, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from agnews_lora.adapters.families import Family
from agnews_lora.adapters.spec import PRESETS, is_adaptable, target_modules
from agnews_lora.config import experiment as experiments
from agnews_lora.config.experiment import Count, Experiment, Head, LearningRate, Preset, Probability, Seed
from agnews_lora.config.yaml import Document, Settings, load, locate, shown
from agnews_lora.errors import ConfigError
from agnews_lora.training.interface import Objective

FOLDER: Final = Path("sweeps")  # below the working directory

Number = TypeVar("Number")
Entry = TypeVar("Entry")


def _from_list(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _each_once(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    twice = [str(entry) for entry, count in Counter(entries).items() if count > 1]
    if twice:
        raise ValueError(f"Input should hold every entry once, but has {', '.join(twice)} more than once")
    return entries


Choices = Annotated[tuple[Entry, ...], Field(min_length=1), BeforeValidator(_from_list), AfterValidator(_each_once)]


class Range(Settings, Generic[Number]):
    """All numbers from low to high, both included."""

    low: Number
    """Smallest value."""
    high: Number
    """Largest value."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:  # type: ignore[operator]
            raise ValueError(f"low should be at most high, but got low {self.low} and high {self.high}")
        return self


class Space(Settings):
    """Parameters that differ between trials. The rank has no key: its largest value follows from the budget."""

    targets: Choices[Preset] = tuple(PRESETS)
    """Presets of target modules; those that the budget does not fit at any rank are left out."""
    heads: Choices[Head] = ("full",)
    """Which part of the classifier trains."""
    alpha_ratio: Choices[Count] = (1, 2, 4, 8)
    """alpha / rank: the factor that the adapter's update is scaled by."""
    dropout: Range[Probability] = Range(low=0.0, high=0.2)
    """Dropout on the adapter's input."""
    learning_rate: Range[LearningRate]
    """Peak of the schedule, searched in its logarithm."""

    def presets(self, family: Family) -> list[str]:
        """The presets of `targets` that a family of encoders has.

        Raises:
            ConfigError: the file names one that it does not have.
        """
        if "targets" in self.model_fields_set:
            for preset in self.targets:
                target_modules(preset, family)
        return [preset for preset in self.targets if is_adaptable(preset, family)]


class Sampler(Settings):
    """Known configurations, then a Sobol sequence, then TPE."""

    startup_trials: Count | None = None
    """Trials before the sampler learns from them, the baseline included; at most a third of all, the default."""
    prior: bool = True
    """Begin the study, after the baseline, with configurations that are known to be good for such encoders."""


class Pruner(Settings):
    """McNemar's test: a trial is given up where the best other trial at the same step answers more of the same
    validation rows correctly, by more than chance explains."""

    standard_errors: Annotated[float, Field(gt=0, le=100)] = 1.25
    """How far the best other trial must be ahead at the end of a training: standard errors of the paired difference.
    Earlier it must be further ahead: at a quarter of the steps twice as far."""


class Confirmation(Settings):
    """The best trials race over seeds: each is trained again with another seed, then the better half, and so on."""

    trials: Count = 3
    """How many of the best trials enter the race."""
    seeds: Annotated[int, Field(ge=2, le=100)] = 3
    """The most runs of each, the sweep's own counted in, every one with a seed of its own."""
    prefer: Literal["smallest", "best"] = "smallest"
    """The winner among trials whose means lie within one standard error of the best: the one with the fewest trainable
    parameters, or the one with the best mean."""


def _load_named(value: object, info: ValidationInfo) -> object:
    """The experiment that a sweep file names, looked for in `experiments/` and beside the folder of the sweep file."""
    assert info.context is not None  # `load` gives the path
    if not isinstance(value, str):
        raise ValueError(f"Input should be the name of an experiment or the path of its file, but got {shown(value)}")
    folder = info.context["path"].parent
    try:
        folders = dict.fromkeys([experiments.FOLDER, folder.parent / experiments.FOLDER])
        return load(Experiment, locate("experiment", value, list(folders), beside=folder))
    except ConfigError as error:  # reported together with the sweep's own faults
        raise ValueError(str(error)) from error


class Sweep(Document):
    """The search that `sweep` runs."""

    experiment: Annotated[Experiment, BeforeValidator(_load_named), WithJsonSchema({"type": "string", "minLength": 1})]
    """The experiment that every trial is a variation of: a name, or a path from the sweep file's folder."""
    budget: Count = 1_000_000
    """The most trainable parameters that a trial may have, head included."""
    space: Space
    """Parameters that differ between trials."""
    sampler: Sampler = Sampler()
    """Proposes the next configuration."""
    pruner: Pruner = Pruner()
    """Stops trials early."""
    trials: Count
    """Trials of the study, the baseline included."""
    objective: Objective = "accuracy"
    """Score on the validation split that trials are sampled, pruned and ranked by."""
    seed: Seed = 42
    """Seed of the sampler."""
    engine: Literal["auto", "multilora", "trainer"] = "auto"
    """Engine: multilora trains many trials at once through one base; trainer is Hugging Face Trainer and PEFT, one
    trial after another; auto is multilora where it can train the experiment, else trainer."""
    slots: Count | None = Field(default=None, validate_default=True)
    """Trials at once, with multilora; as many as fit a GPU, or as a CPU has threads (4 at most), unless given."""
    confirmation: Confirmation | None = Confirmation()
    """The race after the search; null for none: the winner is then the best single run."""

    @field_validator("trials")
    @classmethod
    def _startup_is_at_most_a_third(cls, trials: int, info: ValidationInfo) -> int:
        sampler: Sampler | None = info.data.get("sampler")  # None: it has faults of its own
        startup = sampler.startup_trials if sampler else None
        if startup is not None and startup > _third(trials):
            raise ValueError(
                f"sampler.startup_trials should be at most a third of trials, but got {startup} of {trials}. "
                f"Take {_third(trials)} at most, or at least {3 * startup} trials"
            )
        return trials

    @field_validator("slots")
    @classmethod
    def _has_slots(cls, slots: int | None, info: ValidationInfo) -> int | None:
        if slots is not None and info.data.get("engine") == "trainer":
            raise ValueError(
                f"trainer trains one trial after another, but got {slots}. Remove slots, or take `engine: multilora`"
            )
        return slots

    @property
    def texts(self) -> dict[str, str]:
        """The YAML files of sweep and experiment, word for word, by the names of their copies."""
        return {
            f"{self.name}.yaml": self.source_text,
            f"experiment-{self.experiment.name}.yaml": self.experiment.source_text,
        }

    @property
    def reference(self) -> str:
        """What the command line finds the file by: its name, or its path where it lies outside `sweeps/`."""
        return self.name if self._path == FOLDER / f"{self.name}.yaml" else str(self._path)

    @property
    def startup_trials(self) -> int:
        """Trials before the sampler learns from them."""
        return self.sampler.startup_trials or _third(self.trials)


def _third(trials: int) -> int:
    return max(1, trials // 3)


def load_sweep(name: str | Path | Sweep) -> Sweep:
    """The sweep of a name (`sweeps/NAME.yaml` below the working directory), or of a path, and its experiment.

    One that is loaded already is given back.

    Raises:
        ConfigError: no such file, or one with faults: all of them, and those of its experiment.
    """
    return name if isinstance(name, Sweep) else load(Sweep, locate("sweep", str(name), [FOLDER]))
