"""The Hugging Face hub: whether it can be reached, which commit a revision means, and its data sets.

The hub's own client retries for most of a minute before it gives up, so it is probed before each download. A branch
moves, so a revision is resolved once a project: the commit is recorded in `RECORD`, and used by every later start.
"""

import errno
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from agnews_lora.errors import AgnewsLoraError, DataError, NetworkError, StorageError
from agnews_lora.paths import STORES, locked, write_whole

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder

PROBE_SECONDS: Final = 2.0
RECORD: Final = STORES / "hub.json"
BRANCH: Final = "main"  # the default branch of every repository on the hub
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")

Kind = Literal["model", "dataset"]


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
    with _translated(what, remedy):
        yield


@contextmanager
def _translated(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except AgnewsLoraError:
        raise
    except Exception as error:  # the clients raise errors of several HTTP libraries, which share no root
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC):
            raise StorageError(f"Cannot store {what} in the cache: {error}. Free or unlock that folder.") from error
        said = (str(error).splitlines() or [""])[0]
        raise NetworkError(f"Cannot download {what}: {type(error).__name__}: {said}. {remedy}") from error


def is_commit(revision: str) -> bool:
    """Whether a revision names one commit for ever, and no branch or tag."""
    return _COMMIT.fullmatch(revision) is not None


def recorded(key: str) -> dict[str, str]:
    """The project's record of a key; empty where it has none.

    Raises:
        StorageError: the file is not one that `record` wrote.
    """
    if not RECORD.exists():
        return {}
    try:
        entry = json.loads(RECORD.read_text(encoding="utf-8")).get(key, {})
        if not all(isinstance(each, str) for each in dict(entry).values()):
            raise ValueError("a value is no text")
        return dict(entry)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise StorageError(
            f"Cannot read {RECORD}, which holds the commits of this project's models and data sets: {error}. Put it "
            "back, or delete it: revisions are then resolved again."
        ) from error


def record(key: str, **values: str) -> dict[str, str]:
    """Add values to the project's record of a key; those that are recorded already stay.

    Returns:
        all recorded values of the key.

    Raises:
        StorageError: the record cannot be written.
    """
    try:
        with locked(STORES / "lock"):  # another process may record at the same time
            entry = {**values, **recorded(key)}
            everything = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
            if everything.get(key) != entry:
                write_whole(RECORD, json.dumps({**everything, key: entry}, indent=2) + "\n")
    except OSError as error:
        raise StorageError(f"Cannot write {RECORD}: {error.strerror}. Free it or make it writable.") from error
    return entry


def key_of(kind: Kind, repository: str, revision: str | None) -> str:
    """Name of a repository's revision in the record."""
    return f"{kind}s/{repository}@{revision or BRANCH}"


def commit_of(
    kind: Kind, repository: str, revision: str | None, what: str, remedy: str, missing: type[AgnewsLoraError]
) -> str:
    """The commit that a revision means in this project: the recorded one, else the hub's now, which is then recorded.

    Where the hub cannot be reached, the commit of the local cache is taken.

    Args:
        revision: branch, tag or commit; None: the default branch.
        what, remedy: as for `require_reachable`.
        missing: raised where the hub has no such repository or revision.

    Raises:
        NetworkError: the hub is needed and does not answer.
        StorageError: the record cannot be read or written.
    """
    if revision is not None and is_commit(revision):
        return revision
    key = key_of(kind, repository, revision)
    commit = recorded(key).get("commit")
    if commit is not None:
        return commit
    commit = None if reachable() else _cached_commit(kind, repository, revision)
    if commit is None:
        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        with downloading(what, remedy):
            try:
                commit = HfApi().repo_info(repository, repo_type=kind, revision=revision).sha
            except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
                raise missing(
                    f"Cannot find {what}: the hub ({constants.ENDPOINT}) has no {kind} {repository!r} with the "
                    f"revision {revision or BRANCH!r}, or hides it. Correct the name, or log in: `hf auth login`."
                ) from error
    return record(key, commit=str(commit))["commit"]


def _cached_commit(kind: Kind, repository: str, revision: str | None) -> str | None:
    """The commit that a branch or tag had when something of it was last downloaded to this machine."""
    commit = None
    with suppress(OSError):
        commit = (cache_of(kind, repository) / "refs" / (revision or BRANCH)).read_text(encoding="utf-8").strip()
    if kind == "dataset" and revision in (None, BRANCH) and not (commit and _at_hand(repository, None, commit)):
        built = _built(repository, None, "*")
        commit = built[-1].name if built else commit
    return commit


