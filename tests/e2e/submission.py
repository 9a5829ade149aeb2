"""What stands behind submission: a Dovecot that knows passwords, and a Postfix whose own submission port asks it.

Dovecot serves its auth socket (a path, and a port of 127.0.0.1) and nothing else. The Postfix takes mail from nobody
but who has authenticated there, or for whom the gateway says so by XCLIENT LOGIN; it stores all of it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.e2e.certificates import Tls
from tests.e2e.gateway import Value
from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, is_listening, wait_until
from tests.e2e.postfix import Postfix

ANN, BOB = "ann@example.org", "bob@example.org"
PASSWORDS = {ANN: "s3cret Passwort!", BOB: "geheim\u00e4"}

_CONFIGURATION = """\
protocols =
base_dir = {directory}/run
state_dir = {directory}/state
log_path = {directory}/log
auth_mechanisms = plain login
# what Dovecot itself waits behind a failure; the gateway has a delay of its own
auth_failure_delay = 0
ssl = no
first_valid_uid = 1
passdb {{
  driver = passwd-file
  args = {directory}/users
}}
userdb {{
  driver = static
  args = uid=nobody gid=nogroup home=/nonexistent
}}
service auth {{
  unix_listener {directory}/auth {{
    mode = 0666
  }}
  inet_listener {{
    address = 127.0.0.1
    port = {port}
  }}
}}
# no penalties of its own for an address that fails often
service anvil {{
  unix_listener anvil-auth-penalty {{
    mode = 0
  }}
}}
"""


class PasswordServer:
    """A Dovecot from construction to `close`; the test is skipped where there is none."""

    def __init__(self, passwords: Mapping[str, str] = PASSWORDS) -> None:
        require(program="dovecot", root=True)
        self._directory = Path(tempfile.mkdtemp(prefix="mxpw", dir="/tmp"))
        self._directory.chmod(0o755)
        self.socket = self._directory / "auth"
        self.address: Address = (LOOPBACK, free_port())
        (self._directory / "users").write_text(
            "".join(f"{user}:{{PLAIN}}{password}::::::\n" for user, password in passwords.items()),
            encoding="utf-8",
        )
        self._configuration = self._directory / "dovecot.conf"
        self._configuration.write_text(
            _CONFIGURATION.format(directory=self._directory, port=self.address[1]), encoding="utf-8"
        )
        self.start()

    def start(self) -> None:
        """Start it; after `stop`, on the same socket and port."""
        self._process = subprocess.Popen(
            ["dovecot", "-F", "-c", str(self._configuration)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            wait_until(lambda: is_listening(self.address), within_s=10, what="Dovecot's auth listens")
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.log()}") from exc

    def stop(self) -> None:
        """End it at once; nobody answers any more when this returns."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # its children have their own groups, and notice
        wait_until(lambda: not is_listening(self.address), within_s=10, what="Dovecot's auth is gone")

    def close(self) -> None:
        """Stop it and take its directory away."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def log(self) -> str:
        """Its log so far."""
        log = self._directory / "log"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""


def submission_postfix(passwords: PasswordServer, tls: Tls) -> Postfix:
    """A Postfix as `submission` in master.cf has it, with Dovecot SASL; stores mail for example.org and example.net."""
    return Postfix(
        tls.postfix_settings()
        | {
            "smtpd_tls_security_level": "may",
            "smtpd_tls_auth_only": "yes",
            "smtpd_sasl_auth_enable": "yes",
            "smtpd_sasl_type": "dovecot",
            "smtpd_sasl_path": str(passwords.socket),
            "smtpd_sasl_authenticated_header": "yes",
            "smtpd_relay_restrictions": "permit_sasl_authenticated, reject",
            "smtpd_recipient_restrictions": "permit_sasl_authenticated, reject",
            "smtpd_authorized_xclient_hosts": LOOPBACK,
            "virtual_mailbox_domains": "example.org example.net",
        }
    )


def submission_sections(
    postfix: Postfix, tls: Tls, auth: dict[str, Value], **keys: Value
) -> dict[str, Value]:
    """[submission] on free ports in front of this Postfix, and what it needs in other tables."""
    host, port = postfix.address
    inbound: dict[str, Value] = {"domains": ["*"], "downstream": [f"{host}:{port}"]}
    own: dict[str, Value] = {
        "name": "submission",
        "domains": [],
        "downstream": [f"{host}:{port}"],
        "identity": "xclient",
    }
    quick: dict[str, Value] = {"failure_delay_s": 0.2}
    return {
        "server": {"tls": {"cert_file": str(tls.cert_file), "key_file": str(tls.key_file)}},
        "relay": {"routes": [inbound, own]},
        "state": {"url": "memory:"},
        "submission": {
            "listen": [f"{LOOPBACK}:{free_port()}"],
            "listen_tls": [f"{LOOPBACK}:{free_port()}"],
            "route": "submission",
            "auth": quick | auth,
            **keys,
        },
    }
