"""Files as a run store keeps them."""

from pathlib import Path

import pytest

from agnews_lora.config.experiment import load_experiment
from agnews_lora.config.stored import read_experiment, read_sweep
from agnews_lora.config.sweep import load_sweep
from agnews_lora.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["embedded", "agnews"])
def test_what_is_stored_is_read_as_the_files_are(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    experiment, sweep = load_experiment(name), load_sweep(name)
    monkeypatch.chdir(tmp_path)
    again = read_experiment(name, experiment.source_text)
    assert again.model_dump() == experiment.model_dump()
    assert again.name == name
    assert read_sweep(name, sweep.source_text, again).model_dump() == sweep.model_dump()


@pytest.mark.parametrize("text", ["", "- 1\n", "budget: [", "tirals: 3\n", "budget: -1\ntrials: 2\n"])
def test_what_this_version_does_not_accept_is_refused(text: str) -> None:
    experiment = read_experiment("embedded", (ROOT / "experiments/embedded.yaml").read_text(encoding="utf-8"))
    with pytest.raises(ConfigError, match="other"):
        read_sweep("other", text, experiment)
    with pytest.raises(ConfigError, match="other"):
        read_experiment("other", text)
