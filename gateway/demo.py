"""`mxgate demo`, the first hour: a gateway and an MTA behind it, on this machine only, without the internet.

    mxgate demo  ->  gateway on 127.0.0.1:2525  ->  MTA on 127.0.0.1:2526  ->  mxgate-demo/Maildir
                     admin on 127.0.0.1:9464        nobody@demo.test does not exist there

The gateway is the real one: its configuration is written to mxgate-demo/mxgate.toml, loaded as `mxgate serve` would
load it (but for the environment, so that the ports are those that we print), and run by the supervisor.

The MTA (aiosmtpd) is a process of its own, forked before anything else, since the supervisor may have neither a
thread nor a loop when it forks its workers. It ignores Ctrl-C, so that the gateway can drain into it, and ends when
its parent does, however that ends: it watches a pipe that only the parent holds open.

Called by cli.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from aiosmtpd.smtp import SMTP, Envelope

from gateway import __version__, supervisor
from gateway.config import ConfigError, load, print_problems
from gateway.errors import GatewayError

DOMAIN = "demo.test"
UNKNOWN = f"nobody@{DOMAIN}"
"""The one recipient of the domain that the MTA refuses."""

_HOST = "127.0.0.1"
_SENDER = "you@example.org"
_RCPT = f"ann@{DOMAIN}"

_EXIT_OK = 0
_EXIT_FAILURE = 1

# For the MTA to end by itself: nothing is under way any more when it is asked to.
_END_S = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NUMBERS = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of 127.0.0.1; the defaults are a contract (DESIGN.md section 7)."""

    gateway: int = 2525
    downstream: int = 2526
    admin: int = 9464


PORTS = Ports()


class DemoError(GatewayError):
    """The demo cannot run here; the text says why."""


def run(directory: Path, ports: Ports = PORTS) -> int:
    """Run until Ctrl-C or SIGTERM; the exit code. Mail, and the configuration in use, are in `directory`."""
    try:
        with _listen(ports) as sock:
            directory = directory.absolute()
            file = _make(directory, ports)
            config = load(file, environ={})
            with _downstream(sock, directory / "Maildir") as pid:
                has_swaks = shutil.which("swaks") is not None
                print(introduction(directory, ports, pid, has_swaks=has_swaks), flush=True)  # noqa: T201
                code = supervisor.run(config, config_path=str(file))
    except DemoError as exc:
        sys.stderr.write(f"mxgate demo: {exc}\n")
        return _EXIT_FAILURE
    except ConfigError as exc:
        print_problems(exc, sys.stderr)
        return _EXIT_FAILURE
    except KeyboardInterrupt:  # before the supervisor has said what it means
        return _EXIT_OK
    return code


# --- what it needs -----------------------------------------------------------------------------------


def _listen(ports: Ports) -> socket.socket:
    """The MTA's socket. Raises DemoError unless the other ports are free too."""
    for port, who in ((ports.gateway, "the gateway"), (ports.admin, "the admin port")):
        _bind(port, who).close()
    return _bind(ports.downstream, "the MTA behind the gateway")


def _bind(port: int, who: str) -> socket.socket:
    sock = socket.socket()
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((_HOST, port))
        # Linux tells only here that somebody else listens.
        sock.listen()
    except OSError as exc:
        sock.close()
        if exc.errno == errno.EADDRINUSE:
            raise DemoError(
                f"port {port} of {_HOST} is in use, and {who} needs it; is another demo running?"
            ) from exc
        raise DemoError(f"cannot listen on port {port} of {_HOST} for {who}: {exc.strerror}") from exc
    return sock


