"""The result of a sweep: read from the study, ranked, and the same after a way through JSON."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.trial import TrialState

from agnews_lora.adapters.spec import HEADS, PRESETS, TrialSpec
from agnews_lora.search import study as keys
from agnews_lora.search.racing import Confirmed, Selection
from agnews_lora.search.results import Answers, Registration, SweepResult
from agnews_lora.search.trials import TrialSummary, best_first, summaries
from tests.reporting.results import facts, result, summary

SPEC = TrialSpec("qv", 2, 4.0, 0.1, 1e-3)
COSTS = {"rows_seen": 960, "train_seconds": 12.0, "eval_seconds": 3.0, "peak_memory_bytes": 1 << 30}


def row(number: int, state: str = "COMPLETE", accuracy: float | None = 0.5, loss: float | None = 0.5) -> TrialSummary:
    return replace(summary(number, SPEC, state, accuracy), loss=loss, baseline=False)


def new_study() -> optuna.Study:
    return optuna.create_study(direction="maximize")


def add(
    study: optuna.Study,
    *,
    state: TrialState = TrialState.COMPLETE,
    accuracy: float | None = None,
    params: dict[str, float] | None = None,
    **attributes: Any,
) -> None:
    """A trial that ended, with attributes as the driver sets them."""
    value = accuracy if state is TrialState.COMPLETE else None
    reported = {20: accuracy} if accuracy is not None else {}
    spaces = {name: optuna.distributions.FloatDistribution(0, 1) for name in params or {}}
    attributes = {keys.SPEC: SPEC.as_dict(), **attributes}
    study.add_trial(
        optuna.trial.create_trial(
            state=state,
            value=value,
            params=params or {},
            distributions=spaces,
            user_attrs=attributes,
            intermediate_values=reported,
        )
    )


def test_trials_are_read_from_the_study() -> None:
    study = new_study()
    known = {keys.TRAINABLE: 1000, keys.RUN_ID: "run", keys.SEED: 7, keys.COSTS: COSTS}
    add(
        study,
        accuracy=0.8,
        **known,
        **{keys.BASELINE: True, keys.SCORES: {"accuracy": 0.8, "macro_f1": 0.79, "loss": 0.5}},
    )
    last = {"accuracy": 0.3, "macro_f1": 0.2, "loss": 1.1}
    add(study, state=TrialState.PRUNED, accuracy=0.3, **{keys.REASON: "below the median", keys.SCORES: last})
    add(study, state=TrialState.FAIL, **{keys.REASON: "out of memory"})
    study.enqueue_trial({})  # never started
    rows = summaries(study)
    assert rows[0] == TrialSummary(
        "t0000", 0, "COMPLETE", True, SPEC, 0.8, 0.79, 0.5, 1000, 7, "run", None, steps=20, **COSTS
    )
    assert [(each.trial, each.state, each.accuracy, each.macro_f1) for each in rows] == [
        ("t0000", "COMPLETE", 0.8, 0.79),
        ("t0001", "PRUNED", 0.3, 0.2),
        ("t0002", "FAIL", None, None),
    ]
    assert [each.reason for each in rows] == [None, "below the median", "out of memory"]


def test_trials_of_an_older_study_keep_their_scores() -> None:
    study = new_study()
    add(study, accuracy=0.8, loss=0.5, macro_f1=0.79)
    add(study, state=TrialState.PRUNED, accuracy=0.3)
    assert [(each.accuracy, each.macro_f1, each.loss) for each in summaries(study)] == [
        (0.8, 0.79, 0.5),
        (0.3, None, None),
    ]


def test_a_trial_that_somebody_else_ended_has_the_score_that_the_study_knows() -> None:
    study = new_study()
    keys.name_objective(study, "macro_f1")
    add(study, accuracy=0.6)
    [row] = summaries(study)
    assert (row.accuracy, row.macro_f1) == (None, 0.6)
    assert best_first([row], "macro_f1") == [row]


def test_a_score_that_is_not_finite_counts_as_none() -> None:
    study = new_study()
    add(study, accuracy=0.5, **{keys.SCORES: {"accuracy": 0.5, "macro_f1": 0.4, "loss": float("nan")}})
    add(study, state=TrialState.PRUNED, accuracy=float("nan"))
    assert [(each.accuracy, each.loss) for each in summaries(study)] == [(0.5, None), (None, None)]
    found = SweepResult.from_study(study, None, facts(), state="COMPLETE")
    assert SweepResult.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    ("rows", "best"),
    [
        ([], None),
        ([row(0, "PRUNED", 0.9), row(1, "FAIL", None), row(2, "RUNNING", 0.9), row(3, "WAITING", 0.9)], None),
        ([row(0, accuracy=0.5), row(1, accuracy=0.7), row(2, accuracy=0.6), row(3, "PRUNED", 0.9)], 1),
        ([row(0, accuracy=0.0), row(1, "PRUNED", 0.9)], 0),
        ([row(0, loss=0.5), row(1, loss=0.4), row(2, loss=0.45)], 1),
        ([row(1, loss=0.4), row(0, loss=0.4), row(2, loss=0.4)], 0),
        ([row(0, loss=None), row(1, loss=0.4)], 1),
        ([row(0, accuracy=0.7, loss=None), row(1, accuracy=0.6)], 0),
    ],
)
def test_the_best_has_the_highest_accuracy_then_the_lowest_loss(rows: list[TrialSummary], best: int | None) -> None:
    for order in (rows, rows[::-1]):
        assert next((each.number for each in best_first(order, "accuracy")), None) == best


def test_ranking_puts_confirmed_trials_first_and_failed_ones_last() -> None:
    found = result()
    assert [each.trial[-1] for each in found.ranking] == list("17450623")
    assert found.winner is not None and found.winner.trial == "t0001"
    swapped = replace(found, confirmed=found.confirmed[::-1])
    assert swapped.winner is not None and swapped.winner.trial == "t0007"
    assert [each.trial[-1] for each in swapped.ranking][:2] == ["7", "1"]
    assert found.counts == {"complete": 5, "pruned": 2, "failed": 1}
    assert found.gain == pytest.approx(0.9 - 0.552)


def test_nothing_wins_where_nothing_was_completed() -> None:
    found = result(trials=(row(0, "PRUNED", 0.4), row(1, "FAIL", None)), confirmed=())
    assert found.winner is found.baseline is found.gain is found.confirmation is None
    assert found.as_dict()["winner"] is None


def test_macro_f1_as_the_objective_ranks_and_chooses_by_it() -> None:
    rows = tuple(replace(each, macro_f1=each.accuracy and 1 - each.accuracy) for each in result().trials)
    found = result(trials=rows, confirmed=(), facts=facts(objective="macro_f1"))
    assert [each.trial[-1] for each in found.ranking] == list("05471263")
    assert found.winner is not None and found.winner == found.baseline and found.gain == 0
    assert found.as_dict()["objective"] == "macro_f1"


def test_importances_need_trials_that_tell() -> None:
    def importances(values: list[float]) -> dict[str, float]:
        study = new_study()
        for number, value in enumerate(values):
            add(study, accuracy=value, params={"dropout": value, "learning_rate": 0.1 * (number % 3)})
        return dict(SweepResult.from_study(study, None, facts(), state="COMPLETE").importances)

    assert importances([0.1, 0.2, 0.3]) == importances([0.5] * 6) == {}
    assert set(importances([0.1, 0.9, 0.5, 0.7, 0.2, 0.4])) == {"dropout", "learning_rate"}


# JSON ----------------------------------------------------------------------------------------------------------------

shares, texts = st.floats(0, 1), st.text(max_size=20)
specs = st.builds(
    TrialSpec,
    targets=st.sampled_from(sorted(PRESETS)),
    rank=st.integers(1, 64),
    alpha=st.floats(0.1, 100),
    dropout=st.floats(0, 0.9),
    learning_rate=st.floats(0, 1),
    head=st.sampled_from(HEADS),
)
summaries_of_trials = st.builds(
    TrialSummary,
    trial=texts,
    number=st.integers(0, 99),
    state=st.sampled_from(["COMPLETE", "PRUNED", "FAIL", "RUNNING"]),
    baseline=st.booleans(),
    spec=st.none() | specs,
    accuracy=shares,
    macro_f1=st.none() | shares,
    loss=st.none() | shares,
    trainable_parameters=st.none() | st.integers(0, 10**9),
    seed=st.none() | st.integers(0, 2**32 - 1),
    run_id=st.none() | texts,
    reason=st.none() | texts,
    steps=st.integers(0, 1000),
    train_seconds=st.none() | shares,
)
counts = st.tuples(*[st.integers(0, 99)] * 3)
answers = st.builds(
    Answers,
    confusion=st.lists(counts, max_size=9).map(tuple),
    calibration=st.lists(st.fixed_dictionaries({"low": shares, "count": st.integers(0, 9)}), max_size=2).map(tuple),
    mistakes=st.lists(st.fixed_dictionaries({"row": st.integers(0, 9), "text": texts}), max_size=2).map(tuple),
    against_baseline=st.none() | st.just({"both": 1, "only_winner": 2, "only_baseline": 3, "neither": 4}),
)
registrations = st.builds(
    Registration,
    model=texts,
    version=st.integers(1, 9),
    aliases=st.lists(texts, max_size=2).map(tuple),
    checks=st.lists(st.fixed_dictionaries({"rule": texts, "passed": st.booleans()}), max_size=2).map(tuple),
    test=st.none() | st.fixed_dictionaries({"accuracy": shares}),
)


@settings(max_examples=40)
@given(
    trials=st.lists(summaries_of_trials, max_size=4, unique_by=lambda each: each.number),
    repeats=st.lists(summaries_of_trials, max_size=2),
    answers=st.none() | answers,
    registration=st.none() | registrations,
    adapter=st.none() | specs,
)
def test_a_result_is_the_same_after_a_way_through_json(
    trials: list[TrialSummary],
    repeats: list[TrialSummary],
    answers: Answers | None,
    registration: Registration | None,
    adapter: TrialSpec | None,
) -> None:
    trials.sort(key=lambda each: each.number)
    complete = [each for each in trials if each.state == "COMPLETE"]
    written = result(
        facts=facts(adapter=adapter, confirmation={"trials": 1, "seeds": 2}),
        trials=tuple(trials),
        confirmed=tuple(Confirmed(each, tuple(repeats)) for each in complete[:1]),
        answers=answers,
        registration=registration,
        selection=Selection("t0001", ("t0001", "t0007"), 0.97, None) if complete else None,
    )
    read = SweepResult.from_json(written.to_json())
    assert read == written and read.as_dict() == written.as_dict()


def test_as_json_a_result_says_what_follows_from_it() -> None:
    said = json.loads(result().to_json())
    assert said["trials"] == {"complete": 5, "pruned": 2, "failed": 1}
    assert said["winner"]["trial"] == "t0001" and said["winner"]["confirmation"]["seeds"] == 3
    assert said["winner"]["configuration"]["rank"] == 10
    assert (said["baseline_accuracy"], said["best_possible_accuracy"], said["budget"]) == (0.552, 0.94, 100_000)
    assert (said["objective"], said["majority_accuracy"], said["majority_macro_f1"]) == ("accuracy", 0.256, 0.1019)
    assert (said["winner"]["macro_f1"], said["baseline_macro_f1"]) == (0.89, 0.542)
    assert (said["registered"]["version"], said["registered"]["aliases"]) == (3, ["champion"])
    assert [each["trial"] for each in said["leaderboard"]] == [each.trial for each in result().ranking]
    assert said["winner"]["probability_better_than_runner_up"] == 0.924
    assert said["winner"]["indistinguishable"] == ["t0001"]


def test_a_result_of_an_earlier_release_has_no_selection() -> None:
    said = json.loads(result().to_json())
    for name in Selection.__dataclass_fields__:
        del said["winner"][name]
    assert SweepResult.from_json(json.dumps(said)) == result(selection=None)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 0}', '{"format": 2}', "null"])
def test_another_file_is_no_result(text: str) -> None:
    with pytest.raises(ValueError):
        SweepResult.from_json(text)


def test_writing_replaces_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "results" / "small.json"
    result().write(path)
    result(state="INTERRUPTED").write(path)
    assert SweepResult.from_json(path.read_text(encoding="utf-8")).state == "INTERRUPTED"
    assert [each.name for each in path.parent.iterdir()] == ["small.json"]


def test_a_promotion_changes_the_registration_alone() -> None:
    before = result(registration=Registration("small", 3, ("candidate",)))
    after = before.registered(Registration("small", 3, ("champion",)))
    assert after.registration is not None and after.registration.aliases == ("champion",)
    assert replace(after, registration=None) == replace(before, registration=None)
