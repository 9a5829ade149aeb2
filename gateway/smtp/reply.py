"""Replies and the one table of every reply that the gateway itself gives (RFC 5321 4.2, RFC 3463, RFC 2034).

A Reply is validated when it is made: nothing that came from outside can put a CR, an LF or a control
character into what is written to a client. `from_downstream` is the only way to make one from hostile text.

The replies of RFC 5321 that carry data of the session (banner, EHLO, 354) are made in server.py.
"""

from __future__ import annotations

import re
from dataclasses import field
from functools import lru_cache

from gateway.frozen import frozen

# RFC 5321 4.5.3.1.5: a reply line is at most 512 octets with code and CRLF; the rest is room for both codes.
MAX_TEXT = 480
_ENHANCED = re.compile(r"[245]\.[0-9]{1,3}\.[0-9]{1,3}")
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]+")


@lru_cache(maxsize=512)  # there are few, and each message brings one
def _fits(enhanced: str, code: int) -> bool:
    """RFC 2034 4: it is well-formed, and its class is the first digit of the reply code."""
    return _ENHANCED.fullmatch(enhanced) is not None and enhanced[0] == str(code)[0]


@frozen
class Reply:
    """One SMTP reply: a code of 200..599, an enhanced status code ("" where RFC 2034 has none), one line of text.

    Raises ValueError for a code out of range, an enhanced code of another class or malformed, and for a text
    that is empty, over 480 octets or not printable ASCII.
    """

    code: int
    enhanced: str
    text: str
    wire: bytes = field(init=False, repr=False, compare=False)
    """The reply as it is written: one line with CRLF."""

    def __post_init__(self) -> None:
        if not 200 <= self.code <= 599:
            raise ValueError(f"reply code {self.code} is not in 200..599")
        if self.enhanced and not _fits(self.enhanced, self.code):
            raise ValueError(f"enhanced status code {self.enhanced!r} does not fit {self.code}")
        if not (0 < len(self.text) <= MAX_TEXT and self.text.isascii() and self.text.isprintable()):
            raise ValueError(f"reply text {self.text!r} is not one line of printable ASCII")
        enhanced = f"{self.enhanced} " if self.enhanced else ""
        object.__setattr__(self, "wire", f"{self.code} {enhanced}{self.text}\r\n".encode("ascii"))

    @property
    def is_positive(self) -> bool:
        """A 2xx or 3xx reply."""
        return self.code < 400

    @property
    def is_transient(self) -> bool:
        """A 4xx reply: the client may try again."""
        return 400 <= self.code < 500

    @property
    def is_permanent(self) -> bool:
        """A 5xx reply."""
        return self.code >= 500

    def __str__(self) -> str:
        return self.wire[:-2].decode("ascii")

    @classmethod
    def from_downstream(cls, code: int, text: str) -> Reply:
        """A reply of the downstream for our client: its class and codes, its text reduced to printable ASCII.

        An enhanced code at the head of the text is taken when it fits the code, otherwise X.0.0 is given.
        """
        if not (text.isascii() and text.isprintable()):
            text = _UNPRINTABLE.sub(" ", text)
        clean = text.strip()
        head, _, rest = clean.partition(" ")
        if _fits(head, code):
            enhanced, clean = head, rest.strip()
        else:
            enhanced = f"{code // 100}.0.0" if code // 100 in (2, 4, 5) else ""
        return cls(code, enhanced, clean[:MAX_TEXT] or "No text given")


# --- greeting and session -------------------------------------------------------------------------
OK = Reply(250, "2.0.0", "Ok")
BYE = Reply(221, "2.0.0", "Bye")
HELP = Reply(
    214, "2.0.0", "See RFC 5321; commands: HELO EHLO MAIL RCPT DATA BDAT RSET NOOP VRFY HELP QUIT STARTTLS"
)
VRFY = Reply(252, "2.5.0", "Cannot verify the user here; send the message and it will be tried")
READY_FOR_TLS = Reply(220, "2.0.0", "Ready to start TLS")
START_CONTENT = Reply(354, "", "End data with <CR><LF>.<CR><LF>")
SENDER_OK = Reply(250, "2.1.0", "Sender ok")
RECIPIENT_OK = Reply(250, "2.1.5", "Recipient ok")

