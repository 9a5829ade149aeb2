"""The schema of the whole configuration: one frozen model for each table, one documented field for each key.

Everything that is said about a key is said here: type, default, bounds, description; the reference in
docs/configure.md and the JSON schema are rendered from it. A duration ends in `_s` (seconds), a size in `_bytes`.
What one table alone cannot know (files, other tables, parts not built yet) is checked in check.py.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from gateway.config.errors import DEFAULT, KeyPath, Origin, Problem, dotted
from gateway.config.sources import Sources
from gateway.config.values import (
    AddressOrDomain,
    AuthAddress,
    AuthservId,
    DomainName,
    DomainOrSubdomains,
    DomainPattern,
    Downstreams,
    Exempt,
    FieldName,
    HostPort,
    Integer,
    KeyPrefix,
    Listen,
    Nameserver,
    Networks,
    OptionalPath,
    Seconds,
    StateUrl,
    Workers,
)
from gateway.policy import Mode, OnError
from gateway.redaction import Redact
from gateway.session import Role

RELAY_GUARD = "relay_guard"
"""The one policy that is always there; its settings are those of [relay]."""


class Protocol(StrEnum):
    """What a route's downstream speaks."""

    SMTP = "smtp"
    LMTP = "lmtp"


class Identity(StrEnum):
    """How a downstream learns the client's address and name."""

    NONE = "none"
    XCLIENT = "xclient"
    XFORWARD = "xforward"
    PROXY_V2 = "proxy-v2"


class RouteTls(StrEnum):
    """TLS towards a downstream."""

    NONE = "none"
    OPPORTUNISTIC = "opportunistic"
    ENCRYPT = "encrypt"
    VERIFY = "verify"


class AuthBackend(StrEnum):
    """Where the passwords of submission are known."""

    DOWNSTREAM = "downstream"
    DOVECOT = "dovecot"


class OnOutage(StrEnum):
    """What happens while the shared state is out of reach."""

    LOCAL = "local"
    CONTINUE = "continue"
    DEFER = "defer"


class LogFormat(StrEnum):
    """How a log line is written."""

    JSON = "json"
    LOGFMT = "logfmt"
    CONSOLE = "console"
    TEXT = "text"


