"""Promotion: the checks between a registered version and its use, the test score, and the way back."""

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from agnews_lora.adapters.adapter_files import read_record, recount
from agnews_lora.adapters.base_models import resolve
from agnews_lora.adapters.budget import breach
from agnews_lora.data.rows import Rows
from agnews_lora.data.sources import Corpus
from agnews_lora.data.tokens import TokenTable
from agnews_lora.errors import AgnewsLoraError, RegistryError
from agnews_lora.serving import reload
from agnews_lora.serving.model_package import (
    REGISTER_ANOTHER,
    Finding,
    Package,
    ReferenceAnswers,
    TestScore,
    compare_reload,
    failures,
    recorded_score,
    token_digest,
)
from agnews_lora.serving.stats import count_pairs, mcnemar_p_value
from agnews_lora.tracking.descriptions import text
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.versions import CANDIDATE, CHAMPION, PREVIOUS, REPORT, Version
from agnews_lora.training.metrics import Watch, accuracy, accuracy_interval, macro_f1

LEAST_P_VALUE: Final = 0.05


@dataclass(frozen=True)
class Promotion:
    """What a promotion found. Where a check failed, no alias has moved.

    score: on the test split; None if the version was never scored. scored_before: it was read from an earlier
    promotion. replaced: number of the champion before it, now `previous`; None without one, or where a check failed.
    """

    version: Version
    findings: tuple[Finding, ...]
    score: TestScore | None
    scored_before: bool
    replaced: int | None

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    @property
    def refusal(self) -> str:
        """Every check that failed, for a user."""
        return f"Cannot promote {self.version}: {failures(self.findings)}"


def promote(
    registry: Registry,
    corpus: Corpus,
    test: Callable[[], tuple[Rows, TokenTable]],
    version: int | None = None,
    watch: Watch = iter,
) -> Promotion:
    """Check a version, and make it champion if it passes every check.

    The champion before it becomes `previous`, and the version loses the alias `candidate`. The report is logged to the
    version's run, passed or not.

    Args:
        test: gives the test split. Called only after all checks have passed, and only if the version has no score yet.
        version: its number; None: the candidate, or where there is none the champion, which is then checked again.
        watch: passes on the batches of the test split that are scored.

    Raises:
        RegistryError: no such version, or none that could be promoted.
    """
    chosen = registry.version(version) if version is not None else registry.waiting()
    if chosen is None:
        raise RegistryError(
            f"Cannot promote a version of {registry.model}: it has no candidate. Register one with `agnews-lora sweep "
            "SWEEP`."
        )
    package = Package.of(registry, chosen)
    champion = registry.aliased(CHAMPION)
    rival = champion if champion is not None and champion.number != chosen.number else None
    findings = _check(package, Package.of(registry, rival) if rival else None, corpus)
    passed = all(finding.passed for finding in findings)
    earlier = score = recorded_score(chosen)
    if passed and score is None:
        score = _score(package, *test(), watch)
        registry.set_tags(chosen, score.tags())
    registry.set_tags(chosen, {"promotion": "passed" if passed else "failed"})
    _log_report(registry, chosen, rival, findings, score)
    if passed:
        if rival is not None:  # first, so that a replaced champion is always reachable
            registry.set_alias(PREVIOUS, rival)
        registry.set_alias(CHAMPION, chosen)
        if CANDIDATE in chosen.aliases:
            registry.remove_alias(CANDIDATE)
    replaced = rival.number if passed and rival else None
    return Promotion(registry.version(chosen.number), tuple(findings), score, earlier is not None, replaced)


def rollback(registry: Registry) -> tuple[Version, Version]:
    """Exchange the champion and the one before it, and return them as (champion, previous); a second call undoes it.

    Raises:
        RegistryError: there is no champion, or none before it.
    """
    champion, previous = registry.aliased(CHAMPION), registry.aliased(PREVIOUS)
    if champion is None or previous is None:
        missing = CHAMPION if champion is None else PREVIOUS
        raise RegistryError(
            f"Cannot roll back {registry.model}: it has no {missing} version. Promote any version with `agnews-lora "
            "promote SWEEP --version N`."
        )
    registry.set_alias(CHAMPION, previous)
    registry.set_alias(PREVIOUS, champion)
    return registry.version(previous.number), registry.version(champion.number)


def _check(package: Package, champion: Package | None, corpus: Corpus) -> list[Finding]:
    """Every check but the test split. champion: the present one, unless it is the version itself.

    Answers are compared on the validation split as it was registered: where rows or tokens differ now, those checks
    fail, and the comparisons that would mean nothing are left out.
    """
    findings = [_files(package), *_attempt("the adapter must keep the budget", lambda: [_budget(package)])]
    same_rows = [
        _data(package, corpus),
        *_attempt("the version must hold its reference answers", lambda: [_tokens(package, corpus)]),
    ]
    findings += same_rows
    if all(finding.passed for finding in same_rows):
        findings += _attempt("a new process must answer as recorded", lambda: _reload(package, corpus))
    if champion is not None:
        same_data = _champion_data(package, champion)
        findings.append(same_data)
        if same_data.passed and same_rows[0].passed:
            findings += _attempt("the champion must be comparable", lambda: [_not_worse(package, champion, corpus)])
    return findings


