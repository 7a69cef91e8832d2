"""What a sweep with workers shows, read from the study alone."""

from io import StringIO
from pathlib import Path

import optuna
import pytest
from rich.console import Console

from agnews_lora.commands.watch import Watch
from agnews_lora.reporting.progress import Progress
from agnews_lora.search.claims import num_ended
from agnews_lora.search.confirmation import open_round
from agnews_lora.search.standings import best_first, standings
from agnews_lora.search.study import TRIALS
from tests.search.scripted import TOTAL_STEPS, ScriptedEngine, Session


class Screens:
    """Makes the screens of a watch, all of which write lines to one text."""

    def __init__(self) -> None:
        self.text = StringIO()
        self.made: list[Progress] = []

    def __call__(self, study: optuna.Study) -> Progress:
        console = Console(file=self.text, width=200, color_system=None)
        screen = Progress(total_trials=study.user_attrs[TRIALS], ended=num_ended(study), console=console)
        self.made.append(screen)
        return screen

    @property
    def lines(self) -> list[str]:
        return self.text.getvalue().splitlines()


def watched(session: Session, screens: Screens) -> Watch:
    """A watch that looks after every step of the session's engine."""
    watch = Watch(session.study, screens, TOTAL_STEPS)
    session.engine = ScriptedEngine(num_slots=2, script=session.engine.script, each_step=watch.look)
    return watch


def test_it_shows_what_the_process_that_trains_would(tmp_path: Path) -> None:
    session, screens = Session(tmp_path, trials=6), Screens()
    with watched(session, screens):
        session.run()
    ended = standings(session.study)
    assert len(ended) == 6
    for row in ended:
        own = [line for line in screens.lines if line.startswith(f"{row.trial} ")]
        assert own[0].startswith(f"{row.trial} started: {row.spec}")
        assert ("(baseline)" in own[0]) == row.baseline
        assert row.accuracy is not None
        assert f"{row.trial} step 10/{TOTAL_STEPS}" in own[1]
        word = "complete" if row.state == "COMPLETE" else "pruned"
        assert own[-1].startswith(f"{row.trial} {word}  accuracy {row.accuracy:.2%}")
    assert screens.lines[-1].endswith("[6/6]")


def test_what_had_ended_before_is_not_shown_again(tmp_path: Path) -> None:
    Session(tmp_path, trials=3).run()
    session, screens = Session(tmp_path, trials=4), Screens()
    with watched(session, screens):
        session.run()
    assert {line.split()[0] for line in screens.lines} == {"t0003"}
    assert screens.lines[-1].endswith("[4/4]")


def test_a_trial_that_is_given_back_is_taken_off_and_shown_again(tmp_path: Path) -> None:
    first, screens = Session(tmp_path, trials=1), Screens()
    watch = watched(first, screens)
    first.engine.script["t0000", 15] = first.stop
    with watch:
        first.run()
    assert screens.lines[-1].startswith("t0000 interrupted")
    second, again = Session(tmp_path, trials=1), Screens()
    with watched(second, again):
        second.run()
    assert again.lines[0].startswith("t0000 started")
    assert again.lines[-1].endswith("[1/1]")


def test_the_confirmation_has_a_screen_of_its_own(tmp_path: Path) -> None:
    session, screens = Session(tmp_path, trials=3), Screens()
    with watched(session, screens) as watch:
        session.run()
        opened = open_round(session.study, 1, 3, seed=7)
        assert opened is not None
        watch.look()
        for accuracy in (0.5, 0.6):
            opened.tell(opened.ask(), accuracy)
    best = best_first(standings(session.study))[0].trial
    assert len(screens.made) == 2
    assert screens.lines[-1].startswith(f"{best}-s3 complete  accuracy 60.00%")
    assert screens.lines[-1].endswith("[2/2]")


def test_a_study_that_does_not_answer_is_looked_at_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, screens = Session(tmp_path, trials=1), Screens()
    with watched(session, screens) as watch:
        with monkeypatch.context() as away:
            away.setattr(optuna.Study, "get_trials", _does_not_answer)
            watch.look()
        session.run()
    assert screens.lines[-1].endswith("[1/1]")


def _does_not_answer(*arguments: object, **options: object) -> list[optuna.trial.FrozenTrial]:
    raise optuna.exceptions.StorageInternalError("away")