class Section(BaseModel):
    """Base of every table: immutable, unknown keys refused, values never repeated in errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


def _key(default: Any, doc: str, **bounds: Any) -> Any:
    return Field(default=default, description=doc, **bounds)


def _machine_name() -> str:
    return socket.gethostname()


class ServerTls(Section):
    """`[server.tls]`: the certificate for STARTTLS and implicit TLS."""

    cert_file: OptionalPath = _key(None, "PEM file with the certificate and its chain; empty: no TLS.")
    key_file: OptionalPath = _key(None, "PEM file with the certificate's private key, unencrypted.")


# useradd(8), and a number
UserOrGroup = Annotated[str, Field(pattern=r"^([a-z_][a-z0-9_.-]{0,30}\$?|[0-9]{1,10}|)$")]


class Server(Section):
    """`[server]`: the receiving side."""

    hostname: DomainName = Field(
        default_factory=_machine_name,
        validate_default=True,
        description="Name in the banner, EHLO, Received, and the authserv-id unless set; default: the machine's name.",
    )
    listen: tuple[Listen, ...] = _key(
        (HostPort("0.0.0.0", 25),), "Addresses to listen on: `192.0.2.1:25`, `[::]:25`."
    )
    listen_tls: tuple[Listen, ...] = _key(
        (), "Addresses for implicit TLS (usually port 465); need `server.tls`."
    )
    workers: Workers = _key(1, 'Worker processes, 1 to 256; `"auto"`: one for each core.')
    max_connections: Integer = _key(2000, "Connections at once, of all workers.", ge=1, le=1_000_000)
    max_connections_per_client: Integer = _key(
        50, "Connections at once from one client (IPv4 /32, IPv6 /64).", ge=1, le=1_000_000
    )
    max_new_connections_per_client_per_minute: Integer = _key(
        0, "New connections of one client in a minute (IPv4 /32, IPv6 /64); 0: no limit.", ge=0, le=1_000_000
    )
    max_message_bytes: Integer = _key(
        52_428_800, "Largest message; announced as SIZE.", ge=1024, le=4_294_967_296
    )
    # RFC 5321 4.5.3.1.8 wants at least 100; less is an operator's choice for tests.
    max_recipients: Integer = _key(
        200, "Recipients of one transaction; more get 452 4.5.3.", ge=1, le=100_000
    )
    # RFC 5321 6.3: a loop limit is at least 100 hops.
    max_received: Integer = _key(100, "Received fields of a message; more is a mail loop.", ge=1, le=1000)
    max_header_bytes: Integer = _key(262_144, "Size of a message's header.", ge=1024, le=16_777_216)
    max_header_fields: Integer = _key(1000, "Fields of a message's header.", ge=10, le=100_000)
    # RFC 5321 4.5.3.1.6 allows 998 octets; real mail has longer lines, which are passed on unchanged.
    max_line_bytes: Integer = _key(8192, "Longest line of a message, without its CRLF.", ge=998, le=1_048_576)
    max_errors: Integer = _key(20, "Errors of a session, then 421.", ge=1, le=10_000)
    max_commands_without_mail: Integer = _key(
        100, "Commands without an accepted message between them, then 421.", ge=1, le=10_000
    )
    max_unknown_recipients: Integer = _key(20, "Unknown recipients of a session, then 421.", ge=1, le=10_000)
    greeting_delay_s: Seconds = _key(0.0, "Pause before the banner that catches early talkers.", ge=0, le=1)
    command_timeout_s: Seconds = _key(60.0, "From the first byte of a command to its end.", gt=0, le=600)
    # RFC 5321 4.5.3.2.7: a server waits at least 5 minutes for the next command.
    idle_timeout_s: Seconds = _key(300.0, "Wait for the next command.", gt=0, le=3600)
    data_timeout_s: Seconds = _key(180.0, "Wait for more of a message (inactivity).", gt=0, le=3600)
    session_timeout_s: Seconds = _key(
        1200.0, "Length of a session; longer while content progresses.", gt=0, le=86_400
    )
    drain_timeout_s: Seconds = _key(
        300.0, "At shutdown: wait for the downstream's answer to messages that it has in full.", ge=0, le=3600
    )
    reload_on_change: bool = _key(
        False, "Load the configuration again, as SIGHUP does, when its file or a policy's `file` has changed."
    )
    allow_bare_lf_from: tuple[Networks, ...] = _key(
        (), "Networks of your own old devices whose bare LF becomes CRLF; from all others it is refused."
    )
    proxy_protocol_from: tuple[Networks, ...] = _key(
        (),
        "Networks of balancers that are allowed, and then required, to send a PROXY header (version 1 or 2).",
    )
    spool_dir: OptionalPath = _key(
        None, "Directory for large content in flight; empty: the system's temporary one."
    )
    spool_memory_bytes: Integer = _key(
        2_097_152, "Content of one message kept in memory; more goes to `spool_dir`.", ge=0, le=1_073_741_824
    )
    spool_memory_total_bytes: Integer = _key(
        67_108_864, "Content in flight kept in memory by one worker.", ge=0, le=68_719_476_736
    )
    max_worker_memory_bytes: Integer = _key(
        0,
        "Memory of a worker above which it turns new connections away (421); 0: no limit.",
        ge=0,
        le=2**63 - 1,
    )
    user: UserOrGroup = _key(
        "",
        "User to become, by name or number, when all sockets are bound and mxgate was started as root; it has to be "
        "able to read every file and to write to the state and the spool. Empty: stay who it is.",
    )
    group: UserOrGroup = _key("", "Its group, if not the user's own; supplementary groups are the user's.")
    tls: ServerTls = ServerTls()


# A value of a metric's label, and a word of the log.
RouteName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{0,63}$")]


class Route(Section):
    """`[[relay.routes]]`: where mail for some domains goes."""

    name: RouteName = _key(
        "",
        "Name in metrics, log and `/readyz` (lower-case letters, digits, `_`, `-`); empty: `route1`, `route2`, ... "
        "in the order of the routes.",
    )
    domains: tuple[DomainPattern, ...] = _key(
        ("*",),
        "Recipient domains of this route: `example.org`, `.example.org` (subdomains), `*` (the rest).",
    )
    downstream: Downstreams = Field(
        description="Downstream MTAs that share the mail: `["
        '"192.0.2.1:25", "mta.example.org:25"]`. Groups of them, the preferred one first: '
        '`[["192.0.2.1:25", "192.0.2.2:25"], ["198.51.100.1:25"]]`; a group gets mail while all before it are down.'
    )
    protocol: Protocol = _key(
        Protocol.SMTP, "What the downstream speaks; `lmtp` (RFC 2033) takes one recipient in a transaction."
    )
    identity: Identity = _key(
        Identity.NONE,
        "How the downstream learns the client's address and name. `xforward`: for its log, where it offers that; "
        "`xclient`: as if the client had come to it directly, and no mail where it is not offered; `proxy-v2`: the "
        "same by a PROXY header, which the downstream must expect. With the last two each client has connections of "
        "its own. The downstream must be set up to trust the gateway so far.",
    )
    verify_recipients: bool = _key(True, "Ask the downstream about each recipient at RCPT.", strict=True)
    tls: RouteTls = _key(
        RouteTls.OPPORTUNISTIC,
        "`opportunistic`: when offered; `encrypt`: required; `verify`: required, with a valid certificate.",
    )
    tls_implicit: bool = _key(
        False,
        "TLS from the first byte instead of STARTTLS (port 465); with `tls` `encrypt` or `verify`.",
        strict=True,
    )
    tls_ca_file: OptionalPath = _key(None, "PEM file with the CAs that `verify` trusts; empty: the system's.")
    tls_name: str = _key("", "Name that the certificate must carry; empty: the host name of the downstream.")


class Relay(Section):
    """`[relay]`: whose mail is accepted and how it goes on."""

    domains: tuple[DomainOrSubdomains, ...] = _key(
        (), "Mail for any other domain is refused; `example.org`, `.example.org` (subdomains)."
    )
    domains_file: OptionalPath = _key(None, "File with more domains, one on a line.")
    recipients_file: OptionalPath = _key(
        None, "File with all valid recipients, one on a line; empty: not checked here."
    )
    trusted_networks: tuple[Networks, ...] = _key((), "Clients that may relay anywhere.")
    max_connections_per_host: Integer = _key(
        50, "Connections at once to one downstream host.", ge=1, le=10_000
    )
    connect_timeout_s: Seconds = _key(
        10.0,
        "Wait for a downstream's connection, and again for its TLS, banner and EHLO; then the next one is tried.",
        gt=0,
        le=300,
    )
    reply_timeout_s: Seconds = _key(60.0, "Wait for a downstream's reply to a command.", gt=0, le=300)
    # RFC 5321 4.5.3.2.6 gives the end of data 10 minutes; our own client waits as long for us.
    final_timeout_s: Seconds = _key(
        300.0, "Wait for a downstream's reply to the whole message.", gt=0, le=540
    )
    idle_timeout_s: Seconds = _key(30.0, "Keep an idle connection to a downstream.", ge=0, le=300)
    recipient_cache_s: Seconds = _key(300.0, "Remember that a recipient exists; 0: never.", ge=0, le=86_400)
    recipient_cache_negative_s: Seconds = _key(
        60.0, "Remember that a recipient does not exist; 0: never.", ge=0, le=86_400
    )
    routes: tuple[Route, ...] = ()

    @property
    def named_routes(self) -> tuple[tuple[str, Route], ...]:
        """The routes with their names, given or by place."""
        return tuple((route.name or f"route{place}", route) for place, route in enumerate(self.routes, 1))


class Dns(Section):
    """`[dns]`: the resolver of the policies; downstream names are resolved by the system."""

    nameservers: tuple[Nameserver, ...] = _key(
        (), "Addresses, `127.0.0.1:5353`; port 53 unless given; empty: the system's."
    )
    timeout_s: Seconds = _key(5.0, "For one question, all name servers together.", gt=0, le=60)
    total_timeout_s: Seconds = _key(
        20.0,
        "For one message: what its policies wait for questions; those for the author domain have 8 s of their own.",
        gt=0,
        le=120,
    )


class State(Section):
    """`[state]`: what policies remember between messages; opened when a policy needs it."""

    url: StateUrl = Field(
        default="sqlite:///var/lib/mxgate/state.db",
        description="`memory:` (of each worker), `sqlite:///path`, `redis://user:password@host:6379/0`, "
        "`redis+unix:///path?db=0`, `redis+sentinel://user:password@host:26379,host:26379/service/0`, "
        "`redis+cluster://user:password@host:6379,host:6379`. With TLS `rediss` instead of `redis`, and behind `?` "
        "`ca_file`, `cert_file`, `key_file`; for sentinels `sentinel_username`, `sentinel_password`.",
        repr=False,
    )
    timeout_s: Seconds = _key(0.1, "For what a policy asks at once.", gt=0, le=10)
    on_outage: OnOutage = _key(
        OnOutage.LOCAL, "`local`: each worker for itself; `continue`: without; `defer`: 4xx."
    )
    key_prefix: KeyPrefix = _key(
        "mxgate:", "What every key begins with; installations that share a server have different ones."
    )
    max_bytes: Integer = _key(
        268_435_456,
        "Size of `memory:` and of the file of `sqlite:`; when it is reached, what would end first goes first.",
        ge=1_048_576,
        le=68_719_476_736,
    )


class Admin(Section):
    """`[admin]`: health, metrics and the pages for operators."""

    listen: Listen = _key(
        HostPort("127.0.0.1", 9464), "Address of `/livez`, `/readyz`, `/metrics` and `/api/v1/`."
    )
    token_file: OptionalPath = _key(
        None, "File with the token that others than loopback must show for `/api/v1/`."
    )
    trust_loopback: bool = _key(
        True,
        "Loopback needs no token; `false`: it does, as where not every user is an operator, or where a proxy runs.",
        strict=True,
    )


class Auth(Section):
    """`[auth]`: Authentication-Results."""

    authserv_id: AuthservId = _key("", "Our authserv-id (RFC 8601 2.5); empty: `server.hostname`.")
    authserv_id_aliases: tuple[AuthservId, ...] = _key(
        (),
        "Others that are ours, such as former ones and those of hosts behind us: fields of theirs are removed too.",
    )


class Log(Section):
    """`[log]`: standard error."""

    format: LogFormat = _key(
        LogFormat.JSON,
        "How a line is written; `text`: as Postfix would, for fail2ban and tools that read its log.",
    )
    redact: tuple[Redact, ...] = _key(
        (),
        "What is taken out of log, decisions and admin page: `local_parts` of addresses, and `client_addresses`, of "
        "which the network is left (/24, /48).",
    )
    debug_clients: tuple[Networks, ...] = _key(
        (), "Networks of clients whose dialogue and verdicts are logged in full, at level debug."
    )
    debug_rcpts: tuple[AddressOrDomain, ...] = _key(
        (),
        "Recipients for whose mail the same is done: `ann@example.org`, `example.org`, `.example.org` (subdomains).",
    )


class Pipeline(Section):
    """`[pipeline]`: how policies are run."""

    delay_reject: bool = _key(
        True,
        "Answer refusals of CONNECT, EHLO and MAIL at each RCPT, so that the log has the recipient.",
        strict=True,
    )
    observe: bool = _key(False, "Dry run of every policy but the relay guard.", strict=True)


class Quarantine(Section):
    """`[quarantine]`: what becomes of a message that a policy puts into quarantine."""

    header: FieldName = _key(
        "X-Mxgate-Quarantine",
        "Field that it gets, with the reason; a field of this name in mail that comes in is always removed.",
    )
    route: RouteName = _key(
        "",
        "Name of the route that it goes to; empty: its recipients' own. Any refusal there is 451. A route for nothing "
        "else has `domains = []`.",
    )


class DomainOverride(Section):
    """`[policy.NAME.domains."example.org"]`: other values for recipients of a domain, from RCPT on."""

    mode: Mode | None = _key(None, "Mode for this domain.")
    settings: Mapping[str, object] = Field(
        default_factory=dict,
        description="Settings for this domain; those that are not here are the policy's.",
    )


class PolicySection(Section):
    """`[policy.NAME]`: the engine's keys of a policy."""

    mode: Mode = _key(
        Mode.ENFORCE,
        "`observe`: verdicts are only recorded; `off`: not loaded, unless a domain has another mode.",
    )
    timeout_s: Seconds | None = _key(None, "Deadline of one hook; default: the policy's own.", gt=0, le=60)
    on_error: OnError | None = _key(None, "When the policy fails; default: the policy's own.")
    exempt: tuple[Exempt, ...] | None = _key(
        None,
        "Clients that skip this policy: networks, and the classes `trusted` (`relay.trusted_networks`) and "
        "`authenticated`; default: the policy's own.",
    )
    file: OptionalPath = _key(None, "Single Python file with the policy; empty: an installed distribution.")
    settings: Mapping[str, object] = Field(default_factory=dict, description="The policy's own keys.")
    domains: Mapping[DomainPattern, DomainOverride] = Field(
        default_factory=dict,
        description="Other values for recipients of a domain: `example.org`, `.example.org` (subdomains), `*`.",
    )

    @property
    def is_planned(self) -> bool:
        """Whether it is run for anybody: where it is off, a domain may have it all the same."""
        return any(
            mode is not Mode.OFF
            for mode in (self.mode, *(each.mode for each in self.domains.values()))
            if mode
        )


