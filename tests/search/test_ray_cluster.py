"""Workers as Ray actors, on a real Ray: one cluster on this machine for all tests, and a local Ray of its own."""

import json
import os
import secrets
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from agnews_lora.errors import ConfigError, StudyError
from agnews_lora.search import ray_cluster
from agnews_lora.training.interface import Engine, TrialPlan
from tests.search.drivers import ListDriver
from tests.search.scripted import ScriptedEngine

pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install '.[cluster]'")

ROOT = Path(__file__).parents[2]
SILENCE = 6.0  # a busy machine holds up a worker that lives


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head without places, and one node with one; it asks for a token, and listens on loopback alone."""
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o644)  # as Ray makes it
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        import ray
        from ray.cluster_utils import Cluster

        head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        nodes = Cluster(initialize_head=True, head_node_args=head)
        nodes.add_node(**NODE)
        try:
            yield nodes
        finally:
            ray.shutdown()
            nodes.shutdown()


NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def engine(fatal: Callable[[], None] | None = None, at: tuple[str, int] = ("t0001", 15)) -> Engine:
    return ScriptedEngine(script={at: fatal} if fatal else {})


def signal_self_once(number: int, marker: Path) -> None:
    """What happens to a worker's process, from inside: at the first attempt only."""
    if not marker.exists():
        marker.write_text("done")
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.proof)])
def test_a_killed_or_suspended_actor_is_replaced(
    cluster: Any, tmp_path: Path, number: int, capfd: pytest.CaptureFixture[str]
) -> None:
    driver, messages = ListDriver(tmp_path / "driver", 3), list[str]()
    factory = partial(engine, partial(signal_self_once, number, tmp_path / "marker"))
    ray_cluster.train(driver, factory, address=cluster.address, screen_message=messages.append, silence=SILENCE)
    assert sorted(driver.adapters) == ["t0000", "t0001", "t0002"]
    assert driver.resumed_from["t0001"] == [0, 10]
    assert any("t0001 will be resumed" in message for message in messages)
    assert len(driver.reasons) == 1
    assert capfd.readouterr().out == ""  # Ray would tell it, too


def test_the_tokens_file_is_for_its_owner_alone(cluster: Any, tmp_path: Path) -> None:
    driver = ListDriver(tmp_path / "driver", 1)
    ray_cluster.train(driver, engine, address=cluster.address)
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777 == 0o600


def lose(cluster: Any, node: Any) -> None:
    """As when its machine is switched off: all processes of the node at once."""
    import psutil

    for process in psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True):
        process.kill()
    cluster.remove_node(node, allow_graceful=False)


@dataclass
class Growing(ListDriver):
    """Gives t0001 to the second worker only, and so waits for a node to join."""

    on_start: Callable[[str], object] = field(default=lambda worker: None)

    def next(self, worker: str = "") -> TrialPlan | None:
        if worker == "worker-1" and self.waiting[:1] == ["t0001"] and not self.reasons:
            self.on_start(worker)
            return None
        return super().next(worker)


def test_a_node_that_joins_gets_a_worker_and_one_that_is_lost_gives_its_trial_back(
    cluster: Any, tmp_path: Path
) -> None:
    nodes: list[Any] = []
    driver = Growing(tmp_path / "driver", 2)
    driver.on_start = lambda worker: nodes or nodes.append(cluster.add_node(**NODE))

    def leave(trial: str, step: int) -> None:
        if (trial, step) == ("t0001", 10) and not driver.reasons and len(nodes) == 1:
            nodes.append(None)
            lose(cluster, nodes[0])

    driver.on_checkpoint = leave
    ray_cluster.train(driver, engine, address=cluster.address)
    assert sorted(driver.adapters) == ["t0000", "t0001"]
    assert driver.resumed_from["t0001"] == [0, 10]


def unbuildable() -> Engine:
    os._exit(3)


@pytest.mark.proof
def test_actors_that_die_again_and_again_end_the_sweep_with_their_last_words(cluster: Any, tmp_path: Path) -> None:
    driver = ListDriver(tmp_path / "driver", 1)
    with pytest.raises(StudyError, match="died 5 times in a row") as caught:
        ray_cluster.train(driver, unbuildable, address=cluster.address, screen_message=lambda line: None)
    assert "Ray's logs" in str(caught.value)


