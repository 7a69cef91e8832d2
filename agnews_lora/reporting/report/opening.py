"""The report's first page: title, what a reader takes away, abstract, and what is not done yet."""

from agnews_lora.reporting.report.comparison import pairs_of
from agnews_lora.reporting.report.document import Cite, Code, Strong, Text, say, sentences
from agnews_lora.reporting.report.dossier import STATES, Dossier, spec_of
from agnews_lora.reporting.report.wording import (
    accuracy_range,
    as_word,
    capital,
    counted,
    interval,
    listed,
    number,
    p_value,
    percent,
    points,
    whole,
)
from agnews_lora.serving.stats import Pairs, difference_interval, two_sided_p_value

# What became of one trial, and of several, by their state.
_BECAME = {
    "COMPLETE": ("was trained to its end", "were trained to their end"),
    "PRUNED": (
        "was given up on the way because others did better",
        "were given up on the way because others did better",
    ),
    "FAIL": ("failed", "failed"),
    "RUNNING": ("is still running", "are still running"),
    "INTERRUPTED": ("was stopped and can go on", "were stopped and can go on"),
}


def title(dossier: Dossier) -> str:
    """What was to be found: the budget is what makes the task."""
    return f"LoRA within {whole(dossier.budget)} trainable parameters"


def subtitle(dossier: Dossier) -> Text:
    """Which sweep, which study, on which base."""
    return say(
        "Report of sweep {sweep} (study {study}) on {base}",
        sweep=Code(dossier.sweep),
        study=Code(dossier.study),
        base=Code(dossier.params.get("base", "an unknown base model")),
    )


def highlights(dossier: Dossier) -> tuple[tuple[str, str], ...]:
    """The few numbers that a reader takes away."""
    items: list[tuple[str, str]] = []
    winner, baseline = dossier.trial(dossier.winner), dossier.trial(dossier.baseline)
    if dossier.registered and dossier.registered.score:
        items.append((percent(dossier.registered.score.accuracy), "test accuracy, scored once"))
    if winner is not None:
        items.append((percent(winner.accuracy), f"validation accuracy of the {dossier.best_called}"))
    if baseline is not None and baseline.state == "COMPLETE" and dossier.baseline != dossier.winner:
        items.append((percent(baseline.accuracy), "validation accuracy of the baseline"))
    if winner is not None:
        items.append((whole(winner.trainable_parameters), f"trainable parameters of {whole(dossier.budget)} allowed"))
    return tuple(items)


def notice(dossier: Dossier) -> Text | None:
    """What a reader must know first, where the sweep is not finished or found nothing."""
    ended = sum(dossier.count(state) for state in ("COMPLETE", "PRUNED", "FAIL"))
    if not dossier.is_complete:
        done = f"{ended} of {dossier.asked} trials" if dossier.asked is not None else counted(ended, "trial")
        state = "is still under way" if dossier.state == "RUNNING" else "was stopped and can go on"
        parts = [
            say("{head} The sweep {state}: ", head=Strong("Unfinished."), state=state),
            say("{done} had ended when this report was written, and everything below may still change.", done=done),
        ]
        return (*parts[0], *parts[1])
    if not dossier.count("COMPLETE"):
        return say(
            "{head} {done} ended, and none of them was trained to its end, so there is no winner.",
            head=Strong("No result."),
            done=capital(counted(ended, "trial")),
        )
    return None


def abstract(dossier: Dossier) -> Text:
    """Five to seven sentences, as far as the stores tell them."""
    return sentences(
        _what_was_searched(dossier),
        _how_trials_ended(dossier),
        _winner(dossier),
        _confirmed(dossier),
        _test_score(dossier),
        _against_baseline(dossier),
    )


def _what_was_searched(dossier: Dossier) -> Text:
    rows = dossier.num_rows("training")
    trained = f", each trained on {whole(rows)} rows" if rows else ""
    return say(
        "We searched for the best low-rank adapter (LoRA, {lora}) that turns the frozen language model {base} into a "
        "classifier of news items with at most {budget} trainable parameters, the classifier's head "
        "included{trained}.",
        lora=Cite("hu"),
        base=Code(dossier.params.get("base", "")),
        budget=whole(dossier.budget),
        trained=trained,
    )


