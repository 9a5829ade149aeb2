"""A private Dovecot that speaks LMTP on a high port: own configuration, sockets and Maildirs below one directory.

It knows the users of example.org that a test names and delivers each one's mail into a Maildir of its own. It is
our own child (`dovecot -F`), ended with its process group. It needs root, because Dovecot changes users.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, is_listening, wait_until
from tests.e2e.postfix import STORE_HOSTNAME, behind_our_fields

_PROGRAM = "dovecot"
_NOBODY = 65534
_CONFIGURATION = """\
protocols = lmtp
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/log
hostname = {hostname}
ssl = no
first_valid_uid = 1
mail_location = maildir:{directory}/mail/%u
login_trusted_networks = {xclient_from}
passdb {{
  driver = static
  args = nopassword=y
}}
userdb {{
  driver = passwd-file
  args = {directory}/users
}}
service lmtp {{
  inet_listener lmtp {{
    address = {address}
    port = {port}
  }}
}}
"""


class Dovecot:
    """Runs from construction to `close`; the test is skipped where there is none.

    XCLIENT is offered to `xclient_from`.
    """

    def __init__(self, users: Sequence[str], *, xclient_from: str = "") -> None:
        require(program=_PROGRAM, root=True)
        # short: the paths of its sockets have room for 108 octets; and below /tmp, where others may pass
        self._directory = Path(tempfile.mkdtemp(prefix="mxdv", dir="/tmp"))
        self._directory.chmod(0o755)
        self.address: Address = (LOOPBACK, free_port())
        mail = self._directory / "mail"
        mail.mkdir()
        shutil.chown(mail, _NOBODY, _NOBODY)
        (self._directory / "users").write_text(
            "".join(f"{user}::{_NOBODY}:{_NOBODY}::{mail}/{user}::\n" for user in users), encoding="utf-8"
        )
        configuration = self._directory / "dovecot.conf"
        configuration.write_text(
            _CONFIGURATION.format(
                directory=self._directory,
                hostname=STORE_HOSTNAME,
                xclient_from=xclient_from,
                address=self.address[0],
                port=self.address[1],
            ),
            encoding="utf-8",
        )
        self._process = subprocess.Popen(
            [_PROGRAM, "-F", "-c", str(configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: is_listening(self.address), within_s=10, what="Dovecot listens")
        except AssertionError as exc:
            log = self.log()
            self.close()
            raise AssertionError(f"{exc}\n{log}") from exc

    def close(self) -> None:
        """Stop it and take its directory away. It would take its time for what nobody needs any more."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def log(self) -> str:
        """Its log so far."""
        log = self._directory / "log"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def stored_for(self, user: str) -> list[bytes]:
        """What lies in the user's Maildir, LF line ends. Dovecot answers the dot when it is there."""
        return [file.read_bytes() for file in (self._directory / "mail" / user / "new").glob("*")]

    def contents_for(self, user: str) -> list[bytes]:
        """The same behind our own fields, with CRLF: what clients have sent."""
        return [behind_our_fields(stored) for stored in self.stored_for(user)]
