import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.adapters.base_models import EMBEDDED, shape_of
from agnews_lora.adapters.budget import require_within_budget
from agnews_lora.adapters.spec import PRESETS
from agnews_lora.training.interface import TrialResult
from benchmarks.agreement import (
    Comparison,
    Pair,
    compare,
    over_all,
    paired_standard_error,
    report,
    table,
    two_sample_standard_error,
)
from benchmarks.agreement_trials import BUDGET, MULTILORA, OTHER, SEEDS, TRAINER, TRIALS, Course, Kept, build_engine
from tests.tiny import tiny_base
from tests.training.conftest import tiny_setup

TAGS = {f"version.{name}": "1.0" for name in ("python", "torch", "transformers", "peft")} | {"device": "CPU"}


def rights(*counts: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows that (both, only the first, only the second, neither) of two have right."""
    first, second = np.array([True, True, False, False]), np.array([True, False, True, False])
    return np.repeat(first, counts), np.repeat(second, counts)


def pair(*counts: int) -> Pair:
    first, second = rights(*counts)
    return Pair(float(first.mean()), float(second.mean()), first, second)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_the_paired_error_is_that_of_the_mean_of_the_rows_differences(rows: list[tuple[bool, bool]]) -> None:
    first, second = np.array(rows, dtype=bool).T
    differences = second.astype(float) - first.astype(float)
    assert paired_standard_error(first, second) == pytest.approx(differences.std() / np.sqrt(len(rows)), abs=1e-9)


def test_the_two_sample_error_is_the_binomial_one() -> None:
    assert two_sample_standard_error(0.5, 0.5, 50) == pytest.approx(0.1)
    assert two_sample_standard_error(0.9, 0.8, 100) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("counts", "within", "within_paired"),
    [
        ((1_760, 0, 0, 240), True, True),
        ((1_740, 20, 30, 210), True, True),  # half a point: 2 SE are 2.0 points, paired 0.7
        ((1_740, 0, 20, 240), True, False),  # one point, all gained: 2 SE are 2.0 points, paired 0.4
        ((1_720, 0, 60, 220), False, False),  # three points
        ((1_720, 60, 0, 220), False, False),
    ],
)
def test_the_verdicts(counts: tuple[int, ...], within: bool, within_paired: bool) -> None:
    judged = pair(*counts)
    assert (judged.agrees, judged.agrees_paired) == (within, within_paired)
    assert judged.difference == pytest.approx((counts[2] - counts[1]) / 2_000)


def test_the_two_verdicts_are_made_of_their_own_figures() -> None:
    apart = replace(pair(1_760, 0, 0, 240), second=0.5)  # as reported; the exported adapters answer alike
    assert (apart.agrees, apart.agrees_paired) == (False, True)


def test_the_report_says_what_does_not_agree_and_how_both_rank() -> None:
    good, poor = pair(1_740, 20, 30, 210), pair(800, 0, 200, 1_000)
    first, second = list(TRIALS.values())[:2]
    rows = [
        Comparison(first, good, seeds=pair(200, 1_560, 0, 240)),
        Comparison(second, poor, seeds=pair(400, 400, 0, 1_200)),
    ]
    lines = table(rows)
    assert lines[2] == f"| {first} | 88.00% | 88.50% | +0.50 | 2.04 | yes | +0.50 | 0.71 | yes | 10.00% |"
    assert lines[3].count("**no**") == 2 and lines[3].endswith("| 20.00% |")
    figures = over_all(rows)
    assert "| within two standard errors | 1 of 2 | 0 of 2 |" in figures
    assert "| Kendall's tau of the two rankings | 1.000 | -1.000 |" in figures
    assert "| difference, root mean square | 7.08 | 56.94 |" in figures
    assert "| difference, mean | +5.25 | -49.00 |" in figures
    text = report(rows, TAGS, {TRAINER: "abc, def (dirty)", MULTILORA: "def"}, bf16=True)
    assert "Commits: trainer abc, def (dirty); multilora def." in text
    assert "bf16" in text and "2,000 validation rows" in text


def test_the_configurations_take_every_preset_and_keep_the_budget() -> None:
    assert len(TRIALS) == 8 and {spec.targets for spec in TRIALS.values()} == set(PRESETS)
    for spec in TRIALS.values():
        require_within_budget(spec, shape_of(EMBEDDED), BUDGET)


class StopsAfter(Course):
    """Is broken off when so many trials have ended."""

    stop_after = 3

    def finished(self, result: TrialResult) -> None:
        super().finished(result)
        self.stop_after -= 1

    def stop_requested(self) -> bool:
        return self.stop_after <= 0


def test_both_engines_train_all_and_go_on_where_they_were(tmp_path: Path) -> None:
    setup = tiny_setup(tiny_base(tmp_path / "tiny-bert", "bert"), tmp_path / "tokens")
    conditions = {"seeds": SEEDS, "spans": (1, 2)}
    for engine in SEEDS:
        kept = Kept(tmp_path, conditions, "abc")
        course = StopsAfter(engine, kept, setup.base, setup.corpus, tmp_path / engine)
        build_engine(engine, setup.base, setup.corpus).run(course, course)
        ended = list(kept.trials(engine))
        assert len(ended) in (3, 4), "four slots end together"

        kept = Kept(tmp_path, conditions, "def")
        course = Course(engine, kept, setup.base, setup.corpus, tmp_path / engine)
        assert [plan.trial for plan in course.left] == [trial for trial in TRIALS if trial not in ended]
        assert course.left[-1].seed == SEEDS[engine] + 7
        build_engine(engine, setup.base, setup.corpus).run(course, course)
        assert not kept.missing(engine) and kept.commits(engine) == "abc, def"
    rows = compare(Kept(tmp_path, conditions, "def"), setup.corpus.validation.labels)
    trials = json.loads((tmp_path / "agreement.json").read_text())["trials"]
    assert [row.engines.second for row in rows] == [trials[MULTILORA][trial]["accuracy"] for trial in TRIALS]
    assert [row.seeds.second for row in rows] == [trials[OTHER][trial]["accuracy"] for trial in TRIALS]
    for row, trial in zip(rows, TRIALS, strict=True):
        assert row.engines.first == trials[TRAINER][trial]["accuracy"]
        assert row.seeds.first == row.engines.second
        assert row.engines.first == pytest.approx(row.engines.first_right.mean(), abs=0.1), "bf16 against fp32"
    with pytest.raises(SystemExit, match="name another folder"):
        Kept(tmp_path, {"seeds": SEEDS, "spans": (1, 3)}, "def")
