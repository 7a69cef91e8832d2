"""The report of a sweep: one HTML page and one PDF, from its result and its figures.

Both show the same content: plain strings, numbers in words, tables and figures, which the two templates beside this
module set. Strings from data are never read as markup: jinja2 escapes them, and Typst gets them as JSON.
"""

import base64
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from agnews_lora.adapters.budget import head_parameters, parameters_per_rank
from agnews_lora.data.profile import TOTAL, profile_sentence, profile_table
from agnews_lora.errors import StorageError
from agnews_lora.paths import write_whole
from agnews_lora.reporting.figures import MAX_MATRIX, confidence_in_words, expected_calibration_error, short
from agnews_lora.reporting.progress import duration
from agnews_lora.reporting.summary import certainty, counted, next_steps
from agnews_lora.search.racing import SURE
from agnews_lora.search.results import SweepFacts, SweepResult
from agnews_lora.serving.stats import Pairs, difference_interval, mcnemar_p_value
from agnews_lora.training.interface import SCORES

TEMPLATES: Final = Path(__file__).parent
TOP: Final = 10  # trials of the leaderboard
MAX_FAILURES: Final = 10
MAX_CLASSES: Final = 20
MAX_MISTAKES: Final = 10
MAX_NAME: Final = 60  # characters of a label, where it has a line of its own
MAX_TEXT: Final = 220  # characters of a row or an error that are shown
FEW_TRIALS: Final = 10
OTHER_SCRIPTS: Final = re.compile("[\u0900-\u1cff\u2e80-\ufefe\U00010000-\U0010ffff]")  # of Asia, and emoji
SIGNIFICANT: Final = 0.05
PROVENANCE: Final = {"mlflow.source.git.commit": "commit", "git.dirty": "uncommitted changes"}
SIZE: Final = "score_against_parameters.png"
CONFUSION: Final = "confusion_matrix.png"
PAIRS: Final = "confused pairs"  # what that picture shows with many classes

Block = dict[str, Any]


def write_report(result: SweepResult, pictures: Mapping[str, Path], to: Path) -> tuple[Path, Path]:
    """Write `<study>.html` and `<study>.pdf`. The same input gives the same bytes.

    Args:
        result: the sweep's.
        pictures: figures of the result by name, as `reporting.figures.draw` gives them; may be empty.
        to: a folder; created.

    Returns:
        The HTML file and the PDF.

    Raises:
        StorageError: the folder cannot be written.
    """
    content = compose(result, set(pictures))
    written = {
        to / f"{result.study}.html": _html(content, pictures).encode("utf-8"),
        to / f"{result.study}.pdf": _pdf(content, pictures, result.ended_at),
    }
    for path, data in written.items():
        try:
            write_whole(path, data)
        except OSError as error:
            raise StorageError(
                f"Cannot write the report to {path}: {error.strerror}. Free or unlock its folder, or name another "
                "one with --to."
            ) from error
    page, paper = written
    return page, paper


def compose(result: SweepResult, pictures: set[str]) -> dict[str, Any]:
    """Everything that both forms show, JSON-ready: `title`, `subtitle`, `date`, `first` (page) and `sections`.

    pictures: names of the figures that there are.
    """
    facts = result.facts
    ended = datetime.fromtimestamp(result.ended_at, UTC) if result.ended_at is not None else None
    sections = [
        ("Data", _data(facts)),
        ("Leaderboard", _leaderboard(result)),
        ("Confirmation over seeds", _confirmation(result)),
        ("Promotion checks", _checks(result)),
        ("The search in figures", [_figure(name) for name in SEARCH_FIGURES if name in pictures]),
        ("Mistakes", _mistakes(result, pictures)),
        ("Configuration", _configuration(result)),
        ("Provenance", _provenance(result)),
    ]
    return {
        "title": f"{result.study}: LoRA within {facts.budget:,} trainable parameters",
        "subtitle": f"Sweep {facts.sweep} over experiment {facts.experiment}, on {facts.base}",
        "date": f"{ended:%-d %B %Y}" if ended else "",
        "day": [ended.year, ended.month, ended.day] if ended else None,
        "first": _first_page(result, pictures),
        "sections": [{"title": title, "blocks": blocks} for title, blocks in sections if blocks],
    }


# The first page: everything for a decision --------------------------------------------------------------------------


