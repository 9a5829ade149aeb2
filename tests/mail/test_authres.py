"""mail.authres: what we write is what readers of all kinds find, and whatever any of them could take for ours is."""

from __future__ import annotations

import time

import pytest

from gateway.mail.authres import (
    ReadResult,
    ReadResults,
    forged,
    format_results,
    is_ours,
    own_ids,
    parse,
)
from gateway.mail.message import parse_header
from gateway.verdict import AuthResult, Result

ID = "mx.example.org"
SPF = AuthResult("spf", Result.PASS, properties=(("smtp.mailfrom", "a.b+c@client.example"),))
DKIM = AuthResult(
    "dkim",
    Result.FAIL,
    "body hash did not verify",
    (
        ("header.d", "client.example"),
        ("header.i", "@client.example"),
        ("header.s", "s1"),
        ("header.a", "rsa-sha256"),
        ("header.b", "Ab/dE+1="),
    ),
)
DMARC = AuthResult(
    "dmarc", Result.PASS, properties=(("header.from", "client.example"), ("policy.dmarc", "reject"))
)

# --- writing ------------------------------------------------------------------------------------------------


def test_a_message_of_which_nothing_is_known_says_so() -> None:
    assert format_results(ID, []) == "mx.example.org; none"


def test_each_result_has_a_line_of_its_own_and_long_ones_are_folded() -> None:
    assert format_results(ID, [SPF, DKIM, DMARC]) == (
        "mx.example.org;\r\n"
        "\tspf=pass smtp.mailfrom=a.b+c@client.example;\r\n"
        '\tdkim=fail reason="body hash did not verify" header.d=client.example\r\n'
        '\theader.i=@client.example header.s=s1 header.a=rsa-sha256 header.b="Ab/dE+1=";\r\n'
        "\tdmarc=pass header.from=client.example policy.dmarc=reject"
    )


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("a@client.example", "a@client.example"),
        ("@client.example", "@client.example"),
        ("client.example", "client.example"),
        ("", '""'),
        ("a@localhost", '"a@localhost"'),
        ("SRS0=x=y=z=a@client.example", '"SRS0=x=y=z=a@client.example"'),
        ("a/b@client.example", '"a/b@client.example"'),
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8::1", '"2001:db8::1"'),
        ('"a b"@client.example', "\"'a b'@client.example\""),
        ('"a; dmarc=pass (x"@client.example', "\"'a? dmarc?pass ?x'@client.example\""),
        ("dmarc=pass@client.example", '"dmarc?pass@client.example"'),
        ("header.from=bank.example@client.example", '"header.from?bank.example@client.example"'),
        ("a\r\nX: y\0\x1b[2J\x7f", '"a??X: y??[2J?"'),
        ("a\\", '"a?"'),
    ],
)
def test_a_value_that_is_not_plain_is_quoted_and_what_reads_as_syntax_is_replaced(
    value: str, written: str
) -> None:
    result = AuthResult("spf", Result.NONE, properties=(("smtp.mailfrom", value),))
    field = format_results(ID, [result]).replace("\r\n\t", " ")
    assert field == f"mx.example.org; spf=none smtp.mailfrom={written}"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("büro@client.example", "büro@client.example"),
        ("\uff44\uff4d\uff41\uff52\uff43\uff1dpass\uff1b@client.example", "??????pass?@client.example"),
        ("a\u2028b\u202ec\x85\u037e@client.example", "a?b?c??@client.example"),
        ("\ud800@client.example", "?@client.example"),
    ],
)
def test_text_beyond_ascii_is_written_where_the_message_may_have_it(value: str, written: str) -> None:
    result = AuthResult("spf", Result.NONE, properties=(("smtp.mailfrom", value),))
    field = format_results(ID, [result], smtputf8=True)
    assert field.endswith(f'smtp.mailfrom="{written}"')
    plain = format_results(ID, [result])
    assert plain.isascii()
    assert plain.endswith('@client.example"')


def test_what_is_too_long_is_cut_and_reads_as_no_other_domain() -> None:
    value = "x" * 300 + "@bank.example." + "a" * 50 + ".example"
    (result,) = parse(
        format_results(ID, [AuthResult("spf", Result.PASS, properties=(("smtp.mailfrom", value),))]).encode()
    ).results
    assert result.properties == (("smtp.mailfrom", value[:320] + "?"),)


