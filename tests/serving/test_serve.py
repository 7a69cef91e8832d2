"""`agnews-lora serve` as a client meets it over HTTP, in a process of its own that `make serve` starts, and its end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

import agnews_lora
from agnews_lora.cli import main
from agnews_lora.data.newswire import LABELS
from agnews_lora.data.rows import MAX_CHARACTERS
from agnews_lora.serving import server as module
from agnews_lora.serving.model_package import ANSWERS, Package
from agnews_lora.serving.predict import Classifier
from agnews_lora.serving.server import MAX_TEXTS
from agnews_lora.tracking.registry import Registry
from tests.project import environment
from tests.tiny import SENTENCES

ROOT = Path(__file__).resolve().parent.parent.parent
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
        """body: bytes, an iterator of bytes (sent in parts), or a document that is sent as JSON."""
        data = json.dumps(body).encode() if isinstance(body, dict | list) else body
        given = headers | ({"Content-Type": kind} if kind else {})
        return requests.request(method, self.address + path, data=data, headers=given, timeout=60)

    def predictions(self, body: Any, kind: str = JSON) -> list[dict[str, Any]]:
        answer = self.ask(body, kind)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == JSON
        return answer.json()["predictions"]


@pytest.fixture(scope="module")
def server(project: Path, small: Registry) -> Iterator[Server]:
    """The champion as `make serve` serves it. It ends as the programs of a closed terminal do, if it still runs."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    make = ["make", "-s", "-f", str(ROOT / "Makefile"), "-o", ".venv/.agnews-lora-installed", "serve"]
    with (project / "serve.err").open("w") as errors:
        process = subprocess.Popen(
            [*make, "SWEEP=small --verbose", f"PORT={port}", f"AGNEWS={sys.executable} -m agnews_lora"],
            cwd=project,
            env=environment() | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # so that all of its processes can be signalled, and no others
        )
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if "curl" in line:
                break
        assert f"Serving http://127.0.0.1:{port}/invocations" in said, (project / "serve.err").read_text()
        yield Server(process, f"http://127.0.0.1:{port}", said)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)
        process.stdout.close()


