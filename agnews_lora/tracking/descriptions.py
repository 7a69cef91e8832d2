"""What MLflow's UI shows as Markdown of a sweep, its trials, and the registered model and its versions.

The texts are templates. Every value that a template prints is escaped, unless it is `Markdown`: a text from data can
make no markup, mention, emoji, link or picture. The UI reads GitHub's Markdown, shows the first three lines of a
description and hides the rest behind a click.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import isnan
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from agnews_lora.adapters.budget import head_parameters, max_rank, parameters_per_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.tracking.views import address
from agnews_lora.training.interface import SCORES

if TYPE_CHECKING:
    from jinja2 import Environment

    from agnews_lora.tracking.runs import RunPage
    from agnews_lora.tracking.versions import Version

# Figures of a trial's run, with their captions.
TRIAL_FIGURES: Final = {"accuracy_curve.png": "Accuracy and macro-F1", "loss_curve.png": "Loss"}
THUMBNAILS: Final = "thumbnails"  # artifact folder of a run: its figures, small enough to stand side by side

# An underscore inside a word is no markup.
_MARKUP: Final = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_HTML: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_LINKS: Final = {"@": "&#64;", ":": "&#58;", "www.": "www&#46;"}
_NBSP: Final = "\N{NO-BREAK SPACE}"

# Before and behind our part of a description, beside which people write notes. It shows nowhere, the UI's editor and
# tables included, and no value in our part has one: `one_line` replaces it.
MARK: Final = "\N{INVISIBLE SEPARATOR}"

Pages = Callable[[str], "RunPage"]  # the page of a run, by its id


class Markdown(str):
    """A text that is Markdown already, and is printed as it is."""

    __slots__ = ()


def beside_notes(markdown: str, present: str | None, longest: int | None = None) -> str:
    """A description with our part replaced, and the notes of people around it kept.

    Args:
        present: the description so far. Without our part, it is notes.
        longest: characters; what is beyond is cut off our part at the end of a line.
    """
    before, marked, rest = (present or "").partition(MARK)
    after = rest.rpartition(MARK)[2]
    if before and not marked:
        before, after = "", f"\n\n{before}"
    room = None if longest is None else max(longest - len(before) - len(after) - 4, 0)
    if room is not None and len(markdown) > room:
        markdown = markdown[:room].rpartition("\n")[0]
    return f"{before}{MARK}{markdown}\n\n{MARK}{after}"


def opening_description(facts: Any, steps: Sequence[Any], links: Mapping[str, str]) -> str:
    """Describe a sweep that is under way, or stopped.

    Args:
        facts: `SweepFacts`.
        steps: what to do next, a `Step` each.
        links: of the study's pages, as `share_view` gives them.
    """
    return _render("sweep", facts=facts, result=None, steps=steps, links=links, highest=_highest_rank(facts))


def sweep_description(
    result: Any, pages: Pages, figures: Mapping[str, str], steps: Sequence[Any], certainty: Sequence[str] = ()
) -> str:
    """Describe a sweep that has ended.

    Args:
        result: `SweepResult`.
        steps: what to do next, a `Step` each.
        certainty: how sure the choice of the winner is, a sentence each.
        figures: that its parent run has: captions by artifact name.
    """
    return _render(
        "sweep",
        facts=result.facts,
        result=result,
        steps=steps,
        certainty=certainty,
        links=result.links,
        means={row.own.trial: row for row in result.confirmed},
        gallery=gallery(pages(result.run_id), figures),
        highest=_highest_rank(result.facts),
        **_links(result, pages),
    )


def trial_description(spec: TrialSpec, facts: Mapping[str, Any], page: "RunPage | None" = None, end: Any = None) -> str:
    """Describe a trial's run.

    Args:
        facts: `trainable_parameters`, `budget`, `baseline`, `source` (of a configuration that is known to be good) and
            `confirms` (the trial that is repeated), where known.
        page: the run's, for its curves.
        end: how it ended, with `state`, `reason` and the engine's `result`; None while it trains.
    """
    figures = gallery(page, TRIAL_FIGURES) if page and end and end.result else None
    return _render("trial", spec=spec, facts=facts, end=end, gallery=figures)


def winner_description(result: Any, pages: Pages, figures: Mapping[str, str], row: Any = None) -> str:
    """Describe the winner's run.

    Args:
        figures: of its answers: captions by artifact name.
        row: `TrialSummary` of another trial, which was the winner of an earlier end.
    """
    row = row or result.winner
    page = pages(row.run_id)
    return _render(
        "winner",
        result=result,
        facts=result.facts,
        row=row,
        gallery=gallery(page, {**TRIAL_FIGURES, **figures}),
        mistakes=page.artifact_url("mistakes.json"),
        **_links(result, pages),
    )


def model_description(name: str, facts: Any) -> str:
    """Describe a registered model. facts: `SweepFacts` of the sweep that found its last version."""
    return _render("model", model=name, facts=facts)


def version_description(registered: "Version", run: "RunPage", parent: "RunPage | None") -> str:
    """Describe a registered version by its tags. run: its trial's page. parent: the sweep's, where it is known."""
    tags = registered.tags
    return _render(
        "version",
        tags=tags,
        data="; ".join(f"{key} {value}" for key, value in json.loads(tags.get("data", "{}")).items()),
        run=run.url,
        report=run.artifact_url(f"promotion/v{registered.number}/report.md"),
        parent=parent.url if parent else None,
    )


# Escaping and parts --------------------------------------------------------------------------------------------------


def one_line(value: object) -> str:
    """White space folded, and characters that would steer a terminal or a reader's eye replaced."""
    folded = " ".join(str(value).split())
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in folded)