# --- the wire itself: syntax, order, limits (always the client's doing) ------------------------------
EARLY_TALKER = Reply(554, "5.5.1", "Protocol violation: you spoke before your turn")
NOT_SMTP = Reply(554, "5.5.1", "Protocol violation: this is no SMTP, closing the connection")
LINE_END = Reply(500, "5.5.2", "Bare CR or LF in a command")
LINE_TOO_LONG = Reply(500, "5.5.2", "Command line too long")
BAD_BYTES = Reply(500, "5.5.2", "Command holds control or 8-bit characters")
UNKNOWN_COMMAND = Reply(500, "5.5.2", "Command not recognised")
NOT_IMPLEMENTED = Reply(502, "5.5.1", "Command not implemented")
SYNTAX = Reply(501, "5.5.4", "Syntax error in arguments")
NO_ARGUMENT_ALLOWED = Reply(501, "5.5.4", "This command takes no argument")
BAD_GREETING = Reply(501, "5.5.2", "EHLO and HELO need a domain or an address literal")
BAD_MAIL = Reply(501, "5.5.2", "Syntax: MAIL FROM:<address> [parameters]")
BAD_RCPT = Reply(501, "5.5.2", "Syntax: RCPT TO:<address> [parameters]")
BAD_REVERSE_PATH = Reply(501, "5.1.7", "The reverse-path is no valid address")
BAD_FORWARD_PATH = Reply(501, "5.1.3", "The forward-path is no valid address")
SOURCE_ROUTE = Reply(553, "5.1.3", "Source routes are not accepted")
NEEDS_SMTPUTF8_SENDER = Reply(553, "5.6.7", "A reverse-path outside ASCII needs SMTPUTF8")
NEEDS_SMTPUTF8_RCPT = Reply(553, "5.6.7", "A forward-path outside ASCII needs SMTPUTF8")
BAD_PARAMETER = Reply(501, "5.5.4", "Bad value of a parameter")
UNKNOWN_PARAMETER = Reply(555, "5.5.4", "Parameter not recognised")
TOO_BIG = Reply(552, "5.3.4", "Message size exceeds the limit")
HELLO_FIRST = Reply(503, "5.5.1", "Send EHLO or HELO first")
EHLO_FIRST = Reply(503, "5.5.1", "Send EHLO first")
MAIL_FIRST = Reply(503, "5.5.1", "Send MAIL first")
NESTED_MAIL = Reply(503, "5.5.1", "A transaction is open already")
NO_RECIPIENTS = Reply(554, "5.5.1", "No valid recipients")
RCPT_AFTER_BDAT = Reply(503, "5.5.1", "RCPT is not allowed between chunks")
DATA_AFTER_BDAT = Reply(503, "5.5.1", "DATA and BDAT cannot be mixed in one transaction")
TLS_NOT_AVAILABLE = Reply(502, "5.5.1", "TLS is not available")
TLS_ALREADY = Reply(503, "5.5.1", "TLS is in use already")
TLS_IN_TRANSACTION = Reply(503, "5.5.1", "STARTTLS is not allowed inside a transaction")
STARTTLS_FIRST = Reply(530, "5.7.0", "Must issue a STARTTLS command first")
TOO_MANY_RECIPIENTS = Reply(452, "4.5.3", "Too many recipients")
TOO_MANY_ERRORS = Reply(421, "4.7.0", "Too many errors, closing the connection")
TOO_MANY_COMMANDS = Reply(421, "4.7.0", "Too many commands without a message, closing the connection")
TOO_MANY_UNKNOWN = Reply(421, "4.7.1", "Too many unknown recipients, closing the connection")
TOO_MANY_CONNECTIONS = Reply(421, "4.7.0", "Too many connections, try again later")
TOO_MANY_FROM_CLIENT = Reply(421, "4.7.0", "Too many connections from your address")
COMMAND_TIMEOUT = Reply(421, "4.4.2", "Timeout, closing the connection")
SHUTTING_DOWN = Reply(421, "4.3.2", "Service is shutting down, try again later")

# --- AUTH (RFC 4954 4, 6) ------------------------------------------------------------------------------
AUTH_OK = Reply(235, "2.7.0", "Authentication successful")
AUTH_FIRST = Reply(530, "5.7.0", "Authentication required")
AUTH_NEEDS_TLS = Reply(538, "5.7.11", "Encryption required for authentication; issue STARTTLS first")
AUTH_ALREADY = Reply(503, "5.5.1", "Already authenticated")
AUTH_MECHANISM = Reply(504, "5.5.4", "Authentication mechanism not supported; PLAIN and LOGIN are")
AUTH_CANCELLED = Reply(501, "5.7.0", "Authentication cancelled")
AUTH_NOT_BASE64 = Reply(501, "5.5.2", "Cannot decode the response: it is no base64")
AUTH_MALFORMED = Reply(501, "5.5.2", "The response does not fit the mechanism")
AUTH_LINE_TOO_LONG = Reply(500, "5.5.6", "Authentication exchange line is too long")
AUTH_REFUSED = Reply(535, "5.7.8", "Authentication credentials invalid")
AUTH_UNAVAILABLE = Reply(454, "4.7.0", "Temporary authentication failure")
TOO_MANY_AUTH_FAILURES = Reply(421, "4.7.0", "Too many failed authentications, try again later")

# --- content ---------------------------------------------------------------------------------------
BARE_LINE_END = Reply(550, "5.5.2", "Message holds bare CR, bare LF or NUL characters")
LONG_LINE = Reply(554, "5.6.0", "Message holds a line that is too long")
BAD_HEADER = Reply(554, "5.6.0", "Message header is too large or has too many fields")
TOO_MANY_HOPS = Reply(554, "5.4.6", "Too many hops, this looks like a loop")
NO_SPACE = Reply(452, "4.3.1", "Insufficient storage, try again later")

# --- what a route is known not to take ---------------------------------------------------------------
ROUTE_TOO_BIG = Reply(552, "5.3.4", "Message size exceeds the limit of the destination")
ROUTE_NO_SMTPUTF8 = Reply(550, "5.6.7", "The destination does not support SMTPUTF8")

# --- trouble of ours: never 5xx ----------------------------------------------------------------------
INTERNAL = Reply(451, "4.3.0", "Temporary trouble here, try again later")
INTERNAL_CLOSING = Reply(421, "4.3.0", "Temporary trouble here, try again later")
DOWNSTREAM_TROUBLE = Reply(451, "4.4.1", "The destination is not reachable now, try again later")
FINAL_REPLY_LOST = Reply(451, "4.4.2", "The destination did not confirm the message, try again later")
PARTIAL_REFUSAL = Reply(451, "4.3.0", "Some recipients were refused meanwhile, try again later")
