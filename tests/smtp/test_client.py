"""The sending side without sockets: replies, commands, stuffing, and the dialogues in every order of replies."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.session import BodyType, Envelope, Recipient, Session
from gateway.smtp.address import Domain, Mailbox
from gateway.smtp.client import (
    DATA,
    MAX_REPLY_BYTES,
    MAX_REPLY_LINE,
    RSET,
    After,
    Capabilities,
    DotStuffer,
    DownstreamProtocolError,
    Outcome,
    Refused,
    ReplyReader,
    Send,
    ServerReply,
    StartContent,
    Transfer,
    Verification,
    Verified,
    ehlo_as_client,
    ehlo_command,
    final_outcome,
    helo_command,
    lhlo_command,
    mail_command,
    proxy_v2,
    rcpt_command,
    transaction_commands,
    xclient_command,
    xforward_commands,
)
from gateway.smtp.content import unstuff
from gateway.smtp.reply import DOWNSTREAM_TROUBLE, FINAL_REPLY_LOST, PARTIAL_REFUSAL, Reply

MAIL = b"MAIL FROM:<a@example.org>\r\n"
RCPTS = (b"RCPT TO:<x@example.org>\r\n", b"RCPT TO:<y@example.org>\r\n")
EVERYTHING = Capabilities(
    pipelining=True, eightbitmime=True, smtputf8=True, dsn=True, starttls=True, size=1000
)


def mailbox(text: str) -> Mailbox:
    local, _, domain = text.rpartition("@")
    return Mailbox(local, Domain(domain))


def said(text: str) -> ServerReply:
    return ServerReply(int(text[:3]), (text[4:].encode(),))


# --- replies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", range(1, 60))
def test_replies_come_out_however_the_bytes_are_cut(cut: int) -> None:
    wire = b"250-one\r\n250-two\r\n250 three\r\n354 go\r\n421\r\n550\n250 bare LF\n"
    reader = ReplyReader()
    replies = [reply for at in range(0, len(wire), cut) for reply in reader.feed(wire[at : at + cut])]
    assert replies == [
        ServerReply(250, (b"one", b"two", b"three")),
        ServerReply(354, (b"go",)),
        ServerReply(421, (b"",)),
        ServerReply(550, (b"",)),
        ServerReply(250, (b"bare LF",)),
    ]
    assert reader.is_empty


def test_the_same_line_is_another_reply_each_time_and_another_thing_inside_of_one() -> None:
    reader = ReplyReader()
    assert len(reader.feed(b"250 ok\r\n" * 3)) == 3
    assert reader.feed(b"250-a\r\n250 ok\r\n") == [ServerReply(250, (b"a", b"ok"))]


@pytest.mark.parametrize("wire", [b"2", b"250", b"250-a\r\n", b"250-a\r\n250"])
def test_an_open_reply_is_not_empty(wire: bytes) -> None:
    reader = ReplyReader()
    assert reader.feed(wire) == []
    assert not reader.is_empty


@pytest.mark.parametrize(
    "wire",
    [
        b"\r\n",
        b"\n",
        b"hello\r\n",
        b"25\r\n",
        b"2500\r\n",
        b"250+a\r\n",
        b"099 a\r\n",
        b"600 a\r\n",
        b"2\xb20 a\r\n",
        b" 250 a\r\n",
        b"250-a\r\n251 b\r\n",
        b"250-a\r\n\r\n",
        b"250 " + b"x" * MAX_REPLY_LINE + b"\r\n",
        b"250-" + b"x" * MAX_REPLY_LINE + b"\r\n",
        b"x" * (MAX_REPLY_LINE + 1),
        (b"250-" + b"x" * 1000 + b"\r\n") * (MAX_REPLY_BYTES // 1000 + 1),
    ],
)
def test_what_is_no_reply_is_the_typed_error(wire: bytes) -> None:
    with pytest.raises(DownstreamProtocolError):
        ReplyReader().feed(wire)


def test_replies_before_the_error_are_not_lost() -> None:
    with pytest.raises(DownstreamProtocolError) as caught:
        ReplyReader().feed(b"250 Stored\r\n354-go\r\nwhat\r\n")
    assert caught.value.replies == (ServerReply(250, (b"Stored",)),)


def test_a_reader_parses_more_lines_than_it_remembers() -> None:
    reader = ReplyReader()
    for _ in range(2):
        for number in range(50):
            assert reader.feed(b"250 %d\r\n" % number) == [ServerReply(250, (b"%d" % number,))]


def test_the_longest_line_and_a_long_reply_pass() -> None:
    line = b"250 " + b"x" * (MAX_REPLY_LINE - 6) + b"\r\n"
    assert len(ReplyReader().feed(line)) == 1
    assert len(ReplyReader().feed(b"250-" + line[4:]) + ReplyReader().feed(line)) == 1


@given(st.lists(st.binary(max_size=40)))
@example([b"250 ok\r\n"])
def test_any_bytes_are_replies_or_the_typed_error(chunks: list[bytes]) -> None:
    reader = ReplyReader()
    try:
        for chunk in chunks:
            for reply in reader.feed(chunk):
                assert 100 <= reply.code <= 599
                assert all(b"\n" not in line for line in reply.lines)
    except DownstreamProtocolError:
        pass


# What a downstream may put together in one read, the usual lines much more often than the odd ones
READ = st.lists(
    st.sampled_from(
        [b"250 ok\r\n"] * 6
        + [b"354 go\r\n"] * 4
        + [b"251 x\n", b"250-a\r\n", b"354\r\n", b"250\r\n", b"550 no\r\n", b"2", b"250 a\rb\r\n", b"\r\n"]
        + [b"250 " + b"x" * 5000 + b"\r\n"]
    ),
    max_size=5,
).map(b"".join)


@given(st.sampled_from([b"", b"", b"2", b"250-a\r\n"]), READ, st.integers(3, 5))
@example(b"", b"250 a\r\n250 b\r\n354 c\r\n", 3)
@example(b"250-a\r\n", b"250 a\r\n250 b\r\n354 c\r\n", 3)
def test_a_go_ahead_is_what_the_whole_dialogue_takes_for_one(
    before: bytes, data: bytes, replies: int
) -> None:
    reader = ReplyReader()
    reader.feed(before)

    if reader.is_go_ahead(data, replies):
        assert not before
        said_at_once = ReplyReader().feed(data)
        assert len(said_at_once) == replies
        transfer = Transfer(b"MAIL\r\n", [b"RCPT\r\n"] * (replies - 2), pipelining=True)
        transfer.begin()
        assert transfer.advance(said_at_once) is StartContent.NOW


def test_the_usual_replies_are_a_go_ahead() -> None:
    assert ReplyReader().is_go_ahead(b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n354 go ahead\r\n", 3)
    assert not ReplyReader().is_go_ahead(b"250 2.1.0 Ok\r\n550 5.1.1 No\r\n354 go ahead\r\n", 3)
    assert not ReplyReader().is_go_ahead(b"250 2.1.0 Ok\r\n250 2.1.5 Ok\r\n250 go ahead\r\n", 3)


@given(st.lists(st.sampled_from(["a", "b.c", '"d e"']), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_the_commands_of_a_group_are_those_of_the_dialogue(
    locals_: list[str], eight_bit: bool, dsn: bool
) -> None:
    rcpts = tuple(
        Recipient(Mailbox(local, Domain("example.org")), "NEVER" if dsn else "") for local in locals_
    )
    envelope = Envelope(None, rcpts, BodyType.EIGHT_BIT if eight_bit else BodyType.SEVEN_BIT)
    offered = Capabilities(pipelining=True, eightbitmime=True, dsn=dsn, size=0)
    first = Transfer(
        mail_command(envelope, offered, 7), [rcpt_command(rcpt, offered) for rcpt in rcpts], pipelining=True
    ).begin()

    assert isinstance(first, Send)
    assert transaction_commands(envelope, offered, 7) == first.data


def test_lines_of_a_reply_become_one_line_with_one_enhanced_code() -> None:
    reply = ServerReply(550, (b"5.1.1 No such", b"5.1.1 user \xe9\r\x00 here", b"see 5.1.1 above"))
    assert str(reply.for_client()) == "550 5.1.1 No such user   here see 5.1.1 above"


def test_lines_without_enhanced_code_keep_their_words() -> None:
    assert str(ServerReply(550, (b"No user", b"No way")).for_client()) == "550 5.0.0 No user No way"


def test_421_of_the_downstream_does_not_close_the_client() -> None:
    assert str(said("421 4.3.2 Shutting down").for_client()) == "451 4.3.2 Shutting down"


@given(st.sampled_from([250, 251, 299, 421, 450, 500, 599]), st.lists(st.binary(max_size=600), min_size=1))
def test_whatever_a_downstream_says_is_one_printable_line(code: int, lines: list[bytes]) -> None:
    reply = ServerReply(code, tuple(lines)).for_client()
    assert reply.code // 100 == code // 100
    assert len(reply.wire) <= 512
    assert reply.wire[:-2].decode("ascii").isprintable()


# --- EHLO ----------------------------------------------------------------------------------------------


def test_capabilities_are_read_in_any_case() -> None:
    lines = (b"mx.example.org", b"pipelining", b"8BITMIME", b"SmtpUtf8", b"DSN ", b"STARTTLS", b"SIZE  1000")
    assert Capabilities.parse(ServerReply(250, lines)) == EVERYTHING


def test_what_may_be_passed_on_is_read_as_postfix_says_it() -> None:
    lines = (b"mx", b"XCLIENT NAME ADDR proto", b"XFORWARD", b"limits MAILMAX=3 rcptmax=50 RCPTDOMAINMAX=1")
    offered = Capabilities.parse(ServerReply(250, lines))
    assert offered == Capabilities(max_recipients=50, xclient=frozenset(("NAME", "ADDR", "PROTO")))


@pytest.mark.parametrize(
    ("line", "count"),
    [
        (b"LIMITS RCPTMAX=1", 1),
        (b"LIMITS RCPTMAX=999999", 999999),
        (b"LIMITS RCPTMAX=9 RCPTMAX=7", 7),
        (b"LIMITS RCPTMAX=0", 0),
        (b"LIMITS RCPTMAX=07", 0),
        (b"LIMITS RCPTMAX=1000000", 0),
        (b"LIMITS RCPTMAX=\xb2", 0),
        (b"LIMITS RCPTMAX=5x", 0),
        (b"LIMITS RCPTMAX", 0),
        (b"LIMITS", 0),
        (b"X RCPTMAX=5", 0),
    ],
)
def test_rcptmax_is_a_number_or_no_limit(line: bytes, count: int) -> None:
    assert Capabilities.parse(ServerReply(250, (b"mx", line))).max_recipients == count


def test_the_greeting_offers_nothing() -> None:
    assert Capabilities.parse(ServerReply(250, (b"PIPELINING",))) == Capabilities()


@pytest.mark.parametrize(
    ("line", "size"),
    [
        (b"SIZE", 0),
        (b"SIZE 0", 0),
        (b"SIZE 5", 5),
        (b"SIZE -5", 0),
        (b"SIZE x", 0),
        (b"SIZE \xb2", 0),
        (b"SIZE " + b"9" * 21, 0),
        (b"SIZES 5", None),
        (b"", None),
    ],
)
def test_size_is_a_number_or_no_limit(line: bytes, size: int | None) -> None:
    assert Capabilities.parse(ServerReply(250, (b"mx", line))).size == size


@given(st.lists(st.binary(max_size=50), min_size=1))
def test_any_ehlo_reply_can_be_read(lines: list[bytes]) -> None:
    Capabilities.parse(ServerReply(250, tuple(lines)))


# --- who the client is ---------------------------------------------------------------------------------

XCLIENT = frozenset(
    ("NAME", "ADDR", "PROTO", "HELO", "REVERSE_NAME", "PORT", "LOGIN", "DESTADDR", "DESTPORT")
)
XFORWARD = frozenset(("NAME", "ADDR", "PROTO", "HELO", "PORT", "IDENT", "SOURCE"))
CLIENT = Session("s1", IPv4Address("192.0.2.7"), 40000, "mail.example.org", esmtp=True)


def test_xclient_says_what_is_known() -> None:
    assert xclient_command(CLIENT, XCLIENT) == (
        b"XCLIENT NAME=[UNAVAILABLE] ADDR=192.0.2.7 PORT=40000 PROTO=ESMTP HELO=mail.example.org"
        b" REVERSE_NAME=[UNAVAILABLE]\r\n"
    )


def test_xclient_of_a_client_before_helo_on_ipv6() -> None:
    client = Session("s1", IPv6Address("2001:db8::7"), 25)
    assert xclient_command(client, frozenset(("ADDR", "HELO", "PROTO"))) == (
        b"XCLIENT ADDR=IPV6:2001:db8::7 PROTO=SMTP HELO=[UNAVAILABLE]\r\n"
    )


def test_xclient_says_who_has_authenticated() -> None:
    command = xclient_command(replace(CLIENT, user="ann+a=b c@example.org"), XCLIENT)
    assert b" LOGIN=ann+2Ba+3Db+20c@example.org" in command


@pytest.mark.parametrize(
    ("user", "offered"),
    [("ann", XCLIENT - {"LOGIN"}), ("j\u00fcrgen", XCLIENT), ("a\nb", XCLIENT), ("x" * 256, XCLIENT)],
)
def test_nobody_else_is_named_where_the_user_cannot_be(user: str, offered: frozenset[str]) -> None:
    with pytest.raises(ValueError, match="LOGIN"):
        xclient_command(replace(CLIENT, user=user), offered)


@pytest.mark.parametrize("offered", [frozenset[str](), XCLIENT - {"ADDR"}])
def test_xclient_without_the_address_is_no_use(offered: frozenset[str]) -> None:
    with pytest.raises(ValueError, match="ADDR"):
        xclient_command(CLIENT, offered)


def test_xforward_fits_in_one_line_for_most() -> None:
    (line,) = xforward_commands(CLIENT, "tx1", XFORWARD)
    assert line == (
        b"XFORWARD NAME=[UNAVAILABLE] ADDR=192.0.2.7 PORT=40000 PROTO=ESMTP HELO=mail.example.org"
        b" IDENT=tx1 SOURCE=REMOTE\r\n"
    )


def test_xforward_is_cut_into_lines_and_left_out() -> None:
    client = Session("s1", IPv4Address("192.0.2.7"), 1, "h" * 255)
    lines = xforward_commands(client, "t" * 255, XFORWARD)
    assert [line.split()[1][:4] for line in lines] == [b"NAME", b"IDEN"]
    assert b" HELO=" + b"h" * 255 + b"\r\n" in lines[0]
    assert lines[1].endswith(b" SOURCE=REMOTE\r\n")
    assert xforward_commands(client, "tx1", frozenset(("SOURCE", "OTHER"))) == (
        b"XFORWARD SOURCE=REMOTE\r\n",
    )
    assert xforward_commands(client, "tx1", frozenset()) == ()


@pytest.mark.parametrize(
    ("helo", "value"),
    [
        ("[192.0.2.7]", b"[192.0.2.7]"),
        ("a+b=c", b"a+2Bb+3Dc"),
        ("a ADDR=127.0.0.1", b"a?ADDR+3D127.0.0.1"),
        ("a\r\nMAIL", b"a??MAIL"),
        ('<a@b>(c);"\\', b"?a?b??c????"),
        ("b\xfccher\x00\x7f", b"b?cher??"),
        ("h" * 255, b"h" * 255),
        ("h" * 256, b"[UNAVAILABLE]"),
        ("+" * 86, b"[UNAVAILABLE]"),
    ],
)
def test_a_helo_is_a_name_or_unknown(helo: str, value: bytes) -> None:
    client = Session("s1", IPv4Address("192.0.2.7"), 1, helo)
    assert xclient_command(client, frozenset(("ADDR", "HELO"))) == (
        b"XCLIENT ADDR=192.0.2.7 HELO=" + value + b"\r\n"
    )


def test_ehlo_behind_xclient_is_the_clients() -> None:
    assert ehlo_as_client(CLIENT, "mx.example.org") == b"EHLO mail.example.org\r\n"
    nameless = Session("s1", IPv4Address("192.0.2.7"), 1)
    assert ehlo_as_client(nameless, "mx.example.org") == b"EHLO mx.example.org\r\n"
    odd = Session("s1", IPv4Address("192.0.2.7"), 1, "a b\r\nMAIL <")
    assert ehlo_as_client(odd, "mx.example.org") == b"EHLO a?b??MAIL??\r\n"
    endless = Session("s1", IPv4Address("192.0.2.7"), 1, "a" * 256)
    assert ehlo_as_client(endless, "mx.example.org") == b"EHLO mx.example.org\r\n"


ATTRIBUTE = rb"[A-Z_]+=[!-*,-<>-~+]{1,255}"


@given(st.text(), st.text(max_size=300), st.ip_addresses(), st.integers(0, 65535), st.booleans())
@example("+" * 85, "t", ip_address("2001:db8:1111:2222:3333:4444:5555:6666"), 65535, True)
@example("h" * 255, "=" * 85, ip_address("2001:db8:1111:2222:3333:4444:5555:6666"), 65535, True)
def test_no_helo_breaks_a_line_or_makes_it_too_long(
    helo: str, tx_id: str, client: IPv4Address | IPv6Address, port: int, esmtp: bool
) -> None:
    session = Session("s1", client, port, helo, esmtp)
    for verb, lines in (
        (b"XCLIENT", (xclient_command(session, XCLIENT),)),
        (b"XFORWARD", xforward_commands(session, tx_id, XFORWARD)),
    ):
        attributes = []
        for line in lines:
            assert len(line) <= 512
            assert line.endswith(b"\r\n")
            first, *rest = line[:-2].split(b" ")
            assert first == verb
            attributes += rest
        assert all(re.fullmatch(ATTRIBUTE, each) for each in attributes)
        names = [each.partition(b"=")[0].decode() for each in attributes]
        assert len(names) == len(set(names))
        assert set(names) == (
            XFORWARD if verb == b"XFORWARD" else XCLIENT - {"LOGIN", "DESTADDR", "DESTPORT"}
        )
    assert re.fullmatch(rb"EHLO [!-~]{1,255}\r\n", ehlo_as_client(session, "mx.example.org"))


SIGNATURE = bytes.fromhex("0D0A0D0A000D0A515549540A")


def test_proxy_header_for_ipv4() -> None:
    header = proxy_v2((IPv4Address("192.0.2.7"), 40000), (IPv4Address("192.0.2.1"), 25))
    assert header == SIGNATURE + bytes.fromhex("21 11 000C C0000207 C0000201 9C40 0019")


def test_proxy_header_for_ipv6() -> None:
    header = proxy_v2((IPv6Address("2001:db8::7"), 40000), (IPv6Address("2001:db8::1"), 25))
    assert header == SIGNATURE + bytes.fromhex(
        "21 21 0024 20010db8000000000000000000000007 20010db8000000000000000000000001 9C40 0019"
    )


def test_proxy_header_for_our_own_connection_is_local() -> None:
    assert proxy_v2(None, (IPv4Address("192.0.2.1"), 25)) == SIGNATURE + bytes.fromhex("20 00 0000")


ENDPOINT = st.tuples(st.ip_addresses(), st.integers(0, 65535))


@given(ENDPOINT, ENDPOINT)
@example((ip_address("192.0.2.7"), 1), (ip_address("2001:db8::1"), 2))
@example((ip_address("2001:db8::7"), 1), (ip_address("192.0.2.1"), 2))
def test_a_proxy_header_reads_back(
    source: tuple[IPv4Address | IPv6Address, int], destination: tuple[IPv4Address | IPv6Address, int]
) -> None:
    header = proxy_v2(source, destination)
    signature, command, family, length = struct.unpack("!12sBBH", header[:16])
    assert (signature, command, len(header)) == (SIGNATURE, 0x21, 16 + length)
    size = {0x11: 4, 0x21: 16}[family]
    ends = []
    for at, (address, port) in enumerate((source, destination)):
        packed = header[16 + at * size :][:size]
        if size == 16 and address.version == 4:
            assert IPv6Address(packed).ipv4_mapped == address
        else:
            assert packed == address.packed
        ends.append(port)
    assert struct.unpack("!HH", header[-4:]) == tuple(ends)
    assert (size == 4) == (source[0].version == destination[0].version == 4)


# --- commands ------------------------------------------------------------------------------------------

FULL = Envelope(
    mailbox("a@example.org"),
    (Recipient(mailbox("b@example.org"), "SUCCESS,DELAY", "rfc822;b@example.org"),),
    BodyType.EIGHT_BIT,
    smtputf8=True,
    size_hint=9,
    dsn_ret="HDRS",
    dsn_envid="QQ1",
)


def test_mail_has_what_was_offered() -> None:
    assert mail_command(FULL, EVERYTHING, 77) == (
        b"MAIL FROM:<a@example.org> SIZE=77 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=QQ1\r\n"
    )
    assert rcpt_command(FULL.rcpts[0], EVERYTHING) == (
        b"RCPT TO:<b@example.org> NOTIFY=SUCCESS,DELAY ORCPT=rfc822;b@example.org\r\n"
    )


def test_nothing_is_said_that_was_not_offered() -> None:
    assert mail_command(FULL, Capabilities(), 77) == b"MAIL FROM:<a@example.org>\r\n"
    assert rcpt_command(FULL.rcpts[0], Capabilities()) == b"RCPT TO:<b@example.org>\r\n"


def test_nothing_is_said_that_was_not_asked_for() -> None:
    plain = Envelope(None, (Recipient(mailbox("b@example.org")),))
    assert mail_command(plain, EVERYTHING, 0) == b"MAIL FROM:<>\r\n"
    assert rcpt_command(plain.rcpts[0], EVERYTHING) == b"RCPT TO:<b@example.org>\r\n"


def test_size_is_told_also_where_no_limit_was_announced() -> None:
    assert mail_command(Envelope(None), Capabilities(size=0), 5) == b"MAIL FROM:<> SIZE=5\r\n"


def test_utf8_addresses_go_out_as_utf8() -> None:
    envelope = Envelope(mailbox("jürgen@example.org"), smtputf8=True)
    assert mail_command(envelope, EVERYTHING, 0) == "MAIL FROM:<jürgen@example.org> SMTPUTF8\r\n".encode()


def test_hello_commands() -> None:
    assert ehlo_command("mx.example.org") == b"EHLO mx.example.org\r\n"
    assert helo_command("mx.example.org") == b"HELO mx.example.org\r\n"
    assert lhlo_command("mx.example.org") == b"LHLO mx.example.org\r\n"


class Evil:
    """A mailbox that no parser made."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __str__(self) -> str:
        return self.text


