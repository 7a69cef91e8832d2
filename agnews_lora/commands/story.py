"""What the parent run says of its sweep in MLflow's UI: what is searched, and at the end what was found.

The UI shows the first three lines and hides the rest behind a click: they hold the result.
"""

from dataclasses import dataclass

from agnews_lora.adapters.budget import feasible_ranks, head_parameters, parameters_per_rank
from agnews_lora.adapters.spec import ModelShape, TrialSpec
from agnews_lora.commands.board import FIGURES
from agnews_lora.commands.markdown import comparison_url, gallery, link, percent, plain, table, version_url
from agnews_lora.commands.predictions import ANSWERS
from agnews_lora.commands.stage import Stage
from agnews_lora.config.sweep import Sweep
from agnews_lora.search.confirmation import Confirmed
from agnews_lora.search.standings import Standing, baseline_of, best_first, count_ended
from agnews_lora.serving.markdown import code
from agnews_lora.tracking.registry import Version
from agnews_lora.tracking.runs import RunPage, SweepRuns

NUM_TOP = 5
MAX_COMPARED = 60  # run ids that the link to the comparison can name


def opening(sweep: Sweep, stage: Stage) -> str:
    """While the sweep is under way, or stopped."""
    return "\n\n".join(
        [
            f"**Under way, or stopped on it:** the tag `state` says which.\n"
            f"{code(f'agnews-lora sweep {sweep.name}')} goes on with it where it ended.",
            _searched(sweep, stage),
        ]
    )


@dataclass(frozen=True)
class Story:
    """A finished sweep. rounds: the confirmed trials, the chosen one first; none without a confirmation.

    version: what was registered; None without a winner.
    """

    sweep: Sweep
    stage: Stage
    runs: SweepRuns
    rows: list[Standing]
    winner: Standing | None
    rounds: list[Confirmed]
    version: Version | None

    def told(self) -> str:
        """The whole description."""
        page = self.runs.page()
        if self.winner is None:
            parts = [f"**No winner:** no trial was completed. {self._counts()}", _searched(self.sweep, self.stage)]
            return "\n\n".join(parts)
        shown = FIGURES | ANSWERS
        parts = [
            "\n".join([self._headline(self.winner), self._kept(self.winner), self._next()]),
            f"### Result\n\n{self._results(self.winner)}",
            f"### Best trials\n\n{self._top()}\n\n{self._counts()} {self._links(page)}",
            f"### Figures\n\n{gallery(page, shown)}",
            _searched(self.sweep, self.stage),
            f"### What to do next\n\n{self._commands()}",
        ]
        return "\n\n".join(parts)

    def _headline(self, winner: Standing) -> str:
        mean = next((row for row in self.rounds if row.own.trial == winner.trial), None)
        accuracy = f"{_mean(mean)} over {len(mean.runs)} seeds" if mean else percent(winner.accuracy)
        assert winner.spec is not None and winner.run_id is not None, "a trial that was completed has both"
        name = f"{winner.trial}-{winner.spec.targets}-r{winner.spec.rank}"
        found = f"**{accuracy} by {link(name, self.runs.page(winner.run_id).url)}**"
        baseline, bound = baseline_of(self.rows), self.stage.corpus.best_accuracy
        against = [f"seed baseline {percent(baseline.accuracy)}"] if baseline else []
        against += [f"best possible {percent(bound)}"] if bound is not None else []
        return found + (f" ({', '.join(against)})" if against else "")

    def _kept(self, winner: Standing) -> str:
        assert winner.spec is not None
        return f"**Budget:** {arithmetic(winner.spec, self.stage.base.shape, self.sweep.budget)}"

    def _next(self) -> str:
        command, version = code(f"agnews-lora promote {self.sweep.name}"), self.version
        if version is None:
            return f"**Next:** {command}"
        return f"**Next:** {command} puts {link(version, version_url(version))} through the gate"

    def _results(self, winner: Standing) -> str:
        baseline, bound = baseline_of(self.rows), self.stage.corpus.best_accuracy
        rows = [("winner", winner), *([("seed baseline", baseline)] if baseline else [])]
        lines = [
            [name, self._link(row), percent(row.accuracy), percent(row.macro_f1), _loss(row), _count(row)]
            for name, row in rows
        ]
        if baseline is not None and winner.accuracy is not None and baseline.accuracy is not None:
            gain = 100 * (winner.accuracy - baseline.accuracy)
            lines.append(["gain", "", f"{gain:+.2f} points", "", "", ""])
        if bound is not None:
            lines.append(["best possible", "by construction of the data", percent(bound), "", "", ""])
        header = ["", "trial", "accuracy", "macro-F1", "loss", "trainable parameters"]
        return f"On {len(self.stage.corpus.validation):,} validation rows.\n\n{table(header, lines)}"

    def _top(self) -> str:
        means = {row.own.trial: row for row in self.rounds}
        header = ["place", "trial", "configuration", "accuracy", "loss", "parameters"]
        best = [row.own for row in self.rounds]
        best += [row for row in best_first(self.rows) if row.trial not in means]
        lines = [
            [str(place), self._link(row), plain(row.spec), percent(row.accuracy), _loss(row), _count(row)]
            for place, row in enumerate(best[:NUM_TOP], 1)
        ]
        if means:
            header.insert(4, "mean over seeds")
            for line, row in zip(lines, best, strict=False):
                line.insert(4, _mean(means.get(row.trial)))
        return table(header, lines)

    def _counts(self) -> str:
        counts = [f"{count} {word}" for word, count in count_ended(self.rows).items()]
        return f"Trials: {', '.join(counts)}."

    def _links(self, page: RunPage) -> str:
        run_ids = [row.run_id for row in self.rows if row.run_id is not None][:MAX_COMPARED]
        return (
            f"All of them: {link('leaderboard', page.artifact_url('leaderboard.json'))}, "
            f"{link('side by side', comparison_url(page.experiment_id, run_ids))}, "
            f"{link('as charts', page.children_url)}."
        )

    def _commands(self) -> str:
        name = self.sweep.name
        return "\n".join(
            [
                f"- {code(f'agnews-lora promote {name}')}: the gate, then champion",
                f"- {code(f'agnews-lora report {name}')}: what was found, as a page and a PDF",
                f"- {code(f'agnews-lora export {name} --to exported')}: the champion as a PEFT folder",
                f"- {code(f'agnews-lora sweep {name} --trials N')}: more trials in this study",
            ]
        )

    def _link(self, row: Standing) -> str:
        return link(row.trial, self.runs.page(row.run_id).url) if row.run_id else plain(row.trial)


