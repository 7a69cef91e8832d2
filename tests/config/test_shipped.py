"""The files that ship: they load, and say only what differs from the defaults."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import feasible_ranks, max_rank, trainable_parameters
from agnews_lora.adapters.spec import PRESETS, TrialSpec
from agnews_lora.config.experiment import load_experiment
from agnews_lora.config.sweep import load_sweep
from agnews_lora.training.interface import TrainSettings

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (ROOT / "experiments").iterdir())
SWEEPS = sorted(path.stem for path in (ROOT / "sweeps").iterdir())


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def repeated_defaults(written: dict[str, Any], model: BaseModel, path: str = "") -> list[str]:
    """Keys of a file that say what the model says anyway."""
    repeated = []
    for key, value in written.items():
        field, loaded = type(model).model_fields[key], getattr(model, key)
        if isinstance(value, dict):
            repeated += repeated_defaults(value, loaded, f"{path}{key}.")
        elif not field.is_required() and field.get_default(call_default_factory=True) == loaded:
            repeated.append(f"{path}{key}")
    return repeated


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_says_only_what_differs(name: str) -> None:
    experiment = load_experiment(name)
    assert experiment.source_text.startswith("# ")
    assert repeated_defaults(YAML(typ="safe", pure=True).load(experiment.source_text), experiment) == []


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_says_only_what_differs(name: str) -> None:
    sweep = load_sweep(name)
    assert sweep.source_text.startswith("# ")
    written = YAML(typ="safe", pure=True).load(sweep.source_text)
    assert written.pop("experiment") == sweep.experiment.name == name
    assert repeated_defaults(written, sweep) == []


def test_the_seed_is_the_students_configuration() -> None:
    seed = load_experiment("seed")
    assert (seed.base, seed.data.source) == ("roberta-base", "hub")
    assert seed.spec == TrialSpec("qk", rank=4, alpha=8.0, dropout=0.1, learning_rate=2e-5, head="full")
    assert trainable_parameters(seed.spec, shape_of(seed.base)) == 741_124
    assert seed.settings == TrainSettings(3, 16, 32, 80, 250, 2_000, 10, 0.1, 0.01, 1.0, 0.1, "auto")


@pytest.mark.parametrize(("name", "budget"), [("agnews", 1_000_000), ("embedded", 100_000)])
def test_a_sweep_offers_every_preset_under_its_budget(name: str, budget: int) -> None:
    sweep = load_sweep(name)
    shape = shape_of(sweep.experiment.base)
    assert sweep.budget == budget
    assert sweep.space.heads == ("full",)
    assert set(feasible_ranks(list(sweep.space.targets), ["full"], shape, budget)) == {
        (name, "full") for name in PRESETS
    }
    assert trainable_parameters(sweep.experiment.spec, shape) <= budget
    assert sweep.startup_trials * 3 <= sweep.trials


def test_the_small_budget_binds_the_small_base_as_the_large_one_the_large() -> None:
    small, large = (load_sweep(name) for name in ("embedded", "agnews"))
    for preset in PRESETS:
        ranks = [max_rank(preset, "full", shape_of(sweep.experiment.base), sweep.budget) for sweep in (small, large)]
        assert abs(ranks[0] - ranks[1]) <= 1