def _make(directory: Path, ports: Ports) -> Path:
    """The directory with an empty Maildir and the configuration, whose path is the result."""
    file = directory / "mxgate.toml"
    try:
        for name in ("tmp", "new", "cur"):
            (directory / "Maildir" / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_text(configuration(ports) + _state(directory), encoding="utf-8")
    except OSError as exc:
        raise DemoError(f"cannot write {exc.filename or directory}: {exc.strerror}") from exc
    return file


def configuration(ports: Ports) -> str:
    """The gateway's configuration, as TOML."""
    return f"""\
# Made anew by each `mxgate demo`. To change it, copy it; then: mxgate serve --config COPY

[server]
hostname = "mx.{DOMAIN}"
listen = ["{_HOST}:{ports.gateway}"]

[relay]
domains = ["{DOMAIN}"]                  # mail for any other domain is refused

[[relay.routes]]
domains = ["*"]
downstream = ["{_HOST}:{ports.downstream}"]      # the MTA behind the gateway

[admin]
listen = "{_HOST}:{ports.admin}"              # /livez /readyz /metrics

[policy.greylist.settings]
delay_s = 10                            # a stranger's first message waits for 10 s

[log]
format = "console"
"""


def _state(directory: Path) -> str:
    """Where the gateway remembers who came: beside the mail. A JSON string is a TOML basic string."""
    return f"\n[state]\nurl = {json.dumps(f'sqlite://{directory}/state.db', ensure_ascii=False)}\n"


# --- what it says ------------------------------------------------------------------------------------


def introduction(directory: Path, ports: Ports, pid: int, *, has_swaks: bool) -> str:
    """What runs where, and what to try; a line that begins with four blanks is a command to paste."""
    send = _swaks if has_swaks else _python
    probe = _swaks if has_swaks else _python_rcpt
    sending = [_swaks(ports, _RCPT), _python(ports, _RCPT)] if has_swaks else [_python(ports, _RCPT)]
    file = shlex.quote(str(directory / "mxgate.toml"))
    maildir = shlex.quote(str(directory / "Maildir"))
    admin = f"http://{_HOST}:{ports.admin}"
    return f"""\
mxgate {__version__} demo: a gateway for {DOMAIN} and an MTA behind it, on this machine only. Ctrl-C ends both.

  gateway        {_HOST}:{ports.gateway}
  MTA behind it  {_HOST}:{ports.downstream}, process {pid}; what it takes is in {maildir}
  admin          {admin}/
  configuration  {file}

To try in another terminal; below, each message becomes one line of the log. A first message is greylisted, 451 4.7.1:
send it again after 10 s. So that you need not wait: mxgate --config {file} greylist allow {_HOST}

1. A message goes through. The file is what the client sent, with one Received field before it:
    {_indented(sending)}
    cat {maildir}/new/*
2. Mail for another domain is refused, 550 5.7.1: this is no open relay.
    {probe(ports, "ann@example.com")}
3. A recipient that the MTA does not know is refused while its sender waits, 550 5.1.1: nobody has to bounce it.
    {probe(ports, UNKNOWN)}
4. Health, and what was counted so far:
    curl -s {admin}/readyz
    curl -s {admin}/metrics | grep mxgate_transactions_total
5. The MTA goes away: the sender is told to come again, 451 4.4.1, and keeps the message. (Then start anew.)
    kill {pid}
    {send(ports, _RCPT)}
"""


def _indented(commands: list[str]) -> str:
    return "\n    ".join(commands)


def _swaks(ports: Ports, rcpt: str) -> str:
    return f"swaks --server {_HOST} --port {ports.gateway} --from {_SENDER} --to {rcpt}"


def _python(ports: Ports, rcpt: str) -> str:
    message = r"Subject: hello\n\nFrom Python.\n"
    return _smtplib(ports, f's.set_debuglevel(1); s.sendmail("{_SENDER}", "{rcpt}", "{message}"); s.quit()')


def _python_rcpt(ports: Ports, rcpt: str) -> str:
    return _smtplib(ports, f's.ehlo(); s.mail("{_SENDER}"); print(s.rcpt("{rcpt}")); s.quit()')


def _smtplib(ports: Ports, statements: str) -> str:
    return f"python3 -c 'import smtplib; s = smtplib.SMTP(\"{_HOST}\", {ports.gateway}); {statements}'"


# --- the MTA behind the gateway ----------------------------------------------------------------------


@contextlib.contextmanager
def _downstream(sock: socket.socket, maildir: Path) -> Iterator[int]:
    """The MTA in a process of its own, whose pid is given. It is gone at the end."""
    watched, held = os.pipe()
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    pid = os.fork()
    if pid == 0:
        os.close(held)
        _be_downstream(sock, maildir, watched, parent)
    # When the MTA is gone, connections have to be refused, not to wait here for nobody.
    sock.close()
    os.close(watched)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pid
    finally:
        os.close(held)
        _await_end(pid)


def _await_end(pid: int) -> None:
    deadline = time.monotonic() + _END_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return
        time.sleep(0.01)


def _be_downstream(sock: socket.socket, maildir: Path, watched: int, parent: int) -> NoReturn:
    """The child, which must never return into the parent's frames."""
    code = _EXIT_FAILURE
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # What asked the parent to end while it forked asked this process too: it is noticed by the pipe.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        asyncio.run(_serve(sock, maildir, watched, parent))
        code = _EXIT_OK
    except BaseException:  # noqa: BLE001  # as above; it is said, and the exit code says so too
        traceback.print_exc()
    finally:
        os._exit(code)


async def _serve(sock: socket.socket, maildir: Path, watched: int, parent: int) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(watched, ended.set)  # nothing is ever written: it is readable when the parent is gone
    # A closed terminal: the gateway takes SIGHUP for something else, and would live on without one.
    loop.add_signal_handler(signal.SIGHUP, os.kill, parent, signal.SIGTERM)
    handler = Downstream(maildir)
    server = await loop.create_server(lambda: _Smtp(handler, loop), sock=sock)
    await ended.wait()
    loop.remove_reader(watched)
    server.close()


class _Smtp(SMTP):
    """A server of aiosmtpd that takes what the gateway does."""

    # Real mail has lines longer than the 998 octets of RFC 5321 4.5.3.1.6, and the gateway passes them on.
    line_length_limit = 16384

    def __init__(self, handler: Downstream, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            handler,
            data_size_limit=0,  # none: the gateway has one
            enable_SMTPUTF8=True,
            hostname=f"mta.{DOMAIN}",
            ident="demo MTA",
            loop=loop,
        )


class Downstream:
    """The MTA as a handler of aiosmtpd: who exists, and where mail goes."""

    def __init__(self, maildir: Path) -> None:
        self._maildir = maildir

    async def handle_RCPT(  # noqa: N802  # aiosmtpd's name
        self, _server: object, _session: object, envelope: Envelope, address: str, rcpt_options: list[str]
    ) -> str:
        """Take everybody of the domain but one."""
        local, _, domain = address.lower().rpartition("@")
        # RFC 5321 4.5.1: postmaster needs no domain
        if domain != DOMAIN and (local, domain) != ("", "postmaster"):
            return "550 5.7.1 Relaying denied"
        if address.lower() == UNKNOWN:
            return "550 5.1.1 There is nobody of this name here"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(rcpt_options)
        return "250 2.1.5 Ok"

    async def handle_DATA(  # noqa: N802  # aiosmtpd's name
        self, _server: object, _session: object, envelope: Envelope
    ) -> str:
        """Say 250 when the message is on the disk, and not before."""
        assert isinstance(envelope.content, bytes)
        try:
            name = await asyncio.to_thread(store, self._maildir, envelope.content)
        except OSError as exc:
            sys.stderr.write(f"mxgate demo: the MTA cannot write to {self._maildir}: {exc.strerror}\n")
            return "452 4.3.1 The message cannot be stored now"
        return f"250 2.0.0 Stored as new/{name}"

    async def handle_exception(self, error: Exception) -> str:
        """Trouble of the MTA is no reason to refuse a message for good, which aiosmtpd would do."""
        traceback.print_exception(error)
        return "451 4.3.0 Temporary trouble"


def store(maildir: Path, content: bytes) -> str:
    """Deliver to a Maildir, as https://cr.yp.to/proto/maildir.html has it; the file's name in new/.

    On the disk when it returns: OSError, or a power cut before, leaves nothing in new/. The octets are those of the
    wire with their CRLF, so that they can be compared with what was sent.
    """
    now_ns = time.time_ns()
    seconds, microseconds = now_ns // 10**9, now_ns % 10**9 // 1000
    name = f"{seconds}.M{microseconds}P{os.getpid()}Q{next(_NUMBERS)}.{DOMAIN}"
    tmp, new = maildir / "tmp" / name, maildir / "new" / name
    try:
        with tmp.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        tmp.rename(new)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    # The name is durable when its directory is.
    directory = os.open(new.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return name
