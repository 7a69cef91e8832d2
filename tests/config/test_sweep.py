"""Sweeps: what a file says, what it may not say, and the experiment that it names."""

from pathlib import Path

import pytest

from agnews_lora.adapters.spec import PRESETS
from agnews_lora.config.sweep import Confirmation, Range, Space, Sweep, load_sweep
from agnews_lora.errors import ConfigError
from tests.config.conftest import Write, lines_and_faults

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT = (
    "base: b\ndata: {source: hub, dataset: a/b, text: text, label: label}\n"
    "adapter: {targets: qv, rank: 8, alpha: 16, learning_rate: 1e-3}\n"
)
SPACE = "space: {learning_rate: {low: 1e-4, high: 1e-3}}\n"
PRESET_NAMES = "'qk', 'qv', 'qkv', 'qkvo', 'ffn' or 'all-linear'"
SMALLEST = f"experiment: mine\n{SPACE}trials: 12\n"


@pytest.fixture(autouse=True)
def experiment(write: Write) -> Path:
    return write("experiments/mine", EXPERIMENT)


def faults(write: Write, content: str) -> list[str]:
    write("sweeps/wide", content)
    with pytest.raises(ConfigError) as caught:
        load_sweep("wide")
    assert str(caught.value).startswith("Cannot read sweeps/wide.yaml: ")
    return lines_and_faults(str(caught.value))


def test_defaults_make_a_whole_sweep(write: Write) -> None:
    write("sweeps/wide", SMALLEST)
    sweep = load_sweep("wide")
    assert (sweep.name, sweep.source_text) == ("wide", SMALLEST)
    assert (sweep.experiment.name, sweep.experiment.source_text) == ("mine", EXPERIMENT)
    assert (sweep.budget, sweep.trials, sweep.startup_trials, sweep.seed) == (1_000_000, 12, 4, 42)
    assert (sweep.pruner.standard_errors, sweep.engine) == (1.25, "auto")
    assert sweep.confirmation == Confirmation(trials=3, seeds=3, prefer="smallest")
    assert sweep.space == Space(
        targets=tuple(PRESETS),
        heads=("full",),
        alpha_ratio=(1, 2, 4, 8),
        dropout=Range(low=0.0, high=0.2),
        learning_rate=Range(low=1e-4, high=1e-3),
    )


def test_what_a_file_says_arrives(write: Write) -> None:
    write(
        "sweeps/wide",
        "experiment: mine\nbudget: 100_000\nspace: {targets: [qv, ffn], heads: [out_proj, full], alpha_ratio: [2], "
        "dropout: {low: 0, high: 0}, learning_rate: {low: 1e-4, high: 1}}\nsampler: {startup_trials: 2}\n"
        "pruner: {standard_errors: 3}\ntrials: 9\nseed: 7\nengine: trainer\n",
    )
    sweep = load_sweep("wide")
    assert (sweep.budget, sweep.trials, sweep.startup_trials, sweep.seed) == (100_000, 9, 2, 7)
    assert sweep.pruner.standard_errors == 3
    assert (sweep.space.targets, sweep.space.heads) == (("qv", "ffn"), ("out_proj", "full"))
    assert (sweep.space.dropout.high, sweep.space.learning_rate.high) == (0.0, 1.0)


def test_a_confirmation_is_made_smaller_or_left_out(write: Write) -> None:
    write("sweeps/wide", SMALLEST + "confirmation: {trials: 1}\n")
    assert load_sweep("wide").confirmation == Confirmation(trials=1, seeds=3)
    write("sweeps/wide", SMALLEST + "confirmation: null\n")
    assert load_sweep("wide").confirmation is None
    for value, rule in (("1", "or equal to 2"), ("101", "or equal to 100"), ("two", "a valid integer")):
        [fault] = faults(write, SMALLEST + f"confirmation: {{seeds: {value}}}\n")
        assert fault.startswith("4: confirmation.seeds: Input should be ") and rule in fault
    [fault] = faults(write, SMALLEST + "confirmation: off\n")
    assert fault == "4: confirmation: Input should be a block with the keys trials, seeds, prefer, but got 'off'"


@pytest.mark.parametrize(("trials", "startup"), [(1, 1), (2, 1), (5, 1), (6, 2), (48, 16)])
def test_start_up_trials_are_a_third_unless_given(write: Write, trials: int, startup: int) -> None:
    write("sweeps/wide", f"experiment: mine\n{SPACE}trials: {trials}\n")
    assert load_sweep("wide").startup_trials == startup


def test_start_up_trials_are_at_most_a_third(write: Write) -> None:
    write("sweeps/wide", SMALLEST + "sampler: {startup_trials: 4}\n")
    assert load_sweep("wide").startup_trials == 4
    assert faults(write, SMALLEST + "sampler: {startup_trials: 5}\n") == [
        "3: trials: sampler.startup_trials should be at most a third of trials, but got 5 of 12. "
        "Take 4 at most, or at least 15 trials"
    ]


