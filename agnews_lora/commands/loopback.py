"""A port of this machine alone: what the project's servers listen on."""

import socket
from typing import Final

from agnews_lora.errors import StorageError

HOST: Final = "127.0.0.1"


def bound(port: int) -> socket.socket:
    """The port, taken but not answering yet: who connects before it listens is refused at once.

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
        raise StorageError(f"port {port} cannot be used ({error.strerror}); take another with --port") from error
    return listener
