"""The URL of a Redis store: which servers, which of them, who we are, and TLS. Parsing only.

    redis://user:password@host:6379/0             rediss://...              the same with TLS
    redis+unix:///run/redis/redis.sock?db=0       with user:password@ before the path where it needs one
    redis+sentinel://user:password@host:26379,host:26379/service/0          rediss+sentinel://...
    redis+cluster://user:password@host:6379,host:6379                       rediss+cluster://...

Characters that mean something in a URL are written %40. Behind a question mark may stand `ca_file`, `cert_file` and
`key_file` (TLS; the system's CAs unless given), and `sentinel_username` and `sentinel_password`. With TLS a certificate
that is not valid for the host is always refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from urllib.parse import parse_qsl, unquote, urlsplit

PORT = 6379
SENTINEL_PORT = 26379
_OPTIONS = frozenset({"ca_file", "cert_file", "key_file"})
_SENTINEL_OPTIONS = frozenset({"sentinel_username", "sentinel_password"})


class Topology(StrEnum):
    """How the servers belong together."""

    SINGLE = "single"
    UNIX = "unix"
    SENTINEL = "sentinel"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class RedisUrl:
    """What a URL says. `hosts` are the servers, with SENTINEL the sentinels; with UNIX there are none but `path`."""

    topology: Topology
    hosts: tuple[tuple[str, int], ...] = ()
    path: str = ""
    service: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = None
    sentinel_username: str | None = None
    sentinel_password: str | None = None
    has_tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    def __repr__(self) -> str:
        """Without passwords."""
        return f"<RedisUrl {self.topology} {','.join(f'{h}:{p}' for h, p in self.hosts) or self.path}>"


def parse_redis_url(url: str) -> RedisUrl:
    """Raises ValueError with what is wrong, in words that never repeat a password."""
    scheme, _, rest = url.partition("://")
    family, _, word = scheme.partition("+")
    topology = Topology(word or "single")
    has_tls = family == "rediss"
    parts = urlsplit(f"//{rest}")
    credentials, at, hosts = parts.netloc.rpartition("@")
    user, colon, password = credentials.partition(":")
    if at and not colon:
        raise ValueError("what stands before @ is user:password; write :password@ for a password alone")
    allowed = (
        (_OPTIONS if has_tls else frozenset())
        | (_SENTINEL_OPTIONS if topology is Topology.SENTINEL else frozenset())
        | ({"db"} if topology is Topology.UNIX else frozenset())
    )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    if unknown := options.keys() - allowed:
        raise ValueError(f"{', '.join(sorted(unknown))} is no option of {scheme}: ({_listed(allowed)})")
    service, db, path = "", options.pop("db", ""), ""
    if topology is Topology.UNIX:
        path = unquote(parts.path)
        if hosts or not path.strip("/"):
            raise ValueError("must name a socket: redis+unix:///run/redis/redis.sock")
    elif topology is Topology.SENTINEL:
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise ValueError("must name the service: redis+sentinel://host:26379,host:26379/service/0")
    else:
        db = parts.path.strip("/")
    if topology is Topology.CLUSTER and db:
        raise ValueError("a cluster has no databases: nothing stands behind its hosts")
    return RedisUrl(
        topology,
        () if topology is Topology.UNIX else _hosts(hosts, topology),
        path,
        unquote(service),
        _database(db),
        unquote(user) or None,
        unquote(password) or None,
        has_tls=has_tls,
        **options,
    )


def _hosts(text: str, topology: Topology) -> tuple[tuple[str, int], ...]:
    default = SENTINEL_PORT if topology is Topology.SENTINEL else PORT
    hosts = tuple(_host(each, default) for each in text.split(","))
    if topology is Topology.SINGLE and len(hosts) > 1:
        raise ValueError("several hosts need redis+sentinel: or redis+cluster:")
    return hosts


def _host(text: str, default: int) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(default)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        # the text may hold a password whose @ was not written %40
        raise ValueError("hosts are written host:port, separated by commas; IPv6 addresses in brackets")
    return host, int(port)


def _database(text: str) -> int:
    if not text:
        return 0
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError("the database is a number, as in redis://127.0.0.1:6379/0")
    return int(text)


def _listed(words: frozenset[str] | set[str]) -> str:
    return f"known: {', '.join(sorted(words))}" if words else "it has none"