PolicyName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class SubmissionAuth(Section):
    """`[submission.auth]`: who knows the users' passwords, and what becomes of who guesses."""

    backend: AuthBackend = _key(
        AuthBackend.DOVECOT,
        "`dovecot`: the auth socket of a Dovecot; `downstream`: a mail server's own submission port, which is given "
        "the same credentials over TLS with a valid certificate.",
    )
    address: AuthAddress = _key(
        "",
        "Where it is. Of Dovecot `unix:/run/dovecot/auth-client` or `192.0.2.1:12345`; of a mail server "
        "`mta.example.org:587`.",
    )
    tls_implicit: bool = _key(
        False, "With `downstream`: TLS from the first byte instead of STARTTLS (port 465).", strict=True
    )
    tls_ca_file: OptionalPath = _key(
        None, "With `downstream`: PEM file with the CAs that are trusted; empty: the system's."
    )
    tls_name: str = _key(
        "", "With `downstream`: name that the certificate must carry; empty: the host of `address`."
    )
    # Dovecot answers a client that has failed often after up to 17 s.
    timeout_s: Seconds = _key(20.0, "For one attempt; then 454.", gt=0, le=60)
    failure_delay_s: Seconds = _key(
        2.0, "A failure is told a whole number of these behind its attempt; 0: at once.", ge=0, le=30
    )
    failure_window_s: Seconds = _key(3600.0, "For how long failures are counted together.", ge=1, le=86_400)
    max_failures_per_client: Integer = _key(
        20,
        "Failures of a client (IPv4 address, IPv6 /64) in that time; then 421 without a look at the password.",
        ge=1,
        le=1_000_000,
    )
    max_failures_per_user: Integer = _key(
        20,
        "The same for a user's name. Networks from which the user has logged in within 30 days have counts of "
        "their own.",
        ge=1,
        le=1_000_000,
    )


