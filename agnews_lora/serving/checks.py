"""What the gate asks of a version: every check, with its rule, what was found, and what to do about it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from agnews_lora.adapters.adapter_files import read_record, recount
from agnews_lora.adapters.budget import breach
from agnews_lora.data.sources import Corpus
from agnews_lora.errors import AgnewsLoraError, GateError, RegistryError
from agnews_lora.serving import reload
from agnews_lora.serving.package import Package
from agnews_lora.serving.record import GateRecord, agreement, largest_difference, read_gate_record, token_digest
from agnews_lora.serving.stats import worse_p_value
from agnews_lora.tracking.registry import Version

LARGEST_DIFFERENCE: Final = 1e-4
LEAST_AGREEMENT: Final = 0.999
LEAST_P_VALUE: Final = 0.05

REGISTER_ANOTHER: Final = "register another version with `agnews-lora sweep`"


@dataclass(frozen=True)
class Finding:
    """One check. found: the value, in words. remedy: read where the check failed; None where `found` has it."""

    rule: str
    found: str
    passed: bool
    remedy: str | None

    def __str__(self) -> str:
        return f"{self.rule}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Entry:
    """A version and its files."""

    version: Version
    package: Package


def require_all(findings: Sequence[Finding], refusal: str) -> None:
    """Nothing where every check passed.

    Raises:
        GateError: `refusal`, and every check that failed.
    """
    failed = [finding for finding in findings if not finding.passed]
    if failed:
        raise GateError(
            "\n  - ".join([f"{refusal}: {len(failed)} of {len(findings)} checks failed", *map(str, failed)])
        )


def judge(entry: Entry, champion: Entry | None, corpus: Corpus) -> list[Finding]:
    """Every check of a version but the test split. champion: the present one, unless it is the version itself.

    Answers are compared on the validation split as it was registered: where rows or tokens are others now, those checks
    say so, and the comparisons that would mean nothing are left out.
    """
    findings = [
        _files(entry),
        *_attempt("the adapter must keep the budget", lambda: [_budget(entry)]),
    ]
    same_rows = [
        _data(entry, corpus),
        *_attempt("the version must hold the gate's record", lambda: [_tokens(entry, corpus)]),
    ]
    findings += same_rows
    if all(finding.passed for finding in same_rows):
        findings += _attempt("a new process must answer as recorded", lambda: _reload(entry, corpus))
    if champion is not None:
        same_data = _champion_data(entry, champion)
        findings.append(same_data)
        if same_data.passed and same_rows[0].passed:
            findings += _attempt("the champion must be comparable", lambda: [_not_worse(entry, champion, corpus)])
    return findings


def _attempt(rule: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; a check that cannot be made has failed, and the others are still made."""
    try:
        return check()
    except AgnewsLoraError as error:
        return [Finding(rule, str(error), False, None)]


def _files(entry: Entry) -> Finding:
    changed = entry.package.changed(entry.version.tags)
    return Finding(
        rule="the files must be those that were registered",
        found=f"changed since: {', '.join(changed)}" if changed else "every SHA-256 is the one of the registration",
        passed=not changed,
        remedy=f"put the files back, or {REGISTER_ANOTHER}",
    )


def _budget(entry: Entry) -> Finding:
    record, count = read_record(entry.package.adapter), recount(entry.package.adapter)
    budget = int(entry.version.tags["budget"])
    passed = count <= budget
    return Finding(
        rule=f"the adapter's file must recount within the budget of {budget:,} trainable parameters",
        found=f"{count:,}" if passed else breach(record.spec, record.shape, budget, count),
        passed=passed,
        remedy=REGISTER_ANOTHER,
    )


def _data(entry: Entry, corpus: Corpus) -> Finding:
    digest = entry.version.tags["data_digest"]
    return Finding(
        rule=f"the data must be that of the sweep now (digest {corpus.digest[:12]})",
        found=f"digest {digest[:12]}",
        passed=digest == corpus.digest,
        remedy=f"give the sweep back the data that it was registered with, or {REGISTER_ANOTHER}",
    )


def _tokens(entry: Entry, corpus: Corpus) -> Finding:
    tokens, present = read_gate_record(entry.package.gate).tokens, token_digest(corpus.validation)
    return Finding(
        rule=f"tokenizer and maximal length must be those of the sweep now (tokens {present[:12]})",
        found=f"tokens {tokens[:12]}",
        passed=tokens == present,
        remedy=f"give the sweep back the base and `max_length` that it was registered with, or {REGISTER_ANOTHER}",
    )


def _reload(entry: Entry, corpus: Corpus) -> list[Finding]:
    logits = reload.reload(entry.package.adapter, entry.version.tags["base"], corpus.validation)
    return compare_reload(read_gate_record(entry.package.gate), logits)


def compare_reload(record: GateRecord, logits: npt.NDArray[np.float32]) -> list[Finding]:
    """What a new process answered, against the record. logits: [validation rows, classes]."""
    difference, share = largest_difference(record, logits), agreement(record, logits)
    return [
        Finding(
            rule=f"in a new process, the logits of {len(record.rows)} fixed validation rows must be the recorded ones "
            f"within {LARGEST_DIFFERENCE:g}",
            found=f"the largest difference is {difference:.2g}",
            passed=difference <= LARGEST_DIFFERENCE,
            remedy=REGISTER_ANOTHER,
        ),
        Finding(
            rule=f"in a new process, {LEAST_AGREEMENT:.1%} of the validation split must get the recorded labels",
            found=f"{share:.2%} of {len(record.predicted):,} rows do",
            passed=share >= LEAST_AGREEMENT,
            remedy=REGISTER_ANOTHER,
        ),
    ]


def _champion_data(entry: Entry, champion: Entry) -> Finding:
    digest, champions = entry.version.tags["data_digest"], champion.version.tags["data_digest"]
    return Finding(
        rule=f"the data must be the champion's (version {champion.version.number}, digest {champions[:12]})",
        found=f"digest {digest[:12]}",
        passed=digest == champions,
        remedy="give the sweep back the champion's data, or copy the experiment to a file of another name, which makes "
        "another registered model",
    )


def _not_worse(entry: Entry, champion: Entry, corpus: Corpus) -> Finding:
    """Compared by what both answered when they were registered: the rows are the same, and so is their order."""
    changed = champion.package.changed(champion.version.tags)
    if changed:
        raise RegistryError(
            f"the champion's files changed since it was registered: {', '.join(changed)}; put them back"
        )
    right, champion_right = (
        read_gate_record(each.package.gate).predicted == corpus.validation.labels for each in (entry, champion)
    )
    p_value = worse_p_value(right, champion_right)
    return Finding(
        rule=f"it must not be worse than the champion (version {champion.version.number}) on the validation split "
        f"(exact one-sided McNemar test, p ≥ {LEAST_P_VALUE:g})",
        found=f"p = {p_value:.3g} ({right.mean():.2%} against {champion_right.mean():.2%} of {len(right):,} rows)",
        passed=p_value >= LEAST_P_VALUE,
        remedy="keep the champion, and search on",
    )
