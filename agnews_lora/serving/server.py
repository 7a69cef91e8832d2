"""The HTTP server: labels for texts, in the forms that MLflow's scoring server takes and gives.

Requests are read strictly: a client gets labels, or one sentence that names the fault, never a traceback or a path.
"""

import asyncio
import copy
import csv
import io
import json
import socket
import time
from typing import Any, Final

import numpy as np
import uvicorn
from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import LOGGING_CONFIG

import agnews_lora
from agnews_lora.errors import DataError, PromotionError
from agnews_lora.serving.model_package import LARGEST_DIFFERENCE, ReferenceAnswers
from agnews_lora.serving.predict import Classifier
from agnews_lora.tracking.descriptions import code, one_line
from agnews_lora.tracking.versions import Version

INVOCATIONS: Final = "/invocations"
LOOPBACK_NAMES: Final = ("127.0.0.1", "localhost", "[::1]")

# Together they bound the cost of a request: on two CPU cores, seconds for MiniLM and half a minute for `roberta-base`.
MAX_BODY_BYTES: Final = 2 * 1024 * 1024  # the longest text that may be has half of it, as JSON escapes it
MAX_TEXTS: Final = 256
BODY_SECONDS: Final = 10.0  # for a whole request to arrive
TURN_SECONDS: Final = 30.0  # for the requests before it to be answered
MAX_REQUESTS: Final = 256  # that arrive, wait or are computed
MAX_COMPUTED: Final = 4  # at the same time: a short request does not wait for a long one
IDLE_SECONDS: Final = 60  # a client that asks again after a while finds its connection still open
SHUTDOWN_SECONDS: Final = 2

JSON: Final = "application/json"
CSV: Final = "text/csv"
COLUMN: Final = "text"
_FORMATS: Final = ("inputs", "instances", "dataframe_split", "dataframe_records")
_WANTED: Final = 'send {"inputs": ["a text", "another"]}'

# `error_code` of an answer, beside its status; the names are MLflow's where it has one.
_ERROR_CODES: Final = {
    404: "ENDPOINT_NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    408: "REQUEST_TIMEOUT",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    500: "INTERNAL_ERROR",
    503: "TEMPORARILY_UNAVAILABLE",
}
_REQUEST_SCHEMA: Final = {
    "requestBody": {
        "required": True,
        "content": {
            JSON: {
                "schema": {
                    "type": "object",
                    "properties": {"inputs": {"type": "array", "items": {"type": "string"}, "maxItems": MAX_TEXTS}},
                    "required": ["inputs"],
                },
                "example": {"inputs": ["Oil prices rose to a record."]},
            },
            CSV: {"schema": {"type": "string"}, "example": "text\nOil prices rose to a record.\n"},
        },
    }
}


class Refusal(HTTPException):
    """A request that is not answered: a status, and one sentence that quotes nothing at length."""

    @property
    def body(self) -> dict[str, str]:
        return {"error_code": _ERROR_CODES.get(self.status_code, "BAD_REQUEST"), "message": self.detail}


def largest_difference(classifier: Classifier, answers: ReferenceAnswers, name: str, merged: bool) -> float:
    """Ask for the fixed rows again, and compare the logits with the recorded ones.

    Merging moves every weight by its rounding in fp32, which moves the logits by far less than the limit.

    Args:
        name: the version's, for the message.

    Raises:
        PromotionError: a label differs, or a logit differs by more than `LARGEST_DIFFERENCE`, or is no number.
    """
    logits = classifier.logits(answers.table)
    difference = answers.largest_difference(logits)
    others = int(np.sum(logits.argmax(axis=-1) != answers.logits.argmax(axis=-1)))
    if others or not difference <= LARGEST_DIFFERENCE:
        remedy = "Serve it without --merged." if merged else "Serve another one with --version."
        raise PromotionError(
            f"Cannot serve {name}: it answers otherwise than when it was registered ({others} of {len(logits)} fixed "
            f"rows get another label, the largest difference of logits is {difference:.2g}, {LARGEST_DIFFERENCE:g} is "
            f"allowed). {remedy}"
        )
    return difference


