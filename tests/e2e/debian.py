"""A Debian of its own, which debootstrap makes in a directory, and programs that run in it by chroot(8).

For programs that cannot be installed beside others (two MTAs), and to see what a fresh machine lacks. Network and
processes are those of this machine; /proc is not there.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.machine import require

SUITE = "bookworm"
# What a package's script would start: nothing.
_NO_SERVICES = "#!/bin/sh\nexit 101\n"
# Where this machine's way to a package index goes through something whose certificate it had to learn.
_CERTIFICATES = "etc/ssl/certs/ca-certificates.crt"
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


class Debian:
    """The system below `root`."""

    def __init__(self, root: Path, *packages: str, more: tuple[str, ...] = ()) -> None:
        """Make it of these packages; `more` are installed afterwards, with none of their services started."""
        require(program="debootstrap", root=True)
        self.root = root
        included = ",".join(packages)
        _succeed(["debootstrap", "--variant=minbase", f"--include={included}", SUITE, str(root)])
        for name in ("etc/resolv.conf", "etc/hosts", _CERTIFICATES):
            if Path("/", name).is_file() and (root / name).parent.is_dir():
                (root / name).unlink(missing_ok=True)
                (root / name).write_bytes(Path("/", name).read_bytes())
        if more:
            policy = root / "usr" / "sbin" / "policy-rc.d"
            policy.write_text(_NO_SERVICES)
            policy.chmod(0o755)
            self("apt-get", "-q", "-y", "--no-install-recommends", "install", *more)

    def command(self, *words: str) -> list[str]:
        """The command that runs a program in it."""
        return ["chroot", str(self.root), *words]

    @property
    def environment(self) -> Mapping[str, str]:
        """Nothing of the tests' own."""
        return {"PATH": _PATH, "HOME": "/root", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}

    def __call__(self, *words: str) -> str:
        """What a program that has to succeed prints."""
        return _succeed(self.command(*words), self.environment)


def _succeed(words: list[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(
        words, env=environment or os.environ, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout
