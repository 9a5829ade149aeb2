"""What the schema of one table cannot know: tables that contradict each other, files.

`contradictions` needs the configuration only; `check_files` looks at the machine, so it is asked by the commands
that are about to use these files (serve, a reload, check-config).
"""

from __future__ import annotations

import ssl
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path

from gateway.config.errors import ConfigError, KeyPath, did_you_mean
from gateway.config.model import (
    RELAY_GUARD,
    AuthBackend,
    Config,
    PolicySection,
    Protocol,
    Relay,
    Route,
    RouteTls,
    SubmissionAuth,
)
from gateway.config.values import HostPort
from gateway.identity import identity_of
from gateway.policy import Mode, OnError

Finding = tuple[KeyPath, str]


def contradictions(config: Config) -> dict[KeyPath, str]:
    """Everything that is wrong although each table for itself is right: one message for a path."""
    found: dict[KeyPath, str] = {}
    guard = config.policy.get(RELAY_GUARD, PolicySection())
    own_guard = config.submission.policy.get(RELAY_GUARD, PolicySection())
    for path, message in (
        *_unserviceable(config),
        *_overlapping(config),
        *_contradictory_routes(config.relay, {config.quarantine.route, config.submission.route}),
        *_unusable_quarantine(config),
        *_unsafe_relay_guard(guard),
        *_unusable_submission(config),
        *((("submission", *path), message) for path, message in _unsafe_relay_guard(own_guard)),
    ):
        found.setdefault(path, message)
    return found


def _unserviceable(config: Config) -> Iterator[Finding]:
    tls = config.server.tls
    if tls.cert_file and not tls.key_file:
        yield ("server", "tls", "cert_file"), "needs server.tls.key_file"
    if tls.key_file and not tls.cert_file:
        yield ("server", "tls", "key_file"), "needs server.tls.cert_file"
    if not config.server.listen and not config.server.listen_tls:
        yield ("server", "listen"), "no address to listen on"
    if config.server.group and not config.server.user:
        yield ("server", "group"), "needs server.user"
    if config.server.listen_tls and not tls.cert_file:
        yield ("server", "listen_tls"), "needs server.tls.cert_file and server.tls.key_file"
    if not config.admin.trust_loopback and not config.admin.token_file:
        yield ("admin", "trust_loopback"), "false needs admin.token_file: nobody could show a token"
    if not config.relay.domains and not config.relay.domains_file:
        yield (
            ("relay", "domains"),
            "mail for no domain would be accepted; list your domains here or in domains_file",
        )
    if not config.relay.routes:
        yield ("relay", "routes"), "no route; say where mail goes: [[relay.routes]] with downstream"


def _overlapping(config: Config) -> Iterator[Finding]:
    # a reload would bind both, and the kernel send clients to either
    taken: list[HostPort] = []
    for section, addresses in (("server", config.server), ("submission", config.submission)):
        for key in ("listen", "listen_tls"):
            for place, address in enumerate(getattr(addresses, key)):
                if other := next((each for each in taken if _overlap(address, each)), None):
                    where = "" if other == address else f" by {other}"
                    yield (section, key, place), f"{address} is listened on already{where}"
                taken.append(address)
    if other := next((each for each in taken if _overlap(config.admin.listen, each)), None):
        yield ("admin", "listen"), f"{config.admin.listen} is listened on already by {other}"


def _overlap(one: HostPort, other: HostPort) -> bool:
    """Whether both take the same connection; sockets for IPv6 take nothing else."""
    is_same_family = (":" in one.host) == (":" in other.host)
    hosts = {one.host, other.host}
    return (
        one.port == other.port != 0
        and is_same_family
        and (len(hosts) == 1 or not hosts.isdisjoint(["0.0.0.0", "::"]))
    )


