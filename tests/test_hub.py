import errno
import socket

import pytest
from huggingface_hub import constants

from agnews_lora import hub
from agnews_lora.errors import NetworkError, StorageError
from tests import loopback_hub


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
