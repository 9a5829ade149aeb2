"""ARC sets: whatever a header holds, it is a chain of whole sets from 1 to n, or it says why it is none."""

from __future__ import annotations

import time

import pytest

from gateway.mail.message import Header, parse_header
from policies.verify.arc.sets import MAX_SETS, ChainError, read_sets

SEAL = "ARC-Seal: i={i}; a=rsa-sha256; cv={cv}; d=list.example; s=s1; b=AAAA\r\n"
AMS = "ARC-Message-Signature: i={i}; a=rsa-sha256; d=list.example; s=s1; h=from; bh=AAAA; b=AAAA\r\n"
AAR = "ARC-Authentication-Results: i={i}; mx.list.example; dmarc=pass\r\n"


def header_of(text: str | bytes) -> Header:
    octets = text if isinstance(text, bytes) else text.encode()
    return parse_header(octets, max_fields=100_000, wire_bytes=len(octets))


def arc_set(instance: int, cv: str = "") -> str:
    return SEAL.format(i=instance, cv=cv or ("none" if instance == 1 else "pass")) + (AMS + AAR).format(
        i=instance
    )


def chain(*instances: int) -> str:
    return "".join(map(arc_set, instances)) + "From: a@author.example\r\n"


def fault(text: str | bytes) -> str:
    with pytest.raises(ChainError) as caught:
        read_sets(header_of(text))
    return str(caught.value)


def test_a_message_without_arc_fields_has_no_sets() -> None:
    assert read_sets(header_of("From: a@author.example\r\nX-ARC-Seal: i=1\r\nSubject: arc-seal\r\n")) == ()


@pytest.mark.parametrize("order", [(1,), (2, 1), (1, 2), (3, 1, 2), tuple(range(MAX_SETS, 0, -1))])
def test_sets_come_from_the_oldest_to_the_newest_in_whatever_order_they_stand(order: tuple[int, ...]) -> None:
    sets = read_sets(header_of(chain(*order)))

    assert [each.instance for each in sets] == sorted(order)
    assert sets[0].results == b" mx.list.example; dmarc=pass"
    assert sets[-1].seal_tags["d"] == b"list.example"
    assert sets[-1].ams_tags["h"] == b"from"


def test_names_are_known_in_any_case_and_with_blanks_before_the_colon() -> None:
    text = chain(1).replace("ARC-Seal:", "aRC-sEAL \t:")

    assert len(read_sets(header_of(text))) == 1


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (chain(1, 3), "a set is missing or not complete"),
        (chain(2), "a set is missing or not complete"),
        (chain(1, 1), "set 1 has a field twice"),
        (chain(1) + SEAL.format(i=1, cv="none"), "set 1 has a field twice"),
        (chain(1) + SEAL.format(i=2, cv="pass"), "a set is missing or not complete"),
        (chain(1) + AMS.format(i=2), "a set is missing or not complete"),
        (chain(1) + AAR.format(i=2), "a set is missing or not complete"),
        (AAR.format(i=1), "a set is missing or not complete"),
        (chain(0), "an instance is not between 1 and 50"),
        (chain(51), "an instance is not between 1 and 50"),
        (chain(1025), "an AAR does not begin with its instance"),
        (chain(*range(1, MAX_SETS + 2)), "there are more than 50 sets"),
        (AAR.format(i=1) * 51, "there are more than 50 sets"),
        (arc_set(1, "pass"), "the cv= of seal 1 is not what its position asks"),
        (arc_set(1, "fail"), "the newest sealer says cv=fail"),
        (arc_set(1) + arc_set(2, "fail"), "the newest sealer says cv=fail"),
        (arc_set(1) + arc_set(2, "none"), "the cv= of seal 2 is not what its position asks"),
        (arc_set(1) + arc_set(2, "Pass"), "the cv= of seal 2 is not what its position asks"),
        (arc_set(1, "fail") + arc_set(2), "the cv= of seal 1 is not what its position asks"),
        (chain(1).replace(" cv=none;", ""), "the cv= of seal 1 is not what its position asks"),
        (chain(1).replace("cv=none;", "cv=none; h=from;"), "seal 1 has h="),
        (chain(1).replace("cv=none;", "cv=none; t=;"), "the t= of seal 1 is no number"),
        (chain(1).replace("cv=none;", "cv=none; t=-1;"), "the t= of seal 1 is no number"),
        (chain(1).replace("cv=none;", "cv=none; cv=none;"), "a signature is malformed: a tag stands twice"),
        (
            chain(1).replace("cv=none;", "cv=none; x=\0;"),
            "a signature is malformed: a tag holds a control character",
        ),
        (chain(1).replace("Seal: i=1", "Seal: i=+1"), "an instance is not between 1 and 50"),
        (chain(1).replace("Seal: i=1", "Seal: i=001"), "an instance is not between 1 and 50"),
        (chain(1).replace("Seal: i=1;", "Seal:"), "an instance is not between 1 and 50"),
        (chain(1).replace("Seal: i=1", "Seal: I=1"), "an instance is not between 1 and 50"),
    ],
)
def test_says_why_the_fields_are_no_chain(text: str, why: str) -> None:
    assert fault(text) == why


@pytest.mark.parametrize(
    "head",
    [
        "i=1;",
        "i = 1 ;",
        "i=01;",
        "\r\n i=1;",
        "(a comment) i (b(c)\\)) = ( ) 1 (\r\n\td) ;",
    ],
)
def test_an_aar_begins_with_its_instance_and_may_have_comments_around_it(head: str) -> None:
    (only,) = read_sets(header_of(chain(1).replace("Results: i=1;", f"Results: {head}")))

    assert only.instance == 1
    assert only.results == b" mx.list.example; dmarc=pass"


@pytest.mark.parametrize(
    "head", ["mx.example; i=1;", "i=1", "i=1 mx;", "i=;", "i;", "=1;", "I=1;", "i=1(;", "(i=1;", "i=123;", ""]
)
def test_an_aar_without_a_clear_instance_is_in_no_set(head: str) -> None:
    fault(chain(1).replace("Results: i=1;", f"Results: {head}"))


def test_utf_8_is_taken_where_the_message_may_have_it() -> None:
    header = header_of(chain(1).replace("d=list.example", "d=bücher.example"))

    assert read_sets(header, utf8=True)[0].seal_tags["d"] == "bücher.example".encode()
    with pytest.raises(ChainError):
        read_sets(header)


@pytest.mark.parametrize(
    "value",
    ["(" * 200_000, "(\\" * 100_000, "()" * 100_000, " " * 200_000 + "x", "(" * 99_000 + ")" * 99_000],
)
def test_comments_cost_linear_time(value: str) -> None:
    began = time.process_time()

    fault(f"ARC-Authentication-Results: {value}\r\n")

    assert time.process_time() - began < 1
