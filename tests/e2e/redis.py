"""Real Redis servers on free ports in private directories: one, a master with replicas and sentinels, a cluster.

They keep nothing on disk and answer only on loopback. `close` ends them; a test may kill, freeze and start them again.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, wait_until

_PROGRAM = "redis-server"
_START_S = 15
SERVICE = "mxgate-test"


class RedisServer:
    """One server from construction to `close`; `options` are lines of its configuration."""

    def __init__(self, *options: str, port: int | None = None, mode: str = "") -> None:
        require(program=_PROGRAM)
        self.directory = Path(tempfile.mkdtemp(prefix="mxgate-redis-"))
        self.port = port or free_port()
        self._mode = mode
        self.tls_port = 0  # of who asks for one in `options`
        lines = [
            f"port {self.port}",
            f"bind {LOOPBACK}",
            f"dir {self.directory}",
            'save ""',
            "appendonly no",
            # a server that is restarted has to be there at once
            "repl-diskless-sync-delay 0",
            *options,
        ]
        self._file = self.directory / "redis.conf"
        self._file.write_text("\n".join(lines) + "\n", "utf-8")
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> Address:
        return (LOOPBACK, self.port)

    @property
    def url(self) -> str:
        return f"redis://{LOOPBACK}:{self.port}/0"

    def start(self) -> None:
        """Start it, also again after `kill`; returns when it answers."""
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [_PROGRAM, str(self._file), *([self._mode] if self._mode else [])],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(self._answers, within_s=_START_S, what=f"Redis answers on {self.port}")

    def kill(self) -> None:
        """End it as kill -9 does; its port is free when this returns."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """It takes connections and bytes, and answers nothing."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def ask(self, *words: str | int) -> str:
        """The raw answer to one command; OSError when nobody answers."""
        return ask(self.address, *words)

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.directory / "log").read_text("utf-8", "replace")
        try:
            answer = self.ask("PING")
        except OSError:
            return False
        return not answer.startswith("-LOADING")


class SentinelGroup:
    """A master, a replica and three sentinels that fail over within some seconds."""

    def __init__(self) -> None:
        self.servers = [RedisServer()]
        self.sentinels: list[RedisServer] = []
        try:
            host, port = self.servers[0].address
            self.servers.append(RedisServer(f"replicaof {host} {port}"))
            wait_until(
                lambda: "master_link_status:up" in self.servers[1].ask("INFO", "replication"),
                within_s=_START_S,
                what="the replica follows its master",
            )
            for _ in range(3):
                self.sentinels.append(
                    RedisServer(
                        f"sentinel monitor {SERVICE} {host} {port} 2",
                        f"sentinel down-after-milliseconds {SERVICE} 500",
                        f"sentinel failover-timeout {SERVICE} 2000",
                        mode="--sentinel",
                    )
                )
            # before that a failover would be given up: no good replica, no majority
            wait_until(self._is_complete, within_s=40, what="the sentinels know each other and the replica")
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        hosts = ",".join(f"{LOOPBACK}:{each.port}" for each in self.sentinels)
        return f"redis+sentinel://{hosts}/{SERVICE}/0"

    def master(self) -> RedisServer:
        """The one that all sentinels name."""

        def named() -> RedisServer | None:
            ports = {
                int(re.findall(r"\d{4,5}", each.ask("SENTINEL", "get-master-addr-by-name", SERVICE))[-1])
                for each in self.sentinels
            }
            return next((each for each in self.servers if {each.port} == ports), None)

        found = wait_until(named, within_s=_START_S, what="the sentinels agree about the master")
        assert found is not None
        return found

    def close(self) -> None:
        for each in (*self.sentinels, *self.servers):
            each.close()

    def _is_complete(self) -> bool:
        answers = [each.ask("SENTINEL", "master", SERVICE) for each in self.sentinels]
        return all(
            re.search(r"num-slaves\r\n\$1\r\n1\r\n", answer)
            and re.search(r"num-other-sentinels\r\n\$1\r\n2\r\n", answer)
            for answer in answers
        )


class RedisCluster:
    """Three masters, each with a replica that takes over within some seconds."""

    def __init__(self) -> None:
        require(program="redis-cli")
        self.nodes: list[RedisServer] = []
        try:
            for _ in range(6):
                self.nodes.append(_cluster_node())
            addresses = [f"{LOOPBACK}:{each.port}" for each in self.nodes]
            subprocess.run(
                ["redis-cli", "--cluster", "create", *addresses, "--cluster-replicas", "1", "--cluster-yes"],
                check=True,
                capture_output=True,
                timeout=60,
            )
            wait_until(self._is_complete, within_s=30, what="the cluster is complete")
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"{LOOPBACK}:{each.port}" for each in self.nodes[:3])

    def masters(self) -> list[RedisServer]:
        """Those that are masters now, of those that answer."""
        return [each for each in self.nodes if "role:master" in _info(each)]

    def close(self) -> None:
        for each in self.nodes:
            each.close()

    def _is_complete(self) -> bool:
        return all(
            "cluster_state:ok" in each.ask("CLUSTER", "INFO")
            and each.ask("CLUSTER", "NODES").count(" connected") == len(self.nodes)
            and ("role:master" in _info(each) or "master_link_status:up" in _info(each))
            for each in self.nodes
        )


def _cluster_node() -> RedisServer:
    port, bus = free_port(), free_port()
    return RedisServer(
        "cluster-enabled yes",
        "cluster-config-file nodes.conf",
        "cluster-node-timeout 1000",
        "cluster-replica-validity-factor 0",
        f"cluster-port {bus}",
        port=port,
    )


def _info(server: RedisServer) -> str:
    try:
        return server.ask("INFO", "replication")
    except OSError:
        return ""


def ask(address: Address, *words: str | int) -> str:
    """The raw answer of a server to one command; OSError when nobody answers."""
    octets = [str(word).encode() for word in words]
    request = b"*%d\r\n" % len(octets) + b"".join(b"$%d\r\n%b\r\n" % (len(each), each) for each in octets)
    with socket.create_connection(address, timeout=2) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(partial(connection.recv, 65536), b"")).decode("utf-8", "replace")


def started(make: Callable[[], RedisServer]) -> Iterator[RedisServer]:
    """For fixtures: what `make` starts, closed at the end."""
    server = make()
    yield server
    server.close()