def test_names_that_are_none_are_left_out() -> None:
    field = format_results(
        ID,
        [
            AuthResult("x;y", Result.PASS),
            AuthResult("x y", Result.PASS),
            AuthResult("", Result.PASS),
            AuthResult("ok", Result.PASS, properties=(("a b.c", "1"), ("header", "2"), ("header.d", "3"))),
        ],
    )
    assert field == "mx.example.org;\r\n\tok=pass header.d=3"


def test_no_number_of_results_makes_a_field_without_bounds() -> None:
    long = AuthResult("dkim", Result.FAIL, "x" * 400, tuple((f"header.{n}", "y" * 400) for n in range(50)))
    field = format_results(ID, [long] * 1000)
    assert len(field) < 16_384 + 20_000 + 100 * len(";\r\n\tdkim=fail")
    assert len(parse(field.encode()).results) == 100


# --- reading ------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_again() -> None:
    read = parse(b" " + format_results(ID, [SPF, DKIM, DMARC]).encode())
    assert read == ReadResults(
        ID,
        tuple(
            ReadResult(each.method, str(each.result), each.reason, each.properties)
            for each in (SPF, DKIM, DMARC)
        ),
    )


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("(a (b) \\) c) example.com (x) 1 (y) ; (z) none (w)", ReadResults("example.com", (), "1")),
        ('"example.com"; SPF = Pass', ReadResults("example.com", (ReadResult("spf", "pass"),))),
        (
            'example.com; dkim/1 (a;b) =fail (good "enough") reason = "a;\\"b" header . d= x.example',
            ReadResults("example.com", (ReadResult("dkim", "fail", 'a;"b', (("header.d", "x.example"),)),)),
        ),
        (
            'example.com; spf=pass smtp.mailfrom="a b"@x.example smtp.helo=y=z',
            ReadResults(
                "example.com",
                (ReadResult("spf", "pass", "", (("smtp.mailfrom", "a b@x.example"), ("smtp.helo", "y=z"))),),
            ),
        ),
        ("example.com; what is this; spf=pass", ReadResults("example.com", (ReadResult("spf", "pass"),))),
        ("example.com; spf=fail (; dkim=pass", ReadResults("example.com", (ReadResult("spf", "fail"),))),
        ('example.com; spf=fail x="; dkim=pass', ReadResults("example.com", (ReadResult("spf", "fail"),))),
        ("", ReadResults("")),
        (";;;", ReadResults("")),
    ],
)
def test_reads_what_others_write(value: str, expected: ReadResults) -> None:
    assert parse(value.encode()) == expected


def test_properties_without_a_ptype_are_not_taken_for_properties() -> None:
    assert parse(b"x; spf=pass foo=bar smtp.mailfrom=a").results[0].properties == (("smtp.mailfrom", "a"),)


# --- ours ----------------------------------------------------------------------------------------------------

OURS = own_ids(ID, "alias.example.org", "xn--bcher-kva.example")


