"""address: what is a domain, a literal, a mailbox and a path, and that nothing else is."""

from __future__ import annotations

import copy
import pickle
import unicodedata
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.smtp.address import (
    MAX_DOMAIN,
    MAX_LABEL,
    MAX_LOCAL,
    MAX_PATH,
    AddressError,
    AddressFault,
    AddressLiteral,
    Domain,
    Mailbox,
    parse_forward_path,
    parse_reverse_path,
)

EXAMPLE = Domain("example.org")
# 253 octets: three labels of 63 and one of 61, with their dots
LONGEST = ".".join(["a" * 63] * 3 + ["b" * 61])


def fault_of(text: str, *, smtputf8: bool = True) -> AddressFault:
    """What is wrong with this forward-path."""
    with pytest.raises(AddressError) as caught:
        parse_forward_path(text, smtputf8=smtputf8)
    return caught.value.kind


# --- domains -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("example.org", "example.org"),
        ("Mail.EXAMPLE.Org", "mail.example.org"),
        ("localhost", "localhost"),
        ("3com.example", "3com.example"),
        ("1.2.3.4.example", "1.2.3.4.example"),
        ("a.0x7f", "a.0x7f"),
        (
            "r3---sn-4g5e.example",
            "r3---sn-4g5e.example",
        ),  # hyphens in the third and fourth place: in the field
        (f"{'a' * MAX_LABEL}.example", f"{'a' * MAX_LABEL}.example"),
        (LONGEST, LONGEST),
        # RFC 5891: U-labels and A-labels become A-labels
        ("bücher.example", "xn--bcher-kva.example"),
        ("xn--bcher-kva.example", "xn--bcher-kva.example"),
        ("XN--BCHER-KVA.EXAMPLE", "xn--bcher-kva.example"),
        ("MAIL.bücher.EXAMPLE", "mail.xn--bcher-kva.example"),
        ("例え.テスト", "xn--r8jz45g.xn--zckzah"),
        # what IDNA 2003 would have mapped to another domain (docs/adr/0001-idna.md)
        ("faß.example", "xn--fa-hia.example"),
        ("βόλος.example", "xn--nxasmm1c.example"),
    ],
)
def test_domain_is_kept_as_lower_case_a_labels(text: str, expected: str) -> None:
    assert Domain.parse(text) == expected
    assert type(Domain.parse(text)) is Domain


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "example.org.",
        ".example.org",
        "example..org",
        "-example.org",
        "example-.org",
        "exa_mple.org",
        "_dmarc.example.org",
        "exa mple.org",
        " example.org",
        "example.org ",
        "example.org\n",
        "example.org\0",
        "exam\tple.org",
        "example.org:25",
        "example,org",
        "*.example.org",
        "(comment)example.org",
        f"{'a' * (MAX_LABEL + 1)}.example",
        LONGEST + "b",
        "a" * 100_000,
        # RFC 3696 2: the last label is not all-numeric
        "192.0.2.1",
        "example.123",
        "123",
        "[192.0.2.1]",
        "2001:db8::1",
    ],
)
def test_text_that_is_no_host_name_is_no_domain(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        Domain.parse(text)
    assert caught.value.kind is AddressFault.SYNTAX


@pytest.mark.parametrize(
    "text",
    [
        "xn--.example",  # nothing behind the prefix
        "xn--a.example",  # no Punycode
        "xn--example-.example",  # decodes to ASCII
        "xn--53h.example",  # U+2615 HOT BEVERAGE: DISALLOWED
        "xn---bbk.example",  # not the canonical Punycode of its U-label
        "xn--bcher-kva8445foa.example",  # two forms of one label at once
        "xn--99999999.example",
        f"xn--{'a' * 60}.example",
        # RFC 5892: DISALLOWED without a mapping, and the gateway maps nothing
        "Bücher.example",
        "BÜCHER.example",
        "\N{FULLWIDTH LATIN SMALL LETTER E}xample.org",
        "example\N{IDEOGRAPHIC FULL STOP}org",
        "example\N{FULLWIDTH FULL STOP}org",
        "example\N{HALFWIDTH IDEOGRAPHIC FULL STOP}org",
        "☕.example",
        "\N{KELVIN SIGN}.example",
        "ex\N{SOFT HYPHEN}ample.org",
        "ex\N{ZERO WIDTH SPACE}ample.org",
        "ex\N{ZERO WIDTH JOINER}ample.org",
        "bu\N{COMBINING DIAERESIS}cher.example",  # not in NFC
        "\N{COMBINING DIAERESIS}a.example",
        "בa.example",  # against the Bidi rule (RFC 5893)
        "bü--cher.example",
        "-bücher.example",
        "bücher-.example",
        "bücher..example",
        "bücher.example.",
        "bücher.123",
        "bücher_a.example",
        "bücher.exa_mple",
        "example.org\x85",
        "example.org\u2028",
        "\ud800.example",
        "ü" * (MAX_LABEL + 1),
        "ü" * 60,  # 60 characters, but an A-label of more than 63
        ".".join(["ü"] * 100),  # A-labels of more than 253 octets together
    ],
)
def test_label_that_idna_2008_refuses_is_not_repaired(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        Domain.parse(text)
    assert caught.value.kind is AddressFault.SYNTAX


def test_fake_a_label_is_refused_also_where_idna_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("idna.ulabel", lambda _label: "example")
    with pytest.raises(AddressError):
        Domain.parse("xn--fake.example")


def test_domain_cannot_be_made_of_anything_but_a_domain() -> None:
    assert Domain("EXAMPLE.org") == EXAMPLE
    with pytest.raises(AddressError):
        Domain("no domain")


def test_domain_is_a_str_that_stays_a_domain_when_copied() -> None:
    assert f"{EXAMPLE}" == "example.org"
    assert EXAMPLE in {"example.org", "example.net"}
    assert type(pickle.loads(pickle.dumps(EXAMPLE))) is Domain
    assert type(copy.deepcopy(EXAMPLE)) is Domain
    assert Domain.parse(EXAMPLE) == EXAMPLE


def test_subdomain_lies_below_and_is_not_the_domain_itself() -> None:
    assert Domain("a.b.example.org").is_subdomain_of(EXAMPLE)
    assert not EXAMPLE.is_subdomain_of(EXAMPLE)
    assert not Domain("badexample.org").is_subdomain_of(EXAMPLE)
    assert not EXAMPLE.is_subdomain_of(Domain("a.example.org"))


def test_error_is_ours_and_its_message_is_escaped() -> None:
    with pytest.raises(GatewayError) as caught:
        Domain.parse("exa\r\nmplé.org\x1b[2J")
    assert str(caught.value).isascii()
    assert str(caught.value).isprintable()


def test_message_of_an_error_does_not_grow_with_the_text() -> None:
    with pytest.raises(AddressError) as caught:
        Domain.parse("\0" * 1_000_000)
    assert len(str(caught.value)) < 5 * MAX_PATH


# --- address literals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address", "canonical"),
    [
        ("[192.0.2.1]", IPv4Address("192.0.2.1"), "[192.0.2.1]"),
        ("[IPv6:2001:db8::1]", IPv6Address("2001:db8::1"), "[IPv6:2001:db8::1]"),
        ("[ipv6:2001:DB8:0:0:0:0:0:1]", IPv6Address("2001:db8::1"), "[IPv6:2001:db8::1]"),
        ("[IPv6:::]", IPv6Address("::"), "[IPv6:::]"),
        ("[IPv6:64:ff9b::192.0.2.1]", IPv6Address("64:ff9b::c000:201"), "[IPv6:64:ff9b::c000:201]"),
    ],
)
def test_address_literal_is_an_address(text: str, address: IPv4Address | IPv6Address, canonical: str) -> None:
    literal = AddressLiteral.parse(text)
    assert literal == AddressLiteral(address)
    assert str(literal) == canonical
    assert AddressLiteral.parse(str(literal)) == literal


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[",
        "192.0.2.1",
        "[192.0.2.1",
        "192.0.2.1]",
        "[192.0.2]",
        "[192.0.2.256]",
        "[192.0.2.01]",
        "[192.0.2.1 ]",
        "[192.0.2.1/24]",
        "[192.0.2.\N{ARABIC-INDIC DIGIT ONE}]",
        "[3221225985]",
        "[2001:db8::1]",
        "[IPv6:192.0.2.1]",
        "[IPv6:]",
        "[IPv6:2001:db8::1%eth0]",
        "[IPv6:2001:db8::1::2]",
        "[IPv6:12345::]",
        "[IPv6: 2001:db8::1]",
        "[IPv4:192.0.2.1]",
        "[X-Tag:whatever]",
        "[example.org]",
        "[[192.0.2.1]]",
        "[192.0.2.1\n]",
        "[" + "1" * 100_000 + "]",
    ],
)
def test_anything_else_in_brackets_is_no_address_literal(text: str) -> None:
    with pytest.raises(AddressError) as caught:
        AddressLiteral.parse(text)
    assert caught.value.kind is AddressFault.SYNTAX