@given(st.text(max_size=8).flatmap(lambda text: st.sampled_from("\r\n\0").map(lambda bad: text + bad + text)))
def test_no_command_can_be_built_with_cr_lf_or_nul(text: str) -> None:
    evil: Mailbox = Evil(text)  # type: ignore[assignment]  # that is the test
    builders: list[Callable[[], bytes]] = [
        lambda: mail_command(Envelope(evil), EVERYTHING, 0),
        lambda: rcpt_command(Recipient(evil), EVERYTHING),
        lambda: mail_command(Envelope(None, dsn_envid=text), EVERYTHING, 0),
        lambda: mail_command(Envelope(None, dsn_ret=text), EVERYTHING, 0),
        lambda: rcpt_command(Recipient(mailbox("b@example.org"), notify=text), EVERYTHING),
        lambda: rcpt_command(Recipient(mailbox("b@example.org"), orcpt=text), EVERYTHING),
        lambda: ehlo_command(text),
        lambda: helo_command(text),
        lambda: lhlo_command(text),
        lambda: transaction_commands(Envelope(None, (Recipient(evil),)), EVERYTHING, 0),
    ]
    for build in builders:
        with pytest.raises(ValueError, match=r"CR, LF or NUL|cannot be written"):
            build()


def test_no_parameter_can_bring_another_one() -> None:
    with pytest.raises(ValueError, match="cannot be written"):
        mail_command(Envelope(None, dsn_envid="x BODY=BINARYMIME"), EVERYTHING, 0)


