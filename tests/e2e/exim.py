"""A private Exim behind the gateway, in a Debian of its own: beside Postfix it cannot be installed.

It takes mail for user@example.org from whoever comes with a PROXY header, into a Maildir, as docs/install.md has it.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.e2e.debian import Debian
from tests.e2e.net import LOOPBACK, Address, free_port, is_listening, wait_until
from tests.e2e.postfix import STORE_HOSTNAME

# The user and the group `mail`, on each Debian.
_MAIL = 8
_CONFIGURATION = """\
primary_hostname = {hostname}
domainlist local_domains = example.org
{documented}
acl_smtp_rcpt = check_rcpt
log_selector = +smtp_protocol_error +incoming_interface
message_size_limit = 0

begin acl
check_rcpt:
  accept
    domains = +local_domains
    verify = recipient
  deny
    message = relay not permitted

begin routers
box:
  driver = accept
  domains = +local_domains
  local_parts = user
  transport = box

begin transports
box:
  driver = appendfile
  directory = /var/box
  maildir_format
  user = mail
  group = mail
"""


class Exim:
    """Runs from construction to `close`. `documented` are the lines that the documents tell an operator to write."""

    def __init__(self, root: Path, documented: str) -> None:
        self._debian = Debian(root, "ca-certificates", more=("exim4-daemon-heavy",))
        self._box = root / "var" / "box"
        self._box.mkdir()
        os.chown(self._box, _MAIL, _MAIL)
        self.address: Address = (LOOPBACK, free_port())
        lines = documented.replace("10025", str(self.address[1]))
        configuration = root / "etc" / "exim4" / "exim4.conf"
        configuration.write_text(_CONFIGURATION.format(hostname=STORE_HOSTNAME, documented=lines))
        self._process = subprocess.Popen(
            self._debian.command("exim4", "-bdf"),
            env=self._debian.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: is_listening(self.address), within_s=10, what="Exim listens")
        except AssertionError as exc:
            log = self.log()
            self.close()
            raise AssertionError(f"{exc}\n{log}") from exc

    def close(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def log(self) -> str:
        log = self._debian.root / "var" / "log" / "exim4" / "mainlog"
        return log.read_text("utf-8", errors="replace") if log.exists() else ""

    def wait_stored(self, count: int) -> list[bytes]:
        """All messages, LF line ends, when there are this many; Exim delivers behind its 250."""
        directory = self._box / "new"
        wait_until(
            lambda: directory.is_dir() and len(list(directory.iterdir())) >= count,
            within_s=15,
            what=f"{count} messages are stored",
        )
        return [file.read_bytes() for file in directory.iterdir()]