def _first_page(result: SweepResult, pictures: set[str]) -> list[Block]:
    blocks = [_text(" ".join([_verdict(result), *certainty(result)]), kind="verdict"), _decision(result)]
    if SIZE in pictures:
        blocks.append(_figure(SIZE))
    risks = _risks(result)
    blocks.append({"kind": "list", "title": "Risks", "items": risks or ["None is known."]})
    steps = [
        {"text": f"{step.purpose[0].upper()}{step.purpose[1:]}:", "command": step.command}
        for step in next_steps(result)
    ]
    return [*blocks, {"kind": "next", "title": "Next", "steps": steps}]


def _verdict(result: SweepResult) -> str:
    winner, test = result.winner, result.registration and result.registration.test
    if winner is None:
        ended = sum(result.counts.values())
        return f"No winner: {counted(ended, 'trial')} ended, and none of them completed its training."
    if test:
        accuracy, macro_f1, split = test["accuracy"], test["macro_f1"], f"{test['rows']:,} test rows"
    else:
        rows = f"{result.facts.num_validation_rows:,} validation rows"
        accuracy, macro_f1, split = winner.accuracy, winner.macro_f1, rows
    return (
        f"Trial {winner.trial} is the winner by {SCORES[result.objective]}: its adapter ({winner.spec}) labels "
        f"{_percent(accuracy)} of the {split} correctly, with a macro-F1 of {_percent(macro_f1)}."
    )


def _decision(result: SweepResult) -> Block:
    """The numbers of the first page: what, value, and what qualifies it."""
    facts, winner, baseline = result.facts, result.winner, result.baseline
    word, rows = SCORES[result.objective], list[tuple[str, str, str]]()

    def add(
        name: str,
        accuracy: float | None,
        macro_f1: float | None,
        *notes: str,
        interval: tuple[float, float] | None = None,
        num_rows: int = facts.num_validation_rows,
    ) -> None:
        """A row with the objective's score. interval: the accuracy's."""
        within = f"95% interval {_range(*interval)}" if interval else ""
        on_rows = f"{num_rows:,} rows"
        if result.objective == "accuracy":
            notes = (on_rows, within, *notes, f"macro-F1 {_percent(macro_f1)}")
            rows.append((name, _percent(accuracy), "; ".join(filter(None, notes))))
        else:
            beside = f"accuracy {_percent(accuracy)}{within and f' ({within})'}"
            rows.append((name, _percent(macro_f1), "; ".join((on_rows, beside, *notes))))

    if result.registration and (test := result.registration.test):
        scores, ends = (test["accuracy"], test["macro_f1"]), (test["low"], test["high"])
        add(f"Test {word}", *scores, "scored once, after the choice", interval=ends, num_rows=test["rows"])
    if winner is not None:
        add(f"Validation {word}", winner.accuracy, winner.macro_f1, interval=result.interval(winner))
    if mean := result.confirmation:
        interval = mean.interval(facts.num_validation_rows)
        seeds = f"the winner's configuration, {counted(len(mean.runs), 'run')}"
        add("Mean over seeds", mean.mean("accuracy"), mean.mean("macro_f1"), seeds, interval=interval)
    if baseline is not None:
        notes = ["the experiment's own configuration"]
        if result.gain is not None and winner != baseline:
            notes.append(f"the winner gains {_gain(result)}")
        add("Baseline", baseline.accuracy, baseline.macro_f1, *notes)
    for peer in result.peers:
        add(peer.name[0].upper() + peer.name[1:], peer.scores["accuracy"], peer.scores["macro_f1"], peer.note)
    if facts.bound is not None:
        note = "the accuracy of the best possible classifier: some rows fit two labels"
        rows.append(("Best possible", _percent(facts.bound), note))
    if winner is not None and winner.spec is not None and winner.trainable_parameters:
        spec, shape = winner.spec, facts.shape
        head, step = head_parameters(spec.head, shape), parameters_per_rank(spec.targets, shape)
        share = winner.trainable_parameters / facts.budget
        note = f"{share:.1%} of {facts.budget:,}: head {head:,} + rank {spec.rank} × {step:,}"
        rows.append(("Trainable parameters", f"{winner.trainable_parameters:,}", note))
    rows.append(("Trials", str(len(result.trials)), _ends(result)))
    rows.append(_cost(result))
    return {"kind": "facts", "rows": [{"name": name, "value": value, "note": note} for name, value, note in rows]}


def _gain(result: SweepResult) -> str:
    """The winner's score less the baseline's; of accuracies with its interval, from the answers of both adapters."""
    gain, pairs = f"{_points(result.gain, signed=True)} of {SCORES[result.objective]}", _pairs(result)
    if pairs is None or result.objective != "accuracy":
        return gain
    low, high = map(_signed, difference_interval(pairs))
    return f"{gain} (95% interval {low} to {high}; McNemar {_p_value(mcnemar_p_value(pairs, 'two-sided'))})"


def _ends(result: SweepResult) -> str:
    words = [f"{count} {word}" for word, count in result.counts.items() if count]
    left = len(result.trials) - sum(result.counts.values())
    words += [f"{left} not ended"] if left else []
    planned = result.facts.planned_trials
    return ", ".join(words) + (f"; {planned} planned" if planned != len(result.trials) else "")


def _cost(result: SweepResult) -> tuple[str, str, str]:
    """The time that the sweep took, as on the screen, and of all its runs together."""
    repeats = [row for each in result.confirmed for row in each.repeats]
    ran = [*result.trials, *repeats]
    train, evaluate = (sum(getattr(row, name) or 0.0 for row in ran) for name in ("train_seconds", "eval_seconds"))
    memory = max((row.peak_memory_bytes or 0 for row in ran), default=0)
    notes = [f"summed over {counted(len(ran), 'run')}: training {duration(train)}, evaluation {duration(evaluate)}"]
    if memory:
        notes.append(f"peak memory {memory / 2**30:.1f} GiB")
    if result.wall_seconds is None:
        return "Run time", duration(train + evaluate), "; ".join(notes)
    notes.insert(0, "of training and evaluation, over all starts")
    return "Wall time", duration(result.wall_seconds), "; ".join(notes)


def _risks(result: SweepResult) -> list[str]:
    """Reasons to doubt the result, or to wait with it."""
    winner, baseline, counts = result.winner, result.baseline, result.counts
    registration, mean, found = result.registration, result.confirmation, []
    if 0 < counts["complete"] < FEW_TRIALS:
        completed = counted(counts["complete"], "trial")
        found.append(f"Few trials: only {completed} completed, so most of the space is unexplored.")
    if winner is not None and winner == baseline:
        found.append("No trial beats the baseline: the winner is the experiment's own configuration.")
    elif noise := _noise(result):
        found.append(noise)
    score = None if winner is None else winner.score(result.objective)
    found += [
        f"No better than {peer.name} ({peer.note})."
        for peer in result.peers
        if score is not None and score <= (peer.scores[result.objective] or 0.0)
    ]
    if winner is not None and mean is None:
        found.append("Not confirmed over other seeds: the best of several trials on the same rows is partly luck.")
    elif mean is not None and mean.num_failed:
        found.append(f"{counted(mean.num_failed, 'repetition')} of the winner failed; the mean is over the others.")
    if registration and any(not check["passed"] for check in registration.checks):
        found.append("The version failed a promotion check.")
    elif winner is not None and not (registration and registration.test):
        found.append("Not promoted: the test split has not been scored, and the validation accuracy is optimistic.")
    if counts["failed"]:
        found.append(f"{counted(counts['failed'], 'trial')} failed.")
    found.extend(result.facts.profile.get("warnings", ()))
    if result.facts.provenance.get("git.dirty") == "true":
        found.append("The code had uncommitted changes: its commit does not say all of it.")
    return found


def _noise(result: SweepResult) -> str | None:
    """A warning where the gain over the baseline may be chance."""
    winner, baseline, selection, within = result.winner, result.baseline, result.selection, None
    if winner is None or baseline is None or baseline.accuracy is None or winner.accuracy is None:
        return None
    if selection and (probability := selection.probability_better_than_baseline) is not None:
        within = "the probability of being better is below 95%" if probability < SURE else None
    elif result.objective != "accuracy":  # neither test says anything of macro-F1
        return None
    elif pairs := _pairs(result):
        p = mcnemar_p_value(pairs, "two-sided")
        within = f"McNemar {_p_value(p)}" if p >= SIGNIFICANT or pairs.difference <= 0 else None
    else:
        low, _ = result.interval(winner) or (0.0, 1.0)
        within = "the baseline lies within the winner's 95% interval" if baseline.accuracy >= low else None
    return f"The gain over the baseline may be chance ({within})." if within else None


