"""The layer in front of MLflow, with a stand-in for MLflow that fails, is slow, or repeats what it is handed."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from agnews_lora.serving import front
from agnews_lora.serving.front import Front

BODY = b'{"inputs": ["Oil &amp; gas  rose."]}'
HEADERS = [(b"host", b"127.0.0.1:5001"), (b"content-type", b"application/json")]


class Client:
    """Sends the parts of a body, then stays, leaves, or sends nothing more; keeps what it gets."""

    def __init__(self, *parts: bytes, leaves: bool = False, stalls: bool = False, headers: Any = ()) -> None:
        self.messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
        if self.messages and not stalls:
            self.messages[-1]["more_body"] = False
        self.leaves = leaves
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/invocations",
            "headers": [*HEADERS, *headers],
        }
        self.got: list[dict[str, Any]] = []

    async def receive(self) -> dict[str, Any]:
        if self.messages:
            return self.messages.pop(0)
        if not self.leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.got.append(message)

    async def ask(self, application: Front) -> "Client":
        await asyncio.wait_for(application(self.scope, self.receive, self.send), 5)
        return self

    @property
    def status(self) -> int:
        return int(self.got[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.got[0]["headers"])

    @property
    def answer(self) -> Any:
        return json.loads(self.got[1]["body"])


def scorer(status: int, content: bytes, handed: list[Any] | None = None, pause: float = 0.0) -> Any:
    async def inner(scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Awaitable[None]]) -> None:
        message = await receive()
        if handed is not None:
            handed.append((scope["headers"], json.loads(message["body"])))
        await asyncio.sleep(pause)
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": content})

    return inner


def test_mlflow_is_handed_cleaned_texts_and_its_answer_is_passed_on() -> None:
    handed: list[Any] = []
    client = asyncio.run(Client(BODY[:9], BODY[9:]).ask(Front(scorer(200, b'{"predictions": []}', handed))))
    assert client.status == 200 and client.answer == {"predictions": []}
    [(headers, body)] = handed
    assert body == {"dataframe_split": {"columns": ["text"], "data": [["Oil & gas rose."]]}}
    assert dict(headers)[b"content-type"] == b"application/json"


@pytest.mark.parametrize(("inner", "outer"), [(400, 500), (500, 500), (415, 500), (504, 504)])
def test_what_mlflow_says_when_it_fails_stays_inside(inner: int, outer: int, caplog: pytest.LogCaptureFixture) -> None:
    client = asyncio.run(Client(BODY).ask(Front(scorer(inner, b"Traceback: /home/somebody"))))
    assert client.status == outer
    assert client.answer["error_code"] == {500: "INTERNAL_ERROR", 504: "DEADLINE_EXCEEDED"}[outer]
    assert b"Traceback" not in client.got[1]["body"]
    assert "Traceback: /home/somebody" in caplog.text


def test_a_body_that_does_not_arrive_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "BODY_SECONDS", 0.05)
    client = asyncio.run(Client(BODY[:9], stalls=True).ask(Front(scorer(200, b"{}"))))
    assert client.status == 408 and client.headers[b"connection"] == b"close"


def test_what_is_refused_is_read_to_its_end_so_that_the_answer_arrives() -> None:
    client = Client(*[b"x" * 100_000] * 20, headers=[(b"content-length", b"2000000")])
    asyncio.run(client.ask(Front(scorer(200, b"{}"))))
    assert client.status == 413 and client.messages == [] and b"connection" not in client.headers


def test_a_client_that_asks_first_is_refused_before_it_sends() -> None:
    client = Client(b"x" * 10, headers=[(b"content-length", b"2000000"), (b"expect", b"100-continue")])
    asyncio.run(client.ask(Front(scorer(200, b"{}"))))
    assert client.status == 413 and client.messages and client.headers[b"connection"] == b"close"


def test_a_client_that_leaves_is_not_scored() -> None:
    handed: list[Any] = []
    application = Front(scorer(200, b"{}", handed))
    assert asyncio.run(Client(BODY, leaves=True).ask(application)).got == []
    assert asyncio.run(Client(BODY[:9], stalls=True, leaves=True).ask(application)).got == []
    assert handed == []


def test_too_many_waiting_and_too_long_a_wait_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "MAX_WAITING", 2)
    monkeypatch.setattr(front, "TURN_SECONDS", 0.2)

    async def together() -> list[int]:
        application = Front(scorer(200, b"{}", pause=0.5))
        clients = await asyncio.gather(*(Client(BODY).ask(application) for _ in range(4)))
        assert all(client.headers[b"retry-after"] == b"1" for client in clients if client.status == 503)
        last = await Client(BODY).ask(application)  # the place of each is free again
        return [client.status for client in (*clients, last)]

    assert asyncio.run(together()) == [200, 503, 503, 503, 200]
