"""Base, tokenizer, settings and engine checked together; and what travels to a worker on another machine."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer

from agnews_lora.adapters.base_models import CONFIG, BaseModel, resolve
from agnews_lora.adapters.families import Family
from agnews_lora.commands import prepare
from agnews_lora.errors import BaseModelError
from tests.tiny import MAX_TOKENS, tiny_base, tiny_shape

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


# Checks before anything is tokenised ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[Family, Path]:
    families: list[Family] = ["bert", "roberta", "distilbert", "modernbert"]
    return {family: tiny_base(tmp_path_factory.mktemp(family), family) for family in families}


@pytest.fixture
def copy(bases: dict[Family, Path], tmp_path: Path) -> Any:
    """A copy of a base, with other values in a JSON file of its folder, and without some of its files."""

    def copied(family: Family, changes: dict[str, Any], without: Iterable[str] = (), file: str = CONFIG) -> Path:
        folder = shutil.copytree(bases[family], tmp_path / "base", dirs_exist_ok=True)
        for name in without:
            (folder / name).unlink()
        fields = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
        (folder / file).write_text(json.dumps(fields | changes))
        return folder

    return copied


def check(
    folder: Path, engine: str = "auto", slots: int | None = None, max_length: int = 32, base_dropout: float = 0.0
) -> tuple[str, str]:
    experiment: Any = SimpleNamespace(
        name="mine", settings=SimpleNamespace(max_length=max_length, base_dropout=base_dropout)
    )
    return prepare.check(experiment, resolve(str(folder)), engine, slots)


def faults(*arguments: Any, **settings: Any) -> list[str]:
    with pytest.raises(BaseModelError) as caught:
        check(*arguments, **settings)
    return str(caught.value).splitlines()[1:]


def write_vocabulary(folder: Path) -> None:
    """The words of the folder's WordPiece tokenizer, as `vocab.txt`, in place of all its other files."""
    words = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(words, key=lambda word: words[word])) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("family", "changes", "base_dropout", "expected", "why"),
    [
        ("roberta", {}, 0.0, "multilora", "at once"),
        ("distilbert", {}, 0.0, "multilora", "at once"),
        ("modernbert", {}, 0.0, "trainer", "model_type 'modernbert'"),
        ("bert", {"hidden_act": "gelu_new"}, 0.0, "trainer", "hidden_act 'gelu_new'"),
        ("distilbert", {"activation": "relu"}, 0.0, "trainer", "activation 'relu'"),
        ("bert", {}, 0.1, "trainer", "base_dropout is 0.1"),
    ],
)
def test_auto_takes_multilora_where_it_can_and_says_why_not(
    copy: Any, family: Family, changes: dict[str, Any], base_dropout: float, expected: str, why: str
) -> None:
    folder = copy(family, changes)
    name, reason = check(folder, base_dropout=base_dropout)
    assert name == expected and why in reason
    assert check(folder, "trainer", base_dropout=base_dropout)[0] == "trainer"
    if expected == "trainer":
        [fault] = faults(folder, "multilora", base_dropout=base_dropout)
        assert why in fault and "`engine: trainer`" in fault
        [fault] = faults(folder, "auto", slots=4, base_dropout=base_dropout)
        assert why in fault and "slots is 4" in fault
    else:
        assert check(folder, "multilora", slots=4)[0] == check(folder, "auto", slots=4)[0] == "multilora"


@pytest.mark.parametrize(
    ("family", "changes", "positions"),
    [
        ("bert", {}, MAX_TOKENS),
        ("roberta", {}, MAX_TOKENS),  # of 130, the first two stand for padding
        ("roberta", {"pad_token_id": 5}, MAX_TOKENS - 4),
    ],
)
def test_max_length_is_at_most_the_positions(
    copy: Any, family: Family, changes: dict[str, Any], positions: int
) -> None:
    folder = copy(family, changes)
    check(folder, max_length=positions)
    [fault] = faults(folder, max_length=positions + 1)
    assert f"max_length at most {positions} on this base" in fault


def test_a_base_with_many_positions_takes_long_rows(copy: Any) -> None:
    check(copy("modernbert", {"max_position_embeddings": 8192}), max_length=8192)


def test_a_tokenizer_gives_no_more_ids_than_the_matrix_has_rows(copy: Any) -> None:
    folder = copy("roberta", {})
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["[URL]", "[USER]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    [fault] = faults(folder)
    assert f"ids up to {rows + 1}" in fault and f"{rows} rows" in fault


@pytest.mark.parametrize(("stated", "refused"), [(None, True), (True, False), (False, False)])
def test_a_bare_vocabulary_says_whether_it_is_cased(copy: Any, stated: bool | None, refused: bool) -> None:
    folder = copy("bert", {})
    write_vocabulary(folder)
    if stated is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": stated}))
    if refused:
        [fault] = faults(folder)
        assert "do_lower_case" in fault
    else:
        check(folder)


def test_a_tokenizer_of_another_kind_of_base_is_refused(copy: Any, bases: dict[Family, Path]) -> None:
    """transformers makes one of its special tokens alone, and says nothing."""
    folder = copy("roberta", {})
    shutil.copy(bases["bert"] / "tokenizer.json", folder)
    write_vocabulary(folder)
    [fault] = faults(folder)
    assert "no words" in fault


def test_every_fault_is_in_one_message(copy: Any) -> None:
    folder = copy("roberta", {"vocab_size": 300, "hidden_act": "relu"})
    found = faults(folder, "multilora", max_length=512)
    assert len(found) == 3


@pytest.mark.parametrize(("changes", "said"), [({"pad_token_id": None}, "None"), ({"pad_token_id": 70_000}, "70000")])
def test_positions_count_from_a_token_that_is_there(copy: Any, changes: dict[str, Any], said: str) -> None:
    [fault] = faults(copy("roberta", changes))
    assert f"pad_token_id {said}" in fault


def test_a_tokenizer_without_padding_or_unreadable_is_a_fault(copy: Any) -> None:
    folder = copy("bert", {"pad_token": None}, file="tokenizer_config.json")
    [fault] = faults(folder)
    assert "padding token" in fault
    (folder / "tokenizer.json").write_text("{")
    [fault] = faults(folder)
    assert "Cannot read the tokenizer" in fault


@pytest.mark.parametrize("changes", [{"vocab_size": "many"}, {"layer_norm_eps": []}])
def test_a_configuration_that_transformers_refuses_is_an_error_of_ours(copy: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(BaseModelError, match=CONFIG):
        check(copy("bert", changes))
