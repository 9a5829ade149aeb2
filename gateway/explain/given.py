"""What somebody says of a client, as the client would have said it on the wire: read by the server's own parser."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from gateway.explain.run import Case, ExplainError
from gateway.session import Recipient, client_address
from gateway.smtp.address import Domain
from gateway.smtp.command import (
    Command,
    CommandError,
    Extension,
    MailCommand,
    RcptCommand,
    SimpleCommand,
    parse_command,
)

C = TypeVar("C", SimpleCommand, MailCommand, RcptCommand)


class GivenError(ExplainError):
    """What was given is nothing that a client could say; the text names the option."""


def case_of(*, ip: str, helo: str, mail_from: str, rcpts: Sequence[str]) -> Case:
    """The case of a client at `ip`, without content. Addresses may have angle brackets; "" is the null reverse-path.

    Without `helo` the client greets with its address literal. Raises GivenError for what a session would refuse as
    wrong syntax, and for what is no address of IPv4 or IPv6.
    """
    try:
        client = client_address(ip)
    except ValueError as exc:
        raise GivenError(f"--ip {ip!a} is no IP address") from exc
    literal = f"[{client}]" if client.version == 4 else f"[IPv6:{client}]"
    smtputf8 = not all(each.isascii() for each in (mail_from, *rcpts))
    mail = f"MAIL FROM:{_path(mail_from)}" + (" SMTPUTF8" if smtputf8 else "")
    return Case(
        client=client,
        helo=_said(SimpleCommand, "--helo", f"EHLO {helo or literal}").argument,
        envelope=_said(MailCommand, "--mail-from", mail).envelope,
        rcpts=tuple(
            [_said(RcptCommand, "--rcpt", f"RCPT TO:{_path(each)}", smtputf8=smtputf8).rcpt for each in rcpts]
        ),
        content=None,
    )


def domains_of(rcpts: Iterable[Recipient]) -> list[str]:
    """The domains of recipients, of those that have one."""
    return [rcpt.mailbox.domain for rcpt in rcpts if isinstance(rcpt.mailbox.domain, Domain)]


def _path(address: str) -> str:
    return address if address.startswith("<") else f"<{address}>"


def _said(kind: type[C], option: str, line: str, *, smtputf8: bool = False) -> C:
    try:
        command: Command = parse_command(line.encode(), frozenset(Extension), smtputf8)
    except CommandError as exc:
        raise GivenError(f"{option}: a session would answer {exc.reply}") from exc
    except UnicodeEncodeError as exc:
        raise GivenError(f"{option}: is no UTF-8") from exc
    assert isinstance(command, kind)
    return command
