"""Names that SPF asks DNS for: U-labels to A-labels, and which texts are names at all (RFC 7208 4.3, 4.8)."""

from __future__ import annotations

import re
from functools import lru_cache

from gateway.api import AddressError, Domain
from policies.verify.spf.macro import MAX_NAME

# several look at each name, and most mail of an hour is of few
_CACHED_NAMES = 4096
# RFC 1035 2.3.4: labels of 1 to 63 octets; whoever uses these looks at the whole length
_NAME = re.compile(r"(?:[^.]{1,63}\.)*[^.]{1,63}")
_MULTI_LABEL = re.compile(r"(?:[^.]{1,63}\.)+[^.]{1,63}")


def a_labels(domain: str) -> str:
    """RFC 7208 4.3: a domain with its U-labels as A-labels; any other text as it is."""
    if domain.isascii():
        return domain
    try:
        return Domain.parse(domain)
    except AddressError:
        return domain


@lru_cache(maxsize=_CACHED_NAMES)
def is_checkable(domain: str) -> bool:
    """RFC 7208 4.3: a multi-label domain name that DNS can hold; an address literal is none."""
    return (
        len(domain) <= MAX_NAME
        and _MULTI_LABEL.fullmatch(domain) is not None
        and domain[0] != "["
        and domain.isascii()
    )


def is_askable(name: str) -> bool:
    """RFC 7208 4.8: whether DNS can hold the name that a macro-string gave; elsewhere nobody is asked for it.

    RFC 8616 4: what holds a local part beyond ASCII can never match.
    """
    return len(name) <= MAX_NAME and name.isascii() and _NAME.fullmatch(name) is not None
