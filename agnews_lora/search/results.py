"""The sweep result: the one value that screen, `--json`, MLflow's pages, figures and the report are made from.

It is computed from the study once, written as `result.json`, and read back from there. Nothing else ranks trials.
"""

import json
import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import optuna

from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.paths import write_whole
from agnews_lora.search import study as study_keys
from agnews_lora.search.racing import Confirmed, Selection, choose, repeated
from agnews_lora.search.trials import ENDED_STATES, TrialSummary, best_first, summaries
from agnews_lora.training.interface import SCORES, Objective
from agnews_lora.training.metrics import accuracy_interval

if TYPE_CHECKING:
    import pandas as pd

INTERRUPTED: Final = "INTERRUPTED"
FORMAT: Final = 2  # of `result.json`
MIN_TRIALS_FOR_IMPORTANCE: Final = 4


@dataclass(frozen=True)
class SweepFacts:
    """What a result says of its sweep beside the trials.

    base: the hub's id. bound: the best possible accuracy, where the data's construction tells. objective: the score
    that is searched by. majority_accuracy, majority_macro_f1: of always answering the most common training label, on
    the validation split; None where another release wrote the result. settings: of `TrainSettings`. space: as
    `search.space.describe` gives it. data: the source in words. texts: the YAML files, word for word, by file name.
    provenance: code, versions and device. heads: those that are searched. adapter: the baseline's configuration.
    confirmation: `{trials, seeds, prefer}`; None without one. profile: of the rows, as `data.profile.profile` gives it;
    empty where another release wrote the result. files: SHA-256 (hex) of the data's own files, by split. file: what
    the command line knows the sweep by, its name or its path; empty where it is the name. options: of the command line
    that started it last, as far as the study is found and goes on by them (`--storage`, `--tracking`, `--workers`,
    `--address`, `--trials`).
    """

    sweep: str
    experiment: str
    base: str
    base_revision: str
    shape: ModelShape
    budget: int
    engine: str
    seed: int
    planned_trials: int
    total_steps: int
    num_train_rows: int
    num_validation_rows: int
    data_digest: str
    labels: tuple[str, ...]
    bound: float | None
    settings: Mapping[str, Any]
    space: Mapping[str, Any]
    data: Mapping[str, Any]
    texts: Mapping[str, str]
    provenance: Mapping[str, str]
    heads: tuple[str, ...] = ("full",)
    adapter: TrialSpec | None = None
    confirmation: Mapping[str, Any] | None = None
    objective: Objective = "accuracy"
    majority_accuracy: float | None = None
    majority_macro_f1: float | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    def command(self, verb: str, *words: str) -> str:
        """A command line for this sweep, with the options of its start that the command has."""
        known = {"sweep": ("--storage", "--tracking", "--workers", "--address"), "ui": ()}.get(verb, ("--tracking",))
        found = [word for option in known if option in self.options for word in (option, self.options[option])]
        of = {"predict": ["--sweep", self.file or self.sweep], "ui": []}.get(verb, [self.file or self.sweep])
        return shlex.join(["agnews-lora", verb, *of, *words, *found])


@dataclass(frozen=True)
class Registration:
    """The winner in the model registry. checks: `{rule, found, passed}` each, of its last promotion.

    test: `{accuracy, low, high, macro_f1, rows}` on the test split, scored once; None before.
    """

    model: str
    version: int
    aliases: tuple[str, ...]
    checks: tuple[Mapping[str, Any], ...] = ()
    test: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Answers:
    """How the winner answers on the validation split.

    confusion: `(label, predicted, rows)` of every pair that occurs, by index. calibration: bins
    `{low, count, confidence, accuracy}`. mistakes: `{row, label, predicted, confidence, text}`, by confidence.
    against_baseline: rows by which of the two answers them correctly, `{both, only_winner, only_baseline, neither}`;
    None without a baseline. tfidf_accuracy, tfidf_macro_f1: of TF-IDF and logistic regression on the same training
    rows; None where they were not computed.
    """

    confusion: tuple[tuple[int, int, int], ...]
    calibration: tuple[Mapping[str, Any], ...]
    mistakes: tuple[Mapping[str, Any], ...]
    against_baseline: Mapping[str, int] | None
    tfidf_accuracy: float | None = None
    tfidf_macro_f1: float | None = None