def _pairs(result: SweepResult) -> Pairs | None:
    counts = result.answers and result.answers.against_baseline
    if not counts or result.winner == result.baseline or not sum(counts.values()):
        return None
    return Pairs(counts["both"], counts["only_winner"], counts["only_baseline"], counts["neither"])


# The sections ---------------------------------------------------------------------------------------------------------


def _data(facts: SweepFacts) -> list[Block]:
    if not facts.profile:
        return []
    names = list(facts.profile["rows"])
    rows = [[short(name, MAX_NAME), *numbers] for name, *numbers in profile_table(facts.profile, MAX_CLASSES)]
    total = next(at for at, row in enumerate(rows) if row[0] == TOTAL)
    right = tuple(range(1, len(names) + 1))
    return [_table(profile_sentence(facts.profile), ["", *names], rows, right=right, strong=(total,))]


def _leaderboard(result: SweepResult) -> list[Block]:
    ranked = [row for row in result.ranking if row.state == "COMPLETE"]
    means = {each.own.trial: each for each in result.confirmed}
    columns = ["", "trial", "targets", "r", "alpha", "dropout", "learning rate", "trainable", "accuracy", "macro-F1"]
    columns += [f"mean {SCORES[result.objective]}"] if means else []
    rows = []
    for place, row in enumerate(ranked, start=1):
        if place > TOP and row != result.baseline:
            continue
        last = [_percent(means[row.trial].mean(result.objective)) if row.trial in means else "–"] if means else []
        name = f"{row.trial} (baseline)" if row.baseline else row.trial
        spec, size = row.spec, f"{row.trainable_parameters or 0:,}"
        assert spec is not None, "a trial that was completed has its configuration"
        own = [spec.targets, str(spec.rank), f"{spec.alpha:g}", f"{spec.dropout:.3g}", f"{spec.learning_rate:.3g}"]
        rows.append([str(place), name, *own, size, _percent(row.accuracy), _percent(row.macro_f1), *last])
    blocks: list[Block] = []
    if rows:
        shown = f"The best {TOP} of {len(ranked)} completed trials" if len(ranked) > TOP else "All completed trials"
        word = SCORES[result.objective]
        order = f"{'by the race over seeds, then ' if means else ''}by {word}; ties go to the lower loss"
        order += f". Scores are of {result.facts.num_validation_rows:,} validation rows"
        blocks.append(_table(f"{shown}, {order}.", columns, rows, right=(0, *range(3, len(columns))), strong=(0,)))
    failed = [row for row in result.trials if row.state == "FAIL"]
    if failed:
        more = f" {len(failed) - MAX_FAILURES} more are not shown." if len(failed) > MAX_FAILURES else ""
        errors = [[row.trial, _one_line(row.reason or "unknown")] for row in failed[:MAX_FAILURES]]
        caption = f"Trials that failed, with the start of their error.{more}"
        blocks.append(_table(caption, ["trial", "error"], errors, wide=(1,)))
    return blocks


def _confirmation(result: SweepResult) -> list[Block]:
    if not result.confirmed:
        return []
    objective, num_rows, rows = result.objective, result.facts.num_validation_rows, []
    for each in result.confirmed:
        own, *others = each.scores(objective)
        drop = each.drop(objective)
        rows.append(
            [
                each.own.trial,
                _percent(own),
                ", ".join(map(_percent, others)) or "–",
                str(each.num_failed),
                _percent(each.mean("accuracy")),
                _range(*(each.interval(num_rows) or (0.0, 1.0))),
                _percent(each.mean("macro_f1")),
                _points(None if drop is None else -drop, signed=True),
            ]
        )
    columns = ["trial", "search", "other seeds", "failed", "mean accuracy", "95% interval", "mean macro-F1", "change"]
    caption = (
        "The best trials of the search, raced over other seeds, of which the better half trains once more; the winner "
        f"comes first. Search, other seeds, change from the search to the mean: of {SCORES[objective]}, on "
        f"{num_rows:,} validation rows. The interval of the mean accuracy counts these rows and the spread over seeds."
    )
    return [_table(caption, columns, rows, right=(1, 3, 4, 5, 6, 7), wide=(2,), strong=(0,))]


