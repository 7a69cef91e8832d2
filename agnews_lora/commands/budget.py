"""`agnews-lora budget`: what fits. Counts from shapes alone, without weights, network or torch."""

import json

from rich.console import Console
from rich.table import Table

from agnews_lora.adapters.base_models import shape_of
from agnews_lora.adapters.budget import head_parameters, max_rank, parameters_per_rank
from agnews_lora.adapters.spec import ModelShape
from agnews_lora.config.sweep import Sweep, load_sweep


def run(name: str, as_json: bool) -> int:
    """Print the largest rank of every preset and head that a sweep searches.

    Raises:
        ConfigError: no such sweep, or one with faults.
    """
    sweep = load_sweep(name)
    shape = shape_of(sweep.experiment.base)
    rows = table(sweep, shape)
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    console = Console(highlight=False, markup=False)
    console.print(f"{sweep.name}: {sweep.experiment.base}, budget {sweep.budget:,} trainable parameters, of which")
    for head in sweep.space.heads:
        console.print(f"  head {head} takes {head_parameters(head, shape):,}; the rest is the adapter's")
    view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("preset", "head", "a rank step", "largest rank", "trainable there", "of the budget"):
        view.add_column(heading, justify="left" if heading in ("preset", "head") else "right", no_wrap=True)
    for row in rows:
        count, fits = row["trainable_parameters"], row["max_rank"]
        view.add_row(
            str(row["preset"]),
            str(row["head"]),
            f"{row['parameters_per_rank']:,}",
            str(fits) if fits else "does not fit",
            f"{count:,}" if fits else "",
            f"{int(count) / sweep.budget:.1%}" if fits else "",
        )
    console.print(view)
    return 0


def table(sweep: Sweep, shape: ModelShape) -> list[dict[str, int | str]]:
    """A row for each preset and head of the sweep's space. trainable_parameters: at the largest rank."""
    rows: list[dict[str, int | str]] = []
    for preset in sweep.space.targets:
        for head in sweep.space.heads:
            fits, step = max_rank(preset, head, shape, sweep.budget), parameters_per_rank(preset, shape)
            rows.append(
                {
                    "preset": preset,
                    "head": head,
                    "parameters_per_rank": step,
                    "max_rank": fits,
                    "trainable_parameters": head_parameters(head, shape) + fits * step,
                }
            )
    return rows