def _how_trials_ended(dossier: Dossier) -> Text | None:
    if dossier.trials.empty:
        return say("No trial has been started yet.")
    counts = {state: dossier.count(state) for state in STATES}
    parts = [f"{as_word(count)} {_BECAME[state][count > 1]}" for state, count in counts.items() if count]
    total = counted(len(dossier.trials), "trial")
    if len(parts) == 1:
        [state] = [state for state, count in counts.items() if count]
        subject = {1: "Its one trial", 2: "Both trials"}.get(len(dossier.trials), f"All {total}")
        return say("{subject} {became}.", subject=subject, became=_BECAME[state][len(dossier.trials) > 1])
    return say("Of {total}, {parts}.", total=total, parts=listed(parts))


def _winner(dossier: Dossier) -> Text | None:
    winner = dossier.trial(dossier.winner)
    if winner is None:
        return None
    spec, rows = spec_of(winner), dossier.num_rows("validation")
    is_baseline = " – the baseline itself –" if dossier.winner == dossier.baseline else ""
    return say(
        "The {best}, trial {trial},{is_baseline} adapts {targets} with rank {rank}, alpha {alpha}, dropout {dropout} "
        "and a peak learning rate of {rate}; it trains {size} parameters ({share} of the budget) and labels {accuracy} "
        "of the validation rows rightly{range}.",
        best=dossier.best_called,
        trial=Code(str(winner.trial)),
        is_baseline=is_baseline,
        targets=Code(spec.targets),
        rank=str(spec.rank),
        alpha=number(spec.alpha),
        dropout=number(spec.dropout),
        rate=number(spec.learning_rate),
        size=whole(winner.trainable_parameters),
        share=percent(winner.trainable_parameters / dossier.budget, 1),
        accuracy=percent(winner.accuracy),
        range=f" (95% interval {accuracy_range(winner.accuracy, rows)})" if rows else "",
    )


def _confirmed(dossier: Dossier) -> Text | None:
    if dossier.confirmation is None:
        return None
    chosen = dossier.confirmation[dossier.confirmation["chosen"]]
    if chosen.empty:
        return None
    row = next(chosen.itertuples())
    spread = f" (standard deviation {points(row.std_accuracy)})" if row.std_accuracy == row.std_accuracy else ""
    return say(
        "Trained again with other seeds, it reaches {mean} on average over {runs}{spread}.",
        mean=percent(row.mean_accuracy),
        runs=counted(int(row.seeds), "run"),
        spread=spread,
    )


def _test_score(dossier: Dossier) -> Text | None:
    score = dossier.registered.score if dossier.registered else None
    if score is None:
        return None
    return say(
        "On the test split, which no choice was based on, it was scored once: {accuracy} (95% interval {range}, "
        "{rows} rows).",
        accuracy=percent(score.accuracy),
        range=interval(score.low, score.high),
        rows=whole(score.rows),
    )


def _against_baseline(dossier: Dossier) -> Text | None:
    winner, baseline = dossier.trial(dossier.winner), dossier.trial(dossier.baseline)
    if winner is None or baseline is None or baseline.state != "COMPLETE" or dossier.winner == dossier.baseline:
        return None
    pairs = pairs_of(dossier)
    if pairs is None:
        return say(
            "The baseline, the experiment's own configuration, labels {accuracy} rightly.",
            accuracy=percent(baseline.accuracy),
        )
    return _paired_sentence(pairs, percent(baseline.accuracy))


def _paired_sentence(pairs: Pairs, accuracy: str) -> Text:
    low, high = difference_interval(pairs)
    return say(
        "The baseline, the experiment's own configuration, labels {accuracy} rightly: a difference of {difference} "
        "(95% interval {low} to {high}; exact McNemar test, {p}).",
        accuracy=accuracy,
        difference=points(pairs.difference, signed=True),
        low=f"{100 * low:+.2f}".replace("-", "−"),
        high=f"{100 * high:+.2f}".replace("-", "−"),
        p=p_value(two_sided_p_value(pairs)),
    )
