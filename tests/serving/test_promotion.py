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
from agnews_lora.errors import RegistryError
from agnews_lora.serving import reload
from agnews_lora.serving.export import export
from agnews_lora.serving.model_package import ANSWERS, Package, recorded_score, registration_of
from agnews_lora.serving.promotion import Promotion, promote, rollback
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.versions import CANDIDATE, CHAMPION, PREVIOUS, Version
from tests.serving.conftest import World

Enter = Callable[[Path], Version]


def never() -> tuple[Rows, TokenTable]:
    raise AssertionError("the test split must not be read")


def refused(registry: Registry, world: World, **changes: object) -> Promotion:
    """A refused promotion, which moves no alias and leaves the test split alone."""
    before = [registry.aliased(alias) for alias in (CHAMPION, PREVIOUS)]
    refusal = promote(registry, replace(world.corpus, **changes), never)
    assert [registry.aliased(alias) for alias in (CHAMPION, PREVIOUS)] == before
    candidate = registry.aliased(CANDIDATE)
    assert candidate is not None and candidate.tags["promotion"] == "failed" and recorded_score(candidate) is None
    assert candidate == refusal.version
    assert not refusal.passed and refusal.score is None and refusal.replaced is None
    return refusal


def report(client: MlflowClient, version: Version, name: str) -> str:
    uri = client.get_run(version.run_id).info.artifact_uri
    return load_text(f"{uri}/promotion/v{version.number}/{name}")


