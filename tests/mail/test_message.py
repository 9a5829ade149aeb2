"""message: fields are raw slices found alike however the content is cut, and edits touch nothing but what they name."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.mail.body import Spool
from gateway.mail.message import (
    MAX_CONTINUATIONS,
    MAX_NAME_BYTES,
    EditedContent,
    Field,
    Header,
    HeaderError,
    HeaderReader,
    Message,
    apply_edits,
    parse_header,
    split_edits,
)
from gateway.smtp.client import DotStuffer
from gateway.smtp.content import stuff, unstuff
from gateway.verdict import AddField, RemoveFields

OURS = AddField("X-Ours", "a\r\n b")
OURS_BYTES = b"X-Ours: a\r\n b\r\n"

# --- content to try: mostly lines that look like a header, with dots, blanks and folds where they hurt --------

NAMES = st.sampled_from([b"From", b"TO", b".X", b"X-Gone", b"x-gone", b"X-GONE ", b"X-Gone\r\n\t", b"A" * 77])
VALUES = st.sampled_from(
    [b"", b" a", b" a@example.org", b".", b" \xff\x00", b":", b" a\r\n b", b"\r\n .", b" a\r\n\t\r\n c"]
)
FIELDS = st.builds(lambda name, value: name + b":" + value + b"\r\n", NAMES, VALUES)
ODD_LINES = st.sampled_from([b"no field\r\n", b".\r\n", b"..\r\n", b": x\r\n", b"From x\r\n"])
HEADERS = st.lists(FIELDS | ODD_LINES, max_size=8).map(b"".join)
BODIES = st.lists(st.sampled_from([b"", b".", b"..", b".a", b"text", b"a: b", b" c"]), max_size=6).map(
    lambda lines: b"".join(line + b"\r\n" for line in lines)
)
# None: no blank line, all is header
CONTENTS = st.tuples(HEADERS, st.none() | BODIES)


def whole(header: bytes, body: bytes | None) -> bytes:
    return header if body is None else header + b"\r\n" + body


def cut(data: bytes, *, at: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in at}), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def read(
    blocks: list[bytes], *, is_stuffed: bool = False, max_bytes: int = 10_000, max_fields: int = 100
) -> Header:
    reader = HeaderReader(is_stuffed=is_stuffed, max_bytes=max_bytes, max_fields=max_fields)
    for block in blocks:
        if reader.feed(block):
            break
    return reader.finish()


def message_of(content: bytes, *, is_stuffed: bool) -> Message:
    """The message that arrives when a client sends this content by DATA or by BDAT."""
    wire = stuff(content) if is_stuffed else content
    body = Spool().new(is_stuffed=is_stuffed)
    body.append(wire)
    return Message(read([wire], is_stuffed=is_stuffed), body)


def sent(content: EditedContent) -> bytes:
    """What the downstream stores."""
    blocks = content.blocks()
    rest = b"".join(blocks if content.is_stuffed else DotStuffer().stuff_all(blocks))
    return unstuff(content.prefix + rest)


# --- reading --------------------------------------------------------------------------------------------


@given(CONTENTS, st.booleans(), st.lists(st.integers(0, 500), max_size=20))
@example((b"", b".\r\n"), True, [])
@example((b"From: a\r\n", b""), True, [8, 9, 10, 11])
def test_header_is_the_same_however_the_content_is_cut(
    content: tuple[bytes, bytes | None], is_stuffed: bool, places: list[int]
) -> None:
    plain = whole(*content)
    wire = stuff(plain) if is_stuffed else plain

    try:
        header = read([wire], is_stuffed=is_stuffed)
    except HeaderError:
        with pytest.raises(HeaderError):
            read(cut(wire, at=places), is_stuffed=is_stuffed)
        return

    for cut_up in (cut(wire, at=places), cut(wire, at=list(range(500)))):
        other = read(cut_up, is_stuffed=is_stuffed)
        assert (other.fields, other.wire_bytes) == (header.fields, header.wire_bytes)


@given(CONTENTS, st.booleans())
def test_fields_joined_are_the_header_unstuffed(
    content: tuple[bytes, bytes | None], is_stuffed: bool
) -> None:
    plain = whole(*content)
    wire = stuff(plain) if is_stuffed else plain

    header = read([wire], is_stuffed=is_stuffed)

    assert b"".join(field.raw for field in header.fields) == content[0]
    assert header.wire_bytes == len(stuff(content[0]) if is_stuffed else content[0])


@given(st.binary(max_size=300) | st.text("a: \t\r\n.", max_size=60).map(str.encode))
def test_any_octets_are_a_header_or_a_header_error(data: bytes) -> None:
    content = data + b"\r\n"  # all content that arrives ends so
    try:
        header = read([content], max_fields=20)
    except HeaderError:
        return
    assert content.startswith(b"".join(field.raw for field in header.fields))
    assert all(field.name == field.name.strip().lower() for field in header.fields)


@pytest.mark.parametrize(
    "line",
    [
        b"From: a\r\n",
        b"FROM:a\r\n",
        b"fRoM :a\r\n",
        b"From\t \t: a\r\n",
        b"From\r\n :a\r\n",
        b"From\r\n \r\n\t: a\r\n",
    ],
)
def test_neither_case_nor_blank_nor_fold_hides_a_name(line: bytes) -> None:
    header = read([b"X: 1\r\n" + line + b"Y: 2\r\n\r\n"])

    assert header.all(b"from") == (Field(b"from", line),)


def test_all_gives_each_field_of_a_name_top_to_bottom() -> None:
    header = read([b"Received: 1\r\nX: y\r\nRECEIVED: 2\r\n\r\n"])

    assert [field.value for field in header.all(b"received")] == [b" 1", b" 2"]
    assert header.all(b"y") == ()


def test_value_is_what_stands_behind_the_first_colon_folds_and_all() -> None:
    (field,) = read([b"Subject: a: b\r\n\tc\r\n\r\n"]).fields

    assert field.value == b" a: b\r\n\tc"


def test_a_line_that_is_no_field_has_no_name_and_no_value() -> None:
    header = read([b"From me\r\n folded\r\nTo: x\r\n\r\n"])

    assert [(field.name, field.value) for field in header.fields] == [(b"", b""), (b"to", b" x")]


def test_content_without_a_blank_line_is_all_header() -> None:
    header = read([b"From: a\r\nTo: b\r\n"])

    assert [field.name for field in header.fields] == [b"from", b"to"]
    assert header.wire_bytes == len(b"From: a\r\nTo: b\r\n")


def test_a_header_without_a_body_ends_with_its_blank_line() -> None:
    assert read([b"From: a\r\n\r\n"]).wire_bytes == len(b"From: a\r\n")


@pytest.mark.parametrize("content", [b"", b"\r\n", b"\r\nbody\r\n", b"\r\n\r\n"])
def test_there_may_be_no_header_at_all(content: bytes) -> None:
    for header in (read([content]), read(cut(content, at=list(range(9))))):
        assert (header.fields, header.wire_bytes) == ((), 0)


def test_stuffed_header_lines_are_unstuffed() -> None:
    header = read([b"..X: 1\r\n..\r\nY: 2\r\n .3\r\n\r\n..body\r\n"], is_stuffed=True)

    assert [field.raw for field in header.fields] == [b".X: 1\r\n", b".\r\n", b"Y: 2\r\n .3\r\n"]
    assert header.wire_bytes == len(b"..X: 1\r\n..\r\nY: 2\r\n .3\r\n")


# --- limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank_line", [b"\r\n", b"\r\nbody\r\n", b""], ids=["blank", "body", "none"])
@pytest.mark.parametrize("octet_by_octet", [True, False])
def test_header_may_be_as_large_as_the_limit_and_no_larger(blank_line: bytes, octet_by_octet: bool) -> None:
    content = b"X: 34567\r\n" + blank_line
    blocks = cut(content, at=list(range(99))) if octet_by_octet else [content]
    assert read(blocks, max_bytes=10).wire_bytes == 10

    with pytest.raises(HeaderError, match="too large"):
        read(blocks, max_bytes=9)


def test_a_header_without_end_is_refused_while_it_arrives() -> None:
    reader = HeaderReader(is_stuffed=True, max_bytes=1000, max_fields=10)
    assert not any(reader.feed(b"x") for _ in range(1001))
    with pytest.raises(HeaderError, match="too large"):
        reader.feed(b"x")


def test_as_many_fields_as_the_limit_and_no_more() -> None:
    assert len(read([b"a: b\r\n" * 5 + b"\r\n"], max_fields=5).fields) == 5
    with pytest.raises(HeaderError, match="too many fields"):
        read([b"a: b\r\n" * 6 + b"\r\n"], max_fields=5)


def test_as_many_continuation_lines_as_the_limit_and_no_more() -> None:
    (field,) = parse_header(b"a: b\r\n" + b" c\r\n" * MAX_CONTINUATIONS, max_fields=1, wire_bytes=0).fields
    assert field.raw.count(b"\r\n") == MAX_CONTINUATIONS + 1
    with pytest.raises(HeaderError, match="continuation lines"):
        parse_header(b"a: b\r\n" + b" c\r\n" * (MAX_CONTINUATIONS + 1), max_fields=1, wire_bytes=0)


def test_a_name_as_long_as_the_limit_and_no_longer() -> None:
    assert read([b"a" * MAX_NAME_BYTES + b" : b\r\n\r\n"]).fields[0].name == b"a" * MAX_NAME_BYTES
    with pytest.raises(HeaderError, match="name is too long"):
        read([b"a" * (MAX_NAME_BYTES + 1) + b": b\r\n\r\n"])


@pytest.mark.parametrize("first", [b" a: b\r\n", b"\ta: b\r\n", b" \r\n"])
def test_a_first_line_that_would_continue_our_field_is_refused(first: bytes) -> None:
    with pytest.raises(HeaderError, match="continuation"):
        read([first + b"From: a\r\n\r\n"])


# --- edits ----------------------------------------------------------------------------------------------


@given(
    CONTENTS,
    st.booleans(),
    st.lists(st.sampled_from([OURS, AddField(".X", "."), AddField("Y", "é")]), max_size=3),
)
@example((b"", b".\r\n"), False, [OURS])
@example((b"", None), False, [OURS])
@example((b".X: 1\r\n", b".\r\n"), False, [OURS])
@example((b"X-Gone: 1\r\n", b".\r\n"), False, [])
@example((b"X-Gone: 1\r\n.X: 2\r\n", b".\r\n"), False, [])
@example((b"X-Gone: 1\r\n", None), True, [])
def test_the_downstream_gets_our_fields_then_the_kept_ones_then_the_rest(
    content: tuple[bytes, bytes | None], is_stuffed: bool, added: list[AddField]
) -> None:
    header, body = content
    message = message_of(whole(header, body), is_stuffed=is_stuffed)

    edited = apply_edits(message, added, {b"x-gone"})

    ours = b"".join(f"{edit.name}: {edit.value}\r\n".encode() for edit in added)
    kept = b"".join(field.raw for field in message.header.fields if field.name != b"x-gone")
    assert sent(edited) == ours + whole(kept, body)
    # RFC 5321 4.5.2: no line of what is sent may be a lone dot, at no seam either
    on_wire = edited.prefix + b"".join(
        edited.blocks() if is_stuffed else DotStuffer().stuff_all(edited.blocks())
    )
    assert b"\r\n.\r\n" not in b"\r\n" + on_wire


@pytest.mark.parametrize("is_stuffed", [True, False])
def test_fields_that_are_forged_go_one_by_one(is_stuffed: bool) -> None:
    message = message_of(b"A: 1\r\nA: 2\r\n.B: 3\r\nA: 1\r\n\r\n.body\r\n", is_stuffed=is_stuffed)
    forged = frozenset(message.header.all(b"a")[:1])
    edited = apply_edits(message, [OURS], forged=forged, above=b"First: 1\r\n", trace=b"Last: 1\r\n")
    assert sent(edited) == b"First: 1\r\n" + OURS_BYTES + b"Last: 1\r\nA: 2\r\n.B: 3\r\n\r\n.body\r\n"


def test_fields_resemble_a_name_that_have_more_around_it_than_a_name_may_hold() -> None:
    octets = b"A: 1\r\na\x01 : 2\r\n\xa0A: 3\r\nA!: 4\r\nB: a\r\n"
    header = parse_header(octets, max_fields=9, wire_bytes=len(octets))
    assert [field.value for field in header.resembling(b"a")] == [b" 1", b" 2", b" 3"]
    assert header.resembling(b"c") == ()


@given(CONTENTS, st.booleans())
def test_not_an_octet_is_touched_where_nothing_is_removed(
    content: tuple[bytes, bytes | None], is_stuffed: bool
) -> None:
    plain = whole(*content)
    message = message_of(plain, is_stuffed=is_stuffed)

    for edited in (
        apply_edits(message, [OURS]),
        apply_edits(message, [OURS], {b"no"}),
    ):
        assert edited.prefix == OURS_BYTES
        assert b"".join(edited.blocks()) == (stuff(plain) if is_stuffed else plain)
        assert edited.is_stuffed is is_stuffed
        assert edited.size_bytes == len(edited.prefix) + message.size_bytes


def test_not_an_octet_of_a_badly_stuffed_line_is_touched_either() -> None:
    wire = b".X: 1\r\n\r\n.body\r\n"  # RFC 5321 4.5.2 has ..X and ..body
    body = Spool().new(is_stuffed=True)
    body.append(wire)

    edited = apply_edits(Message(read([wire], is_stuffed=True), body), [OURS])

    assert edited.prefix + b"".join(edited.blocks()) == OURS_BYTES + wire


def test_added_fields_stand_in_their_order() -> None:
    edited = apply_edits(message_of(b"\r\n", is_stuffed=True), [AddField("A", "1"), AddField("B", "2")])

    assert edited.prefix == b"A: 1\r\nB: 2\r\n"


def test_the_trace_field_stands_right_above_the_message() -> None:
    message = message_of(b"X-Gone: 1\r\nA: 2\r\n\r\n", is_stuffed=False)
    trace = b"Received: from a\r\n\tby b\r\n"

    assert sent(apply_edits(message, trace=trace)) == trace + b"X-Gone: 1\r\nA: 2\r\n\r\n"
    assert (
        sent(apply_edits(message, [OURS], {b"x-gone"}, trace=trace)) == OURS_BYTES + trace + b"A: 2\r\n\r\n"
    )


@pytest.mark.parametrize("is_stuffed", [True, False])
def test_the_first_lines_behind_the_prefix_may_begin_with_dots(is_stuffed: bool) -> None:
    message = message_of(b".A: 1\r\nX-Gone: 2\r\n\r\n.\r\n..\r\n", is_stuffed=is_stuffed)

    kept = apply_edits(message, [OURS])
    removed = apply_edits(message, [OURS], {b"x-gone"})

    assert sent(kept) == OURS_BYTES + b".A: 1\r\nX-Gone: 2\r\n\r\n.\r\n..\r\n"
    assert sent(removed) == OURS_BYTES + b".A: 1\r\n\r\n.\r\n..\r\n"


def test_size_counts_what_is_left() -> None:
    message = message_of(b"X-Gone: 1\r\nA: 2\r\n\r\nbody\r\n", is_stuffed=False)

    edited = apply_edits(message, [OURS], {b"x-gone"})

    assert edited.size_bytes == len(sent(edited))


def test_content_may_be_sent_again() -> None:
    edited = apply_edits(message_of(b"A: 1\r\n\r\nbody\r\n", is_stuffed=True), [OURS])

    assert sent(edited) == sent(edited)


def test_text_beyond_ascii_is_added_to_messages_that_may_have_it_only() -> None:
    edit = AddField("X-Note", "caf\u00e9\r\n folded")
    assert split_edits([edit], smtputf8=True) == ([edit], set())
    assert split_edits([edit], smtputf8=False) == ([AddField("X-Note", "caf?\r\n folded")], set())


def test_edits_are_told_apart() -> None:
    added, removed = split_edits(
        [OURS, RemoveFields("Received-SPF"), AddField("A", "1"), RemoveFields("X")], smtputf8=False
    )

    assert added == [OURS, AddField("A", "1")]
    assert removed == {b"received-spf", b"x"}


@given(
    st.lists(st.sampled_from([b".", b"..", b"\r\n", b"\r", b"\n", b"a", b"\r\n.", b"\r\n.."])),
    st.integers(1, 9),
)
def test_its_blocks_are_what_the_sender_meant_however_it_came(pieces: list[bytes], size: int) -> None:
    plain = b"".join(pieces) + b"\r\n"
    for is_stuffed in (True, False):
        body = Spool(memory_bytes=10).new(is_stuffed=is_stuffed)
        wire = stuff(plain) if is_stuffed else plain
        for at in range(0, len(wire), size):
            body.append(wire[at : at + size])
        message = Message(Header(b"", 0), body)
        found = [[*message.blocks()], [*message.blocks()]]
        body.close()
        assert found[0] == found[1]
        assert b"".join(found[0]) == plain
        assert all(found[0]), "none is empty"
