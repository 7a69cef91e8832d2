"""`agnews-lora promote`: check a registered version and make it champion, or roll back."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from agnews_lora.commands.finish import known_result, refresh, refresh_changed
from agnews_lora.commands.prepare import prepare
from agnews_lora.config.experiment import Experiment
from agnews_lora.config.sweep import Sweep, load_sweep
from agnews_lora.data.sources import prepare_test
from agnews_lora.errors import PromotionError
from agnews_lora.paths import STORES, TOKENS, temporary_files
from agnews_lora.reporting.summary import champion_steps, steps_table
from agnews_lora.serving import promotion
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client, reaching


def run(sweep: Sweep, version: int | None, tracking: str | None, as_json: bool) -> int:
    """Promote, and print what was found; see `promote`.

    Raises:
        PromotionError: a check failed; no alias moved.
        AgnewsLoraError: anything else that the user can mend.
    """
    outcome = promote(sweep, version=version, tracking=tracking, quiet=as_json)
    if as_json:
        found = {
            "model": outcome.version.model,
            "version": outcome.version.number,
            "passed": outcome.passed,
            "champion": outcome.version.number if outcome.passed else None,
            "previous": outcome.replaced,
            "checks": [asdict(finding) for finding in outcome.findings],
            "test": asdict(outcome.score) if outcome.score else None,
            "scored_before": outcome.scored_before,
        }
        print(json.dumps(found))
    if not outcome.passed:
        raise PromotionError(outcome.refusal)
    if as_json:
        return 0
    console = Console(highlight=False)
    for finding in outcome.findings:
        console.print(f"[green]passed[/]  {escape(finding.rule)}: {escape(finding.found)}", soft_wrap=True)
    scored = "as scored at its first promotion" if outcome.scored_before else "scored now, once for this version"
    console.print(f"[bold]{outcome.version} is champion[/] (the one before: {outcome.replaced or 'none'})")
    console.print(f"test split, {scored}: {outcome.score}", soft_wrap=True)
    if result := known_result(str(outcome.version.tags.get("study"))):
        console.print("\n[bold]Next[/]", steps_table(champion_steps(result.facts), console.width), sep="\n")
    return 0


def promote(
    sweep: Sweep | str | Path, *, version: int | None = None, tracking: str | None = None, quiet: bool = True
) -> promotion.Promotion:
    """Check a sweep's candidate, or a version, and make it champion if it passes every check.

    Args:
        sweep: what `load_sweep` gave, or the name or path of the file.
        version: its number; the candidate where None.
        tracking: URL of the run store; the project's own where None.
        quiet: show no progress.

    Raises:
        AgnewsLoraError: there is none that could be promoted, or anything else that the user can mend.
    """
    experiment = load_sweep(sweep).experiment
    client = open_client(tracking or STORES)
    stage = prepare(experiment)
    registry = Registry(client, experiment.name)
    # Rich would end its bar by an empty line where it is no terminal that shows it.
    bar = Progress(console=Console(stderr=True), transient=True, disable=quiet or not sys.stderr.isatty())
    with temporary_files(), reaching(client), bar:
        task = bar.add_task("checking it in a new process", total=None)

        def watch(batches: Sequence[list[int]]) -> Iterator[list[int]]:
            bar.update(task, description="scoring the test split", total=len(batches))
            for batch in batches:
                yield batch
                bar.advance(task)

        aliases = registry.aliases()
        outcome = promotion.promote(
            registry,
            stage.corpus,
            lambda: prepare_test(
                experiment.data_settings, experiment.seed, stage.base.folder, experiment.settings.max_length, TOKENS
            ),
            version,
            watch,
        )
        refresh(client, outcome.version)
        refresh_changed(client, registry, aliases, {outcome.version.number})
    return outcome


def rollback(experiment: Experiment, tracking: str | None, as_json: bool) -> int:
    """Make the previous champion champion again.

    Raises:
        RegistryError: there is no previous champion.
    """
    client = open_client(tracking or STORES)
    with temporary_files(), reaching(client):
        registry = Registry(client, experiment.name)
        aliases = registry.aliases()
        champion, previous = promotion.rollback(registry)
        refresh_changed(client, registry, aliases, ())
    if as_json:
        print(json.dumps({"model": champion.model, "champion": champion.number, "previous": previous.number}))
        return 0
    Console(highlight=False).print(f"{champion} is champion again; {previous} is previous")
    return 0
