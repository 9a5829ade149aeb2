"""A private Postfix: its own configuration, queue and Maildir below one short directory, a high port, no syslog.

As a downstream it takes mail for example.org and delivers all of it into one Maildir. As a client it sends what
`sendmail` injects to its relayhost. Started as our own child (`master -d`) and stopped by that pid; it can be killed,
started again on the same port with the same queue, and made to hang. It needs root, because Postfix changes users.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.e2e.gateway import HOSTNAME
from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, is_listening, wait_until

_DAEMONS = Path("/usr/lib/postfix/sbin")
STORE_HOSTNAME = "store.example.org"
_NOBODY = 65534
_LONGEST_RUN_S = 3600
# Return-Path, X-Original-To, Delivered-To
_FIELDS_BEFORE_RECEIVED = 3

# Content is stored as it came: no header is rewritten or added for local clients, no limit is in the way, and no
# client is slowed but by the error limits, which are Postfix's own.
_MAIN = {
    "compatibility_level": "3.6",
    "command_directory": "/usr/sbin",
    "daemon_directory": str(_DAEMONS),
    "mail_owner": "postfix",
    "setgid_group": "postdrop",
    "inet_interfaces": LOOPBACK,
    "inet_protocols": "ipv4",
    "myhostname": STORE_HOSTNAME,
    "myorigin": "example.org",
    "mydestination": "",
    "mynetworks": "",
    "alias_maps": "",
    "alias_database": "",
    "local_recipient_maps": "",
    "local_header_rewrite_clients": "",
    "virtual_mailbox_domains": "example.org",
    "virtual_mailbox_maps": "static:box/",
    "virtual_uid_maps": f"static:{_NOBODY}",
    "virtual_gid_maps": f"static:{_NOBODY}",
    "virtual_mailbox_limit": "0",
    "message_size_limit": "104857600",
    "smtpd_relay_restrictions": "reject_unauth_destination",
    "smtpd_client_connection_count_limit": "0",
    "smtp_tls_security_level": "none",
    "disable_dns_lookups": "yes",
    "maillog_file_prefixes": "/tmp",
}
_SERVICES = """\
pickup unix n - n 1 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
trace unix - - n - 0 bounce
verify unix - - n - 1 verify
flush unix n - n 1000? 0 flush
proxymap unix - - n - - proxymap
proxywrite unix - - n - 1 proxymap
smtp unix - - n - - smtp
relay unix - - n - - smtp
showq unix n - n - - showq
error unix - - n - - error
retry unix - - n - - error
discard unix - - n - - discard
virtual unix - n n - - virtual
lmtp unix - - n - - lmtp
anvil unix - - n - 1 anvil
scache unix - - n - 1 scache
postlog unix-dgram n - n - 1 postlogd
"""
_QUEUES = ("maildrop", "incoming", "active", "deferred")
_POSTFIX_ONLY = (
    "active",
    "bounce",
    "corrupt",
    "defer",
    "deferred",
    "flush",
    "hold",
    "incoming",
    "private",
    "saved",
    "trace",
)


class Postfix:
    """Runs from construction to `close`; the test is skipped where there is none. `settings` are lines of main.cf.

    `refused` is an access(5) table in regexp form over recipients, for instance `/^no-/ 550 5.1.1 No such user`.
    """

    def __init__(self, settings: Mapping[str, str] | None = None, *, refused: str = "") -> None:
        require(program=_DAEMONS / "master", root=True)
        # short: the paths of its sockets have room for 108 octets; and below /tmp, where others may pass
        self.directory = Path(tempfile.mkdtemp(prefix="mxpf", dir="/tmp"))
        self.directory.chmod(0o755)
        self.address: Address = (LOOPBACK, free_port())
        self._etc = self.directory / "etc"
        self._maildir = self.directory / "mail" / "box"
        self._configure(dict(settings or {}), refused)
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            # -e: it ends by itself, should the test run be killed before it can stop it
            [str(_DAEMONS / "master"), "-c", str(self._etc), "-d", "-e", str(_LONGEST_RUN_S)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # a process group of its own, in which master and all its children are
            start_new_session=True,
        )
        try:
            wait_until(lambda: is_listening(self.address), within_s=10, what="Postfix listens")
        except AssertionError as exc:
            process.kill()
            process.wait()
            raise AssertionError(f"{exc}\n{self.log()}") from exc
        return process

    def close(self) -> None:
        """Stop it and take its directory away."""
        try:
            if self._process.poll() is None:
                self.thaw()
                self._process.terminate()
                self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def kill(self) -> None:
        """End master and all its children at once, as a power failure does; nobody listens when this returns."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        wait_until(lambda: not is_listening(self.address), within_s=5, what="killed Postfix is gone")

    def start(self) -> None:
        """Start what `kill` ended: the same port, and what was in the queue is delivered."""
        self._process = self._started()

    def freeze(self) -> None:
        """Hang: no process of it does anything, while the system still accepts connections in its name."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """End `freeze`."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def log(self) -> str:
        """Its mail log so far."""
        log = self.directory / "maillog"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def inject(self, mail_from: str, rcpts: Sequence[str], content: bytes) -> None:
        """Hand a message with LF line ends to its `sendmail`, as a local program does."""
        subprocess.run(
            ["/usr/sbin/sendmail", "-C", str(self._etc), "-i", "-f", mail_from, *rcpts],
            input=content,
            check=True,
            capture_output=True,
            timeout=10,
        )

    def stored(self) -> list[bytes]:
        """All that lies in the Maildir, LF line ends."""
        return [file.read_bytes() for file in self._new()]

    def stored_for(self, rcpt: str) -> list[bytes]:
        """What lies there for this recipient (as Postfix writes it in Delivered-To)."""
        return [file.read_bytes() for file in self._new() if _delivered_to(file) == rcpt.encode()]

    def _new(self) -> list[Path]:
        return list((self._maildir / "new").glob("*"))

    def wait_stored(self, rcpt: str, within_s: float = 15) -> bytes:
        """The one message that arrives for this recipient."""
        try:
            stored = wait_until(
                lambda: self.stored_for(rcpt), within_s=within_s, what=f"mail for {rcpt} is stored"
            )
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.log()}") from exc
        assert len(stored) == 1, f"{len(stored)} copies for {rcpt}"
        return stored[0]

    def wait_copies(self, rcpt: str, count: int, within_s: float = 15) -> None:
        """Return when this many messages have arrived for the recipient."""
        wait_until(
            lambda: len(self.stored_for(rcpt)) >= count, within_s=within_s, what=f"{count} copies for {rcpt}"
        )

    def wait_content(self, rcpt: str, within_s: float = 15) -> bytes:
        """The content of that message behind our own fields, with CRLF: what the client has sent."""
        return behind_our_fields(self.wait_stored(rcpt, within_s))

    def wait_copies_of_all(self, within_s: float = 30) -> Counter[str]:
        """Recipient -> messages stored for it, when all that it took has been delivered.

        What Postfix itself delivers twice, because it was killed in between, counts once: it has one queue id.
        """
        wait_until(self.is_queue_empty, within_s=within_s, what="Postfix's queue is empty")
        return Counter(rcpt for rcpt, _ in {(delivered_to(mail), queue_id(mail)) for mail in self.stored()})

    def is_queue_empty(self) -> bool:
        """Whether all that it took has been delivered or bounced."""
        spool = self.directory / "spool"
        return not any(_is_complete(file) for name in _QUEUES for file in (spool / name).rglob("*"))

    def _configure(self, settings: dict[str, str], refused: str) -> None:
        spool, data, mail = (self.directory / name for name in ("spool", "data", "mail"))
        for directory in (self._etc, spool, data, mail):
            directory.mkdir()
        shutil.chown(data, "postfix")
        mail.chmod(0o777)
        shutil.chown(mail, _NOBODY, _NOBODY)
        for name in _POSTFIX_ONLY:
            (spool / name).mkdir(mode=0o700)
            shutil.chown(spool / name, "postfix")
        (spool / "pid").mkdir(mode=0o755)
        for name, mode in (("maildrop", 0o1730), ("public", 0o2710)):
            (spool / name).mkdir()
            shutil.chown(spool / name, "postfix", "postdrop")
            (spool / name).chmod(mode)
        if refused:
            (self._etc / "refused").write_text(refused + "\n", encoding="utf-8")
            settings = {
                "smtpd_recipient_restrictions": f"check_recipient_access regexp:{self._etc}/refused"
            } | settings
        places = {
            "queue_directory": str(spool),
            "data_directory": str(data),
            "virtual_mailbox_base": str(mail),
            "maillog_file": str(self.directory / "maillog"),
        }
        main = "".join(f"{key} = {value}\n" for key, value in (_MAIN | places | settings).items())
        (self._etc / "main.cf").write_text(main, encoding="utf-8")
        # each of its programs reads a file that has just been changed again and again, for 2 s, lest it miss a part
        os.utime(self._etc / "main.cf", (0, 0))
        smtpd = f"{self.address[0]}:{self.address[1]} inet n - n - - smtpd\n"
        (self._etc / "master.cf").write_text(smtpd + _SERVICES, encoding="utf-8")


