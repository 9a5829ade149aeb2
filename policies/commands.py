"""The commands `mxgate spf`, `dkim`, `arc` and `dmarc`: one check from the shell, and everything that it went by.

Each is offered by an entry point of the group `gateway.commands`. What it needs of the gateway is in click's context:
`context.obj.check(zone)` gives a Check. Exit codes: 0 pass, none or neutral; 1 any other result; 64 wrong usage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import click

from gateway.api import AddressError, AuthResult, BodyDigests, Domain, Header, Lookup, Result
from policies.verify.arc.chain import prepare, validate
from policies.verify.arc.report import ArcEvidence
from policies.verify.arc.report import auth_result as arc_result
from policies.verify.dkim.report import DkimEvidence
from policies.verify.dkim.report import auth_result as dkim_result
from policies.verify.dkim.signature import NAME, Refused, Signature, parse_signatures
from policies.verify.dkim.verify import Limits, want_bodies
from policies.verify.dkim.verify import judge as judge_signatures
from policies.verify.dmarc.judge import Discovery, Identifier
from policies.verify.dmarc.judge import judge as judge_alignment
from policies.verify.spf import check_host, identity

T = TypeVar("T")

# More than anybody signs with, and as many as the policy may be told to verify.
_MOST_SIGNATURES = 100


class Check(Protocol):
    """What the gateway's command line gives to a check."""

    def run(self, lookup: Lookup[T]) -> T:
        """Ask DNS."""

    def message(
        self, file: BinaryIO, on_header: Callable[[Header, BodyDigests], T]
    ) -> tuple[Header, BodyDigests, T]:
        """Read a message; `on_header` says which digests of its body are wanted."""

    def tell(self, results: Sequence[AuthResult], evidence: Sequence[str], *, as_json: bool) -> int:
        """Print what was found; the exit code."""


def _address(_context: click.Context, _parameter: click.Parameter, value: str) -> IPv4Address | IPv6Address:
    try:
        address = ip_address(value)
    except ValueError as exc:
        raise click.BadParameter(f"{value!a} is no IP address") from exc
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _domain(_context: click.Context, _parameter: click.Parameter, value: str) -> Domain:
    try:
        return Domain(value)
    except AddressError as exc:
        raise click.BadParameter(str(exc)) from exc


def _domains(context: click.Context, parameter: click.Parameter, values: Sequence[str]) -> list[Domain]:
    return [_domain(context, parameter, value) for value in values]


_zone = click.option(
    "--zone",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A zone file (RFC 1035 5) that is all of DNS.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_file = click.argument("file", type=click.File("rb"))


@click.command()
@click.option(
    "--ip", "client", callback=_address, required=True, metavar="ADDRESS", help="The client's address."
)
@click.option(
    "--mail-from", metavar="ADDRESS", default="", help="The reverse-path; without it HELO is checked."
)
@click.option("--helo", metavar="NAME", default="", help="What the client said in EHLO or HELO.")
@_zone
@_json
@click.pass_context
def spf(context: click.Context, /, *, client: IPv4Address | IPv6Address, as_json: bool, **given: Any) -> int:
    """Say whether a client may send for a domain, and why (RFC 7208)."""
    mail_from, helo = given["mail_from"].removeprefix("<").removesuffix(">"), given["helo"]
    if not mail_from and not helo:
        raise click.UsageError("--mail-from or --helo is needed")
    check: Check = context.obj.check(given["zone"])
    domain, sender = identity(mail_from, helo)
    found = check.run(check_host(client, domain, sender, helo, now=time.time()))
    identified = ("smtp.mailfrom", mail_from) if mail_from else ("smtp.helo", helo)
    result = AuthResult("spf", found.result, found.problem, (identified,))
    return check.tell([result], found.lines(), as_json=as_json)


@click.command()
@_file
@_zone
@_json
@click.pass_context
def dkim(context: click.Context, /, *, file: BinaryIO, zone: Path | None, as_json: bool) -> int:
    """Verify the signatures of the message in FILE ('-': standard input), and say why each fails (RFC 6376)."""
    check: Check = context.obj.check(zone)

    def on_header(header: Header, digests: BodyDigests) -> tuple[Signature | Refused, ...]:
        signatures = parse_signatures(
            header, now=time.time(), most=_MOST_SIGNATURES, is_internationalized=True
        )
        want_bodies(signatures, digests)
        return signatures

    header, digests, signatures = check.message(file, on_header)
    judged = check.run(judge_signatures(header, digests, signatures, Limits()))
    evidence = DkimEvidence(judged, len(header.all(NAME)) - len(signatures))
    results = [dkim_result(each) for each in judged] or [AuthResult("dkim", Result.NONE)]
    return check.tell(results, evidence.lines(), as_json=as_json)


@click.command()
@_file
@_zone
@_json
@click.pass_context
def arc(context: click.Context, /, *, file: BinaryIO, zone: Path | None, as_json: bool) -> int:
    """Validate the ARC chain of the message in FILE ('-': standard input), set by set (RFC 8617)."""
    check: Check = context.obj.check(zone)
    header, digests, chain = check.message(file, lambda header, digests: prepare(header, digests, utf8=True))
    found = check.run(validate(chain, header, digests, now=time.time()))
    return check.tell([arc_result(found, None)], ArcEvidence(found).lines(), as_json=as_json)


@click.command()
@click.argument("domain", callback=_domain)
@click.option(
    "--spf",
    callback=_domains,
    multiple=True,
    metavar="DOMAIN",
    help="For which SPF passed. Repeatable.",
)
@click.option(
    "--dkim",
    callback=_domains,
    multiple=True,
    metavar="DOMAIN",
    help="Whose DKIM signature passed. Repeatable.",
)
@click.option("--psl", is_flag=True, help="Organizational domains by the Public Suffix List (RFC 7489).")
@_zone
@_json
@click.pass_context
def dmarc(context: click.Context, /, *, domain: Domain, as_json: bool, **given: Any) -> int:
    """Find the DMARC policy of mail from DOMAIN, and judge what SPF and DKIM have found (RFC 9989)."""
    check: Check = context.obj.check(given["zone"])
    identified = [
        Identifier(method, each, Result.PASS) for method in ("spf", "dkim") for each in given[method]
    ]
    discovery = Discovery.PSL if given["psl"] else Discovery.TREEWALK
    found = check.run(judge_alignment(domain, identified, discovery))
    properties = [("header.from", str(domain))]
    if found.record is not None:
        properties.append(("policy.dmarc", str(found.policy)))
    result = AuthResult("dmarc", found.result, found.why, tuple(properties))
    code = check.tell([result], found.lines(), as_json=as_json)
    # who names nothing that passed wants to know the policy: that nothing aligns is no finding
    return 0 if not identified and found.result is Result.FAIL else code