# --- content -------------------------------------------------------------------------------------------

DOTTY = st.lists(st.sampled_from([b".", b"\r", b"\n", b"\r\n", b"\r\n.", b"x"]), max_size=12).map(b"".join)


@given(st.lists(DOTTY))
@example([b"\r\n", b"."])
@example([b"\r", b"\n.", b"\r\n."])
@example([b"\r", b"\n", b"."])
def test_stuffed_content_unstuffs_to_the_same_wherever_blocks_are_cut(blocks: list[bytes]) -> None:
    stuffed = b"".join(DotStuffer().stuff_all(blocks))
    assert unstuff(stuffed) == b"".join(blocks)
    assert stuffed == DotStuffer().stuff(b"".join(blocks))
    assert not stuffed.startswith(b".\r\n")
    assert b"\r\n.\r\n" not in stuffed


# --- one transaction -----------------------------------------------------------------------------------


def play(transfer: Transfer, replies: Sequence[str], end: str = "closed") -> Outcome:
    """Drive a transfer with these replies, then the connection fails with `end`."""
    left = [said(text) for text in replies]
    step: Send | StartContent | Outcome = transfer.begin()
    while not isinstance(step, Outcome):
        if step is StartContent.NOW:
            return final_outcome(left[:1])
        assert isinstance(step, Send)
        wanted = step.replies
        got, left = left[:wanted], left[wanted:]
        step = transfer.advance(got) if len(got) == wanted else transfer.interrupted(got, end)
    return step