def sending_postfix(gateway: Address, settings: Mapping[str, str] | None = None) -> Postfix:
    """A Postfix whose only way out is the gateway; what is deferred goes out again after three seconds.

    Not sooner: a message whose last attempt is only just ending is put off for minutes (`still being delivered`).
    """
    host, port = gateway
    ours = {
        "myhostname": "client.example.net",
        "virtual_mailbox_domains": "",
        "relayhost": f"[{host}]:{port}",
        "smtp_tls_security_level": "may",
        "queue_run_delay": "1s",
        "minimal_backoff_time": "3s",
        "maximal_backoff_time": "3s",
    }
    return Postfix(ours | dict(settings or {}))


def behind_our_fields(stored: bytes, hostname: str = HOSTNAME) -> bytes:
    """The content behind what Postfix and the gateway put on top, with CRLF restored.

    On top may stand Return-Path, X-Original-To, Delivered-To and Received of Postfix, then our Received, exactly
    one, and our Authentication-Results. The first field of anybody else, or the end of the header, ends them.
    """
    ours = 0
    rest = stored
    while field := _first_field(rest):
        name, _, value = field.partition(b":")
        if is_our_received := name == b"Received" and b" by " + hostname.encode() in b" ".join(value.split()):
            ours += 1
        is_postfix = name in (b"Return-Path", b"X-Original-To", b"Delivered-To") or (
            name == b"Received" and b"by " + STORE_HOSTNAME.encode() in value
        )
        is_our_result = (
            name == b"Authentication-Results" and value.split(b";")[0].strip() == hostname.encode()
        )
        if not (is_our_received or is_postfix or is_our_result):
            break
        rest = rest[len(field) :]
    assert ours == 1, f"{ours} Received fields of ours in {stored[:2000]!r}"
    return rest.replace(b"\n", b"\r\n")