def _contradictory_routes(relay: Relay, apart: Container[str]) -> Iterator[Finding]:
    names: set[str] = set()
    taken: dict[str, str] = {}  # domain -> route
    for index, (name, route) in enumerate(relay.named_routes):
        path = ("relay", "routes", index)
        if name in names:
            yield (*path, "name"), f"another route has the name {name}"
        names.add(name)
        if not route.domains and name not in apart:
            yield (*path, "domains"), "must not be empty"
        for place, domain in enumerate(route.domains):
            if domain in taken:
                yield (*path, "domains", place), f"{domain} is in {taken[domain]} already"
            taken.setdefault(domain, name)
        yield from ((path + below, message) for below, message in _contradictory_route(route))
    if relay.routes and not taken:
        yield ("relay", "routes"), "no route has a domain"
    elif relay.routes:
        for place, domain in enumerate(relay.domains):
            if not _is_routed(domain, taken):
                yield ("relay", "domains", place), f"no route takes mail for {domain}"


def _unusable_quarantine(config: Config) -> Iterator[Finding]:
    name = config.quarantine.route
    route = dict(config.relay.named_routes).get(name)
    path = ("quarantine", "route")
    if name and route is None:
        yield path, f"no route has the name {name}{did_you_mean(name, dict(config.relay.named_routes))}"
    elif route is not None and route.protocol is Protocol.LMTP:
        # RFC 2033 4.2: one reply for each recipient behind the dot, and mail in quarantine has several
        yield path, f"{name} speaks LMTP, which takes one recipient at a time"


def _unusable_submission(config: Config) -> Iterator[Finding]:
    own, routes = config.submission, dict(config.relay.named_routes)
    if not own.is_on:
        if own.route or own.policy or own.auth.address:
            yield ("submission",), "has no effect without submission.listen or submission.listen_tls"
        return
    if not config.server.tls.cert_file:
        # RFC 8314 3: no password and no mail of a user in the clear
        key = "listen" if own.listen else "listen_tls"
        yield ("submission", key), "needs server.tls.cert_file and server.tls.key_file"
    path: KeyPath = ("submission", "route")
    if not own.route:
        yield path, "says where the mail goes: the name of a [[relay.routes]] with domains = []"
    elif own.route not in routes:
        yield path, f"no route has the name {own.route}{did_you_mean(own.route, routes)}"
    elif routes[own.route].domains:
        yield path, f"{own.route} is a route for others too; it must be one of its own, with domains = []"
    elif own.route == config.quarantine.route:
        yield path, f"{own.route} is the route of the quarantine"
    elif routes[own.route].protocol is Protocol.LMTP:
        # the others would get 452, and a user's program does not come again for them by itself
        yield path, f"{own.route} speaks LMTP, which takes one recipient at a time"
    yield from _unusable_auth(own.auth)


def _unusable_auth(auth: SubmissionAuth) -> Iterator[Finding]:
    path: KeyPath = ("submission", "auth")
    is_downstream = auth.backend is AuthBackend.DOWNSTREAM
    if not auth.address:
        yield (*path, "address"), f"says where the back-end {auth.backend} is"
    elif is_downstream and isinstance(auth.address, str):
        yield (*path, "address"), "must be host:port of a mail server's submission port"
    for key in ("tls_implicit", "tls_ca_file", "tls_name"):
        if getattr(auth, key) and not is_downstream:
            yield (*path, key), 'is for backend = "downstream" only'


def _contradictory_route(route: Route) -> Iterator[Finding]:
    seen: set[HostPort] = set()
    for at, group in enumerate(route.downstream):
        for place, host in enumerate(group):
            if host in seen:
                path = (place,) if len(route.downstream) == 1 else (at, place)
                yield ("downstream", *path), f"{host} is listed twice"
            seen.add(host)
    if route.tls_implicit and route.tls not in (RouteTls.ENCRYPT, RouteTls.VERIFY):
        yield ("tls_implicit",), 'needs tls = "encrypt" or tls = "verify"'
    if route.tls_ca_file and route.tls is not RouteTls.VERIFY:
        yield ("tls_ca_file",), 'checks nothing without tls = "verify"'


def _is_routed(domain: str, patterns: Container[str]) -> bool:
    """Whether a domain, or all below it where it is written as ".parent", has a route."""
    # "a.b.c", ".b.c", ".c": as the relay looks for a route
    labels = domain.split(".")
    parents = ("." + ".".join(labels[begin:]) for begin in range(1, len(labels)))
    return any(pattern in patterns for pattern in (domain, *parents, "*"))


