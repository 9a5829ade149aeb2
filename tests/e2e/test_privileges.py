"""What the running program may do: whose it is, what it may write, and what is left of it when it crashes."""

from __future__ import annotations

import grp
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.downstream import Downstream
from tests.e2e.gateway import COMMAND, Config, Gateway, Value, config_for, run_mxgate, to_toml
from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, wait_until

pytestmark = pytest.mark.e2e

USER = "nobody"
CONTENT = b"From: <a@client.example.net>\r\nSubject: x\r\n\r\nHello\r\n"
CAP_NET_BIND_SERVICE = 1 << 10


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """One that every user may read, below directories of which that is true."""
    directory = Path(tempfile.mkdtemp(prefix="mxgate-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


# Others cannot read below /root, where a checkout or an interpreter may lie: in the mount namespace of the gateway they
# can, for the directories that it needs. Arguments: the closed directory, those inside, "--", the command.
REACHABLE = r"""
set -e
mount --make-rprivate /
closed=$1; shift
aside=$(mktemp -d)
number=0
for path in "$@"; do
  [ "$path" = -- ] && break
  number=$((number + 1)); mkdir "$aside/$number"; mount --rbind "$path" "$aside/$number"
done
mount -t tmpfs -o mode=755 tmpfs "$closed"
number=0
while [ "$1" != -- ]; do
  number=$((number + 1)); mkdir -p "$1"; mount --rbind "$aside/$number" "$1"; shift
done
shift
exec "$@"
"""
CHECKOUT = Path(__file__).parents[2]


def reachable() -> list[str]:
    """What to put before a command so that every user can run ours."""
    wanted = {str(Path(each).resolve()) for each in (sys.base_prefix, sys.prefix, CHECKOUT)}
    for closed in ("/root", "/home"):
        inside = [each for each in wanted if each.startswith(f"{closed}/")]
        if inside and not Path(closed).stat().st_mode & 0o001:
            return ["unshare", "-m", "sh", "-c", REACHABLE, "sh", closed, *inside, "--"]
    return []


@pytest.fixture
def as_root() -> None:
    require(program="unshare", root=True)
    if reachable() and not has_mount_namespaces():
        pytest.skip(f"others than root cannot run {COMMAND}")


def has_mount_namespaces() -> bool:
    return subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode == 0


def privileged_port() -> int:
    for port in range(700, 1024):
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        return port
    raise AssertionError("no port is free")


def status(pid: int, key: str) -> list[str]:
    """The words of a line of /proc/PID/status."""
    text = Path(f"/proc/{pid}/status").read_text("ascii")
    return next(line for line in text.splitlines() if line.startswith(f"{key}:")).split()[1:]


def limit(pid: int, name: str) -> list[str]:
    """The soft and the hard limit of this name in /proc/PID/limits."""
    text = Path(f"/proc/{pid}/limits").read_text("ascii")
    return next(line for line in text.splitlines() if line.startswith(name)).removeprefix(name).split()[:2]


def processes(gateway: Gateway) -> list[int]:
    return [gateway.process.pid, *gateway.worker_pids()]


def takes_mail(gateway: Gateway, content: bytes = CONTENT) -> bool:
    with gateway.connect() as client:
        client.hello()
        reply = client.submit("a@client.example.net", ["ann@example.org"], content)
    assert reply.code in (250, 451), reply
    return reply.code == 250


def privileged(sink: Downstream, **server: str) -> Config:
    listen: list[Value] = [f"{LOOPBACK}:{privileged_port()}"]
    return config_for(sink.address, overrides={"server": {"listen": listen, **server}})


def user_with_groups() -> str:
    """One that has supplementary groups; USER where there is none."""
    return next((name for each in grp.getgrall() for name in each.gr_mem if name != "root"), USER)


def test_binds_as_root_and_goes_on_as_a_user_with_its_groups(
    as_root: None, sink: Downstream, tmp_path: Path
) -> None:
    user = user_with_groups()
    gateway = Gateway(privileged(sink, user=user), tmp_path, command=[*reachable(), COMMAND])
    try:
        gateway.wait_ready()
        entry = pwd.getpwnam(user)
        for pid in processes(gateway):
            assert status(pid, "Uid") == [str(entry.pw_uid)] * 4
            assert status(pid, "Gid") == [str(entry.pw_gid)] * 4
            assert {*map(int, status(pid, "Groups"))} == {*os.getgrouplist(user, entry.pw_gid)}
            for capabilities in ("CapPrm", "CapEff", "CapAmb"):
                assert int(status(pid, capabilities)[0], 16) == 0
            assert status(pid, "NoNewPrivs") == ["1"]
            # owned by root: nobody but root may trace it, and no core is written
            assert Path(f"/proc/{pid}/environ").stat().st_uid == 0
            assert limit(pid, "Max core file size") == ["0", "0"]
        assert takes_mail(gateway)
        gateway.stop()
    finally:
        gateway.kill()


def test_a_reload_for_more_workers_needs_no_root(
    as_root: None, sink: Downstream, open_directory: Path
) -> None:
    config = privileged(sink, user=USER)
    gateway = Gateway(config, open_directory, command=[*reachable(), COMMAND])
    try:
        gateway.wait_ready()
        text = gateway.config_file.read_text()
        gateway.config_file.write_text(text.replace("[server]", "[server]\nworkers = 3"))
        gateway.reload()
        wait_until(lambda: "reload.done" in gateway.log(), within_s=30, what="the reload is over")
        wait_until(lambda: len(gateway.worker_pids()) == 3, within_s=30, what="the old worker is gone")
        assert all(takes_mail(gateway) for _ in range(10))
        gateway.stop()
    finally:
        gateway.kill()


def test_a_group_may_be_another_one(as_root: None, sink: Downstream, tmp_path: Path) -> None:
    config = privileged(sink, user=str(pwd.getpwnam(USER).pw_uid), group="daemon")
    gateway = Gateway(config, tmp_path, command=[*reachable(), COMMAND])
    try:
        gateway.wait_ready()
        assert {status(pid, "Gid")[1] for pid in processes(gateway)} == {str(grp.getgrnam("daemon").gr_gid)}
        gateway.stop()
    finally:
        gateway.kill()


def test_binds_by_capability(as_root: None, sink: Downstream, open_directory: Path) -> None:
    require(program="setpriv", root=True)
    setpriv = [
        "setpriv",
        "--reuid",
        USER,
        "--regid",
        "nogroup",
        "--clear-groups",
        "--inh-caps=-all,+net_bind_service",
    ]
    setpriv += [
        "--ambient-caps=-all,+net_bind_service",
        "--bounding-set=-all,+net_bind_service",
        "--no-new-privs",
    ]
    config = privileged(sink, user=USER, group="nogroup")
    gateway = Gateway(config, open_directory, command=[*reachable(), *setpriv, COMMAND])
    try:
        gateway.wait_ready()
        assert {int(status(pid, "CapEff")[0], 16) for pid in processes(gateway)} == {CAP_NET_BIND_SERVICE}
        assert {status(pid, "Uid")[1] for pid in processes(gateway)} == {str(pwd.getpwnam(USER).pw_uid)}
        assert takes_mail(gateway)
        gateway.stop()
    finally:
        gateway.kill()


@pytest.mark.parametrize(
    ("server", "told"),
    [
        ({"user": "no-such-user"}, "there is no user no-such-user"),
        ({"user": USER, "group": "no-such-group"}, "there is no group no-such-group"),
        ({"group": "daemon"}, "server.group: needs server.user"),
        ({"user": "bad user"}, "server.user"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "check-config"])
def test_who_it_cannot_be_is_told(
    command: str, server: dict[str, str], told: str, sink: Downstream, tmp_path: Path
) -> None:
    file = tmp_path / "mxgate.toml"
    file.write_text(to_toml(config_for(sink.address, overrides={"server": {**server}})))
    done = run_mxgate(command, "--config", str(file))
    assert done.returncode == 78, done
    assert told in done.stdout + done.stderr


def test_only_root_can_become_somebody_else(as_root: None, sink: Downstream, open_directory: Path) -> None:
    file = open_directory / "mxgate.toml"
    file.write_text(to_toml(config_for(sink.address, overrides={"server": {"user": "daemon"}})))
    done = subprocess.run(
        [*reachable(), "setpriv", "--reuid", USER, "--clear-groups", COMMAND, "serve", "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 78
    assert "only root can become daemon" in done.stderr


READ_ONLY = r"""
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs "$1"
mkdir "$1/spool"
findmnt -rno TARGET | while read -r target; do
  case $target in "$1" | /proc | /proc/* | /sys | /sys/* | /dev/pts) ;;
  *) mount -o remount,bind,ro "$target" 2>/dev/null || true ;;
  esac
done
if (: > /etc/mxgate-probe) 2>/dev/null || (: > /tmp/mxgate-probe) 2>/dev/null; then echo "not read-only"; exit 1; fi
shift
exec "$@"
"""


def test_writes_to_its_state_and_its_spool_only(sink: Downstream, tmp_path: Path) -> None:
    require(program="unshare", root=True)
    state = tmp_path / "state"
    state.mkdir()
    config = config_for(
        sink.address,
        overrides={
            "server": {"spool_dir": f"{state}/spool"},
            "state": {"url": f"sqlite://{state}/state.db"},
            "policy": {"greylist": {"mode": "enforce", "settings": {"delay_s": 0}}},
        },
    )
    command = ["unshare", "-m", "sh", "-c", READ_ONLY, "sh", str(state), COMMAND]
    if not has_mount_namespaces():
        pytest.skip("no mount namespaces here")
    gateway = Gateway(config, tmp_path, command=command)
    try:
        gateway.wait_ready()
        # more than is kept in memory
        assert takes_mail(gateway, CONTENT + b"0123456789abcdef\r\n" * 200_000)
        gateway.stop()
    finally:
        gateway.kill()
    assert [each.content.endswith(b"0123456789abcdef\r\n") for each in sink.messages] == [True]
    assert "Read-only" not in gateway.log()
