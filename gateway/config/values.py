"""Values of the configuration that are parsed at the border into types: addresses, networks, domains, paths.

Each is an annotated type for the models; what it raises is a ValueError whose text says what to write instead.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidatorFunctionWrapHandler,
    WithJsonSchema,
    WrapValidator,
)

from gateway.adapters.store.redis_url import parse_redis_url
from gateway.config.errors import did_you_mean
from gateway.session import Trust
from gateway.smtp.address import AddressError, Domain, parse_forward_path
from gateway.verdict import AddField, forbidden

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# Names of containers and of hosts files are looser than mail domains: one label, underscores.
_HOST_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,62})(?:\.[A-Za-z0-9_][A-Za-z0-9_-]{0,62})*\.?")
_NUMERIC = re.compile(r"[0-9.]+")
_PORT = re.compile(r"[0-9]{1,5}")
# RFC 8601 2.5: authserv-id is a value of RFC 2045 5.1; we write tokens only, so that it never needs quotes.
_TOKEN = re.compile(r"[!#$%&'*+.0-9A-Z^_`a-z{|}~-]{1,255}")
STATE_SCHEMES = (
    "memory",
    "sqlite",
    "redis",
    "rediss",
    "redis+unix",
    "redis+sentinel",
    "rediss+sentinel",
    "redis+cluster",
    "rediss+cluster",
)


@dataclass(frozen=True, slots=True)
class HostPort:
    """An address to listen on or to connect to. An IPv6 host carries no brackets here, but `str` writes them."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be a string")
    return value


def _split_port(text: str, *, default: int | None, lowest: int) -> tuple[str, int]:
    """Host and port of `host:port`; brackets around an IPv6 address are taken off."""
    host, colon, port = text.rpartition(":")
    if default is not None and (not colon or text.endswith("]")):
        host, port = text, str(default)
    elif not colon or not _PORT.fullmatch(port):
        raise ValueError(f"{text!r} has no port; write it as 192.0.2.1:25 or [2001:db8::1]:25")
    if not lowest <= int(port) <= 65535:
        raise ValueError(f"port {port} is outside {lowest}..65535")
    if host.startswith("[") and host.endswith("]"):
        if ":" not in host:
            raise ValueError(f"{host!r} is not an IPv6 address in brackets")
        return host[1:-1], int(port)
    if ":" in host:
        raise ValueError(f"an IPv6 address needs brackets and a port; write it as [{text}]:25")
    return host, int(port)


def _address(text: str, *, default: int | None, lowest: int) -> HostPort:
    host, port = _split_port(text, default=default, lowest=lowest)
    try:
        return HostPort(str(ipaddress.ip_address(host)), port)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address") from None


def parse_listen(value: object) -> HostPort:
    """An address of this machine; port 0 takes any free one."""
    return value if isinstance(value, HostPort) else _address(_text(value), default=None, lowest=0)


def parse_nameserver(value: object) -> HostPort:
    """An IP address; port 53 unless given."""
    if isinstance(value, HostPort):
        return value
    text = _text(value)
    # A bare IPv6 address is unambiguous where the port may be left out.
    text = f"[{text}]" if text.count(":") > 1 and not text.startswith("[") else text
    return _address(text, default=53, lowest=1)


def parse_downstream(value: object) -> HostPort:
    """An IP address or a host name, with its port."""
    if isinstance(value, HostPort):
        return value
    host, port = _split_port(_text(value), default=None, lowest=1)
    try:
        return HostPort(str(ipaddress.ip_address(host)), port)
    except ValueError:
        pass
    if len(host) > 253 or not _HOST_NAME.fullmatch(host) or _NUMERIC.fullmatch(host):
        raise ValueError(f"{host!r} is neither an IP address nor a host name")
    return HostPort(host.lower(), port)


def parse_auth_address(value: object) -> HostPort | str:
    """`unix:/path` as it is, or an IP address or host name with its port; "" is none."""
    if isinstance(value, HostPort):
        return value
    text = _text(value)
    if not text:
        return ""
    if not text.startswith("unix:"):
        return parse_downstream(text)
    path = text.removeprefix("unix:")
    # unix(7): sun_path has 108 octets with its NUL
    if not path.startswith("/") or "\0" in path or len(path.encode()) > 107:
        raise ValueError("must be unix: and an absolute path of at most 107 octets, or host:port")
    return text


def _host_or_group(value: object, group: ValidatorFunctionWrapHandler) -> Any:
    return group(value) if isinstance(value, list | tuple) else parse_downstream(value)


