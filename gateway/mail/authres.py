"""Authentication-Results (RFC 8601): write ours, read others', and tell which of them claim to be ours.

`format_results` writes one field for a message. Whatever a value holds, no reader finds another result, property or
field in it: what is not plain is quoted, and what a careless reader could take for syntax is replaced even there.

`parse` reads what others wrote, as ARC needs it: lenient, never failing, in time linear in the field.

`own_ids` and `forged` find the fields that are to be removed (RFC 8601 5). Readers differ in what they make of
comments, quotes, controls and look-alikes around an authserv-id: a field is ours when any of them could read it so.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from functools import lru_cache
from typing import NamedTuple
from unicodedata import normalize

from gateway.mail.message import Field, Header
from gateway.verdict import AuthResult, Result

_NAME = b"authentication-results"

# --- writing -----------------------------------------------------------------------------------------------

# RFC 2045 5.1: what a token is made of
_TOKEN = r"!#$%&'*+.0-9A-Z^_`a-z{|}~-"
_ATOM = r"[!#$%&'*+0-9A-Z^_`a-z{|}~-]+"
# RFC 8601 2.2: pvalue without quotes: a token, or [[local-part] "@"] domain-name
_is_plain = re.compile(rf"[{_TOKEN}]+|(?:{_ATOM}(?:\.{_ATOM})*)?@[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+").fullmatch
# RFC 5321 4.1.2: Keyword; the length is ours
_KEYWORD = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_METHOD = re.compile(_KEYWORD)
_PROPERTY = re.compile(rf"{_KEYWORD}\.{_KEYWORD}")
# No quoted pairs, which some readers do not know, and nothing that is syntax to those who do not know quotes.
_NOT_QUOTED = re.compile(r'[\x00-\x1f"();\\\x7f]')
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
# Many look for words like "dmarc=pass" or "header.from=example.org" anywhere in the field.
_RESULT_CLAIM = re.compile(
    r"=(?=\s*(?:pass|(?:hard|soft)?fail|none|neutral|policy|temperror|permerror))", re.IGNORECASE
)
_PROPERTY_CLAIM = re.compile(r"((?:smtp|header|body|policy)\s*\.\s*[A-Za-z0-9-]+\s*)=", re.IGNORECASE)
_IN_REASONS = str.maketrans("();", "[],")

# The longest mailbox has 64 + 1 + 253 octets (RFC 5321 4.5.3.1): what is longer is none.
_MAX_VALUE_BYTES = 320
_MAX_RESINFO = 78 - len("\t;")
# Of a well-behaved plan no message comes near these: ten signatures with the longest of names are 10 KiB.
_MAX_RESULTS = 100
_MAX_DETAILED_BYTES = 16_384


def format_results(authserv_id: str, results: Sequence[AuthResult], *, smtputf8: bool = False) -> str:
    """The value of our field, folded: one resinfo for each result, in their order (RFC 8601 2.2).

    `authserv_id` is a token. Text beyond ASCII is written only in a message that is `smtputf8` (RFC 6532), else "?"
    stands for it, as for all that a reader could take for syntax. A method or property whose name is no Keyword is
    left out. Bounds: 320 octets a value, 100 results, and none of their details beyond 16 KiB.
    """
    field = authserv_id
    for result in results[:_MAX_RESULTS]:
        resinfo = _methodspec(result.method, result.result)
        if not resinfo:
            continue
        if len(field) < _MAX_DETAILED_BYTES:
            resinfo = _with_details(resinfo, result, smtputf8)
        field += f";\r\n\t{resinfo}"
    return field if len(field) > len(authserv_id) else f"{authserv_id}; none"


@lru_cache(maxsize=256)
def _methodspec(method: str, result: Result) -> str:
    return f"{method}={result}" if _METHOD.fullmatch(method) else ""


def _with_details(line: str, result: AuthResult, smtputf8: bool) -> str:  # noqa: FBT001  # passed through
    pieces = []
    if result.reason:
        pieces.append(f"reason={_quoted(result.reason.translate(_IN_REASONS), smtputf8)}")
    for name, value in result.properties:
        if _is_property(name):
            is_plain = len(value) <= _MAX_VALUE_BYTES and _is_plain(value)
            pieces.append(f"{name}={value if is_plain else _quoted(value, smtputf8)}")
    whole = " ".join([line, *pieces])
    if len(whole) <= _MAX_RESINFO:
        return whole
    done = ""
    for piece in pieces:
        # RFC 5322 2.1.1: 78 characters are a wish; the limit of 998 is far from the longest piece
        if len(line) + len(" ") + len(piece) > _MAX_RESINFO:
            done, line = f"{done}{line}\r\n\t", piece
        else:
            line = f"{line} {piece}"
    return done + line


@lru_cache(maxsize=256)
def _is_property(name: str) -> bool:
    return _PROPERTY.fullmatch(name) is not None


def _quoted(value: str, smtputf8: bool) -> str:  # noqa: FBT001  # passed through
    """A quoted-string (RFC 5322 3.2.4) without quoted pairs."""
    text = value[:_MAX_VALUE_BYTES]
    if not text.isascii():
        text = _NOT_ASCII.sub(lambda each: _shown(each[0]) if smtputf8 else "?", text)
        text = text.encode()[:_MAX_VALUE_BYTES].decode(errors="ignore")
    text = _NOT_QUOTED.sub("?", text.replace('"', "'"))
    if "=" in text:
        text = _PROPERTY_CLAIM.sub(r"\1?", _RESULT_CLAIM.sub("?", text))
    # what is cut must not read as another domain
    return f'"{text}?"' if len(text) < len(value) else f'"{text}"'


def _shown(character: str) -> str:
    """A character beyond ASCII, "?" where it is no text or stands for ASCII in another form."""
    is_text = character.isprintable() and not any(each < "\x80" for each in normalize("NFKC", character))
    return character if is_text else "?"


# --- reading -----------------------------------------------------------------------------------------------


class ReadResult(NamedTuple):
    """One resinfo as it stands in a field: method, result, ptype and property in lower case, values unquoted.

    The result may be a word that RFC 8601 does not know.
    """

    method: str
    result: str
    reason: str = ""
    properties: tuple[tuple[str, str], ...] = ()


class ReadResults(NamedTuple):
    """A field as it was read. `authserv_id` is as written, but unquoted; "" where there is none."""

    authserv_id: str
    results: tuple[ReadResult, ...] = ()
    version: str = ""


_MAX_READ_BYTES = 32_768
# a part of a field: a quoted string, which may lack its end; what begins a comment; white space; other text
_PART = re.compile(r"""(")((?>(?:[^"\\]|\\.)*))"?|(\()|([ \t\r\n]+)|[^"( \t\r\n]+""", re.DOTALL)
_COMMENT_PART = re.compile(r"[()]|\\.", re.DOTALL)
_QUOTED_PAIR = re.compile(r"\\(.)", re.DOTALL)
_BLANKS = re.compile(r" +")
_EQUALS = re.compile(r" ?= ?")
_METHODSPEC = re.compile(rf" ?({_KEYWORD})(?: ?/ ?[0-9]+)?=([^ ]*)")
_PROPSPEC = re.compile(rf" (?:({_KEYWORD}) ?\. ?)?({_KEYWORD})=([^ ]*)")
# where a quoted string stood
_PLACE = re.compile(r"\0([0-9]+)\0")


def parse(value: bytes) -> ReadResults:
    """What a field says (RFC 8601 2.2): `value` is what stands behind the colon, folds and all.

    A part that cannot be understood is left out. No more than 32 KiB and 100 results are looked at.
    """
    plain, quoted = _without_quotes(value[:_MAX_READ_BYTES].decode("utf-8", "replace"))

    def unquoted(text: str) -> str:
        return _PLACE.sub(lambda place: quoted[int(place[1])], text) if "\0" in text else text

    head, *resinfos = plain.split(";", _MAX_RESULTS + 1)[: _MAX_RESULTS + 1]
    authserv_id, version = [*map(unquoted, head.split()), "", ""][:2]
    results = []
    for resinfo in resinfos:
        spec = _EQUALS.sub("=", resinfo)
        method = _METHODSPEC.match(spec)
        # "none" and what is no methodspec
        if method is None:
            continue
        reason = ""
        properties: list[tuple[str, str]] = []
        for ptype, name, text in _PROPSPEC.findall(spec, method.end()):
            if ptype:
                properties.append((f"{ptype}.{name}".lower(), unquoted(text)))
            elif name.lower() == "reason":
                reason = unquoted(text)
        result = unquoted(method[2]).lower()
        results.append(ReadResult(method[1].lower(), result, reason, tuple(properties)))
    return ReadResults(authserv_id, tuple(results), version)


def _without_quotes(text: str) -> tuple[str, list[str]]:
    """The text without comments, runs of white space as one blank, quoted strings as places; and those strings."""
    parts: list[str] = []
    quoted: list[str] = []
    text = text.replace("\0", "")
    at = 0
    while at < len(text):
        part = _PART.match(text, at)
        assert part is not None  # its last alternatives take whatever the others do not
        at = part.end()
        if part[1]:
            parts.append(f"\0{len(quoted)}\0")
            quoted.append(_QUOTED_PAIR.sub(r"\1", part[2]))
        elif part[3]:
            at = _comment_end(text, at)
            parts.append(" ")
        else:
            parts.append(" " if part[4] else part[0])
    return _BLANKS.sub(" ", "".join(parts)), quoted


def _comment_end(text: str, at: int) -> int:
    """Where the comment ends that has begun before `at` (RFC 5322 3.2.2: comments nest); one without end takes all."""
    depth = 1
    for part in _COMMENT_PART.finditer(text, at):
        depth += {"(": 1, ")": -1}.get(part[0], 0)
        if depth == 0:
            return part.end()
    return len(text)


# --- ours --------------------------------------------------------------------------------------------------

# A head that all readers understand alike: the authserv-id, perhaps a version, and its end
_PLAIN_HEAD = re.compile(rb"[ \t\r\n]*([A-Za-z0-9._-]+)(?:[ \t\r\n]+[0-9]+)?[ \t\r\n]*(?:;|$)")
_ENCODED_WORD = re.compile(rb"=\?[^?\s]*\?[BbQq]\?")
_SPECIAL = re.compile(rb'["\\()]')
_FLAT_COMMENT = re.compile(rb"\([^)]*+\)?")
_SPACES = b" \t\r\n"
_CONTROLS = bytes(each for each in range(0x20) if each not in _SPACES) + b'\x7f"\\'
_CONTROLS_TO_BLANKS = bytes.maketrans(_CONTROLS, b" " * len(_CONTROLS))
_PUNCTUATION = "".join(chr(each) for each in range(0x80) if not chr(each).isalnum())
# what is not seen: soft hyphen, joiners, directions, variation selectors, tags
_INVISIBLE = re.compile(
    "[\x80-\x9f\xad\u034f\u061c\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\U000e0000-\U000e0fff]+"
)
_ID = re.compile(rf"(?:[{_TOKEN}]|[^\x00-\x7f\s])*")
# of an authserv-id as it was written; ours has at most 255 characters
_MAX_HEAD = 1024
_MAX_WORDS = 32
# quotes, backslashes and parentheses before the end of an authserv-id
_MAX_SPECIALS = 32


def own_ids(*names: str) -> frozenset[str]:
    """Our authserv-id and its aliases in the form that `forged` and `is_ours` compare."""
    return frozenset(filter(None, map(_canonical, names)))


def forged(header: Header, ids: AbstractSet[str]) -> frozenset[Field]:
    """The Authentication-Results fields of a header that came in and name one of these ids as their author."""
    # RFC 8601 5: they are removed; a name is compared without what no name holds, such as blanks before the colon
    return frozenset([field for field in header.resembling(_NAME) if is_ours(field.value, ids)])


def is_ours(value: bytes, ids: AbstractSet[str]) -> bool:
    """Whether a reader could take an Authentication-Results field of this value for one of ours, of `own_ids`.

    Compared without case, in the compatibility form of Unicode and with A-labels decoded. A field that has no
    authserv-id, or in a form that all readers understand another one, is not ours. One that hides it behind more
    quotes and comments than anybody writes is.
    """
    head = _PLAIN_HEAD.match(value)
    if head is not None:
        return _canonical(head[1].decode("ascii")) in ids
    # RFC 2047 5 allows no encoded-word here, but some readers decode them before they look at anything
    if _ENCODED_WORD.search(value):
        return True
    readings = set(_readings(value))
    return None in readings or any(
        _canonical(head) in ids for reading in readings if reading is not None for head in _heads(reading)
    )


def _readings(value: bytes) -> Iterator[bytes | None]:
    """The value without its comments, as different readers understand comments, the first of them not at all."""
    yield value
    if b"(" in value:
        yield _FLAT_COMMENT.sub(b" ", value)
        for knows_quotes in (False, True) if b'"' in value else (False,):
            for knows_pairs in (False, True) if b"\\" in value else (False,):
                yield _uncommented(value, knows_quotes=knows_quotes, knows_pairs=knows_pairs)


def _uncommented(value: bytes, *, knows_quotes: bool, knows_pairs: bool) -> bytes | None:
    """Without nested comments up to the first ";"; a parenthesis that has no partner is a blank.

    None when there are too many specials before that.
    """
    parts: list[bytes] = []
    opened: list[int] = []  # how many parts stood there before each comment that is open
    is_quoted = False
    at = skip_to = 0
    for count, special in enumerate(_SPECIAL.finditer(value)):
        here, mark = special.start(), special[0]
        if not opened and not is_quoted and b";" in value[at:here]:
            break
        if count == _MAX_SPECIALS:
            return None
        if here < skip_to:
            continue
        if mark == b"\\":
            skip_to = here + 2 if knows_pairs else here
        elif mark == b'"':
            if knows_quotes and not opened:
                is_quoted = not is_quoted
        elif not is_quoted:
            parts.append(value[at:here])
            at = here + 1
            if mark == b"(":
                opened.append(len(parts))
            elif opened:
                del parts[opened.pop() :]
            parts.append(b" ")
    parts.append(value[at:])
    return b"".join(parts)


def _heads(reading: bytes) -> Iterator[str]:
    """What different readers take for the beginning of a field without comments."""
    # a control or quote parts what it stands in, or is as if it were not there
    for octets in (reading.translate(None, _CONTROLS), reading.translate(_CONTROLS_TO_BLANKS)):
        text = b" ".join(octets.split()).decode("utf-8", "ignore")
        if not text.isascii():
            text = _INVISIBLE.sub("", text)
        name = ""
        for word in _folded(text.lstrip(_PUNCTUATION)[:_MAX_HEAD]).split()[:_MAX_WORDS]:
            # blanks around a dot end a name to one reader, and to another they are as if they were not there
            if name and not name.endswith(".") and not word.startswith("."):
                break
            name += word
            yield name


def _canonical(text: str) -> str:
    """The authserv-id that this text begins with, in one form for all ways of writing it."""
    found = _ID.match(_folded(text).strip(_PUNCTUATION))
    assert found is not None  # it takes an empty string too
    name = found[0].strip(_PUNCTUATION)
    return _folded(".".join(map(_to_unicode, name.split(".")))) if "xn--" in name else name


def _folded(text: str) -> str:
    """Without case and in the compatibility form of Unicode; its ideographic full stop is a dot (RFC 3490 3.1)."""
    return text.lower() if text.isascii() else normalize("NFKC", text).replace("\u3002", ".").lower()


def _to_unicode(label: str) -> str:
    """The U-label of an A-label (RFC 5891 4.4), whether it is a valid one or not; any other label as it is."""
    if not label.startswith("xn--") or len(label) > 63:
        return label
    try:
        return label[4:].encode("ascii").decode("punycode")
    except UnicodeError:
        return label
