"""The gate between a registered version and its use: promotion, and the way back."""

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from agnews_lora.adapters.base_models import resolve
from agnews_lora.data.rows import Rows
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import RegistryError
from agnews_lora.serving import reload
from agnews_lora.serving.checks import Entry, Finding, judge, require_all
from agnews_lora.serving.markdown import text
from agnews_lora.serving.package import Package
from agnews_lora.serving.stats import accuracy_interval
from agnews_lora.tracking.registry import CANDIDATE, CHAMPION, PREVIOUS, Registry, Version
from agnews_lora.training.metrics import accuracy, macro_f1


@dataclass(frozen=True)
class TestScore:
    """What a version scores on the test split, in fp32. low, high: Wilson's 95 % interval of the accuracy.

    digest: SHA-256 (hex) of the test rows.
    """

    __test__ = False  # not a test, whatever pytest makes of its name

    accuracy: float
    macro_f1: float
    num_rows: int
    low: float
    high: float
    digest: str


@dataclass(frozen=True)
class Promotion:
    """A version that passed the gate. replaced: number of the champion before it, now `previous`; None without one.

    scored_before: the test score was read from an earlier promotion.
    """

    version: Version
    score: TestScore
    replaced: int | None
    findings: tuple[Finding, ...]
    scored_before: bool


@dataclass(frozen=True)
class Rollback:
    """champion: the version that is back in use. previous: the one that was."""

    champion: Version
    previous: Version


def promote(
    registry: Registry, corpus: Corpus, test: Callable[[], tuple[Rows, TokenTable]], version: int | None = None
) -> Promotion:
    """Make a version champion, if it passes every check; see `checks.judge`.

    version: its number; without one the candidate, or where none waits the champion, which is then judged again. The
    champion before it becomes `previous`. A promoted version waits no longer: it loses the alias `candidate`.
    test: gives the test split. Asked only once all checks have passed, and only if the version has no score yet.

    The report becomes an artifact of the version's run under `gate/v<number>/`, also when the gate refuses.

    Raises:
        GateError: every check that failed. No alias moves then.
        RegistryError: no such version, or none that could be promoted.
    """
    chosen = registry.version(version) if version is not None else _waiting(registry)
    entry = Entry(chosen, Package(registry.folder(chosen)))
    champion = registry.aliased(CHAMPION)
    rival = champion if champion is not None and champion.number != chosen.number else None
    findings = judge(entry, Entry(rival, Package(registry.folder(rival))) if rival else None, corpus)
    passed = all(finding.passed for finding in findings)
    earlier = recorded_score(chosen)
    score = earlier
    if passed and score is None:
        score = _score(entry, *test())
        registry.set_tags(chosen, _score_tags(score))
    registry.set_tags(chosen, {"gate": "passed" if passed else "failed"})
    _log_report(registry, chosen, rival, findings, score)
    require_all(findings, f"{chosen} does not pass the gate")
    assert score is not None  # scored above: every check has passed
    if rival is not None:  # first, so that a champion replaced is never without its way back
        registry.set_alias(PREVIOUS, rival)
    registry.set_alias(CHAMPION, chosen)
    if CANDIDATE in chosen.aliases:
        registry.remove_alias(CANDIDATE)
    promoted = registry.version(chosen.number)
    return Promotion(promoted, score, rival.number if rival else None, tuple(findings), earlier is not None)


def rollback(registry: Registry) -> Rollback:
    """Give the place of the champion back to the one before it; the two change places, so that a second call undoes it.

    Raises:
        RegistryError: there is no champion before this one.
    """
    champion, previous = registry.aliased(CHAMPION), registry.aliased(PREVIOUS)
    if champion is None or previous is None:
        raise RegistryError(
            f"a rollback of {registry.model} needs a champion and one before it, but there is no "
            f"{CHAMPION if champion is None else PREVIOUS}; `agnews-lora promote SWEEP --version N` promotes any "
            "version"
        )
    registry.set_alias(CHAMPION, previous)
    registry.set_alias(PREVIOUS, champion)
    return Rollback(registry.version(previous.number), registry.version(champion.number))


def recorded_score(version: Version) -> TestScore | None:
    """The test score in a version's tags, or None where it has none."""
    tags = version.tags
    if "test_accuracy" not in tags:
        return None
    return TestScore(
        accuracy=float(tags["test_accuracy"]),
        macro_f1=float(tags["test_macro_f1"]),
        num_rows=int(tags["test_rows"]),
        low=float(tags["test_accuracy_low"]),
        high=float(tags["test_accuracy_high"]),
        digest=tags["test_digest"],
    )


def score_line(score: TestScore) -> str:
    """A test score in words."""
    return (
        f"accuracy {score.accuracy:.2%} (95 % interval {score.low:.2%} to {score.high:.2%}), macro-F1 "
        f"{score.macro_f1:.2%}, on {score.num_rows:,} rows."
    )


def _waiting(registry: Registry) -> Version:
    version = registry.aliased(CANDIDATE) or registry.aliased(CHAMPION)
    if version is None:
        raise RegistryError(
            f"a candidate of {registry.model} is needed, but there is none; `agnews-lora sweep SWEEP` registers its "
            "winner"
        )
    return version


def _score(entry: Entry, rows: Rows, table: TokenTable) -> TestScore:
    predicted = reload.logits(entry.package.adapter, resolve(entry.version.tags["base"]), table).argmax(axis=-1)
    low, high = accuracy_interval(int((predicted == table.labels).sum()), len(table))
    return TestScore(
        accuracy(predicted, table.labels), macro_f1(predicted, table.labels), len(table), low, high, rows.digest()
    )


def _score_tags(score: TestScore) -> dict[str, str]:
    """`test_accuracy` comes last: a version that has it has the others."""
    return {
        "test_digest": score.digest,
        "test_rows": str(score.num_rows),
        "test_macro_f1": str(score.macro_f1),
        "test_accuracy_low": str(score.low),
        "test_accuracy_high": str(score.high),
        "test_accuracy": str(score.accuracy),
    }


def _log_report(
    registry: Registry, version: Version, rival: Version | None, findings: Sequence[Finding], score: TestScore | None
) -> None:
    report: dict[str, Any] = {
        "model": version.model,
        "version": version.number,
        "judged_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "passed": all(finding.passed for finding in findings),
        "champion": rival.number if rival else None,
        "checks": [asdict(finding) for finding in findings],
        "test": asdict(score) if score else None,
    }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "gate_report.json").write_text(
            json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        Path(folder, "gate_report.md").write_text(_markdown(report), encoding="utf-8")
        registry.log_report(version, Path(folder))


def _markdown(report: Mapping[str, Any]) -> str:
    verdict = "passed" if report["passed"] else "refused"
    lines = [
        f"# {text(report['model'])}, version {report['version']}: {verdict}",
        "",
        f"Judged at {report['judged_at']}.",
        "",
    ]
    lines += ["| | rule | found |", "| --- | --- | --- |"]
    lines += [
        f"| {'pass' if each['passed'] else 'FAIL'} | {text(each['rule'])} | {text(each['found'])} |"
        for each in report["checks"]
    ]
    test = report["test"]
    lines += ["", "Test split: " + (score_line(TestScore(**test)) if test else "not scored."), ""]
    return "\n".join(lines)
