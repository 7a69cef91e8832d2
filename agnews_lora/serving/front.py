"""The layer in front of MLflow's scoring server: what it may be sent, how many at once, and what of it gets out.

An ASGI application around the one that MLflow makes. MLflow still scores and writes the answer; it is handed texts that
were read and cleaned here, one request at a time. What it says when it fails goes to the log, never to a client: it
quotes tracebacks and paths.
"""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from agnews_lora.errors import DataError
from agnews_lora.serving.markdown import one_line
from agnews_lora.serving.predict import cleaned_texts
from agnews_lora.serving.requests import COLUMN, JSON, MAX_BODY_BYTES, Refusal, read_texts, require_content_type

BODY_SECONDS: Final = 10.0  # for a whole request to arrive
TURN_SECONDS: Final = 30.0  # for the requests before it to be answered
MAX_WAITING: Final = 256  # requests, each with its texts in memory

INVOCATIONS: Final = "/invocations"
METHODS: Final = {INVOCATIONS: "POST", "/ping": "GET", "/health": "GET", "/version": "GET"}
NAMES: Final = ("127.0.0.1", "localhost")

# `error_code` of an answer, beside its status; the names are MLflow's where it has one.
ERROR_CODES: Final = {
    400: "BAD_REQUEST",
    403: "PERMISSION_DENIED",
    404: "ENDPOINT_NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_RETRY: Final = (b"retry-after", b"1")
_CLOSE: Final = (b"connection", b"close")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class _Gone(Exception):
    """The client has left."""


class _Arriving:
    """A request's body on its way. receive: the server's; once the body is complete it waits for the client's end."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self._complete = False

    async def whole(self, announced: int) -> bytes:
        """All of it, if it is of a fair size and comes within a fair time. announced: bytes, as its header says."""
        limit = f"a body takes at most {MAX_BODY_BYTES:,} bytes"
        if announced > MAX_BODY_BYTES:
            raise Refusal(413, f"{limit}, but has {announced:,}; send several requests")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in self._parts():
                    body += part
                    if len(body) > MAX_BODY_BYTES:
                        raise Refusal(413, f"{limit}, but has more; send several requests")
        except TimeoutError as error:
            reason = f"a request must arrive within {BODY_SECONDS:g} s, but did not; send it again"
            raise Refusal(408, reason) from error
        return bytes(body)

    async def drained(self) -> bool:
        """Whether what was left of it arrived, and was thrown away."""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for _ in self._parts():
                    pass
        except TimeoutError:
            return False
        return True

    async def is_abandoned(self) -> bool:
        """Whether the client has left, once all of it is there."""
        end = asyncio.ensure_future(self.receive())
        await asyncio.sleep(0)
        left = end.done()
        end.cancel()
        return left

    async def _parts(self) -> AsyncIterator[bytes]:
        while not self._complete:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            self._complete = not message.get("more_body", False)
            yield message.get("body", b"")


@dataclass(frozen=True)
class _Answer:
    """HTTP's status, what the body is, and the body."""

    status: int
    content: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ((b"content-type", JSON.encode()),)


@dataclass
class Front:
    """The application that a server runs. inner: MLflow's."""

    inner: Application
    _turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    _waiting: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        arriving = _Arriving(receive)
        try:
            _require_known(scope, headers)
            if scope["path"] != INVOCATIONS:
                await self.inner(scope, receive, send)
                return
            await _send(send, await self._invoke(scope, headers, arriving))
        except Refusal as refusal:
            with suppress(_Gone):
                # A client that is still sending when the connection closes would never see the answer, except one that
                # asked first whether to send. Who was too slow once is not waited for again.
                awaited = refusal.status != 408 and b"expect" not in headers
                is_whole = awaited and await arriving.drained()
                await _send(send, _refused(refusal, close=not is_whole))
        except _Gone:
            pass

    async def _invoke(self, scope: Scope, headers: dict[bytes, str], arriving: _Arriving) -> _Answer:
        """What MLflow answers to a request's texts."""
        content_type = require_content_type(headers.get(b"content-type"), headers.get(b"content-encoding"))
        body = await arriving.whole(int(headers.get(b"content-length", "0")))
        texts = read_texts(body, content_type)
        if self._waiting >= MAX_WAITING:
            raise Refusal(503, f"at most {MAX_WAITING} requests may wait, and as many do; send it again later", _RETRY)
        self._waiting += 1
        try:
            async with asyncio.timeout(TURN_SECONDS):
                await self._turn.acquire()
        except TimeoutError as error:
            reason = f"the requests before this one must be answered in {TURN_SECONDS:g} s, but were not; send it again"
            raise Refusal(503, reason, _RETRY) from error
        finally:
            self._waiting -= 1
        try:
            if await arriving.is_abandoned():
                raise _Gone
            return await self._score(scope, await asyncio.to_thread(_prepared, texts), arriving.receive)
        finally:
            self._turn.release()

    async def _score(self, scope: Scope, body: bytes, client: Receive) -> _Answer:
        """Hand MLflow a body, and take its answer. body: JSON that it reads. client: tells when the client leaves."""
        handed = [{"type": "http.request", "body": body, "more_body": False}]
        received: list[Message] = []

        async def receive() -> Message:
            return handed.pop() if handed else await client()

        async def send(message: Message) -> None:
            received.append(message)

        asked = {**scope, "headers": [(b"content-type", JSON.encode()), (b"content-length", b"%d" % len(body))]}
        await self.inner(asked, receive, send)
        status = next((message["status"] for message in received if message["type"] == "http.response.start"), None)
        if status is None:
            raise _Gone
        content = b"".join(message.get("body", b"") for message in received)
        if status == 200:
            return _Answer(200, content)
        logging.getLogger(__name__).error("the model did not answer (%d): %s", status, content.decode())
        if status == 504:
            raise Refusal(504, "the texts must be labelled within MLflow's limit, but were not; send fewer at once")
        raise Refusal(500, "the model could not answer; whoever runs the server finds the reason in its output")


def _require_known(scope: Scope, headers: dict[bytes, str]) -> None:
    """An endpoint there is, by its method, under a name of this machine.

    A page from elsewhere can let its own name point here and read the answers; the name is what it cannot hide.
    """
    host = headers.get(b"host", NAMES[0]).lower()
    if host.rpartition(":")[0] not in NAMES and host not in NAMES:
        raise Refusal(403, f"the header Host must be {' or '.join(NAMES)}, but is another; ask by one of them")
    path, method = scope["path"], scope["method"]
    if path not in METHODS:
        raise Refusal(404, f"there is no such endpoint; there are {', '.join(METHODS)}")
    if method != METHODS[path]:
        allowed = METHODS[path]
        reason = f"{path} takes {allowed}, but the method is {one_line(method)[:20]}; use {allowed}"
        raise Refusal(405, reason, (b"allow", allowed.encode()))


def _prepared(texts: list[str]) -> bytes:
    """The texts as the body that MLflow is handed: cleaned, so that an empty one is found before the model meets it."""
    try:
        rows = [[text] for text in cleaned_texts(texts)]
    except DataError as error:
        raise Refusal(400, str(error)) from error
    return json.dumps({"dataframe_split": {"columns": [COLUMN], "data": rows}}).encode()


def _refused(refusal: Refusal, close: bool) -> _Answer:
    content = json.dumps({"error_code": ERROR_CODES[refusal.status], "message": refusal.reason}, ensure_ascii=False)
    headers = ((b"content-type", JSON.encode()), *refusal.headers, *((_CLOSE,) if close else ()))
    return _Answer(refusal.status, content.encode(), headers)


async def _send(send: Send, answer: _Answer) -> None:
    length = (b"content-length", b"%d" % len(answer.content))
    await send({"type": "http.response.start", "status": answer.status, "headers": [*answer.headers, length]})
    await send({"type": "http.response.body", "body": answer.content})
