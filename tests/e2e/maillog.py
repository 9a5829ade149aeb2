"""What Postfix's log says about who sent what, and about how a connection behaved.

The log comes by way of postlogd and may be behind what a client has seen: ask with `wait_until`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_QUEUED = re.compile(r"smtpd\[\d+\]: (\w+): client=(.*)")
_DELIVERED = re.compile(r"virtual\[\d+\]: (\w+): to=<([^>]*)>.* status=sent ")
_ENDED = re.compile(r"smtpd\[\d+\]: disconnect from \S+((?: \w+=\d+(?:/\d+)?)*)")
_LOST = re.compile(r"smtpd\[\d+\]: (?:lost connection|timeout|too many errors) .*")


@dataclass(frozen=True, slots=True)
class Client:
    """The client of one message: who connected, and what XFORWARD said about it ("" without)."""

    address: str
    original_address: str
    original_queue_id: str


def clients_of(log: str) -> Mapping[str, Client]:
    """Recipient -> the client of the message that was delivered to it last."""
    queued = {found[1]: _client(found[2]) for found in _QUEUED.finditer(log)}
    return {found[2]: queued[found[1]] for found in _DELIVERED.finditer(log) if found[1] in queued}


def _client(keys: str) -> Client:
    """`keys` are like `unknown[127.0.0.2], orig_client=unknown[127.0.0.3]`."""
    address, *others = keys.split(", ")
    named = dict(other.split("=", 1) for other in others if "=" in other)
    return Client(_address(address), _address(named.get("orig_client", "")), named.get("orig_queue_id", ""))


def _address(client: str) -> str:
    """`127.0.0.2` of `unknown[127.0.0.2]`."""
    return client.rpartition("[")[2].removesuffix("]")


@dataclass(frozen=True, slots=True)
class Session:
    """One ended connection: how often each command was given and how often it was taken."""

    given: Mapping[str, int]
    taken: Mapping[str, int]

    @property
    def errors(self) -> int:
        """What counts for smtpd_soft_error_limit; XCLIENT is never logged as taken, whatever its reply was."""
        return sum(self.given[verb] - self.taken[verb] for verb in self.given if verb != "xclient")

    @property
    def junk(self) -> int:
        """At least what counts for smtpd_junk_command_limit: that counter is cleared by each message."""
        return sum(self.given.get(verb, 0) for verb in ("rset", "noop", "vrfy", "etrn"))


def sessions(log: str) -> list[Session]:
    """Every connection that has ended."""
    return [_session(found[1]) for found in _ENDED.finditer(log)]


def _session(counts: str) -> Session:
    """`counts` are like ` ehlo=1 mail=2 rcpt=1/2 commands=4/5`: taken/given, or one number for both."""
    given: dict[str, int] = {}
    taken: dict[str, int] = {}
    for count in counts.split():
        verb, _, numbers = count.partition("=")
        if verb != "commands":
            first, _, second = numbers.partition("/")
            taken[verb], given[verb] = int(first), int(second or first)
    return Session(given, taken)


def cut_connections(log: str) -> list[str]:
    """The lines about connections that did not end with QUIT: lost, timed out, or too many errors."""
    return [found[0] for found in _LOST.finditer(log)]