def _checks(result: SweepResult) -> list[Block]:
    registration = result.registration
    if registration is None:
        return []
    known = f"version {registration.version} of model {registration.model}"
    aliases = f" ({', '.join(registration.aliases)})" if registration.aliases else ""
    if not registration.checks:
        return [_text(f"The winner is {known}{aliases} in the registry. Its promotion checks have not been run.")]
    rows = [
        [_one_line(check["rule"]), _one_line(check["found"]), "passed" if check["passed"] else "FAILED"]
        for check in registration.checks
    ]
    blocks = [_table(f"Checks of {known}{aliases}.", ["rule", "found", "result"], rows, wide=(0, 1))]
    if test := registration.test:
        blocks.append(
            _text(
                f"After they had passed, the test split was scored, once for this version: accuracy "
                f"{_percent(test['accuracy'])} (95% interval {_range(test['low'], test['high'])}), macro-F1 "
                f"{_percent(test['macro_f1'])}, on {test['rows']:,} rows."
            )
        )
    return blocks


def _mistakes(result: SweepResult, pictures: set[str]) -> list[Block]:
    answers = result.answers
    if answers is None:
        return []
    total = sum(rows for _, _, rows in answers.confusion)
    wrong = sum(rows for label, predicted, rows in answers.confusion if label != predicted)
    error = expected_calibration_error(answers.calibration)
    blocks = [
        _text(
            f"The exported adapter, loaded in a new process in fp32, is wrong on {wrong:,} of {total:,} validation "
            f"rows. It is {confidence_in_words(answers.calibration)}, with an expected calibration error of "
            f"{error:.1%} over ten bins."
        )
    ]
    if CONFUSION in pictures:
        many = len(result.facts.labels) > MAX_MATRIX
        blocks.append(_figure(PAIRS if many else CONFUSION) | {"name": CONFUSION})
    rows = [
        [
            str(each["row"]),
            short(each["label"]),
            short(each["predicted"]),
            f"{each['confidence']:.1%}",
            _one_line(each["text"]),
        ]
        for each in answers.mistakes[:MAX_MISTAKES]
    ]
    if rows:
        caption = "The mistakes with the highest confidence. Row: in the validation split, from 0."
        columns = ["row", "label", "predicted", "confidence", "text"]
        blocks.append(_table(caption, columns, rows, right=(0, 3), wide=(4,)))
    return blocks


def _configuration(result: SweepResult) -> list[Block]:
    facts = result.facts
    space = []
    for name, values in facts.space.items():
        between = " to " if name.startswith(("rank", "dropout", "learning_rate")) else ", "  # a range, or choices
        space.append([name.replace("_", " "), between.join(map(_plain, values))])
    settings = [[name.replace("_", " "), _plain(value)] for name, value in facts.settings.items()]
    caption = f"The search space. A rank goes up to the largest that fits {facts.budget:,} parameters."
    return [
        _table(caption, ["parameter", "values"], space, wide=(1,)),
        _table("Settings that all trials share.", ["setting", "value"], settings, wide=(1,)),
        *({"kind": "listing", "title": name, "text": text.rstrip("\n")} for name, text in facts.texts.items()),
    ]


def _provenance(result: SweepResult) -> list[Block]:
    facts = result.facts
    rows = [
        ["base model", f"{facts.base}, revision {facts.base_revision}"],
        ["data", ", ".join(f"{name} {value}" for name, value in facts.data.items())],
        ["rows", f"{facts.num_train_rows:,} for training, {facts.num_validation_rows:,} for validation"],
        ["digest of the rows", facts.data_digest],
        ["labels", _listed(facts.labels)],
        ["engine", f"{facts.engine}, {facts.total_steps:,} steps a trial"],
        ["seed", str(facts.seed)],
        ["study", f"{result.study}, id {result.study_id}"],
        ["parent run", result.run_id or "–"],
        *(
            [PROVENANCE.get(name, name.removeprefix("version.").replace("_", "-")), _plain(value)]
            for name, value in facts.provenance.items()
        ),
    ]
    return [_table("Where the result comes from.", ["fact", "value"], rows, wide=(1,))]