def both(replies: Sequence[str], end: str = "closed") -> Outcome:
    """The outcome of a pipelined transfer to two recipients."""
    return play(Transfer(MAIL, RCPTS, pipelining=True), replies, end)


def test_pipelined_commands_leave_in_one_write() -> None:
    assert Transfer(MAIL, RCPTS, pipelining=True).begin() == Send(MAIL + b"".join(RCPTS) + DATA, 4)


def test_without_pipelining_each_command_waits_for_its_reply() -> None:
    transfer = Transfer(MAIL, RCPTS, pipelining=False)
    assert transfer.begin() == Send(MAIL, 1)
    assert transfer.advance([said("250 ok")]) == Send(RCPTS[0], 1)
    assert transfer.advance([said("250 ok")]) == Send(RCPTS[1], 1)
    assert transfer.advance([said("250 ok")]) == Send(DATA, 1)
    assert transfer.advance([said("354 go")]) is StartContent.NOW
    outcome = final_outcome([said("250 2.0.0 Stored")])
    assert outcome == Outcome(Reply(250, "2.0.0", "Stored"), stored=True, after=After.REUSE)


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    ("replies", "reply", "error", "after"),
    [
        # MAIL
        ("550 5.7.1 No|503 -|503 -|503 -", "550 5.7.1 No", "refused", After.RESET),
        ("451 4.7.1 Later|503 -|503 -|503 -", "451 4.7.1 Later", "refused", After.RESET),
        # every recipient
        ("250 ok|550 5.1.1 A|550 5.7.1 B|554 -", "550 5.1.1 A", "refused", After.RESET),
        ("250 ok|450 4.2.1 A|452 4.5.3 B|554 -", "450 4.2.1 A", "refused", After.RESET),
        ("250 ok|550 5.1.1 A|450 4.2.1 B|554 -", "450 4.2.1 B", "refused", After.RESET),
        # some recipients
        ("250 ok|250 ok|550 5.1.1 B|554 -", str(PARTIAL_REFUSAL), "partial", After.RESET),
        ("250 ok|450 4.2.1 A|250 ok|554 -", str(PARTIAL_REFUSAL), "partial", After.RESET),
        # DATA
        ("250 ok|250 ok|250 ok|554 5.3.0 No", "554 5.3.0 No", "refused", After.RESET),
        ("250 ok|250 ok|250 ok|451 4.3.0 No", "451 4.3.0 No", "refused", After.RESET),
        ("250 ok|250 ok|250 ok|250 What", str(DOWNSTREAM_TROUBLE), "protocol", After.CLOSE),
        ("250 ok|250 ok|250 ok|334 What", str(DOWNSTREAM_TROUBLE), "protocol", After.CLOSE),
        ("250 ok|250 ok|250 ok|150 What", str(DOWNSTREAM_TROUBLE), "protocol", After.CLOSE),
        # nonsense earlier
        ("354 go|250 ok|250 ok|354 go", str(DOWNSTREAM_TROUBLE), "protocol", After.CLOSE),
        ("250 ok|354 go|250 ok|354 go", str(DOWNSTREAM_TROUBLE), "protocol", After.CLOSE),
        ("250 ok|250 ok|150 go|354 go", str(DOWNSTREAM_TROUBLE), "protocol", After.CLOSE),
        # the dot
        ("250 ok|250 ok|250 ok|354 go|554 5.7.1 Spam", "554 5.7.1 Spam", "refused", After.REUSE),
        ("250 ok|250 ok|250 ok|354 go|451 4.3.0 Later", "451 4.3.0 Later", "refused", After.REUSE),
        ("250 ok|250 ok|250 ok|354 go|421 4.3.2 Bye", "451 4.3.2 Bye", "refused", After.CLOSE),
        ("250 ok|250 ok|250 ok|354 go|354 more", str(FINAL_REPLY_LOST), "final_lost", After.CLOSE),
        ("250 ok|250 ok|250 ok|354 go|199 hm", str(FINAL_REPLY_LOST), "final_lost", After.CLOSE),
        ("250 ok|250 ok|250 ok|354 go", str(FINAL_REPLY_LOST), "final_lost", After.CLOSE),
        # silence
        ("", str(DOWNSTREAM_TROUBLE), "closed", After.CLOSE),
        ("250 ok", str(DOWNSTREAM_TROUBLE), "closed", After.CLOSE),
        ("250 ok|550 5.1.1 A", str(DOWNSTREAM_TROUBLE), "closed", After.CLOSE),
        ("250 ok|250 ok|250 ok", str(DOWNSTREAM_TROUBLE), "closed", After.CLOSE),
    ],
)
def test_each_reply_becomes_its_class(
    pipelining: bool, replies: str, reply: str, error: str, after: After
) -> None:
    outcome = play(Transfer(MAIL, RCPTS, pipelining=pipelining), replies.split("|") if replies else ())
    assert (str(outcome.reply), outcome.stored, outcome.error, outcome.after) == (reply, False, error, after)