@pytest.mark.parametrize(
    "value",
    [
        " mx.example.org; dmarc=pass",
        "mx.example.org;dmarc=pass",
        " MX.Example.ORG; dmarc=pass",
        " (c) mx.example.org (x) 1; dmarc=pass",
        "\r\n\tmx.example.org;\r\n dmarc=pass",
        " mx.example.org 1; dmarc=pass",
        ' "mx.example.org"; dmarc=pass',
        ' "mx.ex\\ample.org"; dmarc=pass',
        ' "mx".example."org"; dmarc=pass',
        ' "mx.example.org" 1; dmarc=pass',
        ' "mx.example.org"1; dmarc=pass',
        ' "mx.example.org; dmarc=pass',
        " mx.example.org.; dmarc=pass",
        " mx.example.org. 1; dmarc=pass",
        " .mx.example.org; dmarc=pass",
        " mx . example . org; dmarc=pass",
        " mx(c).example(d (e)).org; dmarc=pass",
        " mx.example.org",
        " mx.example.org dmarc=pass",
        " mx.example.org/1; dmarc=pass",
        " mx.example.org=; dmarc=pass",
        " mx.example.org, other.example; dmarc=pass",
        " <mx.example.org>; dmarc=pass",
        " @mx.example.org; dmarc=pass",
        " mx.example.org(; dmarc=pass",
        " (mx.example.org; dmarc=pass",
        " ((a) mx.example.org; dmarc=pass",
        " (a)) mx.example.org; dmarc=pass",
        " (a\\) mx.example.org; dmarc=pass)",
        ' "(" mx.example.org; dmarc=pass',
        ' ("a) mx.example.org; dmarc=pass (")',
        " (a;b) mx.example.org; dmarc=pass",
        " m\0x.example.org; dmarc=pass",
        " mx.example.org\x0b1; dmarc=pass",
        " m\x7fx.example.org; dmarc=pass",
        " \uff4d\uff58\uff0e\uff45xample.org; dmarc=pass",
        " mx。example｡org; dmarc=pass",
        " mx.exam\u200bple.org; dmarc=pass",
        " \ufeffmx.exa\u00admple.org; dmarc=pass",
        " mx.example.org\u00a01; dmarc=pass",
        " =?utf-8?q?mx.example.org=3B_dmarc=3Dpass?=",
        " (=?utf-8?q?)_mx.example.org?=; dmarc=pass",
        " alias.example.org; dmarc=pass",
        " bücher.example; dmarc=pass",
        " BÜCHER.example; dmarc=pass",
        " bu\u0308cher.example; dmarc=pass",
        " XN--BCHER-KVA.example; dmarc=pass",
        "(" * 200_000 + ")" * 50_000 + " mx.example.org; dmarc=pass",
        "()" * 100_000 + " mx.example.org; dmarc=pass",
    ],
    ids=lambda value: ascii(value)[1:50],
)
def test_a_field_that_a_reader_could_take_for_ours_is_ours(value: str) -> None:
    assert is_ours(value.encode(), OURS)


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        ";",
        " ; dmarc=pass",
        " dmarc=pass",
        " other.example; dmarc=pass",
        " mx.example.org.other.example; dmarc=pass",
        " mx.example.org.other.example (c); dmarc=pass",
        " mx2.example.org; dmarc=pass",
        " mx.example.org2; dmarc=pass",
        " mx.example.organic; dmarc=pass",
        " a.mx.example.org; dmarc=pass",
        " example.org; dmarc=pass",
        " other.example (mx.example.org); dmarc=pass",
        " other.example; spf=pass (mx.example.org: designates) smtp.helo=mx.example.org",
        ' "other.example"; spf=pass reason="mx.example.org; dmarc=pass"',
        " other.example (;) ; mx.example.org; dmarc=pass",
        " other.example 1; dkim=pass header.b==?utf-8?q?x?=",
        " bucher.example; dmarc=pass",
        " xn--.example; xn--\udcff; dmarc=pass",
        " xn--é.example; dmarc=pass",
        " (c) other.example; " + '"()\\' * 1000,
    ],
    ids=lambda value: ascii(value)[1:50],
)
def test_a_field_of_somebody_else_is_not_ours(value: str) -> None:
    assert not is_ours(value.encode("utf-8", "surrogateescape"), OURS)


@pytest.mark.parametrize(
    "unit",
    [
        b"(",
        b"()",
        b'"',
        b"\\",
        b"(\\",
        b'("\\")',
        b" ",
        b".",
        b" .",
        b";",
        b"=?",
        b"\0",
        "\u0301\u0316".encode(),
        b"\xff",
        b"=",
    ],
)
def test_time_is_linear_in_the_octets_of_a_field(unit: bytes) -> None:
    value = unit * (200_000 // len(unit)) + b" mx.example.org; spf=pass"
    begun = time.process_time()
    is_ours(value, OURS)
    parse(value)
    parse(b"mx.example.org; spf=pass" + value)
    # 0.05 s here; what is quadratic takes minutes
    assert time.process_time() - begun < 2


@pytest.mark.parametrize(
    ("name", "is_removed"),
    [
        (b"Authentication-Results", True),
        (b"AUTHENTICATION-results", True),
        (b"Authentication-Results ", True),
        (b"Authentication-Results\r\n\t", True),
        (b"Authentication-Results\x01", True),
        (b"\xa0Authentication-Results", True),
        (b"ARC-Authentication-Results", False),
        (b"X-Authentication-Results", False),
        (b"Authentication-Results-Original", False),
    ],
)
def test_the_name_of_a_forged_field_may_be_odd(name: bytes, is_removed: bool) -> None:
    raw = name + b": mx.example.org; dmarc=pass\r\n"
    octets = b"From: a@client.example\r\nno field\r\n" + raw + b"To: b@example.org\r\n"
    header = parse_header(octets, max_fields=10, wire_bytes=len(octets))
    assert [field.raw for field in forged(header, OURS)] == ([raw] if is_removed else [])
