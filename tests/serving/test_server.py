"""The server's endpoints with a stand-in for the model that waits or fails, and the reading of requests.

Requests to a real model are in `tests/commands/test_serve.py`.
"""

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
from hypothesis import given
from hypothesis import strategies as st

from agnews_lora.errors import PromotionError
from agnews_lora.serving import server
from agnews_lora.serving.model_package import Package, ReferenceAnswers
from agnews_lora.serving.predict import Classifier, Prediction
from agnews_lora.serving.server import CSV, JSON, Refusal, read_content_type, read_texts
from agnews_lora.tracking.registry import Registry, Version

BODY = {"inputs": ["Oil rose."]}


@dataclass
class Model:
    """Answers when it is told to, or fails; keeps the texts it was asked."""

    fault: Exception | None = None
    asked: list[list[str]] = field(default_factory=list)
    started: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self.asked.append(list(texts))
        self.started.set()
        assert self.go_on.wait(30)
        if self.fault:
            raise self.fault
        return [Prediction("World", {"World": 1.0}) for _ in texts]


@contextmanager
def serving(model: Model) -> Iterator[tuple[str, int]]:
    """(host, port) of a server in this process."""
    application = server.application(model, Version("a <model>", 3, "0" * 32, {}, ()))  # type: ignore[arg-type]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = uvicorn.Server(uvicorn.Config(application, lifespan="off", log_level="error"))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            model.go_on.set()
            running.should_exit = True
            thread.join(20)


def post(address: tuple[str, int], body: Any = BODY) -> requests.Response:
    return requests.post(f"http://127.0.0.1:{address[1]}/invocations", json=body, timeout=30)


def send(address: tuple[str, int], body: bytes, announced: int) -> socket.socket:
    connection = socket.create_connection(address, timeout=30)
    head = (
        f"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nContent-Length: {announced}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def test_one_request_is_answered_after_the_other_and_health_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TURN_SECONDS", 0.2)
    model, answers = Model(), []
    with serving(model) as address:
        first = threading.Thread(target=lambda: answers.append(post(address)))
        first.start()
        assert model.started.wait(30)
        assert requests.get(f"http://127.0.0.1:{address[1]}/health", timeout=30).json() == {"status": "ok"}
        second = post(address)
        assert second.status_code == 503 and second.headers["retry-after"] == "1"
        assert second.json()["error_code"] == "TEMPORARILY_UNAVAILABLE"
        model.go_on.set()
        first.join(30)
        assert answers[0].json() == {"predictions": [{"label": "World", "World": 1.0}]}
        assert post(address).status_code == 200, "the place of each is free again"
    assert model.asked == [["Oil rose."]] * 2


def test_a_client_that_leaves_is_not_answered() -> None:
    model = Model()
    body = json.dumps(BODY).encode()
    with serving(model) as address:
        first = threading.Thread(target=post, args=(address,))
        first.start()
        assert model.started.wait(30)
        send(address, body, len(body)).close()  # leaves while it waits
        send(address, body[:5], len(body)).close()  # leaves before all of it is sent
        for _ in range(2):  # the server has seen both leave when it has answered these
            requests.get(f"http://127.0.0.1:{address[1]}/health", timeout=30)
        model.go_on.set()
        first.join(30)
        assert post(address, {"inputs": ["Last."]}).status_code == 200
    assert model.asked == [["Oil rose."], ["Last."]]


def test_a_fault_stays_inside(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    model = Model(RuntimeError("in /home/somebody"))
    model.go_on.set()
    with serving(model) as address:
        answer = post(address)
    assert answer.status_code == 500 and answer.json()["error_code"] == "INTERNAL_ERROR"
    assert "Traceback" not in answer.text and "somebody" not in answer.text
    assert "RuntimeError: in /home/somebody" in caplog.text + capfd.readouterr().err


def test_a_body_that_does_not_arrive_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_SECONDS", 0.05)
    with serving(Model()) as address, send(address, b"{", 100) as connection:
        answer = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 408 ") and b"REQUEST_TIMEOUT" in answer


def test_the_pages_of_documentation_load_nothing_from_elsewhere() -> None:
    with serving(Model()) as (_, port):
        page = requests.get(f"http://127.0.0.1:{port}/docs", timeout=30)
        schema = requests.get(f"http://127.0.0.1:{port}/openapi.json", timeout=30).json()
    assert page.headers["content-security-policy"] == "default-src 'none'"
    assert f"curl http://127.0.0.1:{port}/invocations" in page.text and "/openapi.json" in page.text
    assert "a &lt;model&gt;, version 3" in page.text and "src=" not in page.text
    assert schema["info"]["title"] == "a <model>, version 3"
    assert set(schema["paths"]) == {"/invocations", "/ping", "/health", "/version"}


@pytest.mark.parametrize(
    ("change", "merged", "reason"),
    [
        (lambda logits: logits + np.float32(5e-5), False, None),
        (
            lambda logits: logits + np.float32(1e-3),
            False,
            r"0 of 64 .* 0\.001, 0\.0001 is .* with --version",
        ),
        (lambda logits: -logits, True, r"64 of 64 fixed rows get another label.*Serve it without --merged"),
        (lambda logits: logits * np.float32("nan"), True, r"the largest difference of logits is nan"),
    ],
)
def test_a_version_that_answers_otherwise_is_not_served(
    small: Registry, change: Callable[[np.ndarray], np.ndarray], merged: bool, reason: str | None
) -> None:
    package = Package.verified(small, small.champion())
    answers = ReferenceAnswers.read(package.reference)

    class Changed(Classifier):
        def __init__(self) -> None:
            pass

        def logits(self, table: Any, batch_size: int = 32) -> np.ndarray:
            return change(answers.logits)

    if reason is None:
        assert server.largest_difference(Changed(), answers, "it", merged) == pytest.approx(5e-5, rel=0.1)
    else:
        with pytest.raises(PromotionError, match=rf"^Cannot serve it: .*{reason}"):
            server.largest_difference(Changed(), answers, "it", merged)


DOCUMENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["inputs", "instances", "dataframe_split", "dataframe_records", "columns", "data", "text", "x"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


def read(body: bytes, kind: str = JSON) -> Refusal | list[str]:
    try:
        return read_texts(body, kind)
    except Refusal as refusal:
        return refusal


@given(DOCUMENTS)
def test_any_json_is_texts_or_a_refusal(document: Any) -> None:
    found = read(json.dumps(document).encode())
    if isinstance(found, Refusal):
        assert found.status_code in (400, 413) and found.detail
    else:
        assert found and all(isinstance(text, str) for text in found)


@given(st.binary(max_size=60), st.sampled_from([JSON, CSV]))
def test_any_bytes_are_texts_or_a_refusal(body: bytes, kind: str) -> None:
    found = read(body, kind)
    assert isinstance(found, list) or found.status_code == 400


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5))
def test_texts_are_read_as_they_were_sent(texts: list[str]) -> None:
    assert read_texts(json.dumps({"inputs": texts}).encode(), JSON) == texts


