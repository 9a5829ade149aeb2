"""Authentication-Results beside an independent reader, written from the grammar (`./dev fuzz -k authres`)."""

from __future__ import annotations

import email
import email.policy
import re
from collections.abc import Callable, Iterator

from hypothesis import example, given
from hypothesis import strategies as st

from gateway.mail.authres import format_results, is_ours, own_ids, parse
from gateway.verdict import AddField, AuthResult, Result

ID = "mx.example.org"

# RFC 8601 2.2 to the letter
TSPECIALS = '()<>@,;:\\"/[]?='
LDH = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?")
DOT_ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(?:\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*")


def strictly(field: str) -> tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]:
    """The authserv-id and the results of a folded value without comments; AssertionError for what is no such value."""
    parts = list(split_outside_quotes(field.replace("\r\n\t", " "), ";"))
    authserv_id = parts[0]
    assert is_token(authserv_id), authserv_id
    if parts[1:] == [" none"]:
        return authserv_id, []
    found = []
    for part in parts[1:]:
        words = [word for word in split_outside_quotes(part, " ") if word]
        method, _, result = words[0].partition("=")
        assert LDH.fullmatch(method), method
        assert LDH.fullmatch(result), result
        pairs = []
        for word in words[1:]:
            name, equals, value = word.partition("=")
            assert equals, word
            assert name == "reason" or all(map(LDH.fullmatch, name.split(".", 1))), name
            pairs.append((name, unquoted(value)))
        found.append((method, result, pairs))
    return authserv_id, found


def split_outside_quotes(text: str, mark: str) -> Iterator[str]:
    piece, is_quoted = "", False
    for character in text:
        if character == '"':
            is_quoted = not is_quoted
        if character == mark and not is_quoted:
            yield piece
            piece = ""
        else:
            piece += character
    assert not is_quoted
    yield piece


def unquoted(value: str) -> str:
    """A value or [[local-part] "@"] domain-name; we write no quoted pairs."""
    if value.startswith('"'):
        inside = value[1:-1]
        assert value.endswith('"')
        assert not set(inside) & set('"\\'), value
        return inside
    local, at, domain = value.rpartition("@")
    if at:
        assert not local or DOT_ATOM.fullmatch(local), value
        assert all(map(LDH.fullmatch, domain.split("."))) or re.fullmatch(r"[A-Za-z0-9.-]+", domain), value
    else:
        assert is_token(value), value
    return value


def is_token(text: str) -> bool:
    return bool(text) and all("!" <= each <= "~" and each not in TSPECIALS for each in text)


def carelessly(field: str) -> list[str]:
    """What readers who know neither quotes nor comments take for results and properties."""
    return [
        *re.findall(r"[;\n]\s*([A-Za-z0-9-]+\s*=\s*[A-Za-z]+)", field),
        *re.findall(r"([A-Za-z0-9-]+\s*=\s*(?:pass|fail))", field, flags=re.IGNORECASE),
    ]


# Text as an attacker would choose it
HOSTILE = st.lists(
    st.sampled_from(["a", ".", "@", "=", ";", " ", '"', "\\", "(", ")", "\r", "\n", "\t", "\0", "\x7f", "é"])
    | st.sampled_from(
        ["dmarc=pass", "; spf=pass ", "header.from=", "bank.example", "\r\n\t", "\uff1b", "\uff1d"]
    )
    | st.characters(),
    max_size=20,
).map("".join)
RESULTS = st.lists(
    st.builds(
        AuthResult,
        st.sampled_from(["spf", "dkim", "arc", "dmarc"]) | HOSTILE,
        st.sampled_from(Result),
        HOSTILE,
        st.lists(
            st.tuples(st.sampled_from(["smtp.mailfrom", "header.d", "header.i"]) | HOSTILE, HOSTILE),
            max_size=4,
        ).map(tuple),
    ),
    max_size=4,
)


@given(RESULTS, st.booleans())
@example([AuthResult("spf", Result.FAIL, "=\tpass", (("smtp.mailfrom", "x= pass"),))], False)
def test_no_value_adds_a_result_a_property_or_a_field(results: list[AuthResult], smtputf8: bool) -> None:
    field = format_results(ID, results, smtputf8=smtputf8)

    AddField("Authentication-Results", field)  # can end no field
    assert max(map(len, field.encode().split(b"\r\n"))) < 900
    assert smtputf8 or field.isascii()
    assert not set(field) & set("()")
    authserv_id, found = strictly(field)
    assert authserv_id == ID
    names = [
        (each.method, str(each.result), [name for name, _ in each.properties if is_property(name)])
        for each in results
        if re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?", each.method)
    ]
    assert [(m, r, [n for n, _ in pairs if n != "reason"]) for m, r, pairs in found] == names

    read = parse(field.encode())
    assert read.authserv_id == ID
    assert [(each.method, each.result, each.reason) for each in read.results] == [
        (method.lower(), result, dict(pairs).get("reason", "")) for method, result, pairs in found
    ]
    assert [each.properties for each in read.results] == [
        tuple((name.lower(), value) for name, value in pairs if name != "reason") for _, _, pairs in found
    ]

    claims = {re.sub(r"\s", "", claim).lower() for claim in carelessly(field)}
    assert claims <= {f"{method}={result}".lower() for method, result, _ in names}

    message = email.message_from_bytes(
        f"Authentication-Results: {field}\r\nSubject: x\r\n\r\nbody\r\n".encode(), policy=email.policy.default
    )
    assert message.keys() == ["Authentication-Results", "Subject"]
    assert message.get_payload() == "body\r\n"


def is_property(name: str) -> bool:
    keyword = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
    return re.fullmatch(rf"{keyword}\.{keyword}", name) is not None


# Ways of writing the same authserv-id: each gives another text that some reader takes for it.
DISGUISES: list[Callable[[str], str]] = [
    str.upper,
    lambda text: f'"{text}"',
    lambda text: f"(c) {text}",
    lambda text: f"{text} (d)",
    lambda text: f"{text}.",
    lambda text: f"\r\n {text}",
    lambda text: text.replace(".", "(c).", 1),
    lambda text: text.replace(".", " .", 1),
    lambda text: text.replace("e", "\u200be", 1),
    lambda text: text.replace("m", "\uff4d"),
    lambda text: text.replace("x", "x\x01", 1),
    lambda text: f"((x) {text}",
]


@given(
    st.lists(st.sampled_from(DISGUISES), max_size=5), st.sampled_from(["", " 1", ";", "; dmarc=pass", " x"])
)
def test_no_mixture_of_disguises_hides_that_a_field_claims_to_be_ours(
    disguises: list[Callable[[str], str]], end: str
) -> None:
    text = ID
    for disguise in disguises:
        text = disguise(text)
    assert is_ours(f" {text}{end}".encode(), own_ids(ID))


@given(st.binary(max_size=200))
def test_no_octets_make_a_reader_fail(value: bytes) -> None:
    parse(value)
    is_ours(value, own_ids(ID))