@dataclass(frozen=True)
class Peer:
    """A classifier without an encoder, fitted to the same training rows. scores: on the validation split."""

    key: str
    name: str
    scores: Mapping[Objective, float | None]
    note: str


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found, finished or not.

    A trial's accuracy is its own run's, as the engine measured it at the last step on the whole validation split. The
    winner's is thus that of the adapter that is registered; the mean over seeds stands beside it, and is never called
    the winner's accuracy. The gain is the winner's score less the baseline's, both of their own runs.

    state: `COMPLETE`, or `INTERRUPTED`; trials_left is then their number, None where it is not known. study_id: the
    study's identity. run_id: of the parent run. trials: by number. confirmed: the winner first. importances: by
    parameter; empty where too few trials tell. wall_seconds: in which trials trained, over all starts of the sweep.
    record_seconds: of the last start, spent in study, tracker and screen. ended_at: when the last trial ended, in
    seconds since 1970; None before the first has. links: of the study's pages, relative to MLflow's UI: `sweep`,
    `trials`, `charts`; empty where another release wrote the result. selection: how the winner was chosen; None without
    a confirmation, or where another release wrote the result.
    """

    facts: SweepFacts
    study: str
    study_id: str
    state: str
    trials: tuple[TrialSummary, ...]
    confirmed: tuple[Confirmed, ...]
    importances: Mapping[str, float]
    run_id: str | None = None
    wall_seconds: float | None = None
    record_seconds: float | None = None
    registration: Registration | None = None
    answers: Answers | None = None
    ended_at: float | None = None
    trials_left: int | None = 0
    links: Mapping[str, str] = field(default_factory=dict)
    selection: Selection | None = None
    format: int = field(default=FORMAT)

    @classmethod
    def from_study(cls, study: optuna.Study, rounds: optuna.Study | None, facts: SweepFacts, **others: Any) -> Self:
        """Compute the result. rounds: the study of the confirmation, where there is one."""
        trials, objective = summaries(study), study_keys.objective_of(study)
        confirmed, selection = choose(repeated(trials, rounds, objective), objective, facts.confirmation)
        return cls(
            facts=facts,
            study=study.study_name,
            study_id=str(study.user_attrs.get(study_keys.IDENTITY, "")),
            trials=tuple(trials),
            confirmed=confirmed,
            selection=selection,
            importances=_importances(study),
            ended_at=_ended_at(study, *([rounds] if rounds else [])),
            **others,
        )

    @property
    def objective(self) -> Objective:
        """The score that trials are ranked by."""
        return self.facts.objective

    @property
    def winner(self) -> TrialSummary | None:
        """The trial whose adapter is the result: the race's winner, or without a confirmation the best trial."""
        return self.confirmed[0].own if self.confirmed else next(iter(best_first(self.trials, self.objective)), None)

    @property
    def confirmation(self) -> Confirmed | None:
        """The winner's."""
        return self.confirmed[0] if self.confirmed else None

    @property
    def baseline(self) -> TrialSummary | None:
        """The experiment's own configuration, where it has finished."""
        return next((row for row in self.trials if row.baseline and row.state == "COMPLETE"), None)

    @property
    def gain(self) -> float | None:
        """The winner's score less the baseline's, a share."""
        best, own = (row.score(self.objective) if row else None for row in (self.winner, self.baseline))
        return None if best is None or own is None else best - own

    def interval(self, row: TrialSummary) -> tuple[float, float] | None:
        """The 95 % interval of a trial's accuracy."""
        return None if row.accuracy is None else accuracy_interval(row.accuracy, self.facts.num_validation_rows)

    @property
    def peers(self) -> list[Peer]:
        """The classifiers without an encoder whose scores are known."""
        facts, answers = self.facts, self.answers
        majority: dict[Objective, float | None]
        majority = {"accuracy": facts.majority_accuracy, "macro_f1": facts.majority_macro_f1}
        found = [Peer("majority", "majority class", majority, "always the most common label")]
        if answers is not None:
            tfidf: dict[Objective, float | None]
            tfidf = {"accuracy": answers.tfidf_accuracy, "macro_f1": answers.tfidf_macro_f1}
            found.insert(0, Peer("tfidf", "TF-IDF", tfidf, "with logistic regression"))
        return [peer for peer in found if peer.scores["accuracy"] is not None]

    @property
    def ranking(self) -> list[TrialSummary]:
        """All trials: confirmed ones, then complete ones by their score, then pruned ones, then the rest."""
        first = [row.own for row in self.confirmed]
        first += [row for row in best_first(self.trials, self.objective) if row not in first]
        order = {"PRUNED": 0}
        rest = [row for row in self.trials if row not in first]
        rest.sort(key=lambda row: (order.get(row.state, 1), -(row.score(self.objective) or 0.0), row.number))
        return first + rest

    @property
    def counts(self) -> dict[str, int]:
        """How many trials ended how: `complete`, `pruned`, `failed`."""
        return {word: sum(row.state == state for row in self.trials) for word, state in ENDED_STATES.items()}

    def frame(self) -> "pd.DataFrame":
        """One row per trial, the best first."""
        import pandas as pd

        scores = ("trial", "state", *SCORES, "loss", "trainable_parameters")
        return pd.DataFrame(
            [
                {name: getattr(row, name) for name in scores}
                | (row.spec.as_dict() if row.spec else {})
                | {"baseline": row.baseline, "winner": row == self.winner, "run_id": row.run_id, "reason": row.reason}
                for row in self.ranking
            ]
        )

    def registered(self, registration: Registration) -> Self:
        """The same result, with its registration."""
        return replace(self, registration=registration)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: every field, and what follows from them for those who read it without this package.

        `trials` counts them, and `leaderboard` has them all, the best first.
        """
        winner, baseline, mean, rows = self.winner, self.baseline, self.confirmation, self.facts.num_validation_rows
        low, high = (winner and self.interval(winner)) or (None, None)
        shown = asdict(replace(self, trials=(), confirmed=()))
        shown["confirmed"] = [
            {"own": each.own.as_dict(), "repeats": [row.as_dict() for row in each.repeats]} for each in self.confirmed
        ]
        del shown["trials"]
        selection = shown.pop("selection") or dict.fromkeys(Selection.__dataclass_fields__)
        return {
            "study": self.study,
            "state": self.state,
            "objective": self.objective,
            "trials": self.counts,
            "winner": winner
            and {
                "trial": winner.trial,
                "run_id": winner.run_id,
                "configuration": winner.spec and winner.spec.as_dict(),
                "accuracy": winner.accuracy,
                "accuracy_low": low,
                "accuracy_high": high,
                "macro_f1": winner.macro_f1,
                "trainable_parameters": winner.trainable_parameters,
                "confirmation": mean and mean.as_dict(self.objective, rows),
            }
            | selection,
            "validation_rows": rows,
            "gain": self.gain,
            "baseline_accuracy": baseline and baseline.accuracy,
            "baseline_macro_f1": baseline and baseline.macro_f1,
            "tfidf_accuracy": self.answers and self.answers.tfidf_accuracy,
            "tfidf_macro_f1": self.answers and self.answers.tfidf_macro_f1,
            "majority_accuracy": self.facts.majority_accuracy,
            "majority_macro_f1": self.facts.majority_macro_f1,
            "best_possible_accuracy": self.facts.bound,
            "budget": self.facts.budget,
            "registered": shown.pop("registration"),
            "leaderboard": [row.as_dict() for row in self.ranking],
            **shown,
        }

    def to_json(self) -> str:
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not a result, or one of another format.
        """
        try:
            read = json.loads(text)
            if read["format"] != FORMAT:
                raise ValueError(f"format {FORMAT} is read, but this is {read['format']}")
            facts, answers, registration = read["facts"], read["answers"], read["registered"]
            found = {name: value for name, value in read.items() if name in cls.__dataclass_fields__}
            found["facts"] = SweepFacts(
                **facts
                | {
                    "shape": ModelShape(**facts["shape"]),
                    "adapter": TrialSpec(**facts["adapter"]) if facts["adapter"] else None,
                    "labels": tuple(facts["labels"]),
                    "heads": tuple(facts["heads"]),
                }
            )
            found["trials"] = tuple(sorted(map(_summary, read["leaderboard"]), key=lambda row: row.number))
            found["confirmed"] = tuple(
                Confirmed(_summary(row["own"]), tuple(map(_summary, row["repeats"]))) for row in read["confirmed"]
            )
            if (read["winner"] or {}).get("best_mean"):
                parts = {name: read["winner"][name] for name in Selection.__dataclass_fields__}
                found["selection"] = Selection(**parts | {"indistinguishable": tuple(parts["indistinguishable"])})
            if registration is not None:
                parts = {name: tuple(registration[name]) for name in ("aliases", "checks")}
                found["registration"] = Registration(**registration | parts)
            if answers is not None:
                parts = {name: tuple(answers[name]) for name in ("calibration", "mistakes")}
                found["answers"] = Answers(**answers | parts | {"confusion": tuple(map(tuple, answers["confusion"]))})
            return cls(**found)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a sweep result: {error!r}") from error

    def write(self, path: Path) -> None:
        """Write `result.json`, beside and renamed."""
        write_whole(path, self.to_json())


def _ended_at(*studies: optuna.Study) -> float | None:
    trials = [trial for study in studies for trial in study.get_trials(deepcopy=False)]
    return max((trial.datetime_complete.timestamp() for trial in trials if trial.datetime_complete), default=None)


def _importances(study: optuna.Study) -> dict[str, float]:
    """Of the parameters that all finished trials share; empty where too few trials tell."""
    counted = {row.number for row in summaries(study) if row.state == "COMPLETE"}
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.number in counted]
    asked = [trial for trial in complete if trial.params]
    if len(asked) < MIN_TRIALS_FOR_IMPORTANCE:
        return {}
    shared = set.intersection(*(set(trial.params) for trial in asked))
    if len({trial.value for trial in complete}) == 1 or not shared:
        return {}
    alone = optuna.create_study(direction="maximize")
    alone.add_trials(complete)
    found = optuna.importance.get_param_importances(alone, params=sorted(shared))
    return {name: value for name, value in found.items() if math.isfinite(value)}


def _summary(read: dict[str, Any]) -> TrialSummary:
    return TrialSummary(**{**read, "spec": TrialSpec(**read["spec"]) if read["spec"] else None})
