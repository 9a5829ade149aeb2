"""Which attempts count as one: the key of a greylist's entry (RFC 6647 5).

A retry has to give the same key although its sender made something new of it: another address of the same network,
another number in a VERP address, another time stamp of BATV or SRS. Nothing here is a proof of who sent it: two
senders that give one key share their waiting time, no more.

A key is text that operators can read: `t ORIGIN SENDER RCPT`, where the origin is a network or an authenticated domain.
"""

from __future__ import annotations

import re
from functools import lru_cache
from hashlib import blake2b
from ipaddress import IPv4Address, IPv6Address

from gateway.api import Mailbox

IPV4_PREFIX = 24
IPV6_PREFIX = 64

# draft-levine-smtp-batv-01: prvs=, then a digit, three of the day and six hex digits; in practice the tag stands
# in front or, of older software, behind
_BATV = re.compile(r"(?:prvs|btv1)=(?:[0-9a-f]{6,14}=(.+)|(.+)=[0-9a-f]{6,14})", re.IGNORECASE)
# SRS0=hash=stamp=domain=local, SRS1=hash=domain==hash=stamp=domain=local (libsrs2); separators = + -
_SRS = re.compile(r"srs([01])[=+-](.+)", re.IGNORECASE)
# What lists and mailers number: digits, and hex of some length with a digit in it.
_NUMBER = re.compile(r"(?<![^\W_])(?=[0-9a-f]*[0-9])(?:[0-9]+|[0-9a-f]{6,})(?![^\W_])", re.IGNORECASE)
_DIGEST_BYTES = 16
# Three parts and what the store puts before them stay below its limit of 512 octets.
_MAX_PART_BYTES = 140
_BLANK = re.compile(r"\s")
TRIPLET = "t "
"""What the keys of triplets begin with."""


@lru_cache(maxsize=4096)
def client_network(client: IPv4Address | IPv6Address) -> str:
    """The network whose addresses count as one client: IPv4 /24, IPv6 /64."""
    if client.version == 4:
        host_bits = 32 - IPV4_PREFIX
        return f"{IPv4Address(int(client) >> host_bits << host_bits)}/{IPV4_PREFIX}"
    host_bits = 128 - IPV6_PREFIX
    return f"{IPv6Address(int(client) >> host_bits << host_bits)}/{IPV6_PREFIX}"


def sender_key(mail_from: Mailbox | None) -> str:
    """The reverse-path as retries have in common; "<>" for the null one. Folding it again changes nothing."""
    if mail_from is None:
        return "<>"
    local = mail_from.local_value.lower()
    while (inner := _unwrapped(local)) is not None:
        local = inner
    # RFC 5233 subaddresses and VERP both stand behind + or -; the first word tells the sender, the rest the recipient
    local = _NUMBER.sub("#", local.partition("+")[0])
    return f"{local}@{mail_from.domain}"


def rcpt_key(rcpt: Mailbox, *, is_domain: bool) -> str:
    """The recipient, or its domain; nearly all mail systems do not tell the case of a local part."""
    return str(rcpt.domain) if is_domain else f"{rcpt.local_value.lower()}@{rcpt.domain}"


def triplet_key(origin: str, sender: str, rcpt: str) -> str:
    """The key of attempts that count as one."""
    return f"{TRIPLET}{_part(origin)} {_part(sender)} {_part(rcpt)}"


def parts_of(key: str) -> tuple[str, str, str]:
    """Origin, sender and recipient of a key of a triplet; a digest stands for one that is very long."""
    origin, _, rest = key.removeprefix(TRIPLET).partition(" ")
    sender, _, rcpt = rest.partition(" ")
    return origin, sender, rcpt


def _part(text: str) -> str:
    """The text, or a digest of one that is long or holds what parts the key."""
    octets = text.encode()
    if len(octets) <= _MAX_PART_BYTES and not _BLANK.search(text):
        return text
    return f"~{blake2b(octets, digest_size=_DIGEST_BYTES).hexdigest()}"


def _unwrapped(local: str) -> str | None:
    """The local part inside BATV or SRS without what changes in time; None where it is neither."""
    if batv := _BATV.fullmatch(local):
        inner: str = batv[1] or batv[2]
        return inner
    if srs := _SRS.fullmatch(local):
        parts = srs[2].split("=")
        # of SRS1 the first domain is the forwarder that put it on, behind "==" stands what SRS0 had
        at = parts.index("") + 1 if srs[1] == "1" and "" in parts[1:] else 0
        original = parts[at:]
        if len(original) >= 4:
            # hash, stamp, domain, local part, which may have "=" itself
            return f"{'='.join(original[3:])}/{original[2]}"
    return None
