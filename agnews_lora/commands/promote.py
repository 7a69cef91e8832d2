"""`agnews-lora promote`: a registered version through the gate, or the way back."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from mlflow import MlflowClient
from rich.console import Console
from rich.markup import escape

from agnews_lora.commands.finish import refresh
from agnews_lora.commands.prepare import prepare
from agnews_lora.config.sweep import load_sweep
from agnews_lora.data.sources import prepare_test
from agnews_lora.paths import STORES, TOKENS
from agnews_lora.serving import gate
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client, reaching


def run(name: str, version: int | None, tracking: str | None, as_json: bool) -> int:
    """Judge the sweep's candidate, or a version, and make it champion. tracking: URL, or None for the project's own.

    Raises:
        GateError: it does not pass; no alias moved.
        AgnewsLoraError: anything else that the user can mend.
    """
    experiment = load_sweep(name).experiment
    client = open_client(tracking or STORES)
    stage = prepare(experiment)
    registry = Registry(client, experiment.name)
    with reaching(client), _refreshed(client, registry, version):
        promotion = gate.promote(
            registry,
            stage.corpus,
            lambda: prepare_test(
                experiment.data_settings, experiment.seed, stage.base.folder, experiment.settings.max_length, TOKENS
            ),
            version,
        )
    if as_json:
        print(json.dumps(_as_dict(promotion)))
        return 0
    console = Console(highlight=False)
    for finding in promotion.findings:
        console.print(f"[green]passed[/]  {escape(finding.rule)}: {escape(finding.found)}", soft_wrap=True)
    scored = "as scored at its first promotion" if promotion.scored_before else "scored now, once for this version"
    console.print(f"[bold]{promotion.version} is champion[/] (the one before: {promotion.replaced or 'none'})")
    console.print(f"test split, {scored}: {gate.score_line(promotion.score)}", soft_wrap=True)
    return 0


@contextmanager
def _refreshed(client: MlflowClient, registry: Registry, number: int | None) -> Iterator[None]:
    """Brings the pages of the version that is judged up to date, also where it is refused."""
    judged = registry.version(number) if number is not None else registry.waiting()
    try:
        yield
    finally:
        if judged is not None:
            refresh(client, registry.version(judged.number))


def _as_dict(promotion: gate.Promotion) -> dict[str, Any]:
    return {
        "model": promotion.version.model,
        "champion": promotion.version.number,
        "previous": promotion.replaced,
        "checks": [{"rule": finding.rule, "found": finding.found} for finding in promotion.findings],
        "test": asdict(promotion.score),
        "scored_before": promotion.scored_before,
    }


def rollback(name: str, tracking: str | None, as_json: bool) -> int:
    """Make the previous champion champion again.

    Raises:
        RegistryError: there is no previous champion.
    """
    client = open_client(tracking or STORES)
    with reaching(client):
        outcome = gate.rollback(Registry(client, load_sweep(name).experiment.name))
    if as_json:
        numbers = {"champion": outcome.champion.number, "previous": outcome.previous.number}
        print(json.dumps({"model": outcome.champion.model, **numbers}))
        return 0
    Console(highlight=False).print(f"{outcome.champion} is champion again; {outcome.previous} is previous")
    return 0