@pytest.mark.parametrize("refusal", ["550 5.1.1 A", "450 4.2.1 A"])
def test_354_for_a_refused_transaction_ends_the_connection_without_a_dot(refusal: str) -> None:
    assert both(["250 ok", refusal, refusal, "354 go"]).after is After.CLOSE
    assert both(["250 ok", refusal, "250 ok", "354 go"]).after is After.CLOSE
    assert both([refusal, "503 -", "503 -", "354 go"]).after is After.CLOSE


def test_refused_recipients_are_named() -> None:
    outcome = both(["250 ok", "250 ok", "550 5.1.1 Gone", "354 go"])
    assert [(each.position, str(each.reply)) for each in outcome.refused] == [(1, "550 5.1.1 Gone")]


@pytest.mark.parametrize(
    ("replies", "reply"),
    [
        (["550 5.7.1 No"], "550 5.7.1 No"),
        (["250 ok", "550 5.1.1 A", "550 5.1.1 B"], "550 5.1.1 A"),
        (["250 ok", "250 ok", "550 5.1.1 B"], str(PARTIAL_REFUSAL)),
    ],
)
def test_a_refusal_stands_also_when_the_downstream_goes_away_after_it(replies: list[str], reply: str) -> None:
    outcome = both(replies)
    assert (str(outcome.reply), outcome.after, outcome.is_used_up) == (reply, After.CLOSE, False)


