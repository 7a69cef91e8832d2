"""A Ray cluster on this host: a head without places for workers, and nodes with one each, that join and are lost.

Ray's own nodes run below a process of their own (this file, as a program), since a process can be in one cluster only.
"""

import os
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Self

import psutil  # type: ignore[import-untyped]


class Nodes:
    """The cluster. environment: lets a process join it.

    Args:
        folder: where its token and its output are written.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32), encoding="ascii")
        self.environment = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # keeps all ports on loopback
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._raylets: list[int] = []
        self._log = (folder / "nodes.log").open("wb")

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            env={**os.environ, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.address = self._answer()
        return self

    def __exit__(self, *error: object) -> None:
        kill([*psutil.Process(self._process.pid).children(recursive=True), self._process])
        self._process.wait()
        self._log.close()

    def add(self) -> None:
        """Let a node join, and wait until it has."""
        assert self._process.stdin is not None
        self._process.stdin.write("add\n")
        self._process.stdin.flush()
        self._raylets.append(int(self._answer()))

    def lose(self) -> None:
        """Kill all processes of the oldest node at once, as when its machine is switched off."""
        raylet = psutil.Process(self._raylets.pop(0))
        raylet.suspend()  # it must start nothing meanwhile
        kill([*raylet.children(recursive=True), raylet])

    def processes(self) -> list[psutil.Process]:
        """All processes of all nodes."""
        return [child for pid in self._raylets for child in psutil.Process(pid).children(recursive=True)]

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline().strip()):
            raise RuntimeError(f"the Ray cluster did not start; {self._log.name} says why")
        return line


def kill(processes: list[psutil.Process]) -> None:
    """Kill (-9) those that still run."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def main() -> None:
    """Print the head's address; for each line on standard input add a node, and print the process id of its raylet."""
    from ray.cluster_utils import Cluster

    memory = 100 * 2**20
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": memory}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        node = cluster.add_node(num_cpus=1, object_store_memory=memory)
        print(node.all_processes["raylet"][0].process.pid, flush=True)


if __name__ == "__main__":
    main()