def run(application: FastAPI, listener: socket.socket, verbose: bool) -> None:
    """Answer on a bound socket until SIGINT or SIGTERM. verbose: a line each request on standard output."""
    logging = copy.deepcopy(LOGGING_CONFIG)
    logging["formatters"]["access"]["fmt"] = '%(asctime)s %(client_addr)s "%(request_line)s" %(status_code)s'
    logging["loggers"]["uvicorn"]["level"] = "ERROR"
    config = uvicorn.Config(
        application,
        lifespan="off",
        ws="none",
        log_config=logging,
        access_log=verbose,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    uvicorn.Server(config).run(sockets=[listener])


class Measured:
    """Count and time the requests to an application, by endpoint and status."""

    def __init__(self, app: ASGIApp, registry: CollectorRegistry) -> None:
        self._app = app
        self._seconds = Histogram(
            "http_request_duration_seconds",
            "Time from a request's first line to the end of its answer",
            ("path", "status"),
            registry=registry,
            buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 500

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, sending)
        finally:
            path = getattr(scope.get("route"), "path", "other")  # a path that no endpoint has is a client's own word
            self._seconds.labels(path, status).observe(time.perf_counter() - began)


def application(classifier: Classifier, version: Version, loopback: bool = True) -> FastAPI:
    """The server's endpoints.

    Args:
        loopback: refuse names of other hosts. A page from elsewhere can let its own name point to this machine and
            read the answers; it cannot hide that name.
    """
    record, registry = classifier.record, CollectorRegistry()
    app = FastAPIOffline(
        title="agnews-lora",
        description=f"Labels for texts, by {code(version)}.",
        version=agnews_lora.__version__,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=LOOPBACK_NAMES if loopback else ["*"])
    app.add_middleware(Measured, registry=registry)
    ProcessCollector(registry=registry)
    Info("agnews_lora_model", "The version that is served", registry=registry).info(
        {"model": version.model, "version": str(version.number), "base": record.hub_id, "trial": record.trial}
    )
    labelled = Counter("agnews_lora_texts", "Texts answered, by their label", ("label",), registry=registry)
    places, turns = asyncio.Semaphore(MAX_REQUESTS), asyncio.Semaphore(MAX_COMPUTED)

    shown = {"predictions": [{"label": record.labels[0], **dict.fromkeys(record.labels, 0.0), record.labels[0]: 1.0}]}

    @app.post(INVOCATIONS, openapi_extra=_REQUEST_SCHEMA, responses={200: {"content": {JSON: {"example": shown}}}})
    async def invocations(request: Request) -> JSONResponse:
        """Label texts, in order: a label each, and the probability of every label."""
        if places.locked():
            raise _busy(f"at most {MAX_REQUESTS} requests are taken at the same time")
        async with places:
            content_type = read_content_type(*map(request.headers.get, ("content-type", "content-encoding")))
            texts = read_texts(await _read_body(request), content_type)
            try:
                async with asyncio.timeout(TURN_SECONDS):
                    await turns.acquire()
            except TimeoutError as error:
                reason = f"the requests before this one must be answered in {TURN_SECONDS:g} s, but were not"
                raise _busy(reason) from error
            try:
                if await request.is_disconnected():
                    raise ClientDisconnect
                predictions = await run_in_threadpool(classifier.predict, texts)
            except DataError as error:
                raise Refusal(400, str(error)) from error
            finally:
                turns.release()
        for each in predictions:
            labelled.labels(each.label).inc()
        return JSONResponse({"predictions": [each.row() for each in predictions]})

    @app.get("/ping")
    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/version")
    async def served() -> dict[str, Any]:
        return {
            "model": version.model,
            "version": version.number,
            "adapter": {
                "trial": record.trial,
                **record.spec.as_dict(),
                "trainable_parameters": record.trainable_parameters,
            },
            "base": {"name": record.hub_id, "revision": record.revision},
            "agnews_lora": agnews_lora.__version__,
        }

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> JSONResponse:
        routing = {
            404: "there is no such endpoint; /docs lists them",
            405: f"this endpoint takes {(error.headers or {}).get('Allow')}; use that method",
        }
        refusal = Refusal(error.status_code, routing.get(error.status_code, error.detail), error.headers)
        return JSONResponse(refusal.body, refusal.status_code, refusal.headers)

    @app.exception_handler(ClientDisconnect)
    async def leave(request: Request, error: ClientDisconnect) -> JSONResponse:
        return JSONResponse({}, 400)  # nobody reads it

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:  # uvicorn logs the traceback
        return JSONResponse(Refusal(500, "the model could not answer; the server's output has the reason").body, 500)

    return app


def _busy(reason: str) -> Refusal:
    return Refusal(503, f"{reason}; send it again", {"Retry-After": "1"})


async def _read_body(request: Request) -> bytes:
    """The body, if it is of a fair size and comes within a fair time.

    A longer one is read to its end and thrown away: a client that is still sending would not see the answer.
    """
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size <= MAX_BODY_BYTES:
                    body += part
    except TimeoutError as error:
        reason = f"a request must arrive within {BODY_SECONDS:g} s, but did not; send it again"
        raise Refusal(408, reason, {"Connection": "close"}) from error
    if size > MAX_BODY_BYTES:
        raise Refusal(413, f"a body takes at most {MAX_BODY_BYTES:,} bytes, but has {size:,}; send several requests")
    return bytes(body)


def read_content_type(given: str | None, encoding: str | None) -> str:
    """`JSON` or `CSV`, from the headers Content-Type and Content-Encoding.

    Raises:
        Refusal: 415 for anything else.
    """
    kind, *parameters = [part.strip().lower() for part in (given or "").split(";")]
    if kind not in (JSON, CSV):
        found = f"is {_short(given)}" if given else "is missing"
        raise Refusal(415, f"the header Content-Type must be {JSON} or {CSV}, but {found}; set it")
    charsets = [part.removeprefix("charset=").strip('"') for part in parameters if part.startswith("charset=")]
    if any(charset not in ("utf-8", "utf8") for charset in charsets):
        raise Refusal(415, f"the charset must be utf-8, but is {_short(charsets[0])}; convert the body")
    if (encoding or "identity").strip().lower() != "identity":
        raise Refusal(415, f"a body must not be encoded, but its Content-Encoding is {_short(encoding)}; send it plain")
    return kind


def read_texts(body: bytes, content_type: str) -> list[str]:
    """The texts in a request's body, in order.

    As JSON `{"inputs": …}` or `{"instances": …}` with a list of texts, a list of records or `{"text": […]}`; that list
    alone; or MLflow's `{"dataframe_records": […]}` and `{"dataframe_split": {"columns": […], "data": […]}}`. As CSV
    with a first line that names a column `text`. Other columns and keys are not read.

    Raises:
        Refusal: 400 for anything else, 413 for too many texts.
    """
    try:
        decoded = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body must be UTF-8, but is not (byte {error.start}); convert it") from error
    texts = _csv_texts(decoded) if content_type == CSV else _json_texts(decoded)
    if not texts:
        raise Refusal(400, f"at least one text is needed, but there is none; {_WANTED}")
    if len(texts) > MAX_TEXTS:
        raise Refusal(413, f"a request takes at most {MAX_TEXTS} texts, but has {len(texts):,}; send several")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise Refusal(400, f"every text must be a string, but text {index} (counted from 0) is {_kind(text)}")
    return texts


def _json_texts(decoded: str) -> list[Any]:
    try:
        document = json.loads(decoded, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise Refusal(400, f"the body must be JSON, but is not ({error.msg}, {place}); {_WANTED}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        reason = f"the body must be plain JSON, but nests too deeply or has too long a number; {_WANTED}"
        raise Refusal(400, reason) from error
    if isinstance(document, list):
        return _listed(document)
    if not isinstance(document, dict):
        raise Refusal(400, f"the body must be an object or a list, but is {_kind(document)}; {_WANTED}")
    if not document.get("params"):  # MLflow's clients send an empty one
        document.pop("params", None)
    if len(document) != 1 or not document.keys() <= set(_FORMATS):
        found = ", ".join(_short(key) for key in list(document)[:5]) or "none"
        raise Refusal(400, f"the object must have one key of {', '.join(_FORMATS)}, but has {found}; {_WANTED}")
    [(key, value)] = document.items()
    return _split(value) if key == "dataframe_split" else _listed(value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise Refusal(400, "an object must have a key only once, but has one twice; leave one out")
    return document


def _listed(value: Any) -> list[Any]:
    """A list of texts or of records, or a column of texts."""
    if isinstance(value, dict) and isinstance(value.get(COLUMN), list):
        return list(value[COLUMN])
    if not isinstance(value, list):
        raise Refusal(400, f"the texts must be a list, but are {_kind(value)}; {_WANTED}")
    if not value or not isinstance(value[0], dict):
        return value
    for index, record in enumerate(value):
        if not isinstance(record, dict) or COLUMN not in record:
            found = f"has no key `{COLUMN}`" if isinstance(record, dict) else f"is {_kind(record)}"
            place = f"record {index} (counted from 0)"
            raise Refusal(400, f'every record must be {{"{COLUMN}": "a text"}}, but {place} {found}; add it')
    return [record[COLUMN] for record in value]


def _split(value: Any) -> list[Any]:
    """The texts in a table of named columns."""
    match value:
        case {"columns": list(columns), "data": list(rows)} if columns.count(COLUMN) == 1:
            if all(isinstance(row, list) and len(row) == len(columns) for row in rows):
                return [row[columns.index(COLUMN)] for row in rows]
    raise Refusal(
        400,
        f"`dataframe_split` must be an object with `columns`, among them `{COLUMN}` once, and `data`, a list of rows "
        f'as long; send {{"dataframe_split": {{"columns": ["{COLUMN}"], "data": [["a text"]]}}}}',
    )


def _csv_texts(decoded: str) -> list[Any]:
    wanted = f"send a first line that names a column `{COLUMN}`, and a row each text, quoted where it has commas"
    try:
        records = list(csv.DictReader(io.StringIO(decoded, newline=""), strict=True))
    except (csv.Error, ValueError) as error:
        raise Refusal(400, f"the body must be CSV, but is not ({_short(str(error))}); {wanted}") from error
    for number, record in enumerate(records, start=1):
        if None in record or None in record.values():  # a field too many, or too few
            raise Refusal(400, f"row {number} must have as many fields as the first line, but has not; {wanted}")
    return _listed(records)


def _kind(value: Any) -> str:
    """A JSON value's type, in JSON's words."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names[type(value)]


def _short(value: str | None) -> str:
    """A client's own word, for a message: on one line, and cut."""
    line = one_line(value or "")
    return repr(line if len(line) <= 40 else f"{line[:40]}…")