# --- paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "local"),
    [
        ("<Smith@example.org>", "Smith"),
        ("<john.q.public@example.org>", "john.q.public"),
        ("<user+tag@example.org>", "user+tag"),
        ("<!#$%&'*+-/=?^_`{|}~@example.org>", "!#$%&'*+-/=?^_`{|}~"),
        # the classic relay attempts are plain local parts of our own domain, which is what the relay guard asks
        ("<user%192.0.2.1@example.org>", "user%192.0.2.1"),
        ("<host!user@example.org>", "host!user"),
        # RFC 5321 4.1.2: quoted strings
        ('<"john smith"@example.org>', '"john smith"'),
        ('<"a@b"@example.org>', '"a@b"'),
        ('<"a>b"@example.org>', '"a>b"'),
        ('<"a\\"b\\\\"@example.org>', '"a\\"b\\\\"'),
        ('<""@example.org>', '""'),
        ('<"@a,@b:c"@example.org>', '"@a,@b:c"'),
        (f"<{'a' * MAX_LOCAL}@example.org>", "a" * MAX_LOCAL),
    ],
)
def test_local_part_is_kept_as_given(text: str, local: str) -> None:
    expected = Mailbox(local, EXAMPLE)
    assert parse_forward_path(text, smtputf8=False) == expected
    assert parse_reverse_path(text, smtputf8=False) == expected
    assert f"<{expected}>" == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<",
        ">",
        "user@example.org",
        "<user@example.org",
        "user@example.org>",
        "<<user@example.org>>",
        " <user@example.org>",
        "<user@example.org> ",
        "< user@example.org>",
        "<user@example.org >",
        "<user @example.org>",
        "<user@ example.org>",
        "<user@example.org>\r\n",
        "<user\r\n@example.org>",
        "<user\r@example.org>",
        "<user\n@example.org>",
        "<user\0@example.org>",
        "<user\t@example.org>",
        "<user\x7f@example.org>",
        "<user@example.org\r\nRCPT TO:<x@example.org>",
        '<"user\r\n"@example.org>',
        '<"user\\\r"@example.org>',
        '<"user\0"@example.org>',
        '<"user\t"@example.org>',
        '<"user@example.org>',
        '<user"@example.org>',
        '<"user"x@example.org>',
        '<"a"."b"@example.org>',  # RFC 5322 obs-local-part
        '<"a"b"@example.org>',
        '<"a\\"@example.org>',
        "<user@>",
        "<@example.org>",
        "<@>",
        "<user>",
        "<user@a@example.org>",
        "<.user@example.org>",
        "<user.@example.org>",
        "<us..er@example.org>",
        "<us(comment)er@example.org>",
        "<user@example.org(comment)>",
        "<user;x@example.org>",
        "<a,b@example.org>",
        "<a:b@example.org>",
        "<us\\er@example.org>",
        "<user@example.org.>",
        "<user@exa_mple.org>",
        "<user@192.0.2.1>",
        "<user@[192.0.2.1>",
        "<user@[x-tag:y]>",
        "<user@example.org,other@example.org>",
        "<user@example.org><other@example.org>",
        "Name <user@example.org>",
        f"<{'a' * (MAX_LOCAL + 1)}@example.org>",
        '<"postmaster">',
        "<postmaster@>",
        "<" + "a" * 1_000_000 + "@example.org>",
    ],
)
def test_text_that_is_no_path_is_not_repaired(text: str) -> None:
    assert fault_of(text, smtputf8=False) is AddressFault.SYNTAX
    with pytest.raises(AddressError) as caught:
        parse_reverse_path(text, smtputf8=False)
    assert caught.value.kind is AddressFault.SYNTAX