@pytest.mark.parametrize(
    "replies",
    [
        [],
        ["421 4.4.2 Idle"],
        ["421 4.4.2 Idle", "421 -", "421 -", "421 -"],
        ["250 ok", "421 4.7.0 Enough"],
        ["250 ok", "250 ok", "250 ok", "421 4.7.0 Enough"],
        ["250 ok", "250 ok", "550 5.1.1 B", "421 4.7.0 Enough"],
    ],
)
def test_a_connection_that_ends_before_content_is_used_up(replies: list[str]) -> None:
    outcome = both(replies)
    assert outcome.is_used_up
    assert outcome.reply.is_transient
    assert outcome.after is After.CLOSE


@pytest.mark.parametrize(
    ("replies", "end"),
    [
        ([], "timeout"),
        ([], "protocol"),
        (["250 ok"], "closed"),
        (["550 5.7.1 No", "421 -", "421 -", "421 -"], "closed"),
        (["250 ok", "250 ok", "250 ok", "354 go"], "closed"),
        (["250 ok", "250 ok", "250 ok", "354 go", "421 4.3.2 Bye"], "closed"),
    ],
)
def test_nothing_else_is_used_up(replies: list[str], end: str) -> None:
    assert not both(replies, end).is_used_up


@pytest.mark.parametrize(
    ("early", "reply", "error"),
    [
        ([], str(DOWNSTREAM_TROUBLE), "closed"),
        (["552 5.3.4 Too big"], "552 5.3.4 Too big", "refused"),
        (["421 4.3.2 Bye"], "451 4.3.2 Bye", "refused"),
        (["250 ok"], str(DOWNSTREAM_TROUBLE), "closed"),
    ],
)
def test_before_the_dot_only_a_refusal_counts(early: list[str], reply: str, error: str) -> None:
    transfer = Transfer(MAIL, RCPTS, pipelining=True)
    transfer.begin()
    assert transfer.advance([said("250 ok")] * 3 + [said("354 go")]) is StartContent.NOW
    outcome = transfer.interrupted([said(text) for text in early], "closed")
    assert (str(outcome.reply), outcome.error) == (reply, error)
    assert (outcome.stored, outcome.after, outcome.is_used_up) == (False, After.CLOSE, False)


def test_a_2yz_reply_before_the_dot_stores_nothing() -> None:
    transfer = Transfer(MAIL, RCPTS, pipelining=True)
    transfer.begin()
    transfer.advance([said("250 ok")] * 3 + [said("354 go")])
    assert not transfer.interrupted([said("250 2.0.0 Stored")], "protocol").stored


CODES = st.sampled_from([199, 250, 251, 299, 334, 354, 421, 450, 503, 550, 599])
WIRE = st.lists(
    st.one_of(
        CODES.map(lambda code: b"%d 2.0.0 text\r\n" % code),
        st.sampled_from([b"250 ok\r\n", b"354 go\r\n"]),
        st.binary(max_size=10),
    ),
    max_size=8,
).map(b"".join)