def _groups(value: tuple[Any, ...]) -> tuple[tuple[HostPort, ...], ...]:
    """What was written as hosts is one group."""
    hosts = sum(isinstance(each, HostPort) for each in value)
    if hosts == len(value):
        return (value,)
    if hosts:
        raise ValueError("must hold either addresses or groups of addresses, not both")
    return value


def _written_groups(groups: tuple[tuple[HostPort, ...], ...]) -> list[Any]:
    written = [[str(host) for host in group] for group in groups]
    return written[0] if len(written) == 1 else written


def parse_network(value: object) -> Network:
    """A network in CIDR notation; one address is a network of its own."""
    if isinstance(value, ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    text = _text(value)
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        pass
    try:
        wider = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise ValueError(f"{text!r} is not a network; write it as 192.0.2.0/24 or 2001:db8::/32") from None
    raise ValueError(f"{text!r} has bits set behind its prefix; did you mean {wider}?")


_EXEMPT_TRUST = {str(trust): trust for trust in (Trust.TRUSTED, Trust.AUTHENTICATED)}


def parse_exempt(value: object) -> Network | Trust:
    """A network, or a class of clients that are trusted by other means than their sender's name."""
    if isinstance(value, Trust | ipaddress.IPv4Network | ipaddress.IPv6Network):
        return value
    text = _text(value)
    if text in _EXEMPT_TRUST:
        return _EXEMPT_TRUST[text]
    try:
        return parse_network(text)
    except ValueError as exc:
        if "/" in text:
            raise
        words = ", ".join(_EXEMPT_TRUST)
        hint = did_you_mean(text, _EXEMPT_TRUST)
        raise ValueError(f"{text!r} is neither a network nor one of {words}{hint}") from exc


def parse_domain(value: object) -> Domain:
    """A domain name as A-labels in lower case."""
    try:
        return Domain.parse(_text(value))
    except AddressError as exc:
        raise ValueError(str(exc)) from None


def parse_domain_or_subdomains(value: object) -> str:
    """`example.org`, or `.example.org` for every name below it."""
    text = _text(value)
    if text == "*":
        raise ValueError(
            "'*' would accept mail for every domain of the world: that is an open relay; list your domains"
        )
    return "." + parse_domain(text[1:]) if text.startswith(".") else parse_domain(text)


def parse_address_or_domain(value: object) -> str:
    """`ann@example.org`, `example.org`, or `.example.org`; the domain as A-labels, all in lower case."""
    text = _text(value)
    if "@" not in text:
        return parse_domain_or_subdomains(value)
    try:
        mailbox = parse_forward_path(f"<{text}>", smtputf8=True)
    except AddressError as exc:
        raise ValueError(str(exc)) from None
    return f"{mailbox.local}@{mailbox.domain}".lower()


def parse_domain_pattern(value: object) -> str:
    """`example.org`, `.example.org`, or `*` for every domain."""
    return "*" if value == "*" else parse_domain_or_subdomains(value)


def _authserv_id(value: object) -> str:
    text = _text(value)
    if text and not _TOKEN.fullmatch(text):
        raise ValueError(f"{text!r} is not a token: letters, digits, '.', '-' and '_'")
    return text


def _field_name(value: object) -> str:
    text = _text(value)
    if why := forbidden(AddField(text, "")):
        raise ValueError(why)
    return text


def _path(value: object) -> Path | None:
    if value is None or isinstance(value, Path):
        return value
    text = _text(value)
    if "\0" in text:
        raise ValueError("a path cannot contain NUL")
    return Path(text) if text else None


def _state_url(value: object) -> str:
    # The URL may carry a password: no message may repeat it.
    url = _text(value)
    scheme, colon, rest = url.partition(":")
    if not colon or scheme not in STATE_SCHEMES:
        known = ", ".join(f"{known}:" for known in STATE_SCHEMES)
        raise ValueError(
            f"must begin with one of {known}{did_you_mean(scheme, STATE_SCHEMES) if colon else ''}"
        )
    if scheme == "memory" and rest:
        raise ValueError("memory: takes nothing behind it")
    if scheme == "sqlite" and not re.fullmatch(r"///[^\0]*[^/\0]", rest):
        raise ValueError("must name a file: sqlite:///var/lib/mxgate/state.db")
    if scheme.startswith("redis"):
        if not re.fullmatch(r"//[^/\s]+.*", rest) and scheme != "redis+unix":
            raise ValueError(f"must name a host: {scheme}://127.0.0.1:6379/0")
        parse_redis_url(url)
    return url


def _workers(value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 256:
        raise ValueError('must be 1 to 256, or "auto"')
    return value


def _no_bool(value: object) -> object:
    # Python calls true an integer; an operator who writes `max_recipients = true` has made a mistake.
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _json(kind: str, **more: object) -> WithJsonSchema:
    return WithJsonSchema({"type": kind, **more})


def _like(pattern: str) -> str:
    """A pattern for the JSON schema: for whoever checks a file without the gateway, so as rough as it may be.

    A string with `${NAME}` is known only where that variable is.
    """
    return rf"^({pattern})$|\$\{{"


_AS_TEXT = PlainSerializer(lambda value: "" if value is None else str(value), return_type=str)

Integer = Annotated[int, BeforeValidator(_no_bool)]
Seconds = Annotated[float, BeforeValidator(_no_bool)]
Listen = Annotated[
    HostPort,
    PlainValidator(parse_listen),
    _AS_TEXT,
    _json("string", examples=["0.0.0.0:25"], pattern=_like(r"(\[[^]\s]+\]|[0-9.]+):[0-9]{1,5}")),
]
Nameserver = Annotated[
    HostPort, PlainValidator(parse_nameserver), _AS_TEXT, _json("string", examples=["127.0.0.1:53"])
]
Downstream = Annotated[
    HostPort, PlainValidator(parse_downstream), _AS_TEXT, _json("string", examples=["192.0.2.1:25"])
]
AuthAddress = Annotated[
    HostPort | str,
    PlainValidator(parse_auth_address),
    _AS_TEXT,
    _json("string", examples=["unix:/run/dovecot/auth-client", "mta.example.org:587"]),
]
_HOST_SCHEMA = {"type": "string", "pattern": _like(r"[^\s/@]+:[0-9]{1,5}")}
_GROUP_SCHEMA = {"type": "array", "minItems": 1, "items": _HOST_SCHEMA}
Downstreams = Annotated[
    tuple[
        Annotated[tuple[Downstream, ...], Field(min_length=1), WrapValidator(_host_or_group)],
        ...,
    ],
    Field(min_length=1),
    AfterValidator(_groups),
    PlainSerializer(_written_groups),
    WithJsonSchema(
        {
            "anyOf": [_GROUP_SCHEMA, {**_GROUP_SCHEMA, "items": _GROUP_SCHEMA}],
            "examples": [["192.0.2.1:25"], [["192.0.2.1:25", "192.0.2.2:25"], ["198.51.100.1:25"]]],
        }
    ),
]
"""Groups of hosts in order of preference; one group may be written as a plain list of hosts."""
Networks = Annotated[
    Network,
    PlainValidator(parse_network),
    _AS_TEXT,
    _json("string", examples=["192.0.2.0/24"], pattern=_like(r"[0-9A-Fa-f:.]+(%[^\s/]+)?(/[0-9]{1,3})?")),
]
Exempt = Annotated[
    Network | Trust,
    PlainValidator(parse_exempt),
    _AS_TEXT,
    _json("string", examples=["192.0.2.0/24", "trusted", "authenticated"]),
]
FieldName = Annotated[str, PlainValidator(_field_name), _json("string", examples=["X-Mxgate-Quarantine"])]
DomainName = Annotated[Domain, PlainValidator(parse_domain), _json("string", pattern=_like(r"[^\s@:/*]+"))]
DomainOrSubdomains = Annotated[
    str, PlainValidator(parse_domain_or_subdomains), _json("string", pattern=_like(r"[^\s@:/*]+"))
]
DomainPattern = Annotated[
    str, PlainValidator(parse_domain_pattern), _json("string", pattern=_like(r"[^\s@:/*]+|\*"))
]
AddressOrDomain = Annotated[
    str, PlainValidator(parse_address_or_domain), _json("string", examples=["ann@example.org", "example.org"])
]
AuthservId = Annotated[str, PlainValidator(_authserv_id), _json("string")]
OptionalPath = Annotated[
    Path | None, PlainValidator(_path), _AS_TEXT, WithJsonSchema({"type": ["string", "null"]})
]
KeyPrefix = Annotated[str, Field(pattern=r"^[!-z|~]{1,64}$")]
"""Printable ASCII without braces, which mean something in the keys of a Redis Cluster."""
StateUrl = Annotated[
    str,
    PlainValidator(_state_url),
    _json("string", pattern=_like(f"({'|'.join(map(re.escape, STATE_SCHEMES))}):.*")),
]
Workers = Annotated[
    int | Literal["auto"],
    PlainValidator(_workers),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1, "maximum": 256}, {"const": "auto"}]}),
]
