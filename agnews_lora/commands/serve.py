"""`agnews-lora serve`: a registered version over HTTP, on loopback or the host's address that is named."""

import errno
import ipaddress
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


def run(
    experiment: Experiment,
    version: int | None,
    merged: bool,
    host: str,
    port: int,
    verbose: bool,
    tracking: str | None,
) -> int:
    """Serve the experiment's champion, or a version, until Ctrl-C.

    Args:
        merged: with the adapter in the base's weights.
        verbose: print a line each request.

    Raises:
        StorageError: the port is taken, or the host is no address of this machine.
        RegistryError: there is no champion or no such version, or its files changed.
        PromotionError: it answers otherwise than when it was registered.
    """
    from agnews_lora.commands.predict import registered
    from agnews_lora.serving import server
    from agnews_lora.serving.model_package import ReferenceAnswers
    from agnews_lora.serving.predict import Classifier
    from agnews_lora.serving.reload import full_precision

    # The precision is the whole process's: held here, it is not changed while requests overlap.
    with bound(port, host) as listener, full_precision():
        address, port = listener.getsockname()[:2]
        loopback = ipaddress.ip_address(address).is_loopback
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
        if not loopback:
            print(
                f"Warning: {host} is not loopback. The server has no password and no encryption: everyone who reaches "
                f"port {port} of this machine can ask it.",
                file=sys.stderr,
            )
        root = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        url = f"{root}{server.INVOCATIONS}"
        print(f"Serving {url}  (Ctrl-C ends it)\nTry it: {root}/docs\n  curl {url} {EXAMPLE}", flush=True)
        server.run(server.application(classifier, package.version, loopback), listener, verbose)
    return 0


def bound(port: int, host: str = HOST) -> socket.socket:
    """A port of this machine, taken but not answering yet: a connection before it listens is refused at once.

    Raises:
        StorageError: it is taken, or the host is no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise StorageError(
            f"Cannot serve on {host}: no such host. Name an address of this machine with --host."
        ) from error
    # With its protocol named, asyncio sends an answer's parts at once; else each waits 40 ms for the one before.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRNOTAVAIL:
            reason = f"Cannot serve on {host}: it is no address of this machine. Name another with --host."
        else:
            reason = f"Cannot use port {port}: {error.strerror}. Take another with --port."
        raise StorageError(reason) from error
    return listener


def _leave(number: int, frame: FrameType | None) -> None:
    """End at once after Ctrl-C, which uvicorn hands on when it has closed.

    Python would first wait for the thread that computes an answer, though nobody waits for that any more.
    """
    print("agnews-lora: interrupted", file=sys.stderr, flush=True)
    os._exit(130)
