"""`mxgate demo`, the first hour: a gateway and an MTA behind it, on this machine only, without the internet.

    mxgate demo  ->  gateway on 127.0.0.1:2525  ->  MTA on 127.0.0.1:2526  ->  mxgate-demo/Maildir
                     admin on 127.0.0.1:9464        nobody@demo.test does not exist there
                     asks the name server on 127.0.0.1:2527, which has the file `zone` and nothing else

The gateway is the real one: its configuration is written to mxgate-demo/mxgate.toml, loaded as `mxgate serve` would
load it (but for the environment, so that the ports are those that we print), and run by the supervisor. The MTA
(mta.py) and the name server (nameserver.py) are processes of their own (process.py).

`signed.eml` is a message with a signature by the key in `zone`; nobody has the private half any more.

Called by cli.py.
"""

from __future__ import annotations

import errno
import json
import shlex
import shutil
import socket
import sys
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

from gateway import __version__, supervisor
from gateway.config import ConfigError, load, print_problems
from gateway.demo import mta, nameserver
from gateway.demo.mta import DOMAIN, UNKNOWN
from gateway.demo.process import served
from gateway.errors import GatewayError

_HOST = "127.0.0.1"
_STRANGER = "127.0.0.2"
"""A client that the sender's domain does not permit."""
_SENDER = "you@example.org"
_FORWARDER = "someone@example.net"
_RCPT = f"ann@{DOMAIN}"
_SIGNED = "signed.eml"

_EXIT_OK = 0
_EXIT_FAILURE = 1


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of 127.0.0.1; the defaults are a contract (DESIGN.md section 7). `dns` is one of UDP."""

    gateway: int = 2525
    downstream: int = 2526
    admin: int = 9464
    dns: int = 2527


PORTS = Ports()


class DemoError(GatewayError):
    """The demo cannot run here; the text says why."""


def run(directory: Path, ports: Ports = PORTS) -> int:
    """Run until Ctrl-C or SIGTERM; the exit code. Mail, and the configuration in use, are in `directory`."""
    try:
        with (
            _listen(ports) as mta_socket,
            _bound(ports.dns, "the name server", socket.SOCK_DGRAM) as dns_socket,
        ):
            directory = directory.absolute()
            file = _make(directory, ports)
            config = load(file, environ={})
            zone = _text_of("zone")
            with (
                served(dns_socket, partial(nameserver.serve, zone_text=zone), tells_of_hangup=False),
                served(
                    mta_socket, partial(mta.serve, maildir=directory / "Maildir"), tells_of_hangup=True
                ) as pid,
            ):
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
        _bound(port, who).close()
    return _bound(ports.downstream, "the MTA behind the gateway")


def _bound(port: int, who: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    sock = socket.socket(type=kind)
    try:
        if kind is socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((_HOST, port))
        if kind is socket.SOCK_STREAM:
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
    """The directory with an empty Maildir, the signed message and the configuration, whose path is the result."""
    file = directory / "mxgate.toml"
    try:
        for name in ("tmp", "new", "cur"):
            (directory / "Maildir" / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        (directory / _SIGNED).write_text(_text_of(_SIGNED), encoding="utf-8")
        file.write_text(configuration(ports) + _state(directory), encoding="utf-8")
    except OSError as exc:
        raise DemoError(f"cannot write {exc.filename or directory}: {exc.strerror}") from exc
    return file


def _text_of(name: str) -> str:
    """A file that comes with this package."""
    return files(__name__).joinpath(name).read_text("utf-8")


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

[dns]
nameservers = ["{_HOST}:{ports.dns}"]     # the demo's own: it knows example.org and example.net

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


def introduction(directory: Path, ports: Ports, pid: int, *, has_swaks: bool, program: str = "") -> str:
    """What runs where, and what to try; a line that begins with four blanks is a command to paste.

    `program` is how mxgate is called; by default it is that of this Python.
    """
    send = _swaks if has_swaks else _python
    probe = _swaks if has_swaks else _python_rcpt
    sending = [_swaks(ports, _RCPT), _python(ports, _RCPT)] if has_swaks else [_python(ports, _RCPT)]
    maildir, signed, config = (
        shlex.quote(str(directory / name)) for name in ("Maildir", _SIGNED, "mxgate.toml")
    )
    mxgate = program or shlex.quote(str(Path(sys.executable).with_name("mxgate")))
    admin = f"http://{_HOST}:{ports.admin}"
    return f"""\
