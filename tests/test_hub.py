import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from agnews_lora import hub
from agnews_lora.errors import BaseModelError, NetworkError, StorageError
from tests import loopback_hub
from tests.project import write_project
from tests.tiny import SENTENCES, tiny_base


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def answering(monkeypatch):
    monkeypatch.setattr(hub, "reachable", lambda: True)


def test_a_hub_that_answers_is_reachable(monkeypatch):
    with loopback_hub.serve({}) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert hub.reachable()
        hub.require_reachable("a model", "Do without.")


def test_offline_mode_forbids_asking(monkeypatch):
    with loopback_hub.serve({}) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert not hub.reachable()
        with pytest.raises(
            NetworkError,
            match=r"Cannot get a model: .* HF_HUB_OFFLINE is set.*\. Do without\.",
        ):
            hub.require_reachable("a model", "Do without.")


def test_a_hub_that_takes_the_call_and_never_answers_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "PROBE_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with pytest.raises(NetworkError, match=rf"the hub \({endpoint}\) cannot be reached\. Do without"):
            hub.require_reachable("a model", "Do without.")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_cache_that_cannot_be_written_is_a_storage_error(answering, number):
    with pytest.raises(StorageError, match="Cannot store a model in the cache"), hub.downloading("a model", "x"):
        raise OSError(number, "no")


def test_a_download_that_breaks_off_says_why_in_one_line(answering):
    with pytest.raises(NetworkError) as caught, hub.downloading("a model", "Do without."):
        raise ConnectionError("reset by peer\nsee the manual")
    assert str(caught.value) == "Cannot download a model: ConnectionError: reset by peer. Do without."
    assert isinstance(caught.value.__cause__, ConnectionError)


FIRST, SECOND = "1" * 40, "2" * 40


@pytest.fixture
def project(tmp_path, monkeypatch):
    """An empty working directory, and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")


def commit_of(repository: str, revision: str | None = None) -> str:
    return hub.commit_of("model", repository, revision, "a model", "Do without.", BaseModelError)


def test_a_branch_is_resolved_once_a_project(project, monkeypatch, tmp_path):
    repositories = {"models/owner/name": (FIRST, tmp_path)}
    with loopback_hub.serve(repositories) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert commit_of("owner/name") == FIRST
        repositories["models/owner/name"] = (SECOND, tmp_path)
        assert commit_of("owner/name") == FIRST
        hub.RECORD.unlink()
        assert commit_of("owner/name", "main") == SECOND
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("the hub was asked"))
    assert commit_of("owner/name") == SECOND
    assert commit_of("owner/other", FIRST) == FIRST


@pytest.mark.parametrize(("repository", "revision"), [("owner/none", None), ("owner/name", "v9"), ("own--er/x", None)])
def test_a_repository_or_revision_that_is_not_there_is_named(project, monkeypatch, tmp_path, repository, revision):
    with loopback_hub.serve({"models/owner/name": (FIRST, tmp_path)}) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with pytest.raises(BaseModelError, match=f"no model '{repository}' with the revision '{revision or 'main'}'"):
            commit_of(repository, revision)
    assert not hub.RECORD.exists()


def test_without_the_hub_a_branch_is_the_commit_of_the_cache(project, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(NetworkError):
        commit_of("owner/name")
    refs = tmp_path / "cache" / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(SECOND)
    assert commit_of("owner/name") == SECOND


def test_what_is_recorded_first_stays(project):
    assert hub.record("models/a@main", commit=FIRST) == {"commit": FIRST}
    assert hub.record("models/a@main", commit=SECOND, weights="x") == {"commit": FIRST, "weights": "x"}
    assert hub.recorded("models/a@main") == {"commit": FIRST, "weights": "x"}
    assert hub.recorded("models/b@main") == {}


@pytest.mark.parametrize("content", ["", "[]", '{"models/a@main": [1]}', '{"models/a@main": {"commit": 1}}', "\xff"])
def test_a_damaged_record_is_named(project, content):
    hub.RECORD.parent.mkdir()
    hub.RECORD.write_text(content, encoding="latin-1")
    with pytest.raises(StorageError, match=r"hub\.json.*delete it"):
        hub.recorded("models/a@main")


CARD = """---
configs:
- config_name: default
  data_files:
  - {split: train, path: data/train-*}
  - {split: test, path: data/test-*}
- config_name: few
  data_files:
  - {split: train, path: few/train-*}
