"""`agnews-lora promote`: a registered version through the gate, or the way back."""

from rich.console import Console
from rich.markup import escape

from agnews_lora.commands.places import STORES, TOKENS
from agnews_lora.commands.stage import prepare
from agnews_lora.config.sweep import load_sweep
from agnews_lora.data.corpus import prepare_test
from agnews_lora.serving import gate
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client, reaching


def run(name: str, version: int | None, tracking: str | None) -> int:
    """Judge the sweep's candidate, or a version, and make it champion. tracking: URL, or None for the project's own.

    Raises:
        GateError: it does not pass; no alias moved.
        AgnewsLoraError: anything else that the user can mend.
    """
    experiment = load_sweep(name).experiment
    client = open_client(tracking or STORES)
    stage = prepare(experiment)
    with reaching(client):
        promotion = gate.promote(
            Registry(client, experiment.name),
            stage.corpus,
            lambda: prepare_test(
                experiment.data_settings, experiment.seed, stage.base.folder, experiment.settings.max_length, TOKENS
            ),
            version,
        )
    console = Console(highlight=False)
    for finding in promotion.findings:
        console.print(f"[green]passed[/]  {escape(finding.rule)}: {escape(finding.found)}", soft_wrap=True)
    scored = "as scored at its first promotion" if promotion.scored_before else "scored now, once for this version"
    console.print(f"[bold]{promotion.version} is champion[/] (the one before: {promotion.replaced or 'none'})")
    console.print(f"test split, {scored}: {gate.score_line(promotion.score)}", soft_wrap=True)
    return 0


def rollback(name: str, tracking: str | None) -> int:
    """Make the previous champion champion again.

    Raises:
        RegistryError: there is no previous champion.
    """
    client = open_client(tracking or STORES)
    with reaching(client):
        outcome = gate.rollback(Registry(client, load_sweep(name).experiment.name))
    Console(highlight=False).print(f"{outcome.champion} is champion again; {outcome.previous} is previous")
    return 0
