r"""Names as texts: what stands in a Question, in a cache's key and in a Record (RFC 1035 2.3).

A text holds a label's octets as UTF-8 and knows no escapes: a backslash is an octet like others. What cannot be said
so, a dot within a label and octets that are no UTF-8, is shown in records as \046; who asks for that text asks for a
name with a backslash, or for none that can exist.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from gateway.lookup import Question

# of what a question has: the length of each label and the root's are octets too
_MAX_NAME_BYTES = 253
_LABELS = re.compile(rb"(?s:[^.]{1,63}(?:\.[^.]{1,63})*)")


def key_of(question: Question) -> str:
    """The same text for the same question: type, a space, the name in lower case without its final dot."""
    name, rrtype = question
    # RFC 4343: the case of ASCII letters only; str.lower makes a k of the Kelvin sign
    lower = name.lower() if name.isascii() else "".join(c.lower() if c.isascii() else c for c in name)
    return rrtype + " " + lower.removesuffix(".")


def can_exist(name: str) -> bool:
    """Whether DNS can hold this name (no final dot): RFC 1035 2.3.4, and what UTF-8 can say."""
    try:
        octets = name.encode()
    except UnicodeEncodeError:  # lone surrogates
        return False
    return len(octets) <= _MAX_NAME_BYTES and _LABELS.fullmatch(octets) is not None


def text_of(labels: Sequence[bytes]) -> str:
    """The text of a name from its labels, without the root's; "" is the root."""
    return ".".join(
        label.lower().decode("utf-8", "backslashreplace").replace(".", "\\046") for label in labels
    )
