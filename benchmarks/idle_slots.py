"""How long slots stand empty at the end of a sweep: `python -m benchmarks.idle_slots`.

The driver is the real one, with its study in SQLite; the engine trains nothing (`tests/search/scripted.py`). All slots
advance by one step at a time, so that an empty slot is counted in steps, and no clock is read. Each sweep runs twice:
search first and then its confirmation, and the two together. Both must find the same. Writes `results/`.
"""

import datetime
import os
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from agnews_lora.search.confirmation import find_confirmation
from agnews_lora.search.racing import repeated
from agnews_lora.search.trials import summaries
from agnews_lora.tracking.provenance import provenance
from benchmarks.result_files import commit_of, write
from tests.search.scripted import TOTAL_STEPS, ScriptedEngine, Session

# (trials, (best that are raced, runs of each at most), slots)
CASES: Final = [(12, (2, 2), 2), (48, (3, 2), 2), *((48, (3, 3), slots) for slots in (1, 2, 4, 8, 32))]


def main() -> int:
    """Measure each case, print and write the table, and return the exit code."""
    lines = []
    for trials, confirmation, slots in CASES:
        with TemporaryDirectory() as folder:
            engine, apart = ScriptedEngine(slots), Path(folder, "apart")
            Session(apart, trials, engine=engine).run()
            searched = engine.num_steps // slots
            Session(apart, trials, engine=engine, confirmation=confirmation).run()
            beside = Session(Path(folder, "beside"), trials, engine=ScriptedEngine(slots), confirmation=confirmation)
            beside.run()
            if found(beside) != found(Session(apart, trials)):
                print(f"{slots} slots: the results differ, nothing is written.", file=sys.stderr)
                return 1
        rounds = find_confirmation(beside.study)
        best, repeats = confirmation[0], len(rounds.trials) if rounds else 0
        before, after = (f"{each.num_idle} | {each.num_steps // slots}" for each in (engine, beside.engine))
        lines.append(f"| {trials} | {best}: {repeats} | {slots} | {searched} | {before} | {after} |")
        print(lines[-1], flush=True)
    tags = provenance()
    text = [
        f"# Empty slots at the end of a sweep, {datetime.date.today()}",
        "",
        f"`python -m benchmarks.idle_slots`. Commit {commit_of(tags)}, optuna {version('optuna')}, {os.cpu_count()} "
        f"cores. A trial that is not pruned has {TOTAL_STEPS} steps. `before`: the confirmation begins after the "
        "search; `after`: in the slots that the search leaves free. Both find the same trials, winner and scores.",
        "",
        "The last place among the best is open until the last trial ends, so that its repetitions begin then: there is "
        "something to gain where the repetitions do not all fit the slots at once.",
        "",
        "| trials | raced: repetitions | slots | steps of the search | before: empty slot-steps | steps in all "
        "| after: empty slot-steps | steps in all |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *lines,
        "",
    ]
    write("idle-slots", "\n".join(text))
    return 0


def found(session: Session) -> object:
    """What a sweep ended with: every trial, and the completed ones with all their runs, the best first."""
    trials = summaries(session.study)
    rows = repeated(trials, find_confirmation(session.study), session.objective).values()
    return trials, [[(run.trial, run.seed, run.accuracy, run.loss) for run in row.runs] for row in rows]


if __name__ == "__main__":
    sys.exit(main())