@pytest.mark.parametrize(
    "text", ["<@a.example:user@example.org>", "<@a.example,@b.example:user@example.org>", "<@a:>"]
)
def test_source_route_is_told_apart(text: str) -> None:
    assert fault_of(text) is AddressFault.ROUTE


def test_null_reverse_path_is_none() -> None:
    assert parse_reverse_path("<>", smtputf8=False) is None
    assert fault_of("<>") is AddressFault.SYNTAX


@pytest.mark.parametrize("local", ["postmaster", "Postmaster", "POSTMASTER"])
def test_postmaster_needs_no_domain_as_a_recipient(local: str) -> None:
    mailbox = parse_forward_path(f"<{local}>", smtputf8=False)
    assert mailbox == Mailbox(local, None)
    assert str(mailbox) == local
    with pytest.raises(AddressError):
        parse_reverse_path(f"<{local}>", smtputf8=False)


def test_address_literal_stands_for_a_domain() -> None:
    mailbox = parse_forward_path("<user@[IPv6:2001:DB8::1]>", smtputf8=False)
    assert mailbox.domain == AddressLiteral(IPv6Address("2001:db8::1"))
    assert str(mailbox) == "user@[IPv6:2001:db8::1]"


@pytest.mark.parametrize(
    "text",
    ["<ü@example.org>", '<"ü"@example.org>', "<a@bücher.example>", "<ü>", "ü", "<a@b\u2028>", "<\ud800@a>"],
)
def test_utf8_without_smtputf8_is_told_apart(text: str) -> None:
    assert fault_of(text, smtputf8=False) is AddressFault.UTF8
    with pytest.raises(AddressError) as caught:
        parse_reverse_path(text, smtputf8=False)
    assert caught.value.kind is AddressFault.UTF8


