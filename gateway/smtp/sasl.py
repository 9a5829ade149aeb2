"""One exchange of AUTH: PLAIN (RFC 4616) and LOGIN, as RFC 4954 carries them in SMTP. No sockets, nobody is asked.

    exchange = Exchange(mechanism)
    step = exchange.begin(initial)              # the initial response of the AUTH command, None without one
    while isinstance(step, Challenge):          # written as 334; the client's next line is its response
        step = exchange.respond(line)
    # step is Credentials: for a back-end to judge

Whatever is wrong is a SaslError with the reply for the client. Nothing of what a client sends here is in an error, in
a `repr` or in a cache: it holds a password.
"""

from __future__ import annotations

import base64
import binascii
import re
import stringprep
import unicodedata
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from gateway.errors import GatewayError
from gateway.smtp import reply as replies
from gateway.smtp.reply import Reply

# RFC 4954 4, 4.5.3.1: the longest line of an exchange and of the command itself, with CRLF
MAX_AUTH_LINE = 12_288
# Ours: an address has 320 octets at most (RFC 5321 4.5.3.1), and no user a longer name
MAX_USER_BYTES = 320
# Ours: far beyond what back-ends take
MAX_PASSWORD_BYTES = 1024


class Mechanism(StrEnum):
    """The mechanisms that there are; the client's words are compared without case (RFC 4422 3.1)."""

    PLAIN = "PLAIN"
    LOGIN = "LOGIN"


class SaslError(GatewayError):
    """The exchange is over: `reply` is for the client."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(str(reply))
        self.reply = reply


class Challenge(NamedTuple):
    """A server's turn; `text` is written in base64 behind 334."""

    text: bytes

    @property
    def wire(self) -> bytes:
        """The line as it is written."""
        return b"334 " + base64.b64encode(self.text) + b"\r\n"


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a client says to prove who it is. `authzid` is on whose behalf it wants to act, "" for itself.

    `user` is prepared by SASLprep (RFC 4013) as RFC 4616 2 wants it, "" where it or `authzid` cannot be anybody's name
    (control characters, longer than 320 octets): then it is refused like any wrong password. The password is as it
    came.
    """

    mechanism: Mechanism
    user: str
    password: str = field(repr=False)
    authzid: str = ""


Step = Challenge | Credentials

_USER, _PASSWORD = Challenge(b"Username:"), Challenge(b"Password:")
# RFC 4648 3.2, 3.3: padding where it belongs, nothing outside of the alphabet
_BASE64 = re.compile(rb"(?>(?:[A-Za-z0-9+/]{4})*)(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")


class Exchange:
    """One exchange of one mechanism."""

    __slots__ = ("_mechanism", "_user")

    def __init__(self, mechanism: Mechanism) -> None:
        self._mechanism = mechanism
        self._user: bytes | None = None

    def begin(self, initial: bytes | None) -> Step:
        """The first step. `initial` is the initial response in base64, `=` where it is empty. Raises SaslError."""
        if initial is None:
            # RFC 4954 4: the client speaks first in PLAIN, so its turn is asked for by an empty challenge
            return Challenge(b"") if self._mechanism is Mechanism.PLAIN else _USER
        return self._take(b"" if initial == b"=" else _decoded(initial))

    def respond(self, line: bytes) -> Step:
        """The client's line, without its CRLF. Raises SaslError."""
        if line == b"*":
            # RFC 4954 4: the client gives up
            raise SaslError(replies.AUTH_CANCELLED)
        return self._take(_decoded(line))

    def _take(self, response: bytes) -> Step:
        if self._mechanism is Mechanism.PLAIN:
            # RFC 4616 2: message = [authzid] UTF8NUL authcid UTF8NUL passwd
            parts = response.split(b"\0")
            if len(parts) != 3:
                raise SaslError(replies.AUTH_MALFORMED)
            return self._credentials(parts[1], parts[2], parts[0])
        if self._user is None:
            self._user = response
            return _PASSWORD
        return self._credentials(self._user, response)

    def _credentials(self, user: bytes, password: bytes, authzid: bytes = b"") -> Credentials:
        # RFC 4616 2: neither is empty; NUL is in no part
        if not user or not password or b"\0" in user + password or len(password) > MAX_PASSWORD_BYTES:
            raise SaslError(replies.AUTH_MALFORMED)
        try:
            name, on_behalf = prepared(user.decode()), prepared(authzid.decode())
            if authzid and not on_behalf:
                # not "for itself": that is what the client did not say
                name = ""
            return Credentials(self._mechanism, name, password.decode(), on_behalf)
        except UnicodeDecodeError:
            # without the octets, which are a secret
            raise SaslError(replies.AUTH_MALFORMED) from None


def _decoded(line: bytes) -> bytes:
    # RFC 4954 4: what is no base64 is 501
    if not _BASE64.fullmatch(line):
        raise SaslError(replies.AUTH_NOT_BASE64)
    try:
        octets = base64.b64decode(line, validate=True)
    except binascii.Error:  # pragma: no cover  # the pattern says more than the decoder
        raise SaslError(replies.AUTH_NOT_BASE64) from None
    # RFC 4648 3.5: bits that mean nothing are 0, so that one value has one form
    if base64.b64encode(octets) != line:
        raise SaslError(replies.AUTH_NOT_BASE64)
    return octets


_PROHIBITED = (
    stringprep.in_table_c12,
    stringprep.in_table_c21_c22,
    stringprep.in_table_c3,
    stringprep.in_table_c4,
    stringprep.in_table_c5,
    stringprep.in_table_c6,
    stringprep.in_table_c7,
    stringprep.in_table_c8,
    stringprep.in_table_c9,
    stringprep.in_table_a1,
)


def prepared(text: str) -> str:
    """A name in the form in which names are compared (SASLprep, RFC 4013), "" where it cannot be one."""
    if len(text.encode()) > MAX_USER_BYTES:
        return ""
    if text.isascii():
        return text if text.isprintable() else ""
    # RFC 4013 2.1: other spaces are spaces, what is commonly mapped to nothing is nothing; 2.2: NFKC
    mapped = "".join(
        [" " if stringprep.in_table_c12(c) else c for c in text if not stringprep.in_table_b1(c)]
    )
    name = unicodedata.normalize("NFKC", mapped)
    # 2.3, 2.5: prohibited output, unassigned code points
    if any(table(c) for c in name for table in _PROHIBITED) or len(name.encode()) > MAX_USER_BYTES:
        return ""
    # 2.4, RFC 3454 6: right-to-left text is all of it so, and at both ends
    if any(map(stringprep.in_table_d1, name)) and (
        any(map(stringprep.in_table_d2, name))
        or not (stringprep.in_table_d1(name[0]) and stringprep.in_table_d1(name[-1]))
    ):
        return ""
    return name