@given(WIRE, st.data(), st.integers(1, 3), st.booleans(), st.integers(0, 2))
@example(b"250 ok\r\n" * 2 + b"354 go\r\n" + b"250 ok\r\n", None, 1, True, 0)
@example(b"501 no\r\n" + b"250 ok\r\n" * 2 + b"354 go\r\n" + b"250 ok\r\n", None, 1, True, 1)
def test_whatever_the_downstream_says_there_is_an_outcome_or_the_typed_error(
    wire: bytes, data: st.DataObject | None, rcpts: int, pipelining: bool, before: int
) -> None:
    """Any bytes in any split; stored only for a 2yz reply after the dot."""
    reader = ReplyReader()
    identity = (b"XFORWARD A=1\r\n",) * before
    transfer = Transfer(MAIL, RCPTS[:1] * rcpts, pipelining=pipelining, before=identity)
    known: list[ServerReply] = []
    is_dot_sent = False
    step: Send | StartContent | Outcome = transfer.begin()
    at = 0
    while not isinstance(step, Outcome):
        is_dot_sent = step is StartContent.NOW
        wanted = step.replies if isinstance(step, Send) else 1
        try:
            while len(known) < wanted and at < len(wire):
                size = len(wire) if data is None else data.draw(st.integers(1, len(wire) - at))
                known += reader.feed(wire[at : at + size])
                at += size
            error = "closed"
        except DownstreamProtocolError as exc:
            known += exc.replies
            error = "protocol"
        got, known = known[:wanted], known[wanted:]
        if is_dot_sent:
            step = final_outcome(got)
        else:
            step = transfer.advance(got) if len(got) == wanted else transfer.interrupted(got, error)
        if isinstance(step, Outcome) and step.stored:
            assert is_dot_sent
            assert got[0].is_ok
            assert step.reply.code == got[0].code
        if isinstance(step, Outcome) and step.reply.is_permanent:
            assert got
            assert step.error == "refused"
    assert isinstance(step, Outcome)
    assert step.reply.is_positive == step.stored
    assert step.stored == (not step.error)
    assert not (is_dot_sent and step.is_used_up)


# --- commands in front of MAIL -------------------------------------------------------------------------

BEFORE = (b"XFORWARD A=1\r\n", b"XFORWARD B=2\r\n")


def test_commands_in_front_belong_to_the_group() -> None:
    transfer = Transfer(MAIL, RCPTS, pipelining=True, before=BEFORE)
    assert transfer.begin() == Send(b"".join(BEFORE) + MAIL + b"".join(RCPTS) + DATA, 6)
    verification = Verification(MAIL, RCPTS, pipelining=True, before=BEFORE)
    assert verification.begin() == Send(b"".join(BEFORE) + MAIL + b"".join(RCPTS) + RSET, 6)
    one_by_one = Transfer(MAIL, RCPTS, pipelining=False, before=BEFORE)
    assert one_by_one.begin() == Send(BEFORE[0], 1)
    assert one_by_one.advance([said("250 ok")]) == Send(BEFORE[1], 1)
    assert one_by_one.advance([said("501 what")]) == Send(MAIL, 1)


def test_the_group_of_an_envelope_has_them_too() -> None:
    group = transaction_commands(FULL, EVERYTHING, 7)
    assert transaction_commands(FULL, EVERYTHING, 7, b"".join(BEFORE)) == b"".join(BEFORE) + group


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("said_before", ["250 ok|250 ok", "550 No|451 Later", "250 ok|501 What"])
def test_a_refused_identity_changes_nothing(said_before: str, pipelining: bool) -> None:
    def play_behind(replies: str) -> Outcome:
        transfer = Transfer(MAIL, RCPTS, pipelining=pipelining, before=BEFORE)
        return play(transfer, [*said_before.split("|"), *replies.split("|")])

    assert play_behind("250 ok|250 ok|250 ok|354 go|250 2.0.0 Stored").stored
    late = play_behind("250 ok|250 ok|550 5.1.1 Gone|554 -")
    assert (late.error, late.after) == ("partial", After.RESET)
    assert late.refused == (Refused(1, Reply(550, "5.1.1", "Gone")),)
    sender = play_behind("550 5.7.1 No|503 -|503 -|503 -")
    assert (str(sender.reply), sender.after) == ("550 5.7.1 No", After.RESET)
    assert play_behind("250 ok|250 ok|250 ok|250 what").error == "protocol"
    verified, written = ask(
        [*said_before.split("|"), "250 -", "250 -", "550 5.1.1 B", "250 -"],
        pipelining=pipelining,
        before=BEFORE,
    )
    assert [reply.code for reply in verified.replies] == [250, 550]
    assert (verified.error, verified.after) == ("", After.REUSE)
    assert written == b"".join(BEFORE) + MAIL + b"".join(RCPTS) + RSET


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    "replies",
    [
        [],
        ["250 ok"],
        ["250 ok", "250 ok"],
        ["421 4.4.2 Idle"],
        ["250 ok", "421 -", "421 -"],
        ["421 -", "250 ok", "250 ok", "250 ok", "250 ok", "354 go"],
    ],
)
def test_what_ends_before_the_reply_to_mail_is_used_up(replies: list[str], pipelining: bool) -> None:
    outcome = play(Transfer(MAIL, RCPTS, pipelining=pipelining, before=BEFORE), replies)
    assert (outcome.is_used_up, outcome.after, outcome.reply.is_transient) == (True, After.CLOSE, True)
    verified, _ = ask(replies, pipelining=pipelining, before=BEFORE)
    assert (verified.is_used_up, verified.after) == (True, After.CLOSE)


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("code", [150, 354])
def test_what_is_no_answer_to_an_identity_is_trouble(code: int, pipelining: bool) -> None:
    replies = [f"{code} what", "250 ok", "550 5.7.1 No", "503 -", "503 -", "503 -"]
    outcome = play(Transfer(MAIL, RCPTS, pipelining=pipelining, before=BEFORE), replies)
    assert (outcome.reply, outcome.error, outcome.is_used_up) == (DOWNSTREAM_TROUBLE, "protocol", False)
    verified, _ = ask(replies, pipelining=pipelining, before=BEFORE)
    assert (verified.replies, verified.after) == ((DOWNSTREAM_TROUBLE,) * 2, After.CLOSE)


