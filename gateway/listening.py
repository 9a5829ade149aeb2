"""The sockets that the supervisor listens on: for each address as many as there are workers, by SO_REUSEPORT.

The kernel parts new connections among the sockets of an address. A socket outlives the worker that accepts from it:
while nobody does, connections wait in its queue, and the next worker serves them. So a socket is closed only when its
address is no longer wanted. When workers become fewer, those that are left accept from the sockets of the others too.

Sockets that a service manager has bound (activation.py) take the place of addresses. It keeps them open itself, so
there is one for each address, from which all workers accept, and who waits in its queue stays there for our successor.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import NamedTuple

from gateway.config import Config, HostPort
from gateway.errors import GatewayError
from gateway.session import Role
from gateway.smtp import reply

EXIT_FAILURE = 1
EXIT_CONFIG = 78  # sysexits.h EX_CONFIG

# SECURITY.md section 1, 9.
_BACKLOG = 511


class StartError(GatewayError):
    """It cannot start; the text is for the operator."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Place(NamedTuple):
    """An address of the configuration; `is_tls`: connections begin with a handshake."""

    address: HostPort
    is_tls: bool
    role: Role = Role.MX


class Sockets(NamedTuple):
    """What a worker accepts from in one role; connections of `implicit_tls` begin with a handshake."""

    plain: tuple[socket.socket, ...] = ()
    implicit_tls: tuple[socket.socket, ...] = ()


WorkerSockets = Mapping[Role, Sockets]
"""Of each role that has addresses."""


@dataclass(frozen=True, slots=True)
class Given:
    """Sockets that listen already, each kind instead of its addresses: of `server`, and `submission` of that table."""

    plain: tuple[socket.socket, ...] = ()
    implicit_tls: tuple[socket.socket, ...] = ()
    submission: tuple[socket.socket, ...] = ()
    submissions: tuple[socket.socket, ...] = ()

    def __contains__(self, sock: socket.socket) -> bool:
        return any(
            sock in kind for kind in (self.plain, self.implicit_tls, self.submission, self.submissions)
        )


NOTHING_GIVEN = Given()


class Listening:
    """The sockets of one configuration, those of the one before among them."""

    def __init__(
        self, sockets: Mapping[Place, tuple[socket.socket, ...]], workers: int, given: Given = NOTHING_GIVEN
    ) -> None:
        self._sockets = sockets
        self._workers = workers
        self._given = given

    def of_worker(self, number: int) -> WorkerSockets:
        """What the worker with this number, from 1, accepts from."""
        found: dict[Role, Sockets] = {}
        for place, sockets in self._sockets.items():
            plain, implicit = found.get(place.role, Sockets())
            is_given = sockets[0] in self._given
            is_short = number > len(sockets)  # see `listen`
            own = sockets if is_given or is_short else (sockets[number - 1], *sockets[self._workers :])
            found[place.role] = (
                Sockets(plain, implicit + own) if place.is_tls else Sockets(plain + own, implicit)
            )
        return found

    def addresses(self, role: Role = Role.MX, *, is_tls: bool) -> list[str]:
        """Where it listens, with the ports that the kernel chose."""
        return [
            str(name_of(sockets[0]))
            for place, sockets in self._sockets.items()
            if place.is_tls == is_tls and place.role is role
        ]

    def without(self, other: Listening | None) -> Iterator[tuple[socket.socket, bool]]:
        """Each socket that the other has not, and whether its connections begin with a handshake."""
        known = {} if other is None else other._sockets  # noqa: SLF001  # of the same class
        for place, sockets in self._sockets.items():
            theirs = known.get(place, ())
            yield from ((sock, place.is_tls) for sock in sockets if sock not in theirs)