WRONG: list[tuple[bytes | Any, int, str]] = [
    (b"", 400, "must be JSON"),
    (b'{"inputs": ["Oil" "rose"]}', 400, "line 1, column 19"),
    (b"\xff\xfe\x00", 400, "must be UTF-8"),
    (b'"Oil rose."', 400, "is a string"),
    (b'{"inputs": ["a"], "inputs": ["b"]}', 400, "a key only once"),
    ({}, 400, "but has none"),
    ({"texts": ["Oil"]}, 400, "but has 'texts'"),
    ({"inputs": ["Oil"], "instances": ["Oil"]}, 400, "but has 'inputs', 'instances'"),
    ({"inputs": ["Oil"], "params": {"temperature": 1}}, 400, "but has 'inputs', 'params'"),
    ({"inputs": "Oil"}, 400, "are a string"),
    ({"inputs": {"txt": ["Oil"]}}, 400, "are an object"),
    ({"inputs": []}, 400, "at least one text"),
    ({"inputs": ["Oil", 7]}, 400, "text 1 (counted from 0) is a number"),
    ({"inputs": [None]}, 400, "text 0 (counted from 0) is null"),
    ({"inputs": ["Oil", {"text": "Oil"}]}, 400, "is an object"),
    ({"inputs": [{"text": "Oil"}, "Oil"]}, 400, "record 1 (counted from 0) is a string"),
    ({"dataframe_records": [{"text": "Oil"}, {"txt": "Oil"}]}, 400, "record 1 (counted from 0) has no key `text`"),
    ({"dataframe_split": {"columns": ["txt"], "data": [["Oil"]]}}, 400, "`columns`"),
    ({"dataframe_split": {"columns": ["text"], "data": ["Oil"]}}, 400, "`data`"),
    ({"dataframe_split": {"columns": ["text"], "data": [["Oil", "rose"]]}}, 400, "`data`"),
    (b'{"inputs": ' + b"[" * 100_000, 400, "nests too deeply"),
    (b'{"inputs": [' + b"1" * 5_000 + b"]}", 400, "too long a number"),
    ({"inputs": ["Oil"] * (server.MAX_TEXTS + 1)}, 413, "at most 256 texts, but has 257"),
]
WRONG_CSV = [
    (b"Oil rose.\n", "at least one text"),
    (b"title\nOil rose.\n", "record 0 (counted from 0) has no key `text`"),
    (b'text\n"Oil', "must be CSV"),
    (b"text\nOil, rose\n", "row 1 must have as many fields as the first line"),
    (b"text\n", "at least one text"),
]


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [(*row[:1], JSON, *row[1:]) for row in WRONG] + [(body, CSV, 400, words) for body, words in WRONG_CSV],
)
def test_wrong_input_is_refused_with_a_short_reason(body: Any, kind: str, status: int, words: str) -> None:
    found = read(body if isinstance(body, bytes) else json.dumps(body).encode(), kind)
    assert isinstance(found, Refusal) and found.status_code == status
    assert words in found.detail and len(found.detail) < 500


@pytest.mark.parametrize(
    ("given_type", "kind"),
    [("application/json", JSON), ("Application/JSON; charset=utf-8", JSON), ('text/csv;charset="UTF-8"', CSV)],
)
def test_content_types_are_read_as_http_has_them(given_type: str, kind: str) -> None:
    assert read_content_type(given_type, None) == read_content_type(given_type, "identity") == kind


@pytest.mark.parametrize(
    ("kind", "encoding", "words"),
    [
        *((kind, None, "Content-Type must be application/json or text/csv") for kind in (None, "", "text/plain")),
        ("application/json2", None, "but is 'application/json2'"),
        ("a/b\x1b[31m\n" + "x" * 1_000, None, "Content-Type must be"),
        ("application/json; charset=latin-1", None, "charset must be utf-8"),
        ("application/json", "gzip", "Content-Encoding is 'gzip'"),
    ],
)
def test_another_content_type_is_refused(kind: str | None, encoding: str | None, words: str) -> None:
    with pytest.raises(Refusal) as refusal:
        read_content_type(kind, encoding)
    assert refusal.value.status_code == 415 and words in refusal.value.detail
    assert len(refusal.value.detail) < 200 and refusal.value.detail.isprintable()
