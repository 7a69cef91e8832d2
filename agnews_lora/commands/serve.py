"""`agnews-lora serve`: a registered version behind MLflow's scoring server, on loopback."""

import os
import signal
import socket
import sys
from types import FrameType
from typing import Final

from agnews_lora.commands.loopback import HOST, bound
from agnews_lora.config.sweep import load_sweep
from agnews_lora.paths import STORES
from agnews_lora.serving.front import INVOCATIONS
from agnews_lora.serving.predict import champion, verified_package
from agnews_lora.serving.served import Served, serve
from agnews_lora.tracking.registry import Registry
from agnews_lora.tracking.store import open_client, reaching

IDLE_SECONDS: Final = 60  # a client that asks again after a while finds its connection still open
LEAVE_SECONDS: Final = 2  # for answers that are on their way when the server is told to end
EXAMPLE: Final = """-H 'Content-Type: application/json' -d '{"inputs": ["Oil prices rose to a record."]}'"""


def run(sweep: str, version: int | None, merged: bool, port: int, tracking: str | None) -> int:
    """Serve the sweep's champion, or a version, until Ctrl-C. merged: with the adapter in the base's weights.

    Raises:
        StorageError: the port is taken.
        RegistryError: there is no champion or no such version, or its files changed.
        GateError: it does not answer as when it was registered.
    """
    experiment = load_sweep(sweep).experiment
    with bound(port) as listener:
        client = open_client(tracking or STORES)
        registry = Registry(client, experiment.name)
        with reaching(client):
            chosen = champion(registry) if version is None else registry.version(version)
            package = verified_package(registry, chosen)
        served = serve(package, str(chosen), merged)
        way = "the adapter merged into its base" if merged else "the adapter on its base"
        print(
            f"Checked: {chosen}, {way}, gives the labels and logits of its registration on {served.num_rows} rows "
            f"(largest difference {served.difference:.1g})"
        )
        _answer(served, listener)
    return 0


def _answer(served: Served, listener: socket.socket) -> None:
    """Answer until a signal comes."""
    import uvicorn

    config = uvicorn.Config(
        served.application,
        lifespan="off",
        ws="none",
        log_level="error",
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=LEAVE_SECONDS,
    )
    signal.signal(signal.SIGINT, _leave)
    listener.listen()
    address = f"http://{HOST}:{listener.getsockname()[1]}{INVOCATIONS}"
    print(f"Serving {address}  (Ctrl-C ends it)\n  curl {address} {EXAMPLE}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once after Ctrl-C, which uvicorn hands on when it has closed: Python would first wait for a thread that
    still computes an answer, though nobody waits for that any more."""
    print("agnews-lora: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