def listen(
    config: Config, workers: int, before: Listening | None = None, *, given: Given = NOTHING_GIVEN
) -> Listening:
    """Bind what `before` lacks, and nothing where sockets are given. Raises StartError; then nothing has changed."""
    server, submission = config.server, config.submission
    if given.implicit_tls and not server.tls.cert_file:
        raise StartError("the service manager passes a socket 'smtps', which needs server.tls", EXIT_CONFIG)
    if (given.submission or given.submissions) and not submission.is_on:
        name = "submission" if given.submission else "submissions"
        raise StartError(
            f"the service manager passes a socket {name!r}, which needs submission.listen or submission.listen_tls",
            EXIT_CONFIG,
        )
    places: list[Place] = []
    of_manager: dict[Place, tuple[socket.socket, ...]] = {}
    for role, is_tls, addresses, theirs in (
        (Role.MX, False, server.listen, given.plain),
        (Role.MX, True, server.listen_tls, given.implicit_tls),
        (Role.SUBMISSION, False, submission.listen, given.submission),
        (Role.SUBMISSION, True, submission.listen_tls, given.submissions),
    ):
        of_manager |= {Place(name_of(sock), is_tls, role): (sock,) for sock in theirs}
        if not theirs:
            places += [Place(address, is_tls, role) for address in addresses]
    known = {} if before is None else before._sockets  # noqa: SLF001  # as above
    # The probe for others that listen there would find ourselves.
    ports_of_ours = {name_of(sockets[0]).port for sockets in known.values()}
    with ExitStack() as bound:
        sockets = {**of_manager}
        for place in places:
            group = list(known.get(place, ()))
            if not group and place.address.port not in ports_of_ours:
                _probe(place.address)
            is_known = bool(group)
            while len(group) < workers:
                # port 0: the kernel chooses one for the first socket, and it is that of the others
                address = name_of(group[0]) if group else place.address
                try:
                    group.append(bound.enter_context(bind(address, is_shared=True)))
                except StartError as exc:
                    # `server.user`: sockets of root share their address with root's alone, and a port below 1024 needs
                    # it; further workers accept from the sockets that are there
                    if not is_known or exc.exit_code != EXIT_FAILURE:
                        raise
                    break
            sockets[place] = tuple(group)
        bound.pop_all()
    return Listening(sockets, workers, given)


def bind(address: HostPort, *, is_shared: bool = False) -> socket.socket:
    """A socket that listens, with others of ours at the same address if `is_shared`. Raises StartError."""
    sock = _bound(address, is_shared=is_shared)
    sock.listen(_BACKLOG)
    sock.setblocking(False)
    return sock


def name_of(sock: socket.socket) -> HostPort:
    """Where it is bound."""
    return HostPort(*sock.getsockname()[:2])


def close_politely(sock: socket.socket, *, is_tls: bool) -> None:
    """Close a socket from which nobody accepts any more, and tell the clients in its queue to come again.

    The kernel would reset them. Those that have not ended their handshake of TCP cannot be spared that.
    """
    with suppress(OSError):  # the queue is empty, or descriptors are short
        while True:
            connection, _ = sock.accept()
            with connection, suppress(OSError):
                connection.setblocking(False)
                if not is_tls:
                    connection.send(reply.SHUTTING_DOWN.wire)
    sock.close()


def _probe(address: HostPort) -> None:
    """Fail when somebody listens there: sharing would part the mail with another gateway, without a word."""
    _bound(address, is_shared=False).close()


def _bound(address: HostPort, *, is_shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with ExitStack() as made:
        try:
            sock = made.enter_context(socket.socket(family, socket.SOCK_STREAM))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if is_shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address.host, address.port))
        except OSError as exc:
            # The configuration may be right and the port be taken, or the right to use it be missing.
            is_wrong = exc.errno not in {errno.EADDRINUSE, errno.EACCES}
            code = EXIT_CONFIG if is_wrong else EXIT_FAILURE
            raise StartError(f"cannot listen on {address}: {exc.strerror}", code) from exc
        made.pop_all()
    return sock