---
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A data set with two configurations, `default` and `few`."""
    folder = tmp_path_factory.mktemp("dataset")
    (folder / "README.md").write_text(CARD)
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    for file, texts in (("data/train", ["a", "b", "c"]), ("data/test", ["d"]), ("few/train", ["e"])):
        rows = datasets.Dataset.from_dict({"text": texts, "label": [0] * len(texts)}, features)
        rows.to_parquet(folder / f"{file}-00000-of-00001.parquet")
    return folder


class Clients:
    """New processes, whose hub and cache are given: the hub's clients read both at import."""

    def __init__(self, folder: Path) -> None:
        self.home, self.project = folder / "home", folder / "project"
        self.project.mkdir()

    def run(self, code: str, endpoint: str | None) -> str:
        """What a script prints; endpoint None: offline."""
        surroundings = {**os.environ, "HF_HOME": str(self.home), "PYTHONPATH": str(Path.cwd())}
        for name in ("HF_DATASETS_CACHE", "HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
            surroundings.pop(name, None)
        surroundings |= {"HF_ENDPOINT": endpoint} if endpoint else {}
        surroundings |= {"HF_HUB_OFFLINE": "0" if endpoint else "1"}
        done = subprocess.run(
            [sys.executable, "-c", f"{LOADING}\n{code}"],
            env=surroundings,
            cwd=self.project,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() or done.stderr


LOADING = """
from agnews_lora import hub
def load(config=None, revision=None, split="train"):
    try:
        rows = hub.load_dataset("owner/Some-Data", config, revision, split, "Do without.")
        print(rows["text"][:], rows.features["label"].names, end=" ")
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def clients(tmp_path):
    return Clients(tmp_path)


def test_a_data_set_is_downloaded_once_and_its_commit_and_configuration_stay(clients, repository, tmp_path):
    repositories = {"datasets/owner/Some-Data": (FIRST, repository)}
    calls = "load(); load(split='test'); load('few'); load('none'); load(split='none')"
    with loopback_hub.serve(repositories) as endpoint:
        said = clients.run(calls, endpoint)
        labels = "['bad', 'good']"
        assert said.startswith(f"['a', 'b', 'c'] {labels} ['d'] {labels} ['e'] {labels} DataError")
        assert "BuilderConfig 'none' not found. Available: ['default', 'few']" in said
        assert said.endswith("Unknown split \"none\". Should be one of ['train', 'test'].")
        repositories["datasets/owner/Some-Data"] = (SECOND, tmp_path)
        assert clients.run("load(split='test')", endpoint) == f"['d'] {labels}"
    assert clients.run(calls, None).startswith(f"['a', 'b', 'c'] {labels} ['d'] {labels} ['e'] {labels} NetworkError")


def test_a_data_set_that_its_user_cached_is_read_offline(clients, repository):
    user = "import datasets; datasets.load_dataset('owner/Some-Data', {}); print('cached')"
    with loopback_hub.serve({"datasets/owner/Some-Data": (FIRST, repository)}) as endpoint:
        assert clients.run(user.format("'few'"), endpoint) == "cached"
        offline = f"load(); load(); load('few'); load('few', '{FIRST}'); load('few', '{SECOND}')"
        assert clients.run(offline, None).startswith("['e'] ['bad', 'good'] " * 4 + "NetworkError")
        (clients.project / hub.RECORD).unlink()
        assert clients.run(user.format("None"), endpoint) == "cached"
    shutil.rmtree(clients.home / "hub")
    assert clients.run("load(); load('few'); load('default')", None) == (
        "DataError Cannot use data set owner/Some-Data at "
        + FIRST
        + ": the cache has the configurations default, few: "
        "name one as `config`.\n['e'] ['bad', 'good'] ['a', 'b', 'c'] ['bad', 'good']"
    )


def test_a_snapshot_that_its_user_downloaded_is_read_offline_if_it_is_whole(clients, repository):
    user = "from huggingface_hub import snapshot_download as get; get('owner/Some-Data', repo_type='dataset')"
    with loopback_hub.serve({"datasets/owner/Some-Data": (FIRST, repository)}) as endpoint:
        clients.run(user, endpoint)
    few, default = "['e'] ['bad', 'good']", "['a', 'b', 'c'] ['bad', 'good']"
    assert clients.run("load('few'); load(); load()", None) == f"{few} {default} {default}"
    next(clients.home.glob("hub/*/snapshots/*/data/train*")).unlink()
    assert clients.run("load()", None).startswith("NetworkError")


@pytest.mark.proof
def test_a_sweep_over_a_base_and_a_data_set_of_the_cache_needs_no_hub(clients, tmp_path):
    base, dataset = tiny_base(tmp_path / "base", "bert"), tmp_path / "dataset"
    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["bad", "good"]))
    for split, num_rows in (("train", 120), ("test", 40)):
        texts = [f"{SENTENCES[row % 8]} {split} {row} is {features['label'].names[row % 2]}" for row in range(num_rows)]
        rows = datasets.Dataset.from_dict({"text": texts, "label": [row % 2 for row in range(num_rows)]}, features)
        rows.to_parquet(dataset / f"{split}.parquet")
    user = (
        "import datasets, huggingface_hub; datasets.load_dataset('owner/reviews'); "
        "huggingface_hub.snapshot_download('owner/tiny')"
    )
    with loopback_hub.serve({"models/owner/tiny": (FIRST, base), "datasets/owner/reviews": (SECOND, dataset)}) as hub_:
        clients.run(user, hub_)
    data = {"source": "hub", "dataset": "owner/reviews", "text": "text", "label": "label"}
    write_project(clients.project, {"base": "owner/tiny", "data": data}, {"budget": 10_000, "trials": 2})

    command = "from agnews_lora.cli import main; print(main({!r}))"
    found = json.loads(clients.run(command.format(["sweep", "small", "--json"]), None).splitlines()[0])
    facts = found["facts"]
    assert (facts["base"], facts["base_revision"], facts["labels"]) == ("owner/tiny", FIRST, ["bad", "good"])
    assert facts["data"]["revision"] == SECOND
    assert found["registered"]["model"] == "small"
    assert "is champion" in clients.run(command.format(["promote", "small"]), None)
    assert "good" in clients.run(command.format(["predict", "--sweep", "small", "The striker scored."]), None)
