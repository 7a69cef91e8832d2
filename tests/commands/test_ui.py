"""`agnews-lora ui`: MLflow's server over a project's runs, on loopback."""

import re
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from tests.browser.mlflow_ui import served


def test_it_answers_at_the_address_that_it_prints_and_nowhere_else(finished_once: Path, tmp_path: Path) -> None:
    with served(finished_once, tmp_path / "log") as said:
        [address] = re.findall(r"^Runs: (http://127\.0\.0\.1:\d+)/", said, flags=re.MULTILINE)
        assert re.search(rf"^small, sweep: {address}/#/experiments/\d+/runs/", said, flags=re.MULTILINE)
        assert said.endswith("compareRunsMode=CHART\nCtrl-C ends it.\n")
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.status == 200
        assert (tmp_path / "log").read_text(encoding="utf-8") == said, "no access log"
        port = urlsplit(address).port
        listening = [one for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        assert {one.laddr.ip for one in listening if one.laddr.port == port} == {"127.0.0.1"}
