"""The author domain: the one domain of the From field that DMARC judges (RFC 5322 3.6.2, RFC 9989 4.2).

What DMARC judges has to be what every reader of the message takes for its author. So this is no parser that makes the
best of a field: it takes the mailbox-list of RFC 5322 3.4 with UTF-8 (RFC 6532), and refuses whatever another parser
may read in another way. Beyond the grammar of today it takes only what honest software writes and nobody misreads:
dots between the words of a display name (RFC 5322 4.1), and octets of an old charset there. Refused though the grammar
has it: groups (RFC 6854), comments and folds within an address, domain literals, quoted local parts that look like
more than a local part, names and comments that hold another address in angle brackets.

Time is linear in the field; encoded words (RFC 2047) are not decoded, since in an address they are refused and
elsewhere they are names. Called by policies in `on_header`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple
from unicodedata import normalize

from gateway.errors import GatewayError
from gateway.mail.message import Field, Header
from gateway.smtp.address import AddressError, Domain

# Ours: a list of authors is far shorter, and the time for one is bounded with it
MAX_FIELD_BYTES = 16384
# Ours: RFC 5322 3.2.2 has no bound; parsers that recurse have one
MAX_COMMENT_DEPTH = 16
# RFC 5321 4.5.3.1.3: a whole path has no more
MAX_LOCAL = 256


class AuthorFault(StrEnum):
    """Why a message has no one author domain; the token is the reason of the verdict."""

    NO_FROM = "no_from"
    SEVERAL_FROM = "several_from"
    SYNTAX = "from_syntax"
    SEVERAL_DOMAINS = "from_several_domains"


class AuthorError(GatewayError):
    """The header has no one author domain. The text says why, without a word of the message."""

    def __init__(self, fault: AuthorFault, why: str) -> None:
        super().__init__(why)
        self.fault = fault


def author_domain(header: Header) -> Domain:
    """The author domain of a message. Raises AuthorError."""
    value = _from_value(header)
    if plain := _PLAIN.fullmatch(value):
        return _domain((plain[1] or plain[2]).decode("ascii"))
    return _author_domain(value)


class Author(NamedTuple):
    """One mailbox of the From field; `local` is without quotes."""

    local: str
    domain: Domain


def authors(header: Header) -> tuple[Author, ...]:
    """Every author of a message, whatever their domains. Raises AuthorError where not every reader finds the same."""
    return tuple(_mailboxes(_from_value(header)))


def _from_value(header: Header) -> bytes:
    value = _from_field(header).raw[len(b"From:") : -2]
    if len(value) > MAX_FIELD_BYTES:
        raise _syntax(f"has more than {MAX_FIELD_BYTES} octets")
    return value


# Also with octets that no field name holds (RFC 5322 3.6.8), which one reader overlooks and another one stumbles over
_FROM_ALIKE = re.compile(rb"[^!-~]*+f[^!-~]*+r[^!-~]*+o[^!-~]*+m[^!-~]*+")
_NAME_OCTETS = bytes(range(0x21, 0x7F))


def _from_field(header: Header) -> Field:
    alike: Sequence[Field] = header.all(b"from")
    # nearly always all names are good ones, of which none but its own looks like it
    if b"".join([field.name for field in header.fields]).translate(None, _NAME_OCTETS):
        alike = [field for field in header.fields if _FROM_ALIKE.fullmatch(field.name)]
    if not alike:
        raise AuthorError(AuthorFault.NO_FROM, "there is no From field")
    if len(alike) > 1:
        raise AuthorError(AuthorFault.SEVERAL_FROM, f"there are {len(alike)} From fields")
    # RFC 5322 4.5: blanks before the colon are obsolete, and readers do not agree on them
    if alike[0].raw[:5].lower() != b"from:":
        raise AuthorError(AuthorFault.SYNTAX, "the name of the From field is not written as From")
    return alike[0]


_ATEXT = rb"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]"
# without "=" and "?", of which encoded words are made
_LOCAL_ATEXT = rb"[A-Za-z0-9!#$%&'*+/^_`{|}~-]"
_ADDRESS = rb"(?![^@]{%d})%b++(?>(?:\.%b++)*)@([A-Za-z0-9.-]++)" % (MAX_LOCAL + 1, _LOCAL_ATEXT, _LOCAL_ATEXT)
# The usual field at once: Name <a@b.c>, "Name" <a@b.c>, a@b.c. What it matches, _author_domain reads alike.
_PLAIN = re.compile(
    rb"[ \t]*+(?:"
    rb"(?>(?:%b(?>(?:[ \t.]|%b)*)|\"[\t !\x23-\x3b\x3d-\x5b\x5d-\x7e]*+\"[ \t]*+)?)<%b>"
    rb"|%b)[ \t]*+" % (_ATEXT, _ATEXT, _ADDRESS, _ADDRESS)
)

# RFC 5322 4.2: a fold without text is obsolete, and to some the end of the header
_BLANK_FOLD = re.compile(rb"\r\n[ \t]*+(?:\r\n|\Z)")
# Controls, but for the tab, and the line ends of Unicode
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]")
# In an old charset (Shift_JIS, GBK, Big5) an octet beyond ASCII and one of these behind it may be one character
_HALF_CHARACTER = re.compile(r"[\udc80-\udcff][@\[\\\]]")
_TOKEN = re.compile(
    r"(?P<space>[ \t]++)"
    r"|(?P<atom>[^ \t\"(),.:;<>@\[\\\]]++)"
    r'|"(?P<quoted>(?>(?:[^"\\]|\\.)*))"'
    r"|(?P<special>[,.:;<>@\[\]])"
)
_COMMENT_MARK = re.compile(r"\\.|[()]")
_SPECIAL = re.compile(r'[\t "(),.:;<>@\[\\\]]')
# RFC 2047 5 (3): an encoded word stands in no address. The others would end a quoted local part for one who
# overlooks its quotes.
_UNCLEAR_IN_LOCAL = re.compile(r"=\?|[\t,:;<>@()\[\\\]]")

# The grammar over kinds of tokens: a atom, q quoted string, c comment, _ white space, else the special itself
_ADDR_SPEC = r"((?:a(?>(?:\.a)*)|q))@(a(?>(?:\.a)*))"
_MAILBOX = re.compile(rf"[_c]*+(?:(?>(?:[aq][aq._c]*+)?)<_*+{_ADDR_SPEC}_*+>|{_ADDR_SPEC})[_c]*+(?:,|$)")
_OTHERS = (
    ("<@", "an obsolete route"),
    ("@[", "a domain literal, which has no DMARC policy"),
    (":", "a group"),
    ("@_", "an address with white space or comments in it"),
    ("@c", "an address with white space or comments in it"),
)


class _Token(NamedTuple):
    kind: str
    text: str


def _author_domain(value: bytes) -> Domain:
    """The domain that all mailboxes of the list share."""
    author: Domain | None = None
    for each in _mailboxes(value):
        if author not in (None, each.domain):
            raise AuthorError(AuthorFault.SEVERAL_DOMAINS, "the authors are of several domains")
        author = each.domain
    assert author is not None  # a list without mailboxes is none
    return author


def _mailboxes(value: bytes) -> Iterator[Author]:
    """Each mailbox of the list. Raises AuthorError."""
    if _BLANK_FOLD.search(value):
        raise _syntax("has a fold without text")
    # RFC 5322 2.2.3: unfolding takes the line end out and leaves the white space
    text = value.replace(b"\r\n", b"").decode("utf-8", "surrogateescape")
    if _CONTROL.search(text):
        raise _syntax("holds control characters")
    if _HALF_CHARACTER.search(text):
        raise _syntax("holds octets that are text in no one charset")
    tokens = list(_tokens(text))
    kinds = "".join([token.kind for token in tokens])
    at = 0
    while True:
        mailbox = _MAILBOX.match(kinds, at)
        if mailbox is None:
            raise _syntax(
                next((f"has {what}" for mark, what in _OTHERS if mark in kinds), "is no list of addresses")
            )
        group = mailbox.lastindex or 0
        local = _clear_local(tokens[slice(*mailbox.span(group - 1))])
        yield Author(local, _domain("".join([token.text for token in tokens[slice(*mailbox.span(group))]])))
        at = mailbox.end()
        if kinds[at - 1] != ",":
            return


def _tokens(text: str) -> Iterator[_Token]:
    at = 0
    while at < len(text):
        if text[at] == "(":
            end = _comment_end(text, at)
            if "@" in text[at:end]:
                raise _syntax("has an address in a comment")
            yield _Token("c", "")
            at = end
            continue
        found = _TOKEN.match(text, at)
        if found is None:
            raise _syntax("has a quote, parenthesis or backslash out of place")
        match found.lastgroup:
            case "space":
                yield _Token("_", "")
            case "atom":
                yield _Token("a", found[0])
            case "quoted":
                if "@" in found[0].partition("<")[2]:
                    raise _syntax("has an address in a name")
                yield _Token("q", found["quoted"])
            case _:
                yield _Token(found[0], found[0])
        at = found.end()


def _comment_end(text: str, start: int) -> int:
    depth = 0
    for mark in _COMMENT_MARK.finditer(text, start):
        if mark[0] == "(":
            depth += 1
            if depth > MAX_COMMENT_DEPTH:
                break
        elif mark[0] == ")":
            depth -= 1
            if depth == 0:
                return mark.end()
    raise _syntax("has a comment without an end, or nested too deeply")


def _clear_local(tokens: list[_Token]) -> str:
    """The local part. Raises AuthorError for one in which somebody might see another address."""
    local = "".join([token.text for token in tokens])
    if len(local) > MAX_LOCAL:
        raise _syntax(f"has a local part of more than {MAX_LOCAL} characters")
    is_clear = not _UNCLEAR_IN_LOCAL.search(local)
    if not local.isascii():
        # RFC 6532 3.1: who normalises (to NFKC: should not) must find the same address; and nothing is invisible
        normal = normalize("NFKC", local)
        is_clear = (
            is_clear
            and local.isprintable()
            and not _UNCLEAR_IN_LOCAL.search(normal)
            and len(_SPECIAL.findall(normal)) == len(_SPECIAL.findall(local))
        )
    if not is_clear:
        raise _syntax("has a local part that is not clear")
    return local


def _domain(text: str) -> Domain:
    try:
        return Domain.parse(text)
    except AddressError as exc:
        raise _syntax("has an address whose domain is none") from exc


def _syntax(why: str) -> AuthorError:
    return AuthorError(AuthorFault.SYNTAX, f"the From field {why}")