class Submission(Section):
    """`[submission]`: mail of your own users, who authenticate (RFC 6409); with `server.tls`. Off without addresses."""

    listen: tuple[Listen, ...] = _key(
        (), "Addresses that take STARTTLS, usually port 587: `192.0.2.1:587`, `[::]:587`."
    )
    listen_tls: tuple[Listen, ...] = _key((), "Addresses for implicit TLS (RFC 8314), usually port 465.")
    route: RouteName = _key(
        "", "Name of the route that all of it takes, whatever its recipients; a route with `domains = []`."
    )
    max_connections: Integer = _key(1000, "Connections at once, of all workers.", ge=1, le=1_000_000)
    max_connections_per_client: Integer = _key(
        20, "Connections at once from one client (IPv4 /32, IPv6 /64).", ge=1, le=1_000_000
    )
    max_new_connections_per_client_per_minute: Integer = _key(
        0, "New connections of one client in a minute (IPv4 /32, IPv6 /64); 0: no limit.", ge=0, le=1_000_000
    )
    max_message_bytes: Integer = _key(
        52_428_800, "Largest message; announced as SIZE.", ge=1024, le=4_294_967_296
    )
    max_recipients: Integer = _key(
        200, "Recipients of one transaction; more get 452 4.5.3.", ge=1, le=100_000
    )
    adds_missing_fields: bool = _key(
        True, "Give a message without Date or Message-ID these fields (RFC 6409 8).", strict=True
    )
    auth: SubmissionAuth = SubmissionAuth()
    policy: Mapping[PolicyName, PolicySection] = Field(
        default_factory=dict,
        description="`[submission.policy.NAME]`: the policies of this role, with the same keys as `[policy.NAME]`; "
        "relay_guard and sender_login unless there are others.",
    )

    @property
    def is_on(self) -> bool:
        """Whether there is any."""
        return bool(self.listen or self.listen_tls)


