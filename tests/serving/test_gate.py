import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.artifacts import load_text

from agnews_lora.data.rows import Rows
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import GateError, RegistryError
from agnews_lora.serving import reload
from agnews_lora.serving.export import export
from agnews_lora.serving.gate import promote, recorded_score, rollback
from agnews_lora.serving.package import Package
from agnews_lora.serving.predict import load_champion
from agnews_lora.tracking.registry import CANDIDATE, CHAMPION, PREVIOUS, Registry, Version
from tests.serving.conftest import World

Enter = Callable[[Path], Version]


def never() -> tuple[Rows, TokenTable]:
    raise AssertionError("the test split must not be read")


def refused(registry: Registry, world: World, **changes: object) -> str:
    """The message of a refused promotion, which moves nothing and leaves the test split alone."""
    before = [registry.aliased(alias) for alias in (CHAMPION, PREVIOUS)]
    with pytest.raises(GateError) as refusal:
        promote(registry, replace(world.corpus, **changes), never)
    assert [registry.aliased(alias) for alias in (CHAMPION, PREVIOUS)] == before
    candidate = registry.aliased(CANDIDATE)
    assert candidate is not None and candidate.tags["gate"] == "failed" and recorded_score(candidate) is None
    return str(refusal.value)


def report(client: MlflowClient, version: Version, name: str) -> str:
    uri = client.get_run(version.run_id).info.artifact_uri
    return load_text(f"{uri}/gate/v{version.number}/{name}")