mxgate {__version__} demo: a gateway for {DOMAIN} and an MTA behind it, on this machine only. Ctrl-C ends both.

  gateway        {_HOST}:{ports.gateway}
  MTA behind it  {_HOST}:{ports.downstream}, process {pid}; what it takes is in {maildir}
  name server    {_HOST}:{ports.dns}: example.org sends from {_HOST}, signs, and wants all else rejected (DMARC)
  admin          {admin}/
  configuration  {config}

To try in another terminal; below, each message becomes one line of the log. A stranger's first message is greylisted,
451 4.7.1: send it again after 10 s. So that you need not wait:
    {mxgate} --config {config} greylist allow {_HOST}

1. A message goes through. The file is what the client sent, with what was found (spf=pass, dmarc=pass) in an
   Authentication-Results field and with a Received field before it:
    {_indented(sending)}
    cat {maildir}/new/*
2. The same from another client is forged for all that can be known, and refused, 550 5.7.1:
    {send(ports, _RCPT, client=_STRANGER)}
3. So may that client send what example.org has signed: a forwarder does (dkim=pass, dmarc=pass).
    {send(ports, _RCPT, client=_STRANGER, sender=_FORWARDER, file=signed)}
4. But not when it was changed on the way, 550 5.7.1:
    {send(ports, _RCPT, client=_STRANGER, sender=_FORWARDER, file=signed, change=True)}
5. Why? What each policy found, of mail that came and of a message in a file:
    {mxgate} decisions --limit 1 --config {config}
    {mxgate} explain {signed} --ip {_STRANGER} --mail-from {_FORWARDER} --rcpt {_RCPT} --config {config}
6. Mail for another domain is refused, 550 5.7.1: this is no open relay.
    {probe(ports, "ann@example.com")}
7. A recipient that the MTA does not know is refused while its sender waits, 550 5.1.1: nobody has to bounce it.
    {probe(ports, UNKNOWN)}
8. Health, and what was counted so far:
    curl -s {admin}/readyz
    curl -s {admin}/metrics | grep mxgate_transactions_total
9. The MTA goes away: the sender is told to come again, 451 4.4.1, and keeps the message. (Then start anew.)
    kill {pid}
    {send(ports, _RCPT)}
"""


def _indented(commands: list[str]) -> str:
    return "\n    ".join(commands)


def _swaks(
    ports: Ports, rcpt: str, *, client: str = "", sender: str = _SENDER, file: str = "", change: bool = False
) -> str:
    command = f"swaks --server {_HOST} --port {ports.gateway} --from {sender} --to {rcpt}"
    if client:
        command += f" --local-interface {client}"
    if change:
        return f"sed s/Monday/Friday/ {file} | {command} --data -"
    return f"{command} --data @{file}" if file else command


def _python(
    ports: Ports, rcpt: str, *, client: str = "", sender: str = _SENDER, file: str = "", change: bool = False
) -> str:
    message = rf'"From: {sender}\nSubject: hello\n\nFrom Python.\n"'
    if file:
        message = "sys.stdin.read()" + ('.replace("Monday", "Friday")' if change else "")
    command = _smtplib(
        ports, f's.set_debuglevel(1); s.sendmail("{sender}", "{rcpt}", {message}); s.quit()', client
    )
    return f"{command} < {file}" if file else command


def _python_rcpt(ports: Ports, rcpt: str) -> str:
    return _smtplib(ports, f's.ehlo(); s.mail("{_SENDER}"); print(s.rcpt("{rcpt}")); s.quit()')


def _smtplib(ports: Ports, statements: str, client: str = "") -> str:
    source = f', source_address=("{client}", 0)' if client else ""
    connect = f'smtplib.SMTP("{_HOST}", {ports.gateway}{source})'
    return f"python3 -c 'import smtplib, sys; s = {connect}; {statements}'"