def _attempt(rule: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; a check that cannot be made has failed, and the others are still made."""
    try:
        return check()
    except AgnewsLoraError as error:
        return [Finding(rule, str(error), False)]


def _files(package: Package) -> Finding:
    changed = package.changed()
    return Finding.of(
        not changed,
        "the files must be those that were registered",
        f"changed since: {', '.join(changed)}" if changed else "every SHA-256 is the one of the registration",
        f"put the files back, or {REGISTER_ANOTHER}",
    )


def _budget(package: Package) -> Finding:
    record, count = read_record(package.adapter), recount(package.adapter)
    budget = int(package.version.tags["budget"])
    return Finding.of(
        count <= budget,
        f"the adapter's file must recount within the budget of {budget:,} trainable parameters",
        f"{count:,}" if count <= budget else breach(record.spec, record.shape, budget, count),
        REGISTER_ANOTHER,
    )


def _data(package: Package, corpus: Corpus) -> Finding:
    digest = package.version.tags["data_digest"]
    return Finding.of(
        digest == corpus.digest,
        f"the data must be that of the sweep now (digest {corpus.digest[:12]})",
        f"digest {digest[:12]}",
        f"give the sweep back the data that it was registered with, or {REGISTER_ANOTHER}",
    )


def _tokens(package: Package, corpus: Corpus) -> Finding:
    tokens, present = ReferenceAnswers.read(package.reference).tokens, token_digest(corpus.validation)
    return Finding.of(
        tokens == present,
        f"tokenizer and maximal length must be those of the sweep now (tokens {present[:12]})",
        f"tokens {tokens[:12]}",
        f"give the sweep back the base and `max_length` that it was registered with, or {REGISTER_ANOTHER}",
    )


def _reload(package: Package, corpus: Corpus) -> list[Finding]:
    logits = reload.reload(package.adapter, package.version.tags["base"], corpus.validation)
    return compare_reload(ReferenceAnswers.read(package.reference), logits)


def _champion_data(package: Package, champion: Package) -> Finding:
    digest, champions = package.version.tags["data_digest"], champion.version.tags["data_digest"]
    return Finding.of(
        digest == champions,
        f"the data must be the champion's (version {champion.version.number}, digest {champions[:12]})",
        f"digest {digest[:12]}",
        "give the sweep back the champion's data, or copy the experiment to a file of another name, which makes "
        "another registered model",
    )


def _not_worse(package: Package, champion: Package, corpus: Corpus) -> Finding:
    """Compare what both answered when they were registered: the rows are the same, and so is their order."""
    changed = champion.changed()
    if changed:
        raise RegistryError(
            f"the champion's files changed since it was registered: {', '.join(changed)}; put them back"
        )
    right, champion_right = (
        ReferenceAnswers.read(each.reference).predicted == corpus.validation.labels for each in (package, champion)
    )
    p_value = mcnemar_p_value(count_pairs(right, champion_right), "less")
    return Finding.of(
        p_value >= LEAST_P_VALUE,
        f"it must not be worse than the champion (version {champion.version.number}) on the validation split "
        f"(exact one-sided McNemar test, p ≥ {LEAST_P_VALUE:g})",
        f"p = {p_value:.3g} ({right.mean():.2%} against {champion_right.mean():.2%} of {len(right):,} rows)",
        "keep the champion, and search on",
    )


def _score(package: Package, rows: Rows, table: TokenTable, watch: Watch) -> TestScore:
    predicted = reload.logits(package.adapter, resolve(package.version.tags["base"]), table, watch).argmax(axis=-1)
    share = accuracy(predicted, table.labels)
    return TestScore(
        share,
        *accuracy_interval(share, len(table)),
        macro_f1=macro_f1(predicted, table.labels),
        rows=len(table),
        digest=rows.digest(),
    )


def _log_report(
    registry: Registry, version: Version, rival: Version | None, findings: list[Finding], score: TestScore | None
) -> None:
    report: dict[str, Any] = {
        "model": version.model,
        "version": version.number,
        "checked_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "passed": all(finding.passed for finding in findings),
        "champion": rival.number if rival else None,
        "checks": [asdict(finding) for finding in findings],
        "test": asdict(score) if score else None,
    }
    with tempfile.TemporaryDirectory() as folder:
        written = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
        Path(folder, f"{REPORT}.json").write_text(written, encoding="utf-8")
        Path(folder, f"{REPORT}.md").write_text(_markdown(report, score), encoding="utf-8")
        registry.log_report(version, Path(folder))


def _markdown(report: Mapping[str, Any], score: TestScore | None) -> str:
    verdict = "passed" if report["passed"] else "refused"
    lines = [
        f"# {text(report['model'])}, version {report['version']}: {verdict}",
        f"\nChecked at {report['checked_at']}.\n",
        "| | rule | found |",
        "| --- | --- | --- |",
        *(
            f"| {'pass' if each['passed'] else 'FAIL'} | {text(each['rule'])} | {text(each['found'])} |"
            for each in report["checks"]
        ),
        f"\nTest split: {score or 'not scored.'}\n",
    ]
    return "\n".join(lines)
