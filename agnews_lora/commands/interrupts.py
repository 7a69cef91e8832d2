"""What asks for a stop: Ctrl-C and SIGTERM (a second Ctrl-C leaves at once), and the death of a worker's supervisor."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

ORPHAN_SECONDS: Final = 3.0


class StopRequest:
    """Whether a stop was asked for, and by which signal."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __bool__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + (self.signal or 0)


@contextmanager
def orderly_stop() -> Iterator[StopRequest]:
    """While inside, SIGINT and SIGTERM only set the request; a second SIGINT raises KeyboardInterrupt."""
    request = StopRequest()

    def handle(number: int, frame: FrameType | None) -> None:
        if request and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.signal = number

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Supervisor:
    """The sweep that started this worker, watched through a pipe that ends when it does, however it ends.

    owner: what this worker's leases are held in the name of. Once the supervisor is gone, the worker is to stop, and
    is ended where it has not after `ORPHAN_SECONDS`: a trial then goes on from its last checkpoint.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.is_gone = False
        threading.Thread(target=self._watch, name="supervisor", daemon=True).start()

    def _watch(self) -> None:
        while os.read(0, 1):
            pass
        self.is_gone = True
        # Its SIGALRM ends the process even while Python shuts down, when this thread runs no more.
        signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)