def append_to(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def test_the_first_candidate_becomes_champion_with_its_test_score(
    registry: Registry, client: MlflowClient, world: World, enter: Enter
) -> None:
    enter(world.good)
    promotion = promote(registry, world.corpus, lambda: world.test)
    assert promotion.version == registry.aliased(CHAMPION) and promotion.version.number == 1
    assert promotion.version.aliases == (CHAMPION,), "a promoted version waits no longer"
    assert promotion.replaced is None and not promotion.scored_before
    score = promotion.score
    assert (score.accuracy, score.macro_f1, score.num_rows) == (1.0, 1.0, 200)
    assert score.low == pytest.approx(0.981154, abs=1e-5) and score.high == 1.0  # 1 / (1 + z² / n)
    assert score.digest == world.test[0].digest()
    assert recorded_score(promotion.version) == score and promotion.version.tags["gate"] == "passed"
    written = json.loads(report(client, promotion.version, "gate_report.json"))
    assert written["passed"] and written["test"]["accuracy"] == 1.0 and len(written["checks"]) == 6
    assert "| FAIL |" not in report(client, promotion.version, "gate_report.md")


def test_the_test_score_is_that_of_its_own_answers(registry: Registry, world: World, enter: Enter) -> None:
    enter(world.worse)
    rows, table = world.test
    score = promote(registry, world.corpus, lambda: world.test).score
    right = reload.logits(world.worse, world.base, table).argmax(axis=-1) == np.asarray(rows.labels)
    assert score.accuracy == pytest.approx(right.mean()) and 0 < right.mean() < 0.9
    assert score.low < score.accuracy < score.high


def test_a_repeated_promotion_reads_the_score(registry: Registry, world: World, enter: Enter) -> None:
    enter(world.good)
    first = promote(registry, world.corpus, lambda: world.test)
    again = promote(registry, world.corpus, never)
    assert again.scored_before and again.score == first.score and again.version == first.version
    by_number = promote(registry, world.corpus, never, version=1)
    assert by_number.score == first.score and registry.aliased(PREVIOUS) is None


def test_a_champion_gives_way_and_can_come_back(registry: Registry, world: World, enter: Enter) -> None:
    enter(world.good)
    promote(registry, world.corpus, lambda: world.test)
    enter(world.alike)
    promotion = promote(registry, world.corpus, lambda: world.test)
    assert (promotion.version.number, promotion.replaced) == (2, 1)
    assert any("McNemar" in finding.rule for finding in promotion.findings)
    assert registry.version(1).aliases == (PREVIOUS,)
    back = rollback(registry)
    assert (back.champion.number, back.previous.number) == (1, 2)
    assert registry.version(1).aliases == (CHAMPION,) and registry.version(2).aliases == (PREVIOUS,)
    assert rollback(registry).champion.number == 2


def test_there_is_nothing_to_roll_back_to(registry: Registry, world: World, enter: Enter) -> None:
    with pytest.raises(RegistryError, match=r"needs a champion and one before it, but there is no champion"):
        rollback(registry)
    enter(world.good)
    promote(registry, world.corpus, lambda: world.test)
    with pytest.raises(RegistryError, match=r"there is no previous; `agnews-lora promote SWEEP --version N`"):
        rollback(registry)


def test_there_is_nothing_to_promote(registry: Registry, world: World) -> None:
    with pytest.raises(
        RegistryError, match=r"a candidate of .* is needed, but there is none; `agnews-lora sweep SWEEP`"
    ):
        promote(registry, world.corpus, never)
    with pytest.raises(RegistryError, match=r"version 4 of .* is not registered"):
        promote(registry, world.corpus, never, version=4)


def test_a_worse_challenger_is_refused(registry: Registry, client: MlflowClient, world: World, enter: Enter) -> None:
    enter(world.good)
    promote(registry, world.corpus, lambda: world.test)
    challenger = enter(world.worse)
    message = refused(registry, world)
    assert message.startswith(f"version 2 of {registry.model} does not pass the gate: 1 of 8 checks failed\n  - ")
    assert "it must not be worse than the champion (version 1) on the validation split" in message
    assert "against 100.00% of 200 rows); keep the champion, and search on" in message
    written = json.loads(report(client, challenger, "gate_report.json"))
    assert not written["passed"] and written["test"] is None and written["champion"] == 1
    assert "| FAIL | it must not be worse" in report(client, challenger, "gate_report.md")


def test_tampered_weights_are_refused(registry: Registry, world: World, enter: Enter) -> None:
    package = Package(registry.folder(enter(world.good)))
    shutil.copyfile(world.worse / "adapter_model.safetensors", package.adapter / "adapter_model.safetensors")
    message = refused(registry, world)
    assert "files must be those that were registered: changed since: adapter/adapter_model.safetensors; put" in message
    assert "the logits of 64 fixed validation rows must be the recorded ones within 0.0001: the largest" in message
    assert "99.9% of the validation split must get the recorded labels" in message


def test_files_that_no_longer_load_are_refused_and_every_other_check_is_made(
    registry: Registry, world: World, enter: Enter
) -> None:
    package = Package(registry.folder(enter(world.good)))
    weights = package.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (package.gate / "gate_record.json").unlink()
    message = refused(registry, world, digest="0" * 64)
    assert "4 of 4 checks failed" in message
    assert "changed since: adapter/adapter_model.safetensors, gate/gate_record.json" in message
    assert "it is damaged" in message
    assert "the data must be that of the sweep now (digest 000000000000)" in message
    assert "the version must hold the gate's record" in message


@pytest.mark.parametrize("name", ["adapter/adapter_record.json", "tokenizer/tokenizer.json", "gate/gate_record.json"])
def test_any_other_file_that_changed_is_refused(registry: Registry, world: World, enter: Enter, name: str) -> None:
    append_to(registry.folder(enter(world.good)) / "artifacts" / name)
    assert f"changed since: {name}; put the files back" in refused(registry, world)


WEIGHTS = "adapter/adapter_model.safetensors"
DAMAGES = {  # kind: the name that is to be refused
    "changed byte": WEIGHTS,
    "missing file": "adapter/adapter_config.json",
    "added file": "adapter/adapter_model.bin",
    "added in a folder": "adapter/more/file",
    "linked file": WEIGHTS,
    "linked folder": "adapter/.",
    "dead link": "adapter/dead",
    "pipe": "adapter/pipe",
    "changed code": "pyfunc.py",
    "changed description": "MLmodel",
}


def damage(folder: Path, kind: str) -> None:
    """One change of a registered model's files."""
    path = folder / ("artifacts" if "/" in DAMAGES[kind] else ".") / DAMAGES[kind]
    outside = folder.parent / f"outside-{kind}"
    match kind:
        case "changed byte":
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        case "missing file":
            path.unlink()
        case "added file" | "added in a folder":
            path.parent.mkdir(exist_ok=True)
            path.touch()
        case "linked file" | "linked folder":
            path = path.parent / path.name  # the folder itself, without the dot
            shutil.move(path, outside)
            path.symlink_to(outside)
        case "dead link":
            path.symlink_to("nowhere")
        case "pipe":
            os.mkfifo(path)
        case _:
            append_to(path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", DAMAGES)
def test_whatever_changed_since_the_registration_is_refused_by_all_that_load_it(
    registry: Registry, world: World, enter: Enter, tmp_path: Path, kind: str
) -> None:
    enter(world.good)
    promote(registry, world.corpus, lambda: world.test)
    champion = registry.aliased(CHAMPION)
    assert champion is not None
    name = DAMAGES[kind]
    damage(registry.folder(champion), kind)
    with pytest.raises(GateError, match=rf"changed since: {re.escape(name)}; put the files back"):
        promote(registry, world.corpus, never)
    for load in (lambda: load_champion(registry), lambda: export(registry, champion, tmp_path / "out")):
        with pytest.raises(RegistryError, match=rf"but {re.escape(name)} changed since"):
            load()
    assert not (tmp_path / "out").exists()


def test_what_mlflow_adds_beside_the_artifacts_is_no_change(registry: Registry, world: World, enter: Enter) -> None:
    folder = registry.folder(enter(world.good))
    (folder / "registered_model_meta").touch()
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "pyfunc.pyc").touch()
    assert promote(registry, world.corpus, lambda: world.test).version.number == 1


def test_texts_in_the_report_are_no_markup(
    registry: Registry, client: MlflowClient, world: World, enter: Enter
) -> None:
    version = enter(world.good)
    registry.set_tags(version, {"base": "a|b <script>`x`</script>\n[y](javascript:z)"})
    refused(registry, world)
    table = [line for line in report(client, version, "gate_report.md").splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(json.loads(report(client, version, "gate_report.json"))["checks"])
    (line,) = [line for line in table if "javascript" in line]
    assert r"a\|b &lt;script&gt;\`x\`&lt;/script&gt;" in line and r"\[y\](javascript:z)" in line


def test_other_data_are_refused(registry: Registry, world: World, enter: Enter) -> None:
    enter(world.good)
    promote(registry, world.corpus, lambda: world.test)
    enter(world.alike)
    message = refused(registry, world, digest="0" * 64)
    assert "1 of 5 checks failed" in message, "answers on other rows are not compared"
    assert f"the sweep now (digest 000000000000): digest {world.corpus.digest[:12]}; give the sweep back the" in message


def test_data_other_than_the_champions_are_refused(registry: Registry, world: World, enter: Enter) -> None:
    champion = enter(world.good)
    promote(registry, world.corpus, lambda: world.test)
    registry.set_tags(champion, {"data_digest": "1" * 64})
    enter(world.alike)
    message = refused(registry, world)
    assert f"the champion's (version 1, digest 111111111111): digest {world.corpus.digest[:12]}; give" in message


def test_other_tokens_are_refused(registry: Registry, world: World, enter: Enter) -> None:
    enter(world.good)
    ids = np.array(world.corpus.validation.ids)
    ids[3] += 1
    message = refused(registry, world, validation=replace(world.corpus.validation, ids=ids))
    assert "tokenizer and maximal length must be those of the sweep now" in message
    assert "give the sweep back the base and `max_length`" in message


def test_over_the_budget_is_refused(registry: Registry, world: World, enter: Enter) -> None:
    version = enter(world.good)
    registry.set_tags(version, {"budget": "600"})
    message = refused(registry, world)
    assert (
        "within the budget of 600 trainable parameters: 644 trainable parameters > budget 600 (rank 2 on qv" in message
    )
    assert "the largest rank that fits is 1; register another version" in message


def test_a_champion_whose_record_changed_cannot_be_compared_with(
    registry: Registry, world: World, enter: Enter
) -> None:
    champion = enter(world.worse)
    promote(registry, world.corpus, lambda: world.test)
    append_to(Package(registry.folder(champion)).gate / "gate_record.json")
    enter(world.good)
    assert "the champion's files changed since it was registered: gate/gate_record.json" in refused(registry, world)


def test_a_base_that_is_gone_is_named(registry: Registry, world: World, enter: Enter) -> None:
    version = enter(world.good)
    registry.set_tags(version, {"base": "gone"})
    assert "a new process must answer as recorded: Cannot find base model 'gone'" in refused(registry, world)


def test_promotion_reloads_in_a_new_process(
    registry: Registry, world: World, enter: Enter, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(world.good)
    monkeypatch.undo()
    assert promote(registry, world.corpus, lambda: world.test).version.number == 1