def text(value: object) -> Markdown:
    """A value as plain text on one line, also inside a table's cell or a heading."""
    line = _MARKUP.sub(r"\\\g<0>", one_line(value))
    return Markdown("".join(_HTML.get(character, character) for character in line))


def code(value: object) -> Markdown:
    """A value as a code span; not for a table, whose cells end at a `|` even there."""
    line = one_line(value)
    fence = "`" * (max((len(run) for run in re.findall("`+", line)), default=0) + 1)
    room = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{fence}{room}{line}{room}{fence}")


def plain(value: object) -> Markdown:
    """A value as plain text where a mention, an emoji or a bare link would be read as one; Markdown as it is."""
    if isinstance(value, Markdown):
        return value
    shown = str(text(value))
    for read, written in _LINKS.items():
        shown = shown.replace(read, written)
    return Markdown(shown)


def link(label: object, url: str | None) -> Markdown:
    """A link with a plain label; the label alone without a URL. url: one that this program has made."""
    return Markdown(f"[{plain(label)}]({url})") if url else plain(label)


def percent(share: float | None) -> Markdown:
    """`89.30 %`, held together, or a dash where it is unknown."""
    return Markdown("–" if share is None or isnan(share) else f"{100 * share:.2f}{_NBSP}%")


def number(value: float | None, form: str = ",") -> Markdown:
    """A number, or a dash where it is unknown."""
    return Markdown("–" if value is None else format(value, form))


def interval(ends: tuple[float, float] | None) -> Markdown:
    """`87.88 % to 91.61 %`, or a dash where it is unknown."""
    return Markdown(f"{percent(ends[0])} to {percent(ends[1])}" if ends else "–")


def arithmetic(spec: TrialSpec, shape: ModelShape, budget: int) -> Markdown:
    """How a configuration's count of trainable parameters comes about, and its share of the budget."""
    head, step = head_parameters(spec.head, shape), parameters_per_rank(spec.targets, shape)
    total = head + spec.rank * step
    return Markdown(
        f"{head:,} head + {spec.rank} · {step:,} adapter (rank · {plain(spec.targets)}) = {total:,} of {budget:,} "
        f"trainable parameters ({percent(total / budget)})"
    )


def gallery(page: "RunPage", figures: Mapping[str, str]) -> Markdown:
    """Thumbnails of a run's figures, two a row, each a link to the figure. figures: captions by artifact name."""
    shown = [
        f"[![{caption}]({page.image_url(f'{THUMBNAILS}/{name}')})]({page.artifact_url(name)})"
        for name, caption in figures.items()
    ]
    captions, rows = list(figures.values()), []
    for start in range(0, len(shown), 2):
        rows += [captions[start : start + 2], shown[start : start + 2]]
    # The UI sets cells without any room between them: a space makes it.
    lines = ["".join(f"| {cell}&emsp; " for cell in row) + "|" for row in rows]
    lines.insert(1, "| --- " * len(captions[:2]) + "|")
    return Markdown("\n".join(lines) if rows else "")


def _links(result: Any, pages: Pages) -> dict[str, Any]:
    """Where a template's links lead."""
    parent, registered = pages(result.run_id), result.registration
    return {
        "url": lambda row: pages(row.run_id).url if row.run_id else None,
        "parent": parent.url,
        "leaderboard": parent.artifact_url("leaderboard.json"),
        "version": registered
        and link(
            f"version {registered.version} of {registered.model}",
            address(f"models/{quote(registered.model, safe='')}/versions/{registered.version}"),
        ),
    }


def _highest_rank(facts: Any) -> Callable[[str], int]:
    """Of a preset: the largest rank that fits the budget with some head that is searched."""
    return lambda preset: max(max_rank(preset, head, facts.shape, facts.budget) for head in facts.heads)


@cache
def _templates() -> "Environment":
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader(__package__),
        finalize=plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # `finalize` escapes, for Markdown
    )
    for helper in (code, link, percent, number, interval, arithmetic):
        templates.globals[helper.__name__] = helper
    templates.globals["scores"] = SCORES
    return templates


def _render(template: str, **values: Any) -> str:
    return _templates().get_template(f"{template}.md.j2").render(values).strip()