@pytest.mark.parametrize(
    "local", ["δοκιμή", "δοκ.ιμή", '"δ δ"', '"\\"ü"', "\N{CJK UNIFIED IDEOGRAPH-4E00}" * 21, "🙂"]
)
def test_utf8_local_part_with_smtputf8_is_kept_as_given(local: str) -> None:
    mailbox = parse_forward_path(f"<{local}@example.org>", smtputf8=True)
    assert mailbox == Mailbox(local, EXAMPLE)
    assert not mailbox.is_ascii


def test_u_label_alone_needs_no_smtputf8_behind_us() -> None:
    mailbox = parse_forward_path("<a@bücher.example>", smtputf8=True)
    assert str(mailbox) == "a@xn--bcher-kva.example"
    assert mailbox.is_ascii


@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("code_point", [0x80, 0x85, 0x9F, 0x2028, 0x2029, 0xD800, 0xDC80, 0xDFFF])
def test_line_ends_controls_and_surrogates_of_unicode_are_refused(code_point: int, quote: str) -> None:
    assert fault_of(f"<{quote}a{chr(code_point)}b{quote}@example.org>") is AddressFault.SYNTAX


def test_quoted_pair_of_utf8_is_refused() -> None:
    # RFC 5321 4.1.2: quoted-pairSMTP is ASCII, and RFC 6531 3.3 leaves it so
    assert fault_of('<"\\ü"@example.org>') is AddressFault.SYNTAX


def test_local_part_is_measured_in_octets() -> None:
    assert parse_forward_path(f"<{'ü' * 32}@example.org>", smtputf8=True).local == "ü" * 32
    assert fault_of(f"<{'ü' * 33}@example.org>") is AddressFault.SYNTAX


def test_path_is_measured_with_its_brackets() -> None:
    domain = LONGEST[-(MAX_PATH - 13) :].lstrip(".")
    longest = f"<{'a' * (MAX_PATH - len(domain) - 3)}@{domain}>"
    assert len(longest) == MAX_PATH
    assert f"<{parse_forward_path(longest, smtputf8=False)}>" == longest
    assert fault_of(longest.replace("<", "<a"), smtputf8=False) is AddressFault.SYNTAX


def test_path_is_measured_as_it_will_be_written() -> None:
    domain = ".".join(["ü"] * 31)
    assert len(Domain(domain)) == 31 * 8 - 1
    longest = parse_forward_path(f"<aaaaaa@{domain}>", smtputf8=True)
    assert len(f"<{longest}>") == MAX_PATH
    assert fault_of(f"<{'a' * 7}@{domain}>") is AddressFault.SYNTAX
    assert len(domain) < MAX_DOMAIN