def arithmetic(spec: TrialSpec, shape: ModelShape, budget: int) -> str:
    """How a configuration's count of trainable parameters comes about, and its share of the budget."""
    head, step = head_parameters(spec.head, shape), parameters_per_rank(spec.targets, shape)
    total = head + spec.rank * step
    return (
        f"{head:,} head + {spec.rank} · {step:,} adapter (rank · {plain(spec.targets)}) = {total:,} of {budget:,} "
        f"trainable parameters ({percent(total / budget)})"
    )


def _searched(sweep: Sweep, stage: Stage) -> str:
    space, corpus, experiment = sweep.space, stage.corpus, sweep.experiment
    ranks = feasible_ranks(list(space.targets), list(space.heads), stage.base.shape, sweep.budget)
    presets = [f"{preset} (r ≤ {rank})" for (preset, _), rank in ranks.items()]
    lines = [
        ["targets", plain(", ".join(presets))],
        ["head", plain(", ".join(space.heads))],
        ["alpha / rank", plain(", ".join(map(str, space.alpha_ratio)))],
        ["dropout", f"{space.dropout.low:g} to {space.dropout.high:g}"],
        ["learning rate", f"{space.learning_rate.low:g} to {space.learning_rate.high:g}, in its logarithm"],
    ]
    confirmation = sweep.confirmation
    repeated = f", the best {confirmation.trials} confirmed over {confirmation.seeds} seeds" if confirmation else ""
    return (
        f"### What is searched\n\n"
        f"The best adapter of {plain(stage.base.hub_id)} with at most {sweep.budget:,} trainable parameters, in "
        f"{sweep.trials} trials of {stage.total_steps:,} steps{repeated}: experiment {plain(experiment.name)}, "
        f"{len(corpus.train):,} training and {len(corpus.validation):,} validation rows.\n"
        f"The baseline is the experiment's own configuration, {code(experiment.spec)}.\n\n"
        f"{table(['dimension', 'range'], lines)}"
    )


def _loss(row: Standing) -> str:
    return "–" if row.loss is None else f"{row.loss:.3f}"


def _count(row: Standing) -> str:
    return "–" if row.trainable_parameters is None else f"{row.trainable_parameters:,}"


def _mean(row: Confirmed | None) -> str:
    if row is None:
        return "–"
    spread = "" if row.std_accuracy is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{100 * row.std_accuracy:.2f}"
    return f"{percent(row.mean_accuracy)}{spread}"