# name: (caption, what a reader who cannot see it must know, share of the page's width)
CAPTIONS: Final[dict[str, tuple[str, str, float]]] = {
    SIZE: (
        "Score against size: each mark is a trial, coloured by the matrices that it adapts, hollow where it was "
        "pruned; pruned trials below the axis are drawn on its edge. The grey line is the best score for a size.",
        "Validation score of each trial by its number of trainable parameters, with the budget as a line.",
        0.74,
    ),
    "optimization_history.png": (
        "Optimisation history: the score of every trial in the order of their start. Pruned ones are shown at their "
        "last evaluation; the star is the baseline.",
        "Validation score of each trial by number, with the best so far as a stepped line.",
        0.62,
    ),
    "learning_curves.png": (
        "Learning curves, on a fixed subset of the validation split. Diamonds: the score on the whole split at the "
        "last step, by which trials are ranked.",
        "Validation score of all trials by training step.",
        0.62,
    ),
    "parallel_coordinates.png": (
        "Configurations: one line for each trial through its parameters. The better half of the completed trials is "
        "darker, the best darkest.",
        "Parallel coordinates of all trials through the searched parameters and their score.",
        0.62,
    ),
    "parameter_importance.png": (
        "Importance: the share of the score's variance among completed trials that each parameter explains "
        "(functional ANOVA). With few trials, it is a hint.",
        "Bars of the importance of each searched parameter.",
        0.62,
    ),
    PAIRS: (
        "What the winner confuses most among the validation rows: label, wrong answer, and how many rows of the "
        "label got it.",
        "Bars of the pairs of a label and a wrong answer with the most rows.",
        0.66,
    ),
    CONFUSION: (
        "Confusion matrix of the winner on the validation rows: rows of each label by answer, the darker the larger "
        "their share of the label's rows.",
        "A matrix of counts, labels against predictions.",
        0.66,
    ),
}
SEARCH_FIGURES: Final = [name for name in CAPTIONS if name not in (SIZE, CONFUSION, PAIRS)]


def _figure(name: str) -> Block:
    caption, alt, width = CAPTIONS[name]
    return {"kind": "figure", "name": name, "caption": caption, "alt": alt, "width": width}


def _text(text: str, kind: str = "text") -> Block:
    return {"kind": kind, "text": text}


def _table(
    caption: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    wide: Sequence[int] = (),
    strong: Sequence[int] = (),
) -> Block:
    """right: columns of numbers. wide: columns that take the rest of the width and wrap. strong: rows in bold."""
    heads = [{"title": title, "right": at in right, "wide": at in wide} for at, title in enumerate(columns)]
    lines = [{"cells": list(row), "strong": at in strong} for at, row in enumerate(rows)]
    return {"kind": "table", "caption": caption, "columns": heads, "rows": lines}


# Numbers in words -----------------------------------------------------------------------------------------------------


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _range(low: float, high: float) -> str:
    return f"{_percent(low)} to {_percent(high)}"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")


def _points(share: float | None, *, signed: bool = False) -> str:
    """A difference of two shares, in percentage points."""
    if share is None:
        return "–"
    return f"{_signed(share) if signed else f'{100 * share:.2f}'} points"


def _p_value(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(short, names[:MAX_CLASSES]))
    return shown if len(names) <= MAX_CLASSES else f"{len(names):,}: {shown}, …"


def _plain(value: Any) -> str:
    if value in ("true", "false"):
        return "yes" if value == "true" else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _one_line(text: object) -> str:
    line = " ".join(str(text).split())
    return line if len(line) <= MAX_TEXT else f"{line[: MAX_TEXT - 1]}…"


# The two forms --------------------------------------------------------------------------------------------------------


def _html(content: Mapping[str, Any], pictures: Mapping[str, Path]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    images = {
        name: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
        for name, path in pictures.items()
    }
    settings: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, **settings)
    return environment.get_template("report.html").render(content, images=images) + "\n"


def _pdf(content: Mapping[str, Any], pictures: Mapping[str, Path], ended_at: float | None) -> bytes:
    """Set by the fonts that the compiler carries, so that pages are alike everywhere, where those have the script."""
    import typst

    written = json.dumps(content, ensure_ascii=False)

    with TemporaryDirectory() as folder:
        for path in (TEMPLATES / "report.typ", *pictures.values()):
            shutil.copy(path, folder)
        Path(folder, "report.json").write_text(written, encoding="utf-8")
        alike = OTHER_SCRIPTS.search(written) is None
        compiler = typst.Compiler(input=Path(folder, "report.typ"), root=folder, ignore_system_fonts=alike)
        pages = compiler.compile(format="pdf", timestamp=int(ended_at or 0))
    assert isinstance(pages, bytes)
    return pages
