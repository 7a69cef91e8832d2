"""`agnews-lora serve` as a client meets it over HTTP: right, wrong, empty, huge and hostile input, and its end.

A real sweep on a tiny base, promoted, is served twice: by `make serve`, and merged by the command line.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from agnews_lora.cli import main
from agnews_lora.serving.requests import MAX_TEXT_CHARACTERS, MAX_TEXTS
from tests.project import agnews_lora, command, environment, write_project
from tests.tiny import SENTENCES, tiny_base

ROOT = Path(__file__).resolve().parent.parent.parent
LABELS = ("World", "Sports", "Business", "Sci/Tech")
JSON, CSV = "application/json", "text/csv"
TEXTS = [*SENTENCES, "Bush #39;s  &lt;b&gt;tax&lt;/b&gt; plan\\falls", "<script>alert(1)</script> 🙂 שלום"]


@dataclass(frozen=True)
class Server:
    """A server that answers. process: the one that was started."""

    process: subprocess.Popen[str]
    address: str
    said: str

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def ask(
        self, body: Any, kind: str | None = JSON, method: str = "POST", path: str = "/invocations", **headers: str
    ) -> requests.Response:
        """body: bytes, an iterator of bytes (sent in parts), or what is sent as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        given = headers | ({"Content-Type": kind} if kind else {})
        return requests.request(method, self.address + path, data=data, headers=given, timeout=60)

    def predictions(self, body: Any, kind: str = JSON) -> list[dict[str, Any]]:
        answer = self.ask(body, kind)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == JSON
        return answer.json()["predictions"]


def start(folder: Path, words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words,
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=(folder / "serve.err").open("a"),
        text=True,
        start_new_session=True,  # so that all of its processes can be signalled, and no others
    )


def answering(process: subprocess.Popen[str]) -> Server:
    """Waits for the line that says that it answers."""
    said = ""
    assert process.stdout is not None
    for line in process.stdout:
        said += line
        if "curl" in line:
            break
    found = re.search(r"Serving (http://127\.0\.0\.1:\d+)/invocations", said)
    assert found, said
    return Server(process, found[1], said)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose sweep has a champion."""
    folder = tmp_path_factory.mktemp("project")
    tiny_base(folder / "base", "bert")
    write_project(folder, experiment={"base": "base", "adapter.learning_rate": 5e-3}, sweep={"trials": 1})
    swept = agnews_lora(folder, "sweep", "small")
    assert swept.returncode == 0, swept.stderr
    with chdir(folder):
        assert main(["promote", "small"]) == 0
    return folder


@pytest.fixture(scope="module")
def servers(project: Path) -> Iterator[tuple[Server, Server]]:
    """The champion as `make serve` serves it, and merged. They end as a closed terminal's programs do."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    make = ["make", "-s", "-f", str(ROOT / "Makefile"), "-o", ".venv/.agnews-lora-installed", "serve", "SWEEP=small"]
    program = f"AGNEWS={sys.executable} -m agnews_lora"
    started = [
        start(project, [*make, f"PORT={free_port()}", program]),
        start(project, command("serve", "small", "--merged", "--port", str(free_port()))),
    ]
    try:
        plain, merged = map(answering, started)
        yield plain, merged
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)
            assert process.stdout is not None
            process.stdout.close()
    for server in (plain, merged):
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{server.address}/ping", timeout=5)
    assert "Traceback" not in (project / "serve.err").read_text()


@pytest.fixture
def server(servers: tuple[Server, Server]) -> Server:
    return servers[0]


@pytest.fixture
def merged(servers: tuple[Server, Server]) -> Server:
    return servers[1]