def check_dataset(dataset: str, config: str | None, revision: str | None, remedy: str) -> str:
    """Check within seconds that a data set is available: nothing of it is downloaded.

    Returns:
        the commit, as of `commit_of`.

    Raises:
        DataError, NetworkError, StorageError: as of `commit_of`.
    """
    what = f"data set {dataset}"
    commit = commit_of("dataset", dataset, revision, what, remedy, DataError)
    if not _at_hand(dataset, config, commit):
        require_reachable(what, remedy)
    return commit


def load_dataset(dataset: str, config: str | None, revision: str | None, split: str, remedy: str) -> "Dataset":
    """Load a split of a data set at the commit that its revision means in this project.

    It is read from the cache of `datasets` without asking the hub where it is there; else it is downloaded. Where no
    configuration is named, the one that `datasets` takes at first is recorded, and taken by every later start. Without
    the hub, a snapshot in its client's cache (`hf download`) will do.

    Raises:
        DataError: there is no such data set, revision, configuration or split.
        NetworkError: the hub is needed and does not answer.
        StorageError: cache or record cannot be written.
    """
    import datasets
    from datasets.arrow_reader import ArrowReader

    commit = check_dataset(dataset, config, revision, remedy)
    key, what = key_of("dataset", dataset, revision), f"data set {dataset}"
    named = config or recorded(key).get("config")
    built = _built(dataset, named, commit)
    ask = not (built and named) and not datasets.config.HF_HUB_OFFLINE and reachable()
    try:
        if built and not ask:
            configs = sorted({folder.parts[-3] for folder in built})
            if len(configs) > 1:
                raise ValueError(f"the cache has the configurations {', '.join(configs)}: name one as `config`")
            info = datasets.DatasetInfo.from_directory(str(built[-1]))  # without a lock: the cache may be read-only
            splits = list((info.splits or {}).values())
            rows = datasets.Dataset(**ArrowReader(str(built[-1]), info).read(info.dataset_name, split, splits))
            taken = configs[0]
        else:
            with _translated(what, remedy):
                builder = _builder(dataset if ask else _snapshot(dataset, commit), named, commit, what)
                builder.download_and_prepare()
            rows, taken = builder.as_dataset(split=split), builder.config.name
    except (ValueError, FileNotFoundError) as error:
        raise DataError(f"Cannot use {what} at {commit}: {' '.join(str(error).split()).rstrip('.')}.") from error
    if named is None:
        record(key, config=taken)
    return rows


def _builder(path: str | Path | None, config: str | None, commit: str, what: str) -> "DatasetBuilder":
    """What makes a data set: from the hub by its name, or from a snapshot in a folder."""
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(path), config, revision=commit)
    except ValueError as error:  # no such configuration, or none named and several there
        raise DataError(f"Cannot use {what} at {commit}: {' '.join(str(error).split()).rstrip('.')}.") from error
    # It prefers a folder in the working directory, and takes any cached commit after a failure.
    if not isinstance(path, Path) and builder.hash != commit:
        raise ConnectionError(f"`datasets` finds {builder.hash}, not {commit} (is there a folder named {path}?)")
    return builder


def _at_hand(dataset: str, config: str | None, commit: str) -> bool:
    return bool(_built(dataset, config, commit)) or _snapshot(dataset, commit) is not None


def _snapshot(dataset: str, commit: str) -> Path | None:
    """Folder of a commit's files in the cache of the hub's client, if they were downloaded as a whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not (cache_of("dataset", dataset) / "trees" / f"{commit}.json").is_file():
        return None  # the client does not know which files there should be: a download may have been broken off
    with suppress(LocalEntryNotFoundError):
        return Path(snapshot_download(dataset, repo_type="dataset", revision=commit, local_files_only=True))
    return None


def cache_of(kind: Kind, repository: str) -> Path:
    """Folder of a repository in the cache of the hub's client, which need not be there."""
    from huggingface_hub import (
        constants,
    )  # alone: the client's `repo_folder_name` takes a quarter of a second to import

    return Path(constants.HF_HUB_CACHE, constants.REPO_ID_SEPARATOR.join([f"{kind}s", *repository.split("/")]))


def _built(dataset: str, config: str | None, commit: str) -> list[Path]:
    """Folders of a data set in the cache of `datasets`, the newest last: …/<configuration>/<version>/<commit>."""
    from datasets.config import HF_DATASETS_CACHE
    from datasets.naming import camelcase_to_snakecase

    *owner, name = dataset.split("/")
    root = Path(HF_DATASETS_CACHE).expanduser() / "___".join([*owner, camelcase_to_snakecase(name)])
    found = sorted(
        root.glob(f"{escape(config) if config else '*'}/*/{commit}/dataset_info.json"),
        key=lambda path: path.stat().st_mtime,
    )
    return [
        path.parent
        for path in found
        if "incomplete" not in path.parent.name
        # Else it was made with `data_files` or other arguments: <configuration>-<their hash>.
        and json.loads(path.read_text(encoding="utf-8"))["config_name"] == path.parts[-4]
    ]