def run(code: str, environment: dict[str, str], folder: Path) -> "subprocess.Popen[str]":
    """A process of its own, with `driver` and `ray_cluster` at hand."""
    head = """
        import os, sys, json
        from pathlib import Path
        from agnews_lora.search import ray_cluster
        from tests.search.drivers import ListDriver
        from tests.search.scripted import ScriptedEngine
        driver = ListDriver(Path(sys.argv[1]), 2)
    """
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(code), str(folder)],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


JOIN = """
    from agnews_lora.errors import ConfigError
    try:
        ray_cluster.train(driver, ScriptedEngine, address={address!r})
    except ConfigError as error:
        print(error)
"""


def test_a_cluster_is_not_joined_without_its_token_nor_where_there_is_none(cluster: Any, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    home = {"HOME": str(tmp_path)}
    tried = {
        "missing": environment | home,
        "wrong": environment | home | {"RAY_AUTH_TOKEN": secrets.token_hex(32)},
        "refused": environment | home | {"RAY_AUTH_MODE": "disabled"},
    }
    code = JOIN.format(address=cluster.address)
    processes = [run(code, each, tmp_path / name) for name, each in tried.items()]
    processes.append(run(JOIN.format(address="127.0.0.1:1"), dict(os.environ), tmp_path / "nobody"))
    for process in processes:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and "it asks for another token" in said
    assert not list(tmp_path.rglob("*.safetensors"))


LOCAL = """
    import psutil, signal

    def look(trial, step):
        driver.on_checkpoint = lambda trial, step: None
        this = psutil.Process()
        tree = [this, *this.children(recursive=True)]
        sockets = [c for process in tree for c in process.net_connections("inet") if c.status == "LISTEN"]
        print(json.dumps({
            "names": [process.name() for process in tree],
            "addresses": sorted({c.laddr.ip for c in sockets}),
            "ports": len({c.laddr.port for c in sockets}),
            "mode": Path(os.environ["RAY_AUTH_TOKEN_PATH"]).stat().st_mode & 0o777,
            "token": os.environ["RAY_AUTH_TOKEN_PATH"],
            "sigterm": signal.getsignal(signal.SIGTERM) is handler,
        }))

    def handler(number, frame):
        raise AssertionError

    signal.signal(signal.SIGTERM, handler)
    driver.on_checkpoint = look
    ray_cluster.train(driver, ScriptedEngine, workers=2)
    print(json.dumps(sorted(driver.adapters)))
    driver = ListDriver(Path(sys.argv[1], "again"), 1)
    ray_cluster.train(driver, ScriptedEngine, workers=2)
    print(json.dumps(sorted(driver.adapters)))
    import ray
    surroundings = ray.remote(num_cpus=0)(lambda: (sys.path, os.environ.get("PYTHONWARNINGS")))
    print(json.dumps(ray.get(surroundings.remote())))
"""


def test_a_local_ray_listens_on_loopback_alone_and_asks_for_a_token(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(tmp_path), "PYTHONWARNINGS": "error::FutureWarning"}
    process = run(LOCAL, environment, tmp_path / "driver")
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    seen, first, second, (path, filters) = [json.loads(line) for line in output.splitlines()]
    assert (first, second) == (["t0000", "t0001"], ["t0000"])
    assert {"gcs_server", "raylet"} <= set(seen["names"])
    assert seen["ports"] >= 5 and set(seen["addresses"]) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert seen["mode"] == 0o600 and not Path(seen["token"]).exists()  # it goes with the process
    assert not (tmp_path / ".ray" / "auth_token").exists()
    assert seen["sigterm"]  # Ray puts a handler of its own there
    assert str(tmp_path) not in path and filters is None  # a script in the working folder may be named as a library


def test_a_ray_that_would_not_keep_to_loopback_is_not_started(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = run("import ray\nray_cluster.train(driver, ScriptedEngine, workers=2)", environment, tmp_path)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "would listen on all interfaces" in errors


def test_the_folder_of_an_actor_that_was_killed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gone = subprocess.Popen(["true"])
    gone.wait()
    dead, alive, other = (
        tmp_path / f"agnews-lora-worker-{name}" for name in (f"{gone.pid}-x", f"{os.getpid()}-x", "x")
    )
    for each in (dead, alive, other):
        each.mkdir()
    own = ray_cluster._own_folder()
    assert set(tmp_path.iterdir()) == {alive, other, own}


def test_more_workers_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(ConfigError, match="3 workers: this machine shows 2 GPUs"):
        ray_cluster.train(ListDriver(tmp_path, 1), engine, workers=3)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ray_cluster, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"\[cluster\]"):
        ray_cluster.train(ListDriver(tmp_path, 1), engine, workers=2)
