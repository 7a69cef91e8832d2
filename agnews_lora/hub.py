"""Whether the Hugging Face hub can be reached, and one message where it cannot.

The hub's own client retries for most of a minute before it gives up, so it is probed before each download.
"""

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from agnews_lora.errors import NetworkError, StorageError

PROBE_SECONDS: Final = 2.0


def reachable() -> bool:
    """Whether the hub answers within `PROBE_SECONDS`; False where `HF_HUB_OFFLINE` forbids asking.

    Any HTTP answer counts. It is waited for in a thread, since looking up a host name knows no time limit.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answers: list[int] = []

    def ask() -> None:
        try:
            answers.append(get_session().head(constants.ENDPOINT, timeout=PROBE_SECONDS).status_code)
        except Exception:  # the client's transport has its own exceptions: whatever it says, there was no answer
            return

    probe = threading.Thread(target=ask, name="hub-probe", daemon=True)
    probe.start()
    probe.join(PROBE_SECONDS)
    return bool(answers)


def require_reachable(what: str, remedy: str) -> None:
    """Check that the hub answers.

    Args:
        what: what is needed from the hub.
        remedy: what to do without it, as a sentence.

    Raises:
        NetworkError: it does not answer, or `HF_HUB_OFFLINE` is set.
    """
    if reachable():
        return
    from huggingface_hub import constants

    reason = (
        "HF_HUB_OFFLINE is set, so the hub is not asked"
        if constants.HF_HUB_OFFLINE
        else f"the hub ({constants.ENDPOINT}) cannot be reached"
    )
    raise NetworkError(f"Cannot get {what}: it is not on this machine, and {reason}. {remedy}")


@contextmanager
def downloading(what: str, remedy: str) -> Iterator[None]:
    """Check that the hub answers, and turn the errors of a download into one message.

    Args:
        what, remedy: as for `require_reachable`.

    Raises:
        StorageError: the local cache cannot be written.
        NetworkError: the hub does not answer, or the download failed.
    """
    require_reachable(what, remedy)
    try:
        yield
    except Exception as error:  # the clients raise errors of several HTTP libraries, which share no root
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            raise StorageError(f"Cannot store {what} in the cache: {error}. Free or unlock that folder.") from error
        said = (str(error).splitlines() or [""])[0]
        raise NetworkError(f"Cannot download {what}: {type(error).__name__}: {said}. {remedy}") from error