def refused(answer: requests.Response, status: int, *words: str) -> str:
    """The reason in a refusal, which shows nothing of the server's inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == JSON
    refusal = answer.json()
    assert refusal.keys() == {"error_code", "message"}
    assert "Traceback" not in answer.text and "agnews_lora" not in answer.text and "/" + "tmp" not in answer.text
    assert len(answer.text) < 600
    for word in words:
        assert word in refusal["message"], refusal["message"]
    return str(refusal["message"])


def test_it_says_what_was_checked_and_how_to_ask(server: Server, merged: Server) -> None:
    assert "Checked: version 1 of small, the adapter on its base, gives the labels and logits" in server.said
    assert "Checked: version 1 of small, the adapter merged into its base, gives the labels" in merged.said
    for each in (server, merged):
        difference = re.search(r"largest difference ([^)]+)\)", each.said)
        assert difference and float(difference[1]) <= 1e-4
        [curl] = re.findall(r"curl .*", each.said)
        shown = subprocess.run(["bash", "-c", f"{curl} -s"], capture_output=True, text=True, check=True)
        assert json.loads(shown.stdout)["predictions"][0]["label"] in LABELS


def test_it_answers_as_predict_does_merged_or_not(
    server: Server, merged: Server, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert main(["predict", "--sweep", "small", "--json", *TEXTS]) == 0
    expected = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for each in (server, merged):
        predictions = each.predictions({"inputs": TEXTS})
        assert [prediction.pop("label") for prediction in predictions] == [one["label"] for one in expected]
        for prediction, one in zip(predictions, expected, strict=True):
            assert prediction == pytest.approx(one["probabilities"], abs=1e-5)
            assert tuple(prediction) == LABELS and sum(prediction.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (["Oil, rose", "NA"], JSON),
        ({"inputs": ["Oil, rose", "NA"]}, JSON),
        ({"inputs": {"text": ["Oil, rose", "NA"]}}, JSON),
        ({"inputs": [{"text": "Oil, rose"}, {"text": "NA"}]}, JSON),
        ({"instances": ["Oil, rose", "NA"]}, JSON),
        ({"instances": ["Oil, rose", "NA"], "params": {}}, JSON),
        ({"dataframe_records": [{"text": "Oil, rose", "id": 1}, {"text": "NA", "id": 2}]}, JSON),
        ({"dataframe_split": {"columns": ["id", "text"], "data": [[1, "Oil, rose"], [2, "NA"]]}}, JSON),
        (b'\xef\xbb\xbf{"inputs": ["Oil, rose", "\\u004eA"]}', f"{JSON}; charset=UTF-8"),
        (b'text\n"Oil, rose"\nNA\n', CSV),
        (b'id,text\r\n1,"Oil, rose"\r\n2,NA\r\n\r\n', CSV),
    ],
)
def test_every_form_of_the_same_texts_gets_the_same_answer(server: Server, body: Any, kind: str) -> None:
    assert server.predictions(body, kind) == server.predictions({"inputs": ["Oil, rose", "NA"]})


WRONG: list[tuple[bytes | Any, int, str]] = [
    (b"", 400, "it is empty"),
    (b"   \n", 400, "it is empty"),
    (b"{", 400, "must be JSON"),
    (b'{"inputs": ["Oil" "rose"]}', 400, "line 1, column 19"),
    (b'{"inputs": ["a\x01b"]}', 400, "Invalid control character"),
    (b"\xff\xfe\x00", 400, "must be UTF-8"),
    ('{"inputs": ["Oil"]}'.encode("utf-16"), 400, "must be UTF-8"),
    (b'"Oil rose."', 400, "is a string"),
    (b"7", 400, "is a number"),
    (b"null", 400, "is null"),
    (b'{"inputs": ["a"], "inputs": ["b"]}', 400, "a key only once"),
    ({}, 400, "but has none"),
    ({"texts": ["Oil"]}, 400, "but has 'texts'"),
    ({"inputs": ["Oil"], "instances": ["Oil"]}, 400, "but has 'inputs', 'instances'"),
    ({"inputs": ["Oil"], "params": {"temperature": 1}}, 400, "takes no `params`"),
    ({"messages": [{"role": "user", "content": "Oil"}]}, 400, "but has 'messages'"),
    ({"inputs": "Oil"}, 400, "are a string"),
    ({"inputs": None}, 400, "are null"),
    ({"inputs": {"txt": ["Oil"]}}, 400, "are an object"),
    ({"inputs": []}, 400, "at least one text"),
    ([], 400, "at least one text"),
    ({"dataframe_records": []}, 400, "at least one text"),
    ({"inputs": ["Oil", 7]}, 400, "text 1 (counted from 0) is a number"),
    ({"inputs": [None]}, 400, "text 0 (counted from 0) is null"),
    ({"inputs": [True]}, 400, "is true"),
    (b'{"inputs": [NaN]}', 400, "is a number"),
    ({"inputs": [["Oil"]]}, 400, "is a list"),
    ({"inputs": ["Oil", {"text": "Oil"}]}, 400, "is an object"),
    ({"inputs": [{"text": "Oil"}, "Oil"]}, 400, "record 1 (counted from 0) is a string"),
    ({"dataframe_records": [{"text": "Oil"}, {"txt": "Oil"}]}, 400, "record 1 (counted from 0) has no key `text`"),
    ({"dataframe_records": {"text": ["Oil"]}}, 400, "must be a list of objects"),
    ({"dataframe_split": [1]}, 400, "must be an object"),
    ({"dataframe_split": {"columns": ["txt"], "data": [["Oil"]]}}, 400, "`columns`"),
    ({"dataframe_split": {"columns": ["text"], "data": ["Oil"]}}, 400, "`data`"),
    ({"dataframe_split": {"columns": ["text"], "data": [["Oil", "rose"]]}}, 400, "`data`"),
    ({"inputs": [""]}, 400, "nothing is left of text 0"),
    ({"inputs": ["Oil", "  \t\n"]}, 400, "nothing is left of text 1"),
    ({"inputs": ["<b></b>&nbsp;<br/>"]}, 400, "nothing is left of text 0"),
    ({"inputs": ["\x00\x1b\x7f", "\u200b\u202e"]}, 400, "nothing is left of text 0, 1"),
    (b'{"inputs": ["Oil \\ud800 rose"]}', 400, "half a surrogate pair"),
    (b'{"inputs": ' + b"[" * 100_000, 400, "nests too deeply"),
    (b'{"inputs": ' * 40_000, 400, "nests too deeply"),
    (b'{"inputs": ' + b"[" * 500 + b"]" * 500 + b"}", 400, "is a list"),
    (b'{"inputs": [' + b"1" * 5_000 + b"]}", 400, "too long a number"),
    ({"inputs": ["a" * (MAX_TEXT_CHARACTERS + 1)]}, 413, "at most 5,000 characters, but text 0"),
    ({"inputs": ["Oil"] * (MAX_TEXTS + 1)}, 413, "at most 256 texts, but has 257"),
    ({"inputs": ["a"] * 100_000}, 413, "at most 256 texts, but has 100,000"),
    ({"inputs": ["Oil rose. " * 1_000_000]}, 413, "at most 524,288 bytes, but has 10,000,016"),
]


@pytest.mark.parametrize(("body", "status", "words"), WRONG)
def test_wrong_input_is_refused_with_a_reason(server: Server, body: Any, status: int, words: str) -> None:
    refused(server.ask(body), status, words)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"Oil rose.\n", "the first line must name a column `text`"),
        (b"text,text\na,b\n", "the first line must name a column `text` once"),
        (b'text\n"Oil', "must be CSV"),
        (b"text\nOil, rose\n", "row 1 must have 1 fields, but has 2"),
        (b"text\n", "at least one text"),
        (b'text\n""\n', "nothing is left of text 0"),
    ],
)
def test_wrong_csv_is_refused_with_a_reason(server: Server, body: bytes, words: str) -> None:
    refused(server.ask(body, CSV), 400, words)


@pytest.mark.parametrize("kind", [None, "", "text/plain", "application/x-www-form-urlencoded", "application/json2"])
def test_another_content_type_is_refused(server: Server, kind: str | None) -> None:
    refused(server.ask({"inputs": ["Oil"]}, kind), 415, "Content-Type must be application/json or text/csv")


def test_encodings_are_refused(server: Server) -> None:
    refused(server.ask({"inputs": ["Oil"]}, f"{JSON}; charset=latin-1"), 415, "charset must be utf-8")
    refused(server.ask(b"\x1f\x8b", **{"Content-Encoding": "gzip"}), 415, "Content-Encoding is 'gzip'")
    refused(server.ask(b"PAR1", "application/vnd.apache.parquet"), 415)


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/", 404, "/invocations, /ping, /health, /version"),
        ("POST", "/nothing", 404, "no such endpoint"),
        ("GET", "/docs", 404, "no such endpoint"),
        ("GET", "/..%2f..%2fetc/passwd", 404, "no such endpoint"),
        ("GET", "/invocations", 405, "takes POST, but the method is GET"),
        ("PUT", "/invocations", 405, "takes POST, but the method is PUT"),
        ("DELETE", "/ping", 405, "takes GET"),
    ],
)
def test_another_endpoint_or_method_is_refused(server: Server, method: str, path: str, status: int, words: str) -> None:
    answer = server.ask(b"x" * 2_000_000, method=method, path=path)
    refused(answer, status, words)
    assert answer.headers.get("allow") == {404: None, 405: "GET" if path == "/ping" else "POST"}[status]


def test_the_endpoints_of_mlflow_answer(server: Server) -> None:
    assert [server.ask(None, None, "GET", path).status_code for path in ("/ping", "/health", "/version")] == [200] * 3


def test_a_page_from_elsewhere_gets_nothing(server: Server) -> None:
    refused(server.ask({"inputs": ["Oil"]}, Host="evil.example"), 403, "Host must be 127.0.0.1 or localhost")
    assert server.ask({"inputs": ["Oil"]}, Host=f"localhost:{server.port}").status_code == 200


def test_a_body_in_parts_is_limited_too(server: Server) -> None:
    assert server.predictions(iter([b'{"inputs": ', b'["Oil"]}'])) == server.predictions({"inputs": ["Oil"]})
    refused(server.ask(b"x" * 100_000 for _ in range(50)), 413, "at most 524,288 bytes, but has more")


@pytest.mark.parametrize(
    "sent",
    [
        b"no HTTP at all\r\n\r\n",
        b"POST /invocations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_request_is_refused(server: Server, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(sent)
        assert connection.recv(100).startswith(b"HTTP/1.1 400 ")


def test_as_much_as_is_allowed_is_answered(server: Server) -> None:
    assert len(server.predictions({"inputs": [f"{'Oil rose. ' * 20}{number}" for number in range(MAX_TEXTS)]})) == 256
    assert len(server.predictions({"inputs": ["a" * MAX_TEXT_CHARACTERS]})) == 1


def test_many_clients_at_once_get_each_its_own_answer(server: Server) -> None:
    texts = [f"{SENTENCES[number % len(SENTENCES)]} {number}" for number in range(120)]
    together = server.predictions({"inputs": texts})
    with ThreadPoolExecutor(40) as clients:
        apart = [answer[0] for answer in clients.map(lambda text: server.predictions([text]), texts)]
    for one, other in zip(apart, together, strict=True):
        assert one.pop("label") == other.pop("label")
        assert one == pytest.approx(other, abs=1e-5)


def test_clients_that_stall_or_leave_hold_up_nobody(server: Server) -> None:
    body = json.dumps({"inputs": [SENTENCES[0] * 10] * MAX_TEXTS}).encode()
    head = (
        b"POST /invocations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
    try:
        for number, connection in enumerate(connections):
            if number % 2:
                connection.sendall(head % len(body) + body[:10])  # stalls
            else:
                connection.sendall(head % len(body) + body)  # leaves
                connection.close()
        began = time.monotonic()
        assert len(server.predictions({"inputs": ["Oil rose."]})) == 1
        assert time.monotonic() - began < 10
    finally:
        for connection in connections:
            connection.close()


def test_the_documented_requests_get_the_documented_answers(server: Server) -> None:
    documented = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    call = re.compile(
        r"curl http://127\.0\.0\.1:5001/invocations -H 'Content-Type: ([^']+)'[ \\\n]+-d \$?'(.+?)'\n(?=(.*))"
    )
    answered, refused_part = documented.split("## Refusals")
    requested = call.findall(answered)
    assert {kind for kind, *_ in requested} == {JSON, CSV} and len(requested) == 6
    for kind, body, _ in requested:
        assert server.predictions(body.replace("\\n", "\n").encode() if kind == CSV else body.encode(), kind)
    [(kind, body, shown)] = call.findall(refused_part)
    assert server.ask(body.encode(), kind).json() == json.loads(shown)


def test_answers_are_not_held_back(server: Server) -> None:
    """The kernel would hold each back for 40 ms, until the client has acknowledged its first part."""
    with requests.Session() as session:
        times = sorted(session.get(f"{server.address}/ping").elapsed.total_seconds() for _ in range(40))
    assert times[10] < 0.03  # the fastest quarter, for a machine that does other things too


def test_a_taken_port_is_one_message(
    server: Server, project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert main(["serve", "small", "--port", str(server.port)]) == 2
    message = capsys.readouterr().err
    assert (
        message
        == f"agnews-lora: port {server.port} cannot be used (Address already in use); take another with --port\n"
    )


def test_nothing_but_a_sound_version_is_served(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = str(free_port())
    monkeypatch.chdir(project)
    assert main(["serve", "small", "--version", "7", "--port", port]) == 2
    assert "version 7 of small is not registered" in capsys.readouterr().err
    [rows] = project.rglob("gate_rows.safetensors")
    kept = rows.read_bytes()
    rows.write_bytes(kept + b" ")
    try:
        assert main(["serve", "small", "--port", port]) == 2
        assert "but gate/gate_rows.safetensors changed since; put them back" in capsys.readouterr().err
    finally:
        rows.write_bytes(kept)
    monkeypatch.chdir(write_project(tmp_path))
    assert main(["serve", "small", "--port", port]) == 2
    assert "a champion of small is needed" in capsys.readouterr().err


def test_ctrl_c_ends_it_at_once(merged: Server, project: Path) -> None:
    """Last: the merged server is gone afterwards. Clients are busy, so that a thread is computing."""
    with ThreadPoolExecutor(3) as clients:
        busy = [clients.submit(merged.ask, {"inputs": [SENTENCES[0] * 10] * MAX_TEXTS}) for _ in range(3)]
        time.sleep(0.2)
        os.killpg(merged.process.pid, signal.SIGINT)
        assert merged.process.wait(10) == 130
        for each in busy:
            assert isinstance(each.exception(), requests.ConnectionError | None)
    assert "agnews-lora: interrupted" in (project / "serve.err").read_text()
