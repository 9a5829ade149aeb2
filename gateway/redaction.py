"""Redaction: takes what tells of a person out of texts that are shown: local parts, and addresses of clients.

The log and the decision records show the same texts of the same strangers, so both ask here, and for every text: an
address stands in the reply of a downstream and in the words of a policy as well as in the envelope.

Rather too much than too little is taken out. What a client calls itself (HELO) may still be a name that its provider
gave to one address; of such names only those that spell an IPv4 address are known here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from enum import StrEnum
from ipaddress import IPv6Network, ip_address, ip_network
from typing import Any, Final

HIDDEN: Final = "***"


class Redact(StrEnum):
    """What can be taken out."""

    LOCAL_PARTS = "local_parts"
    CLIENT_ADDRESSES = "client_addresses"


# What no unquoted local part holds (RFC 5322 3.2.3, RFC 6531 3.3).
_DELIMITERS: Final = '<>()[],;:" \t\r\n'
# RFC 5321 4.1.2; of a local part's length (4.5.3.1.1) with room, so that the search takes linear time.
_QUOTED = re.compile(r'"(?>(?:[^"\\]|\\.){0,128})"(?=@)', re.DOTALL)
# With a prefix it is a network already. What follows a dot is a name in DNS that spells the address backwards.
_IPV4 = re.compile(r"(?<![0-9])([0-9]{1,3}(?:\.[0-9]{1,3}){3})(?![0-9])(/[0-9]{1,2})?(?=(\.[A-Za-z_])?)")
_DASHED_IPV4 = re.compile(r"(?<![0-9])[0-9]{1,3}(?:-[0-9]{1,3}){3}(?![0-9-])")
_IPV6 = re.compile(
    r"(?<![0-9A-Fa-f])(IPv6:)?([0-9A-F]{0,4}(?::[0-9A-F]{0,4}){2,8})(/[0-9]{1,3})?(?:%\w+)?", re.IGNORECASE
)
_NIBBLES = re.compile(r"(?<![0-9A-Za-z])(?:[0-9A-Fa-f]\.){8,31}[0-9A-Fa-f](?![0-9A-Za-z])")
# What is kept of an address: the network of a provider's customer, not the customer.
_KEPT_IPV4, _KEPT_IPV6 = 24, 48
_COLONS_IPV6 = 7  # of an address that is written out


class Redaction:
    """`text` of a text, `values` of JSON's types; as they are where nothing is to be taken out."""

    def __init__(self, wanted: Collection[str] = ()) -> None:
        self._local_parts = Redact.LOCAL_PARTS in wanted
        self._clients = Redact.CLIENT_ADDRESSES in wanted

    @property
    def hides_local_parts(self) -> bool:
        """Whether local parts are taken out."""
        return self._local_parts

    def __bool__(self) -> bool:
        return self._local_parts or self._clients

    def text(self, value: str) -> str:
        """`ann@example.org` becomes `***@example.org`, `192.0.2.7` its network `192.0.2.0/24`, IPv6 its /48."""
        if self._local_parts and "@" in value:
            value = _without_local_parts(value)
        if self._clients:
            value = _NIBBLES.sub(HIDDEN, value)
            value = _DASHED_IPV4.sub(HIDDEN, value)
            value = _IPV4.sub(_network_of_ipv4, value)
            if value.count(":") >= 2:
                value = _IPV6.sub(_network_of_ipv6, value)
        return value

    def user(self, name: str) -> str:
        """The name that somebody has authenticated with: of many it is a local part alone."""
        return HIDDEN if self._local_parts and name and "@" not in name else self.text(name)

    def about(self, addresses: Iterable[str], value: str) -> str:
        """`text` of a text about these addresses, or users: there `ann` is as much as `ann@example.org`."""
        if self._local_parts:
            told = value.lower()
            locals_ = {(address.rpartition("@")[0] or address).strip('"').lower() for address in addresses}
            found = sorted((each for each in locals_ if each and each in told), key=len, reverse=True)
            if found:
                words = "|".join(map(re.escape, found))
                value = re.sub(rf"(?<!\w)(?:{words})(?!\w)", HIDDEN, value, flags=re.IGNORECASE)
        return self.text(value)

    def values(self, value: Any) -> Any:
        """The same of all texts in a value of JSON's types; its keys are ours and stay."""
        match value:
            case str():
                return self.text(value)
            case Mapping():
                return {key: self.values(each) for key, each in value.items()}
            case list() | tuple():
                return [self.values(each) for each in value]
            case _:
                return value


def _without_local_parts(value: str) -> str:
    *pieces, last = _QUOTED.sub(HIDDEN, value).split("@")
    shown = []
    for piece in pieces:
        if piece.endswith(
            '"'
        ):  # a quoted one; where the quote begins is a matter of escapes, so all of them go
            kept = piece[: piece.index('"')]
        else:
            kept = piece[: max(piece.rfind(delimiter) for delimiter in _DELIMITERS) + 1]
        shown.append(kept + HIDDEN if kept != piece else piece)
    return "@".join([*shown, last])


def _network_of_ipv4(found: re.Match[str]) -> str:
    if found[3]:
        return HIDDEN
    try:
        return str(ip_network(f"{found[1]}/{_KEPT_IPV4}", strict=False))
    except ValueError:  # 999.1.2.3: nobody's address
        return found[0]


def _network_of_ipv6(found: re.Match[str]) -> str:
    whole = found[2]
    # a colon at an end may be the sentence's
    for begin, end in ((0, len(whole)), (0, len(whole) - 1), (1, len(whole)), (1, len(whole) - 1)):
        before, address, behind = whole[:begin], whole[begin:end], whole[end:]
        if before in ("", ":") and behind in ("", ":") and _is_address(address):
            return f"{found[1] or ''}{before}{IPv6Network((address, _KEPT_IPV6), strict=False)}{behind}"
    # with what stands around it, such as a port, it is none any more; all else is a time of day
    return HIDDEN if "::" in whole or whole.count(":") >= _COLONS_IPV6 else found[0]


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True