# --- too many recipients -------------------------------------------------------------------------------


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    ("first", "second", "count"),
    [
        ("250 ok", "452 4.5.3 Too many", 1),
        ("250 ok", "452 4.5.3", 1),
        ("250 ok", "452 Too many recipients", 1),
        ("250 ok", "452", 1),
        ("250 ok", "452 4.3.1 No space", 0),
        ("250 ok", "452 4.5.30 What", 0),
        ("250 ok", "450 4.5.3 Too many", 0),
        ("250 ok", "552 5.5.3 Too many", 0),
        ("550 5.1.1 No", "452 4.5.3 Too many", 0),
        ("452 4.5.3 Too many", "452 4.5.3 Too many", 0),
        ("452 4.5.3 Too many", "250 ok", 0),
        ("250 ok", "250 ok", 0),
    ],
)
def test_so_many_recipients_were_taken(first: str, second: str, count: int, pipelining: bool) -> None:
    outcome = play(Transfer(MAIL, RCPTS, pipelining=pipelining), ["250 ok", first, second, "554 -"])
    assert outcome.max_recipients == count
    verified, _ = ask(["250 ok", first, second, "250 ok"], pipelining=pipelining)
    assert verified.max_recipients == count


def test_refused_ones_between_are_no_recipients() -> None:
    replies = ["250 -", "250 ok", "550 5.1.1 No", "250 ok", "452 4.5.3 Enough", "250 ok", "554 -"]
    assert play(Transfer(MAIL, RCPTS[:1] * 5, pipelining=True), replies).max_recipients == 2


# --- asking about recipients ---------------------------------------------------------------------------


def ask(
    replies: Sequence[str], end: str = "closed", *, pipelining: bool = True, before: Sequence[bytes] = ()
) -> tuple[Verified, bytes]:
    """What two recipients were told, and all that was written."""
    verification = Verification(MAIL, RCPTS, pipelining=pipelining, before=before)
    left = [said(text) for text in replies]
    step: Send | Verified = verification.begin()
    written = b""
    while isinstance(step, Send):
        written += step.data
        got, left = left[: step.replies], left[step.replies :]
        is_whole = len(got) == step.replies
        step = verification.advance(got) if is_whole else verification.interrupted(got, end)
    return step, written


@pytest.mark.parametrize("pipelining", [True, False])
def test_each_recipient_gets_its_reply(pipelining: bool) -> None:
    verified, written = ask(["250 -", "250 2.1.5 A", "550 5.1.1 B", "250 -"], pipelining=pipelining)
    assert [str(reply) for reply in verified.replies] == ["250 2.1.5 A", "550 5.1.1 B"]
    assert (verified.error, verified.after, verified.refusals) == ("", After.REUSE, 1)
    assert not verified.is_mail_refused
    assert written == MAIL + b"".join(RCPTS) + RSET


@pytest.mark.parametrize("refusal", ["550 5.7.1 No", "451 4.7.1 No"])
def test_a_refused_sender_answers_for_each_recipient(refusal: str) -> None:
    verified, _ = ask([refusal, "503 -", "503 -", "250 -"])
    assert [str(reply) for reply in verified.replies] == [refusal, refusal]
    assert (verified.is_mail_refused, verified.refusals, verified.after) == (True, 3, After.REUSE)


def test_without_pipelining_a_refused_sender_ends_the_dialogue() -> None:
    verified, written = ask(["550 5.7.1 No"], pipelining=False)
    assert [str(reply) for reply in verified.replies] == ["550 5.7.1 No"] * 2
    assert (written, verified.after) == (MAIL, After.REUSE)


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("end", ["closed", "timeout", "protocol"])
def test_recipients_without_a_reply_are_deferred(end: str, pipelining: bool) -> None:
    verified, _ = ask(["250 -", "550 5.1.1 A"], end, pipelining=pipelining)
    assert [str(reply) for reply in verified.replies] == ["550 5.1.1 A", str(DOWNSTREAM_TROUBLE)]
    assert (verified.error, verified.after) == (end, After.CLOSE)


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize(
    "replies", [["354 -"] * 4, ["250 -", "354 -", "250 -", "250 -"], ["199 -", "250 -", "250 -", "250 -"]]
)
def test_what_is_no_answer_is_deferred(replies: list[str], pipelining: bool) -> None:
    verified, _ = ask(replies, pipelining=pipelining)
    assert verified.replies[0] == DOWNSTREAM_TROUBLE
    assert (verified.error, verified.after) == ("protocol", After.CLOSE)


@pytest.mark.parametrize("pipelining", [True, False])
@pytest.mark.parametrize("replies", [[], ["421 -"], ["250 -", "421 -"], ["250 -", "250 -", "421 -"]])
def test_a_verification_may_find_the_connection_used_up(replies: list[str], pipelining: bool) -> None:
    verified, _ = ask(replies, pipelining=pipelining)
    assert verified.is_used_up
    assert verified.after is After.CLOSE
    assert not any(reply.is_permanent for reply in verified.replies)


def test_replies_stand_when_only_rset_goes_wrong() -> None:
    for rset in ("421 -", "500 -", "354 -"):
        verified, _ = ask(["250 -", "250 -", "250 -", rset])
        assert [reply.code for reply in verified.replies] == [250, 250]
        assert (verified.after, verified.is_used_up) == (After.CLOSE, False)
    verified, _ = ask(["250 -", "250 -", "250 -"])
    assert (verified.after, verified.error) == (After.CLOSE, "")


def test_the_same_answer_for_all_without_asking() -> None:
    verified = Verified.all(PARTIAL_REFUSAL, 3)
    assert verified.replies == (PARTIAL_REFUSAL,) * 3
    assert verified.is_mail_refused  # so nothing is remembered of the recipients


@given(st.lists(CODES, max_size=6), st.booleans(), st.sampled_from(["closed", "timeout", "protocol"]))
def test_there_is_always_a_reply_for_each_recipient(codes: list[int], pipelining: bool, end: str) -> None:
    replies = [f"{code} text" for code in codes]
    verified, _ = ask(replies, end, pipelining=pipelining)
    assert len(verified.replies) == len(RCPTS)
    assert all(reply.code // 100 in (2, 4, 5) for reply in verified.replies)
    assert verified.error or DOWNSTREAM_TROUBLE not in verified.replies