class Config(Section):
    """The whole configuration."""

    # Validated, so that a machine's name that cannot be used is told as server.hostname.
    server: Server = Field(default={}, validate_default=True)
    relay: Relay = Relay()
    dns: Dns = Dns()
    state: State = State()
    admin: Admin = Admin()
    auth: Auth = Auth()
    log: Log = Log()
    pipeline: Pipeline = Pipeline()
    quarantine: Quarantine = Quarantine()
    policy: Mapping[PolicyName, PolicySection] = Field(default_factory=dict)
    submission: Submission = Submission()

    _sources: Sources | None = PrivateAttr(default=None)
    _role: Role = PrivateAttr(default=Role.MX)

    def model_post_init(self, context: Any) -> None:
        """Keep the sources that `load` validates from."""
        self._sources = context

    @property
    def authserv_id(self) -> str:
        """The authserv-id that we write and whose forgeries we remove."""
        return self.auth.authserv_id or self.server.hostname

    @property
    def role(self) -> Role:
        """Whose configuration it is: what was loaded is that of the MX."""
        return self._role

    @property
    def relayed(self) -> tuple[tuple[str, Route], ...]:
        """The routes of this role with their names."""
        return tuple(
            (name, route)
            for name, route in self.relay.named_routes
            if route.domains or name == self.quarantine.route
        )

    def for_submission(self) -> Config:
        """The same configuration as listeners for submission see it: their limits, route and policies."""
        own = self.submission
        limits = (
            "listen",
            "listen_tls",
            "max_connections",
            "max_connections_per_client",
            "max_new_connections_per_client_per_minute",
            "max_message_bytes",
            "max_recipients",
        )
        route = dict(self.relay.named_routes)[own.route]
        every = route.model_copy(update={"name": own.route, "domains": ("*",)})
        view = self.model_copy(
            update={
                "server": self.server.model_copy(update={key: getattr(own, key) for key in limits}),
                "relay": self.relay.model_copy(update={"routes": (every,), "trusted_networks": ()}),
                "quarantine": self.quarantine.model_copy(update={"route": ""}),
                "policy": own.policy,
            }
        )
        view._role = Role.SUBMISSION  # noqa: SLF001  # of the same class
        return view

    def _path(self, path: KeyPath) -> KeyPath:
        """Where a key of this view is written."""
        is_own = self._role is Role.SUBMISSION and path[:1] == ("policy",)
        return ("submission", *path) if is_own else path

    def origin(self, path: KeyPath) -> Origin:
        """Where the value at a path came from; `default` for one that nobody gave."""
        return self._sources.origin(path) if self._sources else DEFAULT

    def written(self, path: KeyPath) -> str | None:
        """A value that held `${NAME}`, as it was written; None for all others."""
        return self._sources.written(path) if self._sources else None

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem with the value at a path, with the place that an operator should look at."""
        path = self._path(path)
        return self._sources.problem(path, message) if self._sources else Problem(dotted(path), message)