def test_every_fault_is_reported_at_once(write: Write) -> None:
    assert faults(
        write,
        "experiment: mien\nbudget: 0\nspace:\n  targets: [qk, qkvv, 3]\n  heads: []\n  alpha_ratio: [1, '2']\n"
        "  dropout: {low: 0.3, high: 0.1}\n  learning_rate: {low: 0, hihg: 1}\n"
        "sampler: {startup_trials: 9}\npruner: median\ntrials: 12\nseed: -1\nengine: multi\ntrails: 3\n",
    ) == [
        "1: experiment: Cannot find experiment 'mien': there is no experiments/mien.yaml. Did you mean mine? "
        "There are: mine.",
        "2: budget: Input should be greater than or equal to 1, but got 0",
        f"4: space.targets[1]: Input should be {PRESET_NAMES}, but got 'qkvv'. Did you mean qkv?",
        f"4: space.targets[2]: Input should be {PRESET_NAMES}, but got 3",
        "5: space.heads: List should have at least 1 item after validation, not 0",
        "6: space.alpha_ratio[1]: Input should be a valid integer, but got '2'",
        "7: space.dropout: low should be at most high, but got low 0.3 and high 0.1",
        "8: space.learning_rate.high: Missing key. Largest value.",
        "8: space.learning_rate.low: Input should be greater than 0, but got 0",
        "8: space.learning_rate.hihg: Unknown key. Did you mean high? The keys here are low, high",
        "10: pruner: Input should be a block with the keys standard_errors, but got 'median'",
        "11: trials: sampler.startup_trials should be at most a third of trials, but got 9 of 12. "
        "Take 4 at most, or at least 27 trials",
        "12: seed: Input should be greater than or equal to 0, but got -1",
        "13: engine: Input should be 'auto', 'multilora' or 'trainer', but got 'multi'. Did you mean multilora?",
        "14: trails: Unknown key. Did you mean trials? The keys here are experiment, budget, space, sampler, "
        "pruner, trials, objective, seed, engine, slots, confirmation",
    ]


@pytest.mark.parametrize(
    ("targets", "fault"),
    [
        ("[qk, qv, qk]", "Input should hold every entry once, but has qk more than once"),
        ("qk", "Input should be a valid list, but got 'qk'"),
        ("!!set {qk}", "Input should be a valid list, but got {'qk'}"),
    ],
)
def test_a_list_of_choices_has_each_once(write: Write, targets: str, fault: str) -> None:
    space = f"space: {{targets: {targets}, learning_rate: {{low: 1e-4, high: 1e-3}}}}\n"
    assert faults(write, f"experiment: mine\n{space}trials: 12\n") == [f"2: space.targets: {fault}"]


def test_a_range_may_be_one_number_and_no_list(write: Write) -> None:
    write("sweeps/wide", "experiment: mine\nspace: {learning_rate: {low: 1e-3, high: 1e-3}}\ntrials: 3\n")
    assert load_sweep("wide").space.learning_rate.low == 1e-3
    assert faults(write, "experiment: mine\nspace: {learning_rate: [1e-4, 1e-3]}\ntrials: 3\n") == [
        "2: space.learning_rate: Input should be a block with the keys low, high, but got [0.0001, 0.001]"
    ]


def test_the_faults_of_its_experiment_are_reported_with_its_own(write: Write) -> None:
    write("experiments/mine", EXPERIMENT.replace("rank: 8", "rank: x") + "seeed: 3\n")
    assert faults(write, SMALLEST + "budget: none\n") == [
        "1: experiment: Cannot read experiments/mine.yaml: 2 faults",
        "3: adapter.rank: Input should be a valid integer, but got 'x'",
        "4: seeed: Unknown key. Did you mean seed? The keys here are base, data, adapter, training, seed",
        "4: budget: Input should be a valid integer, but got 'none'",
    ]


def test_an_experiment_is_named_not_nested(write: Write) -> None:
    assert faults(write, SMALLEST.replace("mine", "{base: b}")) == [
        "1: experiment: Input should be the name of an experiment or the path of its file, but got {'base': 'b'}"
    ]


def test_an_experiment_path_starts_from_the_sweep_file(write: Write, project: Path) -> None:
    write("elsewhere/other", EXPERIMENT)
    sweep = write("elsewhere/sweep", SMALLEST.replace("mine", "./other.yaml"))
    assert load_sweep(str(sweep)).experiment.name == "other"
    write("sweeps/wide", SMALLEST.replace("mine", "../elsewhere/other.yaml"))
    assert load_sweep("wide").experiment.name == "other"


def test_a_sweep_elsewhere_finds_its_neighbours_after_those_at_hand(write: Write) -> None:
    write("elsewhere/experiments/theirs", EXPERIMENT + "seed: 1\n")
    write("elsewhere/experiments/mine", EXPERIMENT + "seed: 2\n")
    theirs = write("elsewhere/sweeps/theirs", SMALLEST.replace("mine", "theirs"))
    mine = write("elsewhere/sweeps/mine", SMALLEST)
    assert load_sweep(str(theirs)).experiment.seed == 1
    assert load_sweep(str(mine)).experiment.seed == 42
    write("elsewhere/sweeps/none", SMALLEST.replace("mine", "none"))
    with pytest.raises(ConfigError, match=r"elsewhere/experiments/none\.yaml\. There are: mine, theirs\."):
        load_sweep("elsewhere/sweeps/none.yaml")


def test_every_key_is_documented() -> None:
    schema = Sweep.model_json_schema()
    blocks = [schema, *schema["$defs"].values()]
    assert all(field.get("description") for block in blocks for field in block["properties"].values())
