"""Whatever stands in a message or in DNS: it is explained, in JSON that every reader takes and in printable lines."""

from __future__ import annotations

import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.explain.lines import explained_lines
from gateway.lookup import RRType
from gateway.testing import Zone
from tests.explainkit import case, explained, planned_of, record_of, replayed

NAMES = (
    *("From", "DKIM-Signature", "ARC-Seal", "ARC-Message-Signature", "ARC-Authentication-Results"),
    *("Authentication-Results", "Received-SPF", "Received", "X-Mxgate-Quarantine", "Subject"),
)
VALUES = (
    b"v=1; a=rsa-sha256; d=author.example; s=s1; h=from; bh=AAAA; b=AAAA",
    b"i=1; a=rsa-sha256; cv=none; d=author.example; s=s1; b=AAAA",
    b"mx.example.org; spf=pass smtp.mailfrom=x@author.example",
    b"\x1b[31m\x07",
    b"ann@author.example",
    b"\xff\xfe <a@\xe2\x80\xae.example>",
)
values = st.sampled_from(VALUES) | st.binary(max_size=30)
fields = st.tuples(st.sampled_from(NAMES), st.lists(values, max_size=3).map(b"\r\n ".join))
texts = st.sampled_from(
    [b"v=spf1 exp=author.example -all", b"v=DMARC1; p=reject", b"v=DKIM1; p="]
) | st.binary(max_size=40)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(fields, max_size=6),
    st.binary(max_size=60),
    st.lists(texts, max_size=3),
    st.sampled_from(["servfail", "timeout", ""]),
)
def test_any_message_is_explained_and_replayed(
    header: list[tuple[str, bytes]], body: bytes, txt: list[bytes], failing: str
) -> None:
    message = b"".join(b"%s: %s\r\n" % (name.encode(), value) for name, value in header) + b"\r\n" + body
    zone = Zone({name: {RRType.TXT: txt} for name in ("author.example", "_dmarc.author.example")})
    zone.nodes["s1._domainkey.author.example"] = {RRType.TXT: failing or txt}
    live = explained(case(message), zone, planned_of())
    shown = live.as_json()
    text = json.dumps(shown, allow_nan=False, ensure_ascii=False)
    text.encode()  # no lone surrogate
    assert json.loads(text) == json.loads(json.dumps(shown))
    assert all(line.isprintable() for line in explained_lines(json.loads(text)))
    record = record_of(live)
    if record["reason"] != "header":
        again = replayed(record, planned_of())
        assert (again.differences, again.missing) == ((), ())