def queue_id(stored: bytes) -> bytes:
    """The queue id that the storing Postfix gave the message: the same in copies of which it alone is the cause."""
    found = re.search(rb"\n\tby %b \(Postfix\) with \S+ id (\w+)" % STORE_HOSTNAME.encode(), stored)
    assert found, stored[:2000]
    return found[1]


def delivered_to(stored: bytes) -> str:
    """The recipient for whom it was stored."""
    found = re.search(rb"^Delivered-To: (.*)$", stored, re.MULTILINE)
    assert found, stored[:2000]
    return found[1].decode()


def _first_field(header: bytes) -> bytes:
    """The first header field with its continuation lines; b"" when the first line is none."""
    end = header.find(b"\n") + 1
    if b":" not in header[:end]:
        return b""
    while header[end : end + 1] in (b" ", b"\t"):
        end = header.find(b"\n", end) + 1 or len(header)
    return header[:end]


def _is_complete(file: Path) -> bool:
    """Whether the queue file is a whole message: what was under way when Postfix was killed is not executable."""
    try:
        status = file.stat()
    except OSError:
        # delivered meanwhile
        return False
    return stat.S_ISREG(status.st_mode) and bool(status.st_mode & stat.S_IXUSR)


def _delivered_to(file: Path) -> bytes:
    with file.open("rb") as stored:
        for _ in range(_FIELDS_BEFORE_RECEIVED):
            name, _, value = stored.readline(4096).partition(b":")
            if name == b"Delivered-To":
                return value.strip()
    return b""
