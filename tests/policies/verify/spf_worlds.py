"""Worlds for SPF: small zones with records that include, redirect, misspell and leave out, and clients for them."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address
from random import Random

from gateway.lookup import Mx, Record, RRType
from gateway.testing.zone import Node, Zone

CLIENTS = ("192.0.2.1", "192.0.2.77", "198.51.100.9", "2001:db8::1", "2001:db8:1::77", "::ffff:192.0.2.1")
HELOS = (
    "mail.example.org",
    "d1.example.org",
    "localhost",
    "[192.0.2.1]",
    "my host.example",
    "d2.example.org.",
)
LOCALS = ("user", "first.last", "a-b+c=d", "Strong_Bad", "", "x" * 60, "o'neil/x,y")
DOMAINS = tuple(f"d{number}.example.org" for number in range(7))
HOSTS = tuple(f"h{number}.example.net" for number in range(8))
NOWHERE = tuple(f"n{number}.example.com" for number in range(4))

_MACROS = [
    "%{d}",
    "%{o}",
    "%{i}",
    "%{ir}.%{v}",
    "%{l}",
    "%{l-}",
    "%{lr-}",
    "%{s}",
    "%{S}",
    "%{h}",
    "%{H}",
    "%{p}",
    "%{v}",
    "%{d2}",
    "%{d1}",
    "%{dr}",
    "%{d1r}",
    "%{d9}",
    "%{l1r+-}",
    "%{o2}",
    "%{p1}",
    "%%",
    "%_",
    "%-",
    "%{ir-.}",
    "%{d02}",
    "%{i-}",
    "%{d-}",
    "%{dR}",
    "%{o10r./}",
]
_BAD_MACROS = (
    "%",
    "%x",
    "%{",
    "%{}",
    "%{q}",
    "%{c}",
    "%{t}",
    "%{d0}",
    "%{d-r}",
    "%{d;}",
    "%{ d}",
    "%{dd}",
    "%{2d}",
    "%{d",
)
_BAD_TERMS = [
    "moo",
    "all:",
    "all.",
    "-all/8",
    "a:",
    "a/",
    "a/33",
    "a//129",
    "a/24/64",
    "a:b",
    "a:1.2.3.4",
    "mx:",
    "mx/x",
    "exists",
    "exists:",
    "include",
    "include:",
    "ptr:",
    "ptr/8",
    "ip4",
    "ip4:",
    "ip4:1.2.3",
    "ip4:1.2.3.4/33",
    "ip4:1.2.3.04",
    "ip4:192.0.2.1//32",
    "ip6:::1/129",
    "ip6:1::2::3",
    "ip6:g::",
    "redirect=",
    "exp=",
    "redirect=x",
    "=x",
    "1up=x",
    "*all",
    "a:foo.example.net,",
    "ip4=192.0.2.1",
    "ip:192.0.2.1",
    "prt",
    "+-all",
    "a:-x.y-",
    "a:x.7",
    "include:x/24",
    "%{d}",
    "a:foo..example.net",
    "a:.example.net",
    "a/032",
    "ip4:192.0.2.0/024",
    "ip6:2001:db8::%eth0",
    "mx:museum.",
]


@dataclass(frozen=True)
class World:
    """One zone and one client in it."""

    zone: Zone
    client: str
    helo: str
    mail_from: str

    @property
    def domain(self) -> str:
        return self.mail_from.rpartition("@")[2]


def world(seed: int) -> World:
    """The same world for the same seed."""
    random = Random(seed)
    nodes: dict[str, Node] = {}
    for name in DOMAINS:
        nodes[name] = _domain(random)
    for name in HOSTS:
        nodes[name] = _host(random)
    for name in (
        "mail.example.org",
        "example.org",
        "example.net",
        *(f"{each}.{DOMAINS[0]}" for each in "xy"),
    ):
        if random.random() < 0.6:
            nodes[name] = _host(random)
    client = random.choice(CLIENTS)
    reverse = ip_address("192.0.2.1" if client.startswith("::ffff") else client).reverse_pointer
    if random.random() < 0.7:
        nodes[reverse] = _reverse(random)
    for name in ("exp.example.org", "exp2.example.org"):
        nodes[name] = {RRType.TXT: _some(random, [_explanation(random)], 0.1)}
    mail_from = f"{random.choice(LOCALS)}@{random.choice(DOMAINS[:3])}"
    return World(Zone(nodes), client, random.choice(HELOS), mail_from)


def record(random: Random) -> str:
    """The text of a record, now and then none that is right."""
    terms = [_term(random) for _ in range(random.choice((0, 1, 2, 2, 3, 3, 4, 5, 12)))]
    if random.random() < 0.6:
        terms.append(random.choice("-~?+") + random.choice(("all", "all", "ALL")))
    if random.random() < 0.2:
        terms.insert(random.randint(0, len(terms)), f"redirect={_target(random)}")
    if random.random() < 0.2:
        exp = random.choice(("exp.example.org", "exp2.example.org", _target(random)))
        terms.insert(random.randint(0, len(terms)), f"exp={exp}")
    if random.random() < 0.06:
        terms.insert(random.randint(0, len(terms)), random.choice(_BAD_TERMS))
    version = random.choice(("v=spf1",) * 30 + ("V=SPF1", "v=spf10", "v=spf1."))
    return version + "".join(random.choice((" ",) * 9 + ("  ",)) + term for term in terms)


def _domain(random: Random) -> Node:
    if random.random() < 0.04:
        return {"*": "timeout"}
    texts = [record(random).encode()]
    if random.random() < 0.1:
        texts.append(b"some other text")
    if random.random() < 0.03:
        texts.append(record(random).encode())
    if random.random() < 0.02:
        texts[0] += "ü".encode()
    if random.random() < 0.05:
        texts = texts[1:]
    return {**_host(random), RRType.TXT: _some(random, texts, 0.03)}


def _host(random: Random) -> Node:
    hosts = [*HOSTS, *HOSTS, *NOWHERE, "mail.example.org", ""]
    many = random.choice((0, 0, 0, 1, 1, 2, 3, 3, 9, 11))
    return {
        RRType.A: _some(random, _addresses(random, 4), 0.05),
        RRType.AAAA: _some(random, _addresses(random, 6), 0.05),
        RRType.MX: _some(random, [Mx(n, random.choice(hosts)) for n in range(many)], 0.04),
    }


def _reverse(random: Random) -> Node:
    pool = (*HOSTS, *DOMAINS, *NOWHERE, "x.d0.example.org", "mail.example.org")
    names = [random.choice(pool) for _ in range(random.choice((0, 1, 1, 2, 3, 12)))]
    return {RRType.PTR: _some(random, names, 0.1)}


def _some(
    random: Random, records: list[Record] | list[bytes] | list[Mx] | list[str], trouble: float
) -> list[Record] | str:
    return "timeout" if random.random() < trouble else list(records)


def _addresses(random: Random, version: int) -> list[Record]:
    pool = [each for each in CLIENTS if (":" in each) == (version == 6) and "ffff" not in each]
    pool += ["192.0.2.200", "203.0.113.5"] if version == 4 else ["2001:db8::ffff", "2001:db8:1:2::3"]
    return [ip_address(random.choice(pool)) for _ in range(random.choice((0, 1, 1, 2)))]


def _term(random: Random) -> str:
    qualifier = random.choice(("", "", "", "+", "-", "~", "?"))
    kind = random.choice(
        ("ip4", "ip4", "ip6", "a", "a", "mx", "ptr", "exists", "include", "include", "modifier")
    )
    address = random.choice(CLIENTS[:3] if kind == "ip4" else CLIENTS[3:5])
    name = kind.upper() if random.random() < 0.05 else kind
    match kind:
        case "ip4" | "ip6":
            bits = (
                random.choice((8, 24, 31, 32, 0)) if kind == "ip4" else random.choice((32, 48, 127, 128, 0))
            )
            return f"{qualifier}{name}:{address}{random.choice(('', f'/{bits}'))}"
        case "a" | "mx":
            target = random.choice(("", f":{_target(random)}"))
            return f"{qualifier}{name}{target}{random.choice(('', '', '/24', '//64', '/24//48', '/0//0'))}"
        case "ptr":
            return f"{qualifier}{name}{random.choice(('', f':{_target(random)}', ':example.org', ':example.net'))}"
        case "modifier":
            return f"{random.choice(('x-y', 'a.b_c', 'm'))}={random.choice(('', 'yes', 'a/b:c', '%{d}', '%{i}x%%'))}"
        case _:
            return f"{qualifier}{name}:{_target(random)}"


def _target(random: Random) -> str:
    chance = random.random()
    if chance < 0.02:
        return random.choice(_BAD_MACROS) + ".example.net"
    if chance < 0.25:
        macro = random.choice(_MACROS)
        around = ("{}", "{}.example.net", "x.{}", "{}.d0.example.org", "x{}.d1.example.org")
        return random.choice(around).format(macro)
    name = random.choice((*DOMAINS, *HOSTS, *NOWHERE))
    return random.choice((name,) * 20 + (f"{name}.", name.upper(), "x." * 200 + name, "y" * 64 + name))


def _explanation(random: Random) -> bytes:
    words = ["See", "http://example.org/?%{S}", "%{i}", "%{c}", "%{d}", "%{p}", "%{r}", "%%", "%_", "%{h}"]
    if random.random() < 0.1:
        words += [random.choice(_BAD_MACROS), "é"]
    return " ".join(random.choice(words) for _ in range(random.randint(0, 6))).encode()