def refused(answer: requests.Response, status: int, *words: str) -> None:
    """A refusal is one short reason, which shows nothing of the server's inside."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == JSON
    refusal = answer.json()
    assert refusal.keys() == {"error_code", "message"}
    assert "Traceback" not in answer.text and "agnews_lora" not in answer.text and "/" + "tmp" not in answer.text
    assert len(answer.text) < 600
    for word in words:
        assert word in refusal["message"], refusal["message"]


def test_it_says_what_was_checked_and_how_to_ask(server: Server) -> None:
    assert "Checked: version 1 of small, the adapter on its base, gives the labels and logits" in server.said
    difference = re.search(r"largest difference ([^)]+)\)", server.said)
    assert difference and float(difference[1]) <= 1e-4
    [curl] = re.findall(r"curl .*", server.said)
    shown = subprocess.run(["bash", "-c", f"{curl} -s"], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)["predictions"][0]["label"] in LABELS


def test_it_answers_as_the_classifier_does(server: Server, small: Registry) -> None:
    package = Package.verified(small, small.champion())
    for merged in (False, True):
        expected = Classifier.load(package, merged).predict(TEXTS)
        for answer, one in zip(server.predictions({"inputs": TEXTS}), expected, strict=True):
            assert answer.pop("label") == one.label
            assert answer == pytest.approx(one.probabilities, abs=1e-5)
            assert tuple(answer) == LABELS and sum(answer.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (["Oil, rose", "NA"], JSON),
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


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("GET", "/", 404, "/docs"),
        ("GET", "/..%2f..%2fetc/passwd", 404, "no such endpoint"),
        ("GET", "/invocations", 405, "takes POST"),
        ("DELETE", "/ping", 405, "takes GET"),
    ],
)
def test_another_endpoint_or_method_is_refused(server: Server, method: str, path: str, status: int, words: str) -> None:
    answer = server.ask(b"x" * 2_000_000, method=method, path=path)
    refused(answer, status, words)
    assert answer.headers.get("allow") == {404: None, 405: words.removeprefix("takes ")}[status]


def test_wrong_input_is_refused_with_a_reason(server: Server) -> None:
    refused(server.ask({"inputs": ["Oil", 7]}), 400, "text 1 (counted from 0) is a number")
    refused(server.ask({"inputs": ["Oil", "<b></b>&nbsp;"]}), 400, "text 1 has nothing visible in it after cleaning")
    refused(server.ask({"inputs": ["Oil", "\ud800"]}), 400, "text 1 is not Unicode")
    refused(server.ask({"inputs": ["a" * (MAX_CHARACTERS + 1)]}), 400, "text 0 has 100,001 characters")
    refused(server.ask({"inputs": ["Oil rose. " * 1_000_000]}), 413, "at most 2,097,152 bytes, but has 10,000,016")
    refused(server.ask({"inputs": ["Oil"]}, None), 415, "Content-Type must be application/json or text/csv")
    refused(server.ask(b"\x1f\x8b", **{"Content-Encoding": "gzip"}), 415, "Content-Encoding is 'gzip'")


def test_health_and_version_are_told(server: Server) -> None:
    assert [server.ask(None, None, "GET", path).status_code for path in ("/ping", "/health", "/docs")] == [200] * 3
    told = server.ask(None, None, "GET", "/version").json()
    assert told.items() >= {"model": "small", "version": 1, "agnews_lora": agnews_lora.__version__}.items()
    assert "tmp" not in json.dumps(told), "no path of this machine"


def test_each_request_is_a_line_with_verbose(server: Server) -> None:
    server.ask(None, None, "GET", "/version?of=this")
    assert server.process.stdout is not None
    line = next(line for line in server.process.stdout if "/version?of=this" in line)
    assert re.fullmatch(r'\d{4}-\d\d-\d\d \S+ 127\.0\.0\.1:\d+ "GET /version\?of=this HTTP/1\.1" 200 OK\n', line)


def test_a_page_from_elsewhere_gets_nothing(server: Server) -> None:
    assert server.ask({"inputs": ["Oil"]}, Host="evil.example").status_code == 400
    assert server.ask({"inputs": ["Oil"]}, Host=f"localhost:{server.port}").status_code == 200


def test_a_body_in_parts_is_limited_too(server: Server) -> None:
    assert server.predictions(iter([b'{"inputs": ', b'["Oil"]}'])) == server.predictions({"inputs": ["Oil"]})
    refused(server.ask(b"x" * 100_000 for _ in range(50)), 413, "at most 2,097,152 bytes, but has 5,000,000")


def test_as_much_as_is_allowed_is_answered(server: Server) -> None:
    assert len(server.predictions({"inputs": [f"{'Oil rose. ' * 20}{number}" for number in range(MAX_TEXTS)]})) == 256
    assert len(server.predictions({"inputs": ["\U0001f680" * MAX_CHARACTERS]})) == 1


def test_many_clients_at_once_get_each_its_own_answer_though_others_stall(server: Server) -> None:
    texts = [f"{SENTENCES[number % len(SENTENCES)]} {number}" for number in range(60)]
    together = server.predictions({"inputs": texts})
    stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(60)]
    try:
        for connection in stalled:
            head = b"POST /invocations HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            connection.sendall(head + b"Content-Length: 1000\r\n\r\n{")
        with ThreadPoolExecutor(20) as clients:
            apart = [answer[0] for answer in clients.map(lambda text: server.predictions([text]), texts)]
    finally:
        for connection in stalled:
            connection.close()
    for one, other in zip(apart, together, strict=True):
        assert one.pop("label") == other.pop("label")
        assert one == pytest.approx(other, abs=1e-5)


def test_the_documented_requests_get_the_documented_answers(server: Server) -> None:
    documented = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    call = re.compile(r"-H 'Content-Type: ([^']+)'[ \\\n]+-d \$?'(.+?)'\n(?=(.*))")
    answered, refused_part = documented.split("## Limits and refusals")
    requested = call.findall(answered)
    assert {kind for kind, *_ in requested} == {JSON, CSV} and len(requested) == 5
    for kind, body, _ in requested:
        assert server.predictions(body.replace("\\n", "\n").encode() if kind == CSV else body.encode(), kind)
    [(kind, body, shown)] = call.findall(refused_part)
    assert server.ask(body.encode(), kind).json() == json.loads(shown)


def test_answers_are_not_held_back(server: Server) -> None:
    """The kernel would hold each back for 40 ms, until the client has acknowledged its first part."""
    with requests.Session() as session:
        times = sorted(session.get(f"{server.address}/ping").elapsed.total_seconds() for _ in range(40))
    assert times[0] < 0.03  # the fastest: this machine does other things too


def test_only_a_sound_version_is_served_on_a_free_port(
    server: Server, project: Path, package: Package, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    assert main(["serve", "small", "--port", str(server.port)]) == 2
    taken = f"agnews-lora: Cannot use port {server.port}: Address already in use. Take another with --port.\n"
    assert capsys.readouterr().err == taken
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
    assert main(["serve", "small", "--version", "7", "--port", port]) == 2
    assert "Cannot use version 7 of small: it is not registered" in capsys.readouterr().err
    assert main(["serve", "small", "--host", "192.0.2.1", "--port", port]) == 2
    assert "Cannot serve on 192.0.2.1: it is no address of this machine" in capsys.readouterr().err
    with monkeypatch.context() as patched:
        patched.setattr(module, "run", lambda application, listener, verbose: None)
        for host, warned in (("0.0.0.0", True), ("localhost", False)):
            assert main(["serve", "small", "--host", host, "--port", port]) == 0
            said = capsys.readouterr()
            assert f"Serving http://{host}:{port}/invocations" in said.out
            assert (f"Warning: {host} is not loopback" in said.err) == warned
    rows = package.reference / ANSWERS
    rows.write_bytes(rows.read_bytes() + b" ")
    assert main(["serve", "small", "--port", port]) == 2
    assert f"reference/{ANSWERS} changed since the registration. Put the files back" in capsys.readouterr().err


def test_ctrl_c_ends_it_at_once(server: Server, project: Path) -> None:
    """Last: the server is gone afterwards. Clients are busy, so that a thread is computing."""
    with ThreadPoolExecutor(3) as clients:
        busy = [clients.submit(server.ask, {"inputs": [SENTENCES[0] * 10] * MAX_TEXTS}) for _ in range(3)]
        requests.get(f"{server.address}/health", timeout=30)
        os.killpg(server.process.pid, signal.SIGINT)
        server.process.wait(20)
        for each in busy:
            assert isinstance(each.exception(), requests.ConnectionError | None)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{server.address}/ping", timeout=5)
    said = (project / "serve.err").read_text()
    assert "agnews-lora: interrupted" in said and "Traceback" not in said
