"""The address parser beside a slow one, written character by character from the grammar (`./dev fuzz -k address`)."""

from __future__ import annotations

import string

import idna
from hypothesis import given
from hypothesis import strategies as st

from gateway.smtp.address import AddressError, AddressLiteral, Domain, Mailbox, parse_forward_path

ATEXT = frozenset(string.ascii_letters + string.digits + "!#$%&'*+-/=?^_`{|}~")
LET_DIG = frozenset(string.ascii_letters + string.digits)

GRAMMAR = st.text(st.sampled_from('aB0._%!"\\ @<>:,;()[]-\r\n\0\x7f\x85\u2028ü\ud800'), max_size=12)
LABELS = st.sampled_from(
    ["a", "Example", "org", "xn--", "xn--bcher-kva", "bücher", "-a", "1", "9.1", "a_b", "", "ü" * 57]
)


def is_utf8_text(character: str) -> bool:
    """RFC 6531 3.3, UTF8-non-ascii, without the C1 controls and the line ends of Unicode."""
    return character >= "\xa0" and character not in "\u2028\u2029" and not "\ud800" <= character <= "\udfff"


def is_local_part(text: str) -> bool:
    """RFC 5321 4.1.2, Local-part, one character after the other."""
    if not text.startswith('"'):
        atoms = text.split(".")
        return all(atom and all(c in ATEXT or is_utf8_text(c) for c in atom) for atom in atoms)
    is_escaped = False
    for position, character in enumerate(text[1:], 1):
        if is_escaped:
            if not " " <= character <= "~":
                return False
            is_escaped = False
        elif character == '"':
            return position == len(text) - 1
        elif character == "\\":
            is_escaped = True
        elif not (" " <= character <= "~" or is_utf8_text(character)):
            return False
    return False


def to_a_labels(text: str) -> str | None:
    """The domain by idna's own way over whole names, None where there is none."""
    labels = [label.lower() if label.isascii() else label for label in text.split(".")]
    for label in labels:
        if label.isascii() and not label.startswith("xn--"):
            if (
                not set(label) <= LET_DIG | {"-"}
                or not label
                or "-" in {label[0], label[-1]}
                or len(label) > 63
            ):
                return None
        else:
            try:
                idna.encode(label, strict=True)
            except idna.IDNAError:
                return None
    if labels[-1].isdigit():
        return None
    name = ".".join(label if label.isascii() else idna.encode(label).decode("ascii") for label in labels)
    return name if len(name) <= 253 else None


@given(GRAMMAR | st.text(max_size=20))
def test_local_part_is_what_the_grammar_says(text: str) -> None:
    try:
        mailbox = parse_forward_path(f"<{text}@example.org>", smtputf8=True)
    except AddressError:
        # a source route looks like a mailbox to nobody; everything else has to be refused by the grammar too
        assert not is_local_part(text)
    else:
        assert is_local_part(text)
        assert mailbox == Mailbox(text, Domain("example.org"))


@given(st.lists(LABELS | st.text(max_size=6), min_size=1, max_size=4).map(".".join))
def test_domain_is_what_idna_says_label_by_label(text: str) -> None:
    expected = to_a_labels(text)
    try:
        domain: str | None = Domain.parse(text)
    except AddressError:
        domain = None
    assert domain == expected


# without dots: one label
@given(
    st.text(st.characters(exclude_characters="."), max_size=63).map("xn--{}".format)
    | st.from_regex(r"xn--[a-z0-9-]{1,59}", fullmatch=True)
)
def test_a_label_is_the_only_form_of_its_u_label(label: str) -> None:
    try:
        domain = Domain.parse(f"{label}.example")
    except AddressError:
        return
    u_label = idna.decode(domain.split(".")[0])
    assert not u_label.isascii()
    assert Domain.parse(f"{u_label}.example") == domain == f"{label.lower()}.example"


@given(st.text(st.sampled_from("0123456789abcdefABCDEF:.%[]IPv6 x/"), max_size=50))
def test_address_literal_keeps_its_canonical_form(text: str) -> None:
    for candidate in (text, f"[{text}]", f"[IPv6:{text}]"):
        try:
            literal = AddressLiteral.parse(candidate)
        except AddressError:
            continue
        assert AddressLiteral.parse(str(literal)) == literal
        assert str(AddressLiteral.parse(str(literal))) == str(literal)