# --- mailboxes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("local", "value"),
    [("a.b", "a.b"), ('"a b"', "a b"), ('"a\\"b"', 'a"b'), ('"\\\\\\a"', "\\a"), ('""', "")],
)
def test_local_value_is_without_quotes_and_escapes(local: str, value: str) -> None:
    assert Mailbox(local, EXAMPLE).local_value == value


@pytest.mark.parametrize("local", ["", "a b", "a\r\nb", '"a', "a@b", "é\x85", "user"])
def test_mailbox_cannot_be_made_of_what_the_parser_refuses(local: str) -> None:
    with pytest.raises(AddressError) as caught:
        Mailbox(local, None if local == "user" else EXAMPLE)
    assert caught.value.kind is AddressFault.SYNTAX


def test_mailboxes_are_equal_when_written_alike() -> None:
    mailbox = parse_forward_path("<user@EXAMPLE.org>", smtputf8=False)
    assert {mailbox, Mailbox("user", EXAMPLE)} == {mailbox}
    assert mailbox != Mailbox("User", EXAMPLE)
    assert mailbox != Mailbox('"user"', EXAMPLE)


# --- properties --------------------------------------------------------------------------------------
# Time: each parser refuses by length (256 characters at most) before it looks at the characters, so whatever its
# patterns do, work for one address has a bound; the texts of a million characters above would show otherwise.

DOT_STRINGS = st.from_regex(
    r"[a-z0-9!#$%&'*+/=?^_`{|}~-]{1,12}(\.[A-Z0-9ü-ž€🙂-🙄]{1,6}){0,3}", fullmatch=True
)
QUOTED_STRINGS = st.from_regex(r'"([ !#-\[\]-~à-ž€]|\\[ -~]){0,14}"', fullmatch=True)
LITERALS = st.ip_addresses().map(AddressLiteral)
DOMAINS = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,9}[a-z0-9])?(\.[a-zà-öø-þ]{1,8}){1,3}", fullmatch=True).filter(
    lambda text: text[2:4] != "--"
)
MAILBOXES = st.builds(Mailbox, DOT_STRINGS | QUOTED_STRINGS, DOMAINS.map(Domain) | LITERALS)
# what means something to the grammar, what means something to others, and anything at all
HOSTILE = (
    st.text(st.sampled_from('<>@".\\ ,:;()[]a0-_xn\r\n\0\t\x7f\x85\u2028\ud800éß\u212a\u3002\uff41'))
    | st.text()
)


def is_harmless(text: str) -> bool:
    """No control character, no line end, no surrogate."""
    return len(text.splitlines()) <= 1 and not any(
        unicodedata.category(c) in {"Cc", "Cs", "Zl", "Zp"} for c in text
    )


@given(MAILBOXES)
def test_formatted_mailbox_parses_to_itself(mailbox: Mailbox) -> None:
    assert parse_forward_path(f"<{mailbox}>", smtputf8=not mailbox.is_ascii) == mailbox
    assert parse_reverse_path(f"<{mailbox}>", smtputf8=True) == mailbox


@given(HOSTILE, st.booleans())
def test_any_text_is_a_harmless_mailbox_or_an_address_error(text: str, smtputf8: bool) -> None:
    for candidate in (text, f"<{text}>", f"<{text}@example.org>", f'<"{text}"@example.org>', f"<a@{text}>"):
        try:
            mailbox = parse_reverse_path(candidate, smtputf8=smtputf8)
        except AddressError:
            continue
        assert is_harmless(str(mailbox))
        assert len(f"<{mailbox}>".encode()) <= MAX_PATH
        assert mailbox is None or parse_forward_path(f"<{mailbox}>", smtputf8=True) == mailbox


@given(HOSTILE)
def test_any_text_is_a_domain_of_the_dns_or_an_address_error(text: str) -> None:
    for candidate in (text, f"xn--{text}.example", f"{text}.example"):
        try:
            domain = Domain.parse(candidate)
        except AddressError:
            continue
        assert domain.isascii()
        assert domain == domain.lower()
        assert len(domain) <= MAX_DOMAIN
        assert all(0 < len(label) <= MAX_LABEL for label in domain.split("."))
        assert Domain.parse(domain) == domain
