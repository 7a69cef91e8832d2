"""The engine in a process of its own, as the command line sets it up: what it loads, prints and asks the network."""

import json
import subprocess
import sys
from pathlib import Path

from tests.training.conftest import Lab

# Trains, is stopped, goes on, prunes, fails and loads an adapter; then writes down what happened beside that.
SCRIPT = """
import json, os, sys, warnings
from pathlib import Path

from agnews_lora.cli import ENVIRONMENT

os.environ |= ENVIRONMENT
warnings.simplefilter("ignore")
asked = []
CALLS = {"socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"}
sys.addaudithook(lambda event, args: asked.append(repr(args)) if event in CALLS else None)

import agnews_lora.training.hf_trainer

STRANGERS = {"optuna", "mlflow", "pydantic", "matplotlib", "ruamel"}  # libraries of other rooms
imported = sorted(STRANGERS & set(sys.modules))

from dataclasses import replace

from agnews_lora.adapters.adapter_files import load_with_peft
from tests.training.conftest import SETTINGS, SPEC, Recorder, make_lab, plan, train

base, folder, report = map(Path, sys.argv[1:])
lab = make_lab(base, folder / "cache")
*_, (_, _, checkpoint) = train(lab, [plan(folder)], recorder=Recorder(stop_at=9)).checkpoints
[result] = train(lab, [plan(folder, checkpoint=checkpoint)]).results
load_with_peft(result.adapter, lab.base)
wild = plan(folder, "t0001", replace(SPEC, learning_rate=1e30))
recorder = train(lab, [wild, plan(folder, "t0002")], recorder=Recorder(prune_at=(5,)))
ended = [len(recorder.failures), recorder.results[0].steps]
after = sorted(STRANGERS & set(sys.modules))
report.write_text(json.dumps({"imported": imported, "after": after, "asked": asked, "ended": ended}))
"""


def test_the_engine_is_silent_offline_and_knows_neither_study_nor_runs(roberta: Lab, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-c", SCRIPT, str(roberta.base.folder), str(tmp_path), str(report)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.stdout, process.stderr) == ("", "")
    assert json.loads(report.read_text()) == {"imported": [], "after": [], "asked": [], "ended": [1, 5]}
