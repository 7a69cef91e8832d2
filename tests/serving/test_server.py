"""The server's endpoints with a stand-in for the model that waits or fails, and the reading of requests.

Requests to a real model are in `tests/commands/test_serve.py`.
"""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from agnews_lora.adapters.adapter_files import AdapterRecord
from agnews_lora.adapters.base_models import KNOWN
from agnews_lora.adapters.spec import TrialSpec
from agnews_lora.errors import PromotionError
from agnews_lora.serving import server
from agnews_lora.serving.model_package import Package, ReferenceAnswers
from agnews_lora.serving.predict import Classifier, Prediction
from agnews_lora.serving.server import CSV, JSON, Refusal, read_content_type, read_texts
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.versions import Version
from tests.browser.mlflow_ui import missing, require, visiting

BODY = {"inputs": ["Oil rose."]}
ROBERTA = KNOWN["roberta-base"]
RECORD = AdapterRecord(
    trial="t0007",
    spec=TrialSpec("qv", rank=8, alpha=16, dropout=0.1, learning_rate=1e-3),
    shape=ROBERTA.shape,
    base="roberta-base",
    hub_id=ROBERTA.hub_id,
    revision=ROBERTA.revision,
    weights_sha256=ROBERTA.weights_sha256,
    labels=("World",),
    max_length=64,
    trainable_parameters=888_580,
)


@dataclass
class Model:
    """Answers when it is told to, or fails; keeps the texts it was asked.

    started: released once a request.
    """

    fault: Exception | None = None
    record: AdapterRecord = RECORD
    asked: list[list[str]] = field(default_factory=list)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    go_on: threading.Event = field(default_factory=threading.Event)

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self.asked.append(list(texts))
        self.started.release()
        assert self.go_on.wait(30)
        if self.fault:
            raise self.fault
        return [Prediction("World", {"World": 1.0}) for _ in texts]


@contextmanager
def serving(model: Model, loopback: bool = True) -> Iterator[tuple[str, int]]:
    """(host, port) of a server in this process."""
    version = Version("a <model>", 3, "0" * 32, {}, ())
    application = server.application(model, version, loopback)  # type: ignore[arg-type]
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


def get(address: tuple[str, int], path: str, **headers: str) -> requests.Response:
    return requests.get(f"http://127.0.0.1:{address[1]}{path}", headers=headers, timeout=30)


def send(address: tuple[str, int], body: bytes, announced: int) -> socket.socket:
    connection = socket.create_connection(address, timeout=30)
    head = (
        f"POST /invocations HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON}\r\nContent-Length: {announced}\r\n\r\n"
    )
    connection.sendall(head.encode() + body)
    return connection


def is_busy(answer: requests.Response) -> bool:
    retry = answer.headers.get("retry-after")
    return (answer.status_code, retry, answer.json()["error_code"]) == (503, "1", "TEMPORARILY_UNAVAILABLE")


def test_requests_are_answered_at_the_same_time_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "TURN_SECONDS", 0.2)
    monkeypatch.setattr(server, "MAX_COMPUTED", 2)
    monkeypatch.setattr(server, "MAX_REQUESTS", 3)
    model = Model()
    with serving(model) as address, ThreadPoolExecutor(2) as clients:
        both = [clients.submit(post, address) for _ in range(2)]
        for _ in both:
            assert model.started.acquire(timeout=30), "neither waits for the other"
        assert get(address, "/health").json() == {"status": "ok"}
        assert is_busy(post(address)), "its turn does not come"
        body = json.dumps(BODY).encode()
        with send(address, body[:5], len(body)):
            until = time.monotonic() + 30
            while not (beyond := post(address)).text.count("at most 3 requests"):
                assert is_busy(beyond) and time.monotonic() < until
            assert is_busy(beyond), "all places are taken"
        model.go_on.set()
        assert [each.result().json() for each in both] == [{"predictions": [{"label": "World", "World": 1.0}]}] * 2
        assert post(address).status_code == 200, "the place of each is free again"
    assert model.asked == [["Oil rose."]] * 3


def test_metrics_count_requests_and_labels() -> None:
    model = Model()
    model.go_on.set()
    with serving(model) as address:
        post(address, {"inputs": ["Oil rose.", "Oil fell."]})
        post(address, {"inputs": []})
        get(address, "/of/a/client")
        answer = get(address, "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    counted = {key[1:]: value for key, value in samples.items() if key[0] == "http_request_duration_seconds_count"}
    assert counted == {("/invocations", "200"): 1, ("/invocations", "400"): 1, ("404", "other"): 1}
    assert samples["agnews_lora_texts_total", "World"] == 2
    assert any(key[0] == "agnews_lora_model_info" and "a <model>" in key for key in samples)


def test_version_names_adapter_and_base() -> None:
    with serving(Model()) as address:
        told = get(address, "/version").json()
    assert (told["model"], told["version"]) == ("a <model>", 3)
    assert (
        told["adapter"].items()
        >= {"trial": "t0007", "targets": "qv", "rank": 8, "trainable_parameters": 888_580}.items()
    )
    assert told["base"] == {"name": "FacebookAI/roberta-base", "revision": ROBERTA.revision}


@pytest.mark.parametrize("loopback", [True, False])
def test_other_names_of_this_machine_are_for_servers_beyond_loopback(loopback: bool) -> None:
    with serving(Model(), loopback) as address:
        assert get(address, "/health", Host="box.example:5001").ok != loopback
        assert get(address, "/health", Host="localhost").ok and get(address, "/health", Host="[::1]:80").ok


def test_a_client_that_leaves_is_not_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_COMPUTED", 1)
    model = Model()
    body = json.dumps(BODY).encode()
    with serving(model) as address:
        first = threading.Thread(target=post, args=(address,))
        first.start()
        assert model.started.acquire(timeout=30)
        send(address, body, len(body)).close()  # leaves while it waits
        send(address, body[:5], len(body)).close()  # leaves before all of it is sent
        for _ in range(2):  # the server has seen both leave when it has answered these
            get(address, "/health")
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


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_the_example_of_the_documentation_works_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    model = Model()
    model.go_on.set()
    with serving(model) as (_, port), visiting(tmp_path) as visitor:
        page = visitor.open(f"http://127.0.0.1:{port}/docs", ["a <model>", "/invocations", "/metrics", "/version"])
        page.get_by_text("/invocations", exact=True).click()
        page.get_by_role("button", name="Try it out").click()
        page.get_by_role("button", name="Execute").click()
        require(page, '"label": "World"')
        assert visitor.strangers == visitor.faults == []
    assert model.asked == [["Oil prices rose to a record."]]


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
