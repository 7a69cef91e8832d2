"""What a trial's run, a registered model and its versions say of themselves in MLflow's UI."""

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.commands.markdown import gallery, link, percent, plain, table, version_url
from agnews_lora.commands.predictions import ANSWERS
from agnews_lora.search.standings import Standing
from agnews_lora.search.trial_log import End
from agnews_lora.serving.export import confirmed_mean
from agnews_lora.serving.markdown import code
from agnews_lora.serving.model_package import recorded_score
from agnews_lora.tracking.registry import CANDIDATE, CHAMPION, PREVIOUS, Version
from agnews_lora.tracking.runs import RunPage

CURVES: Final = {"accuracy_curve.png": "Validation accuracy", "loss_curve.png": "Loss"}
# What a logged model shows of the run that trained it.
MODEL_PARAMS: Final = (
    "targets",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "learning_rate",
    "head",
    "trainable_parameters",
    "budget",
    "seed",
    "base",
)
MODEL_METRICS: Final = ("eval/accuracy", "eval/macro_f1", "eval/loss")
_STATES: Final = {"COMPLETE": "Complete", "PRUNED": "Pruned", "FAILED": "Failed"}


def trial_card(
    spec: TrialSpec, facts: Mapping[str, Any], budget: int | None, page: RunPage | None = None, end: End | None = None
) -> str:
    """Of one trial's run. facts: what the runner knows of it. budget: the sweep's. page, end: None while it trains."""
    kinds = {"baseline": "the sweep's baseline, never pruned"} if facts.get("baseline") else {}
    if "confirms" in facts:
        kinds["confirms"] = f"trains {plain(facts['confirms'])} again, with another seed"
    count = facts.get("trainable_parameters")
    size = "" if count is None else f"{count:,} trainable parameters"
    size += f" of {budget:,} ({percent(count / budget)})" if count is not None and budget is not None else ""
    lines = [f"{_outcome(end)}", " · ".join([code(spec), *([size] if size else []), *kinds.values()])]
    if page is None or end is None or end.result is None:
        return "\n".join(lines)
    return "\n".join(lines) + f"\n\n{gallery(page, CURVES)}"


def _outcome(end: End | None) -> str:
    if end is None:
        return "**Under way, or stopped on it.**"
    result, state = end.result, f"**{_STATES.get(end.state, plain(end.state))}**"
    final = result.final if result is not None else None
    if result is None or final is None:
        return f"{state}: {plain(end.reason or 'no reason was given')}"
    return (
        f"{state}: accuracy **{percent(final.accuracy)}**, macro-F1 {percent(final.macro_f1)}, loss {final.loss:.3f} "
        f"on {final.rows:,} validation rows, after {result.steps:,} steps"
    )


def winner_card(row: Standing, page: RunPage, parent: RunPage, version: Version | None, budget: str) -> str:
    """Of the winner's run. version: what it was registered as; None where another trial has taken its place since.

    budget: how its count of trainable parameters comes about.
    """
    study = link("the sweep", parent.url)
    registered = f"**Winner of {study}**, registered as {link(version, version_url(version))}" if version else ""
    loss = "" if row.loss is None else f", loss {row.loss:.3f}"
    lines = [
        f"{registered or f'**Won {study} once**, and was overtaken'}: accuracy **{percent(row.accuracy)}**, macro-F1 "
        f"{percent(row.macro_f1)}{loss} on the validation split",
        code(row.spec),
        budget,
    ]
    mistakes = link("Its most confident mistakes", page.artifact_url("mistakes.json"))
    return "\n".join(lines) + f"\n\n{gallery(page, CURVES | ANSWERS)}\n\n{mistakes}, as a table."


def model_card(model: str, sweep: str) -> str:
    """Of a registered model."""
    return "\n".join(
        [
            f"Adapters for experiment {plain(model)}, found under a hard budget of trainable parameters by "
            f"{code(f'agnews-lora sweep {sweep}')}.",
            f"\n- {code(CHAMPION)} is in use: {code(f'agnews-lora predict --sweep {sweep} TEXT')}",
            f"- {code(CANDIDATE)} waits for its promotion checks: {code(f'agnews-lora promote {sweep}')}",
            f"- {code(PREVIOUS)} is the way back: {code(f'agnews-lora promote {sweep} --rollback')}",
        ]
    )


def version_card(version: Version, run: RunPage, parent: RunPage | None) -> str:
    """Of a registered version, as its tags tell it. run: of its trial. parent: of the sweep, where it is known."""
    tags = version.tags
    count, budget = int(tags["trainable_parameters"]), int(tags["budget"])
    score = recorded_score(version)
    verdict = tags.get("promotion", "")
    checks = {"passed": "**passed**", "failed": "**refused**"}.get(verdict, "not checked yet")
    report = f", {link('report', run.artifact_url(f'promotion/v{version.number}/report.md'))}" if verdict else ""
    study = link(tags["study"], parent.url) if parent else plain(tags["study"])
    data = "; ".join(f"{key} {value}" for key, value in json.loads(tags.get("data", "{}")).items())
    rows = [
        ["promotion checks", checks + report],
        [
            "test split, scored once",
            re.sub(r"(?<=\d)%", "\N{NO-BREAK SPACE}%", str(score)) if score else "not scored yet",
        ],
        [
            "validation split",
            f"accuracy {percent(float(tags['validation_accuracy']))} on {int(tags['validation_rows']):,} rows, which "
            "chose this adapter among others: optimistic",
        ],
        *([["confirmation", mean.replace("%", " %")]] if (mean := confirmed_mean(version)) else []),
        ["budget", f"{count:,} of {budget:,} trainable parameters ({percent(count / budget)})"],
        ["found by", f"trial {link(tags['trial'], run.url)} of study {study}, sweep {plain(tags['sweep'])}"],
        ["base", f"{plain(tags['base_hub_id'])}, revision {plain(tags['base_revision'])}"],
        ["data", f"{plain(data)}; digest {plain(tags['data_digest'])}"],
    ]
    test = f"test accuracy {percent(score.accuracy)}, " if score else ""
    judged = {"passed": "Passed its promotion checks", "failed": "Failed its promotion checks"}.get(
        verdict, "Not checked yet"
    )
    return (
        f"{judged}: {test}validation accuracy {percent(float(tags['validation_accuracy']))}, {count:,} of {budget:,} "
        f"trainable parameters.\n\n{table(['', ''], rows)}"
    )
