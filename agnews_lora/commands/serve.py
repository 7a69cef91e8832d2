"""`agnews-lora serve`: a registered version over HTTP, on loopback."""

import os
import signal
import socket
import sys
from types import FrameType
from typing import Final

from agnews_lora.config.experiment import Experiment
from agnews_lora.errors import StorageError
from agnews_lora.paths import temporary_files

HOST: Final = "127.0.0.1"
EXAMPLE: Final = """-H 'Content-Type: application/json' -d '{"inputs": ["Oil prices rose to a record."]}'"""


def run(experiment: Experiment, version: int | None, merged: bool, port: int, tracking: str | None) -> int:
    """Serve the experiment's champion, or a version, until Ctrl-C. merged: with the adapter in the base's weights.

    Raises:
        StorageError: the port is taken.
        RegistryError: there is no champion or no such version, or its files changed.
        PromotionError: it answers otherwise than when it was registered.
    """
    from agnews_lora.commands.predict import registered
    from agnews_lora.serving import server
    from agnews_lora.serving.model_package import ReferenceAnswers
    from agnews_lora.serving.predict import Classifier

    with bound(port) as listener:
        with temporary_files():
            package = registered(experiment, tracking, version)
            classifier = Classifier.load(package, merged)
            answers = ReferenceAnswers.read(package.reference)
        difference = server.largest_difference(classifier, answers, str(package.version), merged)
        way = "the adapter merged into its base" if merged else "the adapter on its base"
        print(
            f"Checked: {package.version}, {way}, gives the labels and logits of its registration on "
            f"{len(answers.rows)} rows (largest difference {difference:.1g})"
        )
        signal.signal(signal.SIGINT, _leave)
        listener.listen()
        address = f"http://{HOST}:{listener.getsockname()[1]}{server.INVOCATIONS}"
        print(f"Serving {address}  (Ctrl-C ends it)\n  curl {address} {EXAMPLE}", flush=True)
        server.run(server.application(classifier, package.version), listener)
    return 0


def bound(port: int) -> socket.socket:
    """The port of this machine alone, taken but not answering yet: a connection before it listens is refused at once.

    Raises:
        StorageError: it is taken.
    """
    # With its protocol named, asyncio sends an answer's parts at once; else each waits 40 ms for the one before.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        listener.close()
        raise StorageError(f"Cannot use port {port}: {error.strerror}. Take another with --port.") from error
    return listener


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once after Ctrl-C, which uvicorn hands on when it has closed.

    Python would first wait for the thread that computes an answer, though nobody waits for that any more.
    """
    print("agnews-lora: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
