"""One exchange of AUTH: what is credentials, what is refused with which reply, and that nothing else can happen."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.smtp import reply
from gateway.smtp.reply import Reply
from gateway.smtp.sasl import (
    MAX_PASSWORD_BYTES,
    MAX_USER_BYTES,
    Challenge,
    Credentials,
    Exchange,
    Mechanism,
    SaslError,
    prepared,
)

PLAIN, LOGIN = Mechanism.PLAIN, Mechanism.LOGIN


def b64(octets: bytes) -> bytes:
    return base64.b64encode(octets)


def plain(octets: bytes) -> Credentials | Reply:
    """What comes of a PLAIN message in an initial response."""
    try:
        step = Exchange(PLAIN).begin(b64(octets))
    except SaslError as exc:
        return exc.reply
    assert isinstance(step, Credentials)
    return step


def test_plain_in_the_command_and_behind_it() -> None:
    # RFC 4616 4
    said = Credentials(PLAIN, "tim", "tanstaaftanstaaf")
    assert plain(b"\0tim\0tanstaaftanstaaf") == said

    exchange = Exchange(PLAIN)
    assert exchange.begin(None) == Challenge(b"")
    assert Challenge(b"").wire == b"334 \r\n"
    assert exchange.respond(b64(b"\0tim\0tanstaaftanstaaf")) == said


def test_plain_on_behalf_of_another() -> None:
    assert plain(b"Ursel\0Kurt\0xipj3plmq") == Credentials(PLAIN, "Kurt", "xipj3plmq", "Ursel")


@pytest.mark.parametrize("initial", [None, b64(b"tim")])
def test_login(initial: bytes | None) -> None:
    exchange = Exchange(LOGIN)
    step = exchange.begin(initial)
    if initial is None:
        assert isinstance(step, Challenge)
        assert step.wire == b"334 VXNlcm5hbWU6\r\n"
        step = exchange.respond(b64(b"tim"))
    assert isinstance(step, Challenge)
    assert step.wire == b"334 UGFzc3dvcmQ6\r\n"
    assert exchange.respond(b64(b"a=b \xc3\xa4")) == Credentials(LOGIN, "tim", "a=b \u00e4")


@pytest.mark.parametrize(
    "octets",
    [
        b"tim",
        b"tim\0tanstaaf",
        b"\0tim\0a\0b",
        b"\0\0tanstaaf",
        b"\0tim\0",
        b"",
        b"\0tim\0\xff",
        b"\0\xff\0x",
        b"\xff\0tim\0x",
        b"\0tim\0" + b"x" * (MAX_PASSWORD_BYTES + 1),
    ],
)
def test_what_does_not_fit_plain(octets: bytes) -> None:
    assert plain(octets) is reply.AUTH_MALFORMED


def test_an_empty_initial_response_is_written_as_an_equals_sign() -> None:
    with pytest.raises(SaslError) as caught:
        Exchange(PLAIN).begin(b"=")
    assert caught.value.reply is reply.AUTH_MALFORMED


@pytest.mark.parametrize(
    "line",
    [
        b"=",
        b"A",
        b"AA",
        b"AAA",
        b"A===",
        b"AA==AA==",
        b"AAAA=",
        b"AA=A",
        b"AB==",  # bits that mean nothing and are set
        b" AAAA",
        b"AAAA ",
        b"AA\tAA",
        b"AAA-",
        b"AAA_",
        b"**",
        b"QUIT\r",
        b"\xc3\xa4AA",
    ],
)
@pytest.mark.parametrize("mechanism", Mechanism)
def test_base64_is_read_strictly(mechanism: Mechanism, line: bytes) -> None:
    exchange = Exchange(mechanism)
    exchange.begin(None)
    with pytest.raises(SaslError) as caught:
        exchange.respond(line)
    assert caught.value.reply is reply.AUTH_NOT_BASE64


@pytest.mark.parametrize("mechanism", Mechanism)
def test_an_asterisk_cancels(mechanism: Mechanism) -> None:
    exchange = Exchange(mechanism)
    exchange.begin(None)
    with pytest.raises(SaslError) as caught:
        exchange.respond(b"*")
    assert caught.value.reply is reply.AUTH_CANCELLED


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ann@example.org", "ann@example.org"),
        ("Ann", "Ann"),
        ("a b", "a b"),
        # RFC 4013 3
        ("I\u00adX", "IX"),
        ("\u00aa", "a"),
        ("\u2168", "IX"),
        ("a\u00a0b", "a b"),
        ("j\u00fcrgen", "j\u00fcrgen"),
        ("ju\u0308rgen", "j\u00fcrgen"),
        ("\u05d0\u05d1", "\u05d0\u05d1"),
        # prohibited
        ("\u0007", ""),
        ("ann\n", ""),
        ("a\tb", ""),
        ("a\x7f", ""),
        ("\u202eann", ""),
        ("a\ue000", ""),
        ("a\u2028", ""),
        ("\u0627\u0031", ""),  # right-to-left, and not at its end
        ("\u05d0a\u05d1", ""),
        ("x" * (MAX_USER_BYTES + 1), ""),
        ("\ufdfa" * 30, ""),  # one that becomes long
    ],
)
def test_names_are_prepared(text: str, name: str) -> None:
    assert prepared(text) == name


def test_a_name_that_nobody_has_is_refused_like_a_wrong_password() -> None:
    assert plain(b"\0a\nb\0x") == Credentials(PLAIN, "", "x")


@pytest.mark.parametrize("authzid", [b"bo\nb", b"x" * (MAX_USER_BYTES + 1), b"\xc2\xad"])
def test_on_behalf_of_nobody_is_not_for_itself(authzid: bytes) -> None:
    assert plain(authzid + b"\0ann\0x") == Credentials(PLAIN, "", "x")


def test_a_password_is_shown_nowhere() -> None:
    said = plain(b"\0tim\0tanstaaf")
    assert "tanstaaf" not in repr(said)
    assert "tanstaaf" not in str(said)


def test_an_error_holds_nothing_of_what_was_said() -> None:
    for line in (b64(b"\0tim\0tanstaaf\xff"), b"tanstaaf!"):
        with pytest.raises(SaslError) as caught:
            Exchange(PLAIN).begin(line)
        exc: BaseException | None = caught.value
        assert "tanstaaf" not in repr(exc)
        assert caught.value.__suppress_context__ or caught.value.__context__ is None


# --- properties ---------------------------------------------------------------------------------------

_LINES = st.one_of(
    st.binary(max_size=40),
    st.binary(max_size=40).map(b64),
    st.sampled_from([b"*", b"=", b64(b"\0a\0b")]),
)


@given(st.sampled_from(Mechanism), st.one_of(st.none(), _LINES), st.lists(_LINES, min_size=3, max_size=3))
def test_any_exchange_ends_in_credentials_or_a_refusal(
    mechanism: Mechanism, initial: bytes | None, lines: list[bytes]
) -> None:
    exchange = Exchange(mechanism)
    refused = 0
    step: Challenge | Credentials = Challenge(b"")
    try:
        step = exchange.begin(initial)
        for line in lines:
            if isinstance(step, Credentials):
                break
            assert step.wire.endswith(b"\r\n")
            step = exchange.respond(line)
    except SaslError as exc:
        refused = exc.reply.code
    if refused:
        assert refused == 501
    else:
        assert isinstance(step, Credentials)
        assert step.password
        assert not step.user or step.user.isprintable()


@given(st.text(min_size=1, max_size=50), st.text(min_size=1, max_size=50))
def test_credentials_are_what_was_said(user: str, password: str) -> None:
    try:
        said = plain(f"\0{user}\0{password}".encode())
    except UnicodeEncodeError:
        return
    if "\0" in user + password:
        assert said is reply.AUTH_MALFORMED
    else:
        assert said == Credentials(PLAIN, prepared(user), password)


@given(st.text(max_size=60).filter(lambda text: text.isprintable()))
def test_a_prepared_name_stays_as_it_is(text: str) -> None:
    name = prepared(text)
    assert prepared(name) == name
