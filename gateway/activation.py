"""Sockets that a service manager has bound for us: socket activation, sd_listen_fds(3).

Their name, `FileDescriptorName=` of a systemd.socket(5), says what they are for: `smtp` takes the place of
`server.listen`, `smtps` that of `server.listen_tls`, `submission` and `submissions` those of `submission.listen` and
`submission.listen_tls`, `admin` that of `admin.listen`. A socket that cannot be used is a mistake in the unit, and is
said at start; nothing is ignored. Without a service manager there are none.
"""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gateway.listening import EXIT_CONFIG, Given, StartError, name_of

# sd_listen_fds(3): SD_LISTEN_FDS_START
_FIRST = 3


class SocketName(StrEnum):
    """What a socket is for, by its name."""

    SMTP = "smtp"
    SMTPS = "smtps"
    SUBMISSION = "submission"
    SUBMISSIONS = "submissions"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Activated:
    """What was passed: for the workers, and for the admin port."""

    given: Given
    admin: socket.socket | None


def activated(environ: MutableMapping[str, str]) -> Activated:
    """The sockets that were passed to this process. Raises StartError.

    Takes its variables out of the environment, so that no other process takes the sockets for its own.
    """
    pid, count, names = (environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    found: dict[SocketName, list[socket.socket]] = {name: [] for name in SocketName}
    if count.isdecimal() and pid == str(os.getpid()):
        # A name is missing where a manager is older than systemd 227, and where it is empty.
        called = names.split(":") if names else []
        for index in range(int(count)):
            sock = _adopted(_FIRST + index)
            found[_name(sock, called[index] if index < len(called) else "")].append(sock)
    if len(found[SocketName.ADMIN]) > 1:
        raise StartError("there is one admin port, and the service manager passes several", EXIT_CONFIG)
    given = Given(
        plain=tuple(found[SocketName.SMTP]),
        implicit_tls=tuple(found[SocketName.SMTPS]),
        submission=tuple(found[SocketName.SUBMISSION]),
        submissions=tuple(found[SocketName.SUBMISSIONS]),
    )
    return Activated(given, found[SocketName.ADMIN][0] if found[SocketName.ADMIN] else None)


def _adopted(descriptor: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=descriptor)
    except OSError as exc:
        raise StartError(f"descriptor {descriptor} of the service manager is no socket", EXIT_CONFIG) from exc
    sock.set_inheritable(False)
    sock.setblocking(False)
    return sock


def _name(sock: socket.socket, name: str) -> SocketName:
    if problem := _problem(sock):
        raise StartError(f"the service manager passes a socket {name!r} that {problem}", EXIT_CONFIG)
    try:
        return SocketName(name)
    except ValueError:
        raise StartError(
            f"the service manager passes a socket at {name_of(sock)} by the name {name!r}: "
            f"FileDescriptorName= has to be {_listed([*SocketName])}",
            EXIT_CONFIG,
        ) from None


def _problem(sock: socket.socket) -> str:
    if sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return "is not of TCP: ListenStream= has to be an address and a port"
    if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        return "does not listen: it has to be ListenStream= with Accept=no"
    # A client of IPv4 would have an address of IPv6, for all that goes by addresses.
    if sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY):
        return "takes IPv4 and IPv6: it has to be BindIPv6Only=ipv6-only, with a ListenStream= for each"
    return ""


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