def _unsafe_relay_guard(section: PolicySection) -> Iterator[Finding]:
    if section.mode is not Mode.ENFORCE:
        yield (
            ("policy", RELAY_GUARD, "mode"),
            "the relay guard cannot be off or observed: this would be an open relay",
        )
    if section.on_error is OnError.CONTINUE:
        yield ("policy", RELAY_GUARD, "on_error"), "the relay guard fails closed: only defer is possible"
    if section.exempt:
        yield (
            ("policy", RELAY_GUARD, "exempt"),
            "nobody is exempt from the relay guard; see relay.trusted_networks",
        )
    if section.file:
        yield ("policy", RELAY_GUARD, "file"), "the relay guard is never another one"
    if section.domains:
        yield ("policy", RELAY_GUARD, "domains"), "the relay guard is the same for every domain"
    if section.settings:
        yield ("policy", RELAY_GUARD, "settings"), "the relay guard is configured in [relay]"


def check_files(config: Config) -> None:
    """Raise ConfigError unless every file that the configuration names can be used."""
    problems = [config.problem(path, message) for path, message in _unusable_files(config)]
    if problems:
        raise ConfigError(problems)


def _unusable_files(config: Config) -> Iterator[Finding]:
    tls = config.server.tls
    readable: list[tuple[KeyPath, Path | None]] = [
        (("server", "tls", "cert_file"), tls.cert_file),
        (("server", "tls", "key_file"), tls.key_file),
        (("relay", "domains_file"), config.relay.domains_file),
        (("relay", "recipients_file"), config.relay.recipients_file),
        (("admin", "token_file"), config.admin.token_file),
    ]
    for name, section in config.policy.items():
        if section.is_planned:
            readable.append((("policy", name, "file"), section.file))
    for name, section in config.submission.policy.items():
        if section.is_planned and config.submission.is_on:
            readable.append((("submission", "policy", name, "file"), section.file))
    readable.append((("submission", "auth", "tls_ca_file"), config.submission.auth.tls_ca_file))
    for index, route in enumerate(config.relay.routes):
        if route.tls is RouteTls.VERIFY:
            readable.append((("relay", "routes", index, "tls_ca_file"), route.tls_ca_file))
    unreadable = [(path, reason) for path, file in readable if file and (reason := _unreadable(file))]
    yield from unreadable
    if tls.cert_file and tls.key_file and not any(path[:2] == ("server", "tls") for path, _ in unreadable):
        yield from _unusable_certificate(tls.cert_file, tls.key_file)
    yield from _unusable_spool(config.server.spool_dir)
    try:
        if config.server.user:
            identity_of(config.server.user, config.server.group)
    except KeyError as exc:
        yield ("server", "user"), str(exc.args[0])


def check_state_file(config: Config) -> None:
    """Raise ConfigError unless the file of a `sqlite:` store can be written; for who has a policy that needs one."""
    scheme, _, path = config.state.url.partition("://")
    if scheme != "sqlite":
        return
    file = Path(path)
    try:
        # SQLite makes files beside it
        with tempfile.TemporaryFile(dir=file.parent):
            pass
        if file.exists():
            file.open("r+b").close()
    except OSError as exc:
        reason = (
            f"{file} cannot be written: {exc.strerror or exc}; its directory must be there and writable for "
            "the user that mxgate runs as"
        )
        raise ConfigError([config.problem(("state", "url"), reason)]) from exc


def _unreadable(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            opened.read(1)
    except OSError as exc:
        return f"{file} cannot be read: {exc.strerror}"
    return ""


def _unusable_certificate(cert_file: Path, key_file: Path) -> Iterator[Finding]:
    try:
        # The empty passphrase keeps OpenSSL from asking for one on the terminal.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert_file, key_file, password="")
    except (ssl.SSLError, ValueError) as exc:
        yield (
            ("server", "tls", "cert_file"),
            f"{cert_file} and {key_file} are no certificate and its key: {exc}",
        )


def _unusable_spool(spool_dir: Path | None) -> Iterator[Finding]:
    try:
        with tempfile.TemporaryFile(dir=spool_dir):
            pass
    except OSError as exc:
        where = spool_dir or "the system's temporary directory"
        yield ("server", "spool_dir"), f"{where} cannot hold files: {exc.strerror or exc}"