def append_to(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def test_the_first_candidate_becomes_champion_with_its_test_score(
    registry: Registry, client: MlflowClient, world: World, enter: Enter
) -> None:
    candidate = enter(world.good)
    waiting = registration_of(registry, candidate)
    assert (waiting.aliases, waiting.checks, waiting.test) == ((CANDIDATE,), (), None)

    promotion = promote(registry, world.corpus, lambda: world.test)
    assert promotion.passed and promotion.version == registry.champion() and promotion.version.number == 1
    assert promotion.version.aliases == (CHAMPION,), "a promoted version is no candidate any more"
    assert promotion.replaced is None and not promotion.scored_before
    score = promotion.score
    assert score is not None and (score.accuracy, score.macro_f1, score.rows) == (1.0, 1.0, 200)
    assert score.low == pytest.approx(0.981154, abs=1e-5) and score.high == 1.0  # 1 / (1 + z² / n)
    assert score.digest == world.test[0].digest()
    assert recorded_score(promotion.version) == score and promotion.version.tags["promotion"] == "passed"

    written = json.loads(report(client, promotion.version, "report.json"))
    assert written["passed"] and written["test"]["accuracy"] == 1.0 and len(written["checks"]) == 6
    assert "| FAIL |" not in report(client, promotion.version, "report.md")
    registration = registration_of(registry, promotion.version)
    assert (registration.model, registration.version, registration.aliases) == (registry.model, 1, (CHAMPION,))
    assert [each["rule"] for each in registration.checks] == [finding.rule for finding in promotion.findings]
    assert registration.test is not None and registration.test["rows"] == 200

    again = promote(registry, world.corpus, never)
    assert again.scored_before and again.score == score and again.version == promotion.version
    assert promote(registry, world.corpus, never, version=1).score == score and registry.aliased(PREVIOUS) is None


def test_the_test_score_is_that_of_its_own_answers(registry: Registry, world: World, enter: Enter) -> None:
    enter(world.worse)
    rows, table = world.test
    score = promote(registry, world.corpus, lambda: world.test).score
    right = reload.logits(world.worse, world.base, table).argmax(axis=-1) == np.asarray(rows.labels)
    assert score is not None and score.accuracy == pytest.approx(right.mean()) and 0 < right.mean() < 0.9
    assert score.low < score.accuracy < score.high


def test_a_champion_is_replaced_refuses_a_worse_one_and_can_come_back(
    registry: Registry, client: MlflowClient, world: World, enter: Enter
) -> None:
    with pytest.raises(RegistryError, match=r"Cannot promote a version of .*: it has no candidate"):
        promote(registry, world.corpus, never)
    with pytest.raises(RegistryError, match=r"Cannot use version 4 of .*: it is not registered"):
        promote(registry, world.corpus, never, version=4)
    with pytest.raises(RegistryError, match=r"Cannot roll back .*: it has no champion version"):
        rollback(registry)
    enter(world.good)
    promote(registry, world.corpus, lambda: world.test)
    with pytest.raises(RegistryError, match=r"it has no previous version.*`agnews-lora promote SWEEP --version N`"):
        rollback(registry)

    enter(world.alike)
    promotion = promote(registry, world.corpus, lambda: world.test)
    assert (promotion.version.number, promotion.replaced) == (2, 1)
    assert any("McNemar" in finding.rule for finding in promotion.findings)
    assert registry.version(1).aliases == (PREVIOUS,)
    assert [version.number for version in rollback(registry)] == [1, 2]
    assert registry.version(1).aliases == (CHAMPION,) and registry.version(2).aliases == (PREVIOUS,)

    challenger = enter(world.worse)
    message = refused(registry, world).refusal
    assert message.startswith(f"Cannot promote version 3 of {registry.model}: 1 of 8 checks failed\n  - it must not be")
    assert "(version 1) on the validation split" in message
    assert "against 100.00% of 200 rows); keep the champion, and search on" in message
    written = json.loads(report(client, challenger, "report.json"))
    assert not written["passed"] and written["test"] is None and written["champion"] == 1
    assert "| FAIL | it must not be worse" in report(client, challenger, "report.md")
    assert rollback(registry)[0].number == 2


def test_tampered_weights_are_found_by_hash_and_by_answers(registry: Registry, world: World, enter: Enter) -> None:
    package = Package.verified(registry, enter(world.good))
    shutil.copyfile(world.worse / "adapter_model.safetensors", package.adapter / "adapter_model.safetensors")
    message = refused(registry, world).refusal
    assert "changed since: adapter/adapter_model.safetensors; put the files back" in message
    assert "the logits of 64 fixed validation rows must be the recorded ones within 0.0001: the largest" in message
    assert "99.9% of the validation split must get the recorded labels" in message

    # Files that no longer load: every other check is still made.
    weights = package.adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    (package.reference / ANSWERS).unlink()
    message = refused(registry, world, digest="0" * 64).refusal
    assert "4 of 4 checks failed" in message
    assert f"changed since: adapter/adapter_model.safetensors, reference/{ANSWERS}" in message
    assert "adapter_model.safetensors: it is damaged" in message
    assert "the data must be that of the sweep now (digest 000000000000)" in message
    assert "the version must hold its reference answers" in message


def test_other_data_tokens_budget_or_base_are_refused(registry: Registry, world: World, enter: Enter) -> None:
    champion = enter(world.worse)
    promote(registry, world.corpus, lambda: world.test)
    candidate = enter(world.good)

    refusal = refused(registry, world, digest="0" * 64)
    assert "1 of 5 checks failed" in refusal.refusal, "answers on other rows are not compared"
    digest = world.corpus.digest[:12]
    assert f"the sweep now (digest 000000000000): digest {digest}; give the sweep back the" in refusal.refusal

    ids = np.array(world.corpus.validation.ids)
    ids[3] += 1
    message = refused(registry, world, validation=replace(world.corpus.validation, ids=ids)).refusal
    assert "tokenizer and maximal length must be those of the sweep now" in message

    registry.set_tags(candidate, {"budget": "600", "base": "a|b <script>`x`</script>\n[y](javascript:z)"})
    message = refused(registry, world).refusal
    assert "within the budget of 600 trainable parameters: 644 trainable parameters > budget 600" in message
    assert "the largest rank that fits is 1; register another version" in message
    assert "a new process must answer as recorded: " in message and "a|b" in message
    written = registry.report(candidate, "report.md") or ""
    lines = [line for line in written.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(json.loads(registry.report(candidate, "report.json") or "")["checks"])
    [line] = [line for line in lines if "javascript" in line]  # a text in the report is no markup
    assert r"a\|b &lt;script&gt;\`x\`&lt;/script&gt;" in line and r"\[y\](javascript:z)" in line

    append_to(Package.of(registry, champion).reference / ANSWERS)
    message = refused(registry, world).refusal
    assert f"the champion's files changed since it was registered: reference/{ANSWERS}" in message
    registry.set_tags(champion, {"data_digest": "1" * 64})
    message = refused(registry, world).refusal
    assert f"the champion's (version 1, digest 111111111111): digest {digest}; give" in message


WEIGHTS = "adapter/adapter_model.safetensors"
DAMAGES = {  # kind: the name that is to be refused
    "changed byte": WEIGHTS,
    "changed answers": f"reference/{ANSWERS}",
    "missing file": "adapter/adapter_config.json",
    "added file": "adapter/adapter_model.bin",
    "added in a folder": "adapter/more/file",
    "linked folder": "adapter/.",
    "dead link": "adapter/dead",
    "pipe": "adapter/pipe",
    "changed code": "mlflow_model.py",
}


def damage(folder: Path, kind: str, outside: Path) -> None:
    """One change of a registered model's files."""
    path = folder / ("artifacts" if "/" in DAMAGES[kind] else ".") / DAMAGES[kind]
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
        case "linked folder":
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
def test_a_change_since_the_registration_is_refused_by_all_that_load_it(
    small: Registry, package: Package, world: World, tmp_path: Path, kind: str
) -> None:
    damage(package.folder, kind, tmp_path / "outside")
    name, champion = re.escape(DAMAGES[kind]), small.champion()
    assert re.search(rf"changed since: {name}; put the files back", promote(small, world.corpus, never).refusal)
    for load in (lambda: Package.verified(small, champion), lambda: export(small, champion, tmp_path / "out")):
        with pytest.raises(RegistryError, match=rf": {name} changed since the registration.*--rollback"):
            load()
    assert not (tmp_path / "out").exists()


def test_files_that_mlflow_adds_beside_the_artifacts_are_no_change(small: Registry, package: Package) -> None:
    (package.folder / "registered_model_meta").touch()
    (package.folder / "__pycache__").mkdir(exist_ok=True)
    (package.folder / "__pycache__" / "other.pyc").touch()
    assert Package.verified(small, small.champion()) == package
