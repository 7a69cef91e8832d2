"""What travels to a worker on another machine, where the base model lies elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agnews_lora.adapters.base_models import BaseModel
from agnews_lora.commands import prepare
from agnews_lora.errors import BaseModelError
from tests.tiny import tiny_shape

ELSEWHERE = BaseModel("embedded:minilm", Path("/nowhere/minilm"), "hub/minilm", "main", "digest", tiny_shape("bert"))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[BaseModel]:
    """The bases that engines were built over."""
    bases: list[BaseModel] = []
    monkeypatch.setattr("agnews_lora.training.hf_trainer.TrainerEngine", lambda base, *rest: bases.append(base))
    return bases


def factory(base: BaseModel) -> prepare.EngineFactory:
    unused: Any = None
    return prepare.EngineFactory("trainer", None, base, unused, unused)


def test_the_drivers_base_is_used_where_it_is_there(built: list[BaseModel], tmp_path: Path) -> None:
    here = replace(ELSEWHERE, folder=tmp_path)
    factory(here)()
    assert built == [here]


def test_another_machine_finds_the_base_by_its_name(
    built: list[BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = replace(ELSEWHERE, folder=tmp_path)
    monkeypatch.setattr(prepare, "resolve", lambda name, num_labels: found if name == ELSEWHERE.name else None)
    factory(ELSEWHERE)()
    assert built == [found]


def test_a_base_with_other_weights_is_refused(
    built: list[BaseModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(ELSEWHERE, folder=tmp_path, weights_sha256="another digest")
    monkeypatch.setattr(prepare, "resolve", lambda name, num_labels: other)
    with pytest.raises(BaseModelError, match="another digest"):
        factory(ELSEWHERE)()
    assert built == []
