"""Signed messages of many senders, and the DNS that knows them: what a gateway with everything on has to judge.

Every message is signed by dkimpy with a key of its sender's domain and comes from a client that the domain's SPF record
names, so all of it passes; no two domains have the same records, though some have the same key.
"""

import base64
import random
from dataclasses import dataclass
from pathlib import Path

import dkim  # type: ignore[import-untyped]  # it has no annotations
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from bench.traffic import CorpusFiles

SELECTOR = "k1"
KEYS = 4
CLIENTS = 100
SEED = 7
TTL_S = 86_400  # nothing is asked twice by one process
SIGNED = [b"from", b"to", b"subject", b"date", b"message-id", b"mime-version", b"content-type"]
SIGNATURE_BYTES = 650
WORDS = (
    "the",
    "of",
    "and",
    "to",
    "in",
    "is",
    "you",
    "that",
    "it",
    "he",
    "was",
    "for",
    "what",
    "their",
    "which",
    "would",
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Where the messages are, how many, and the records of their senders as the text of a zone file."""

    files: CorpusFiles
    messages: int
    zone: str


def make_corpus(directory: Path, *, domains: int, messages: int, size_bytes: int) -> Corpus:
    """Write `messages` messages of about `size_bytes`, of `domains` senders in turn."""
    keys = [rsa.generate_private_key(65537, 2048) for _ in range(KEYS)]
    secrets = [
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()) for key in keys
    ]
    files = CorpusFiles(directory / "corpus.idx", directory / "corpus.dat")
    chance = random.Random(SEED)
    with files.index.open("w") as index, files.data.open("wb") as data:
        for number in range(messages):
            sender = number % domains
            domain = _domain(sender)
            unsigned = _unsigned(domain, number, size_bytes - SIGNATURE_BYTES, chance)
            signature = dkim.sign(
                unsigned,
                SELECTOR.encode(),
                domain.encode(),
                secrets[sender % KEYS],
                canonicalize=(b"relaxed", b"relaxed"),
                include_headers=SIGNED,
            )
            wire = (signature + unsigned).replace(b"\r\n.", b"\r\n..") + b".\r\n"
            index.write(
                f"{data.tell()} {len(wire)} mx.{domain} bounce@{domain} user{number % 100}@rcpt.example"
                f" 127.0.1.{1 + number % CLIENTS}\n"
            )
            data.write(wire)
    return Corpus(files, messages, _zone(keys, domains))


def _domain(sender: int) -> str:
    return f"s{sender:03d}.example"


def _unsigned(domain: str, number: int, size_bytes: int, chance: random.Random) -> bytes:
    header = [
        f"Received: from app.{domain} (app.{domain} [10.1.2.{number % 250}])",
        f"\tby mx.{domain} (Postfix) with ESMTPS id {number:010X}",
        "\tfor <user@rcpt.example>; Sun, 22 Nov 2026 02:00:00 +0000 (UTC)",
        f"From: A Sender <news@{domain}>",
        "To: A User <user@rcpt.example>",
        f"Subject: Your order {number} has been shipped",
        "Date: Sun, 22 Nov 2026 02:00:00 +0000",
        f"Message-ID: <{number:016x}@{domain}>",
        "MIME-Version: 1.0",
        "Content-Type: text/plain; charset=utf-8",
        f"List-Unsubscribe: <https://{domain}/u/{number}>",
        "X-Mailer: bench",
    ]
    lines = [*header, ""]
    left = size_bytes - sum(len(line) + 2 for line in lines)
    while left > 0:
        line = " ".join(chance.choices(WORDS, k=chance.randint(3, 14)))
        lines.append(line)
        left -= len(line) + 2
    return ("\r\n".join(lines) + "\r\n").encode()


def _zone(keys: list[rsa.RSAPrivateKey], domains: int) -> str:
    public = [
        base64.b64encode(
            key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        ).decode()
        for key in keys
    ]
    lines = []
    for sender in range(domains):
        domain = _domain(sender)
        lines += [
            _txt(domain, f"v=spf1 include:_spf.{domain} -all"),
            _txt(f"_spf.{domain}", f"v=spf1 ip4:198.51.100.{sender % 256} ip4:127.0.1.0/24 ~all"),
            _txt(f"mx.{domain}", "v=spf1 ip4:127.0.1.0/24 -all"),
            _txt(f"_dmarc.{domain}", f"v=DMARC1; p=reject; rua=mailto:dmarc@{domain}"),
            _txt(f"{SELECTOR}._domainkey.{domain}", f"v=DKIM1; k=rsa; n={domain}; p={public[sender % KEYS]}"),
        ]
    return "\n".join(lines) + "\n"


def _txt(name: str, value: str) -> str:
    """A TXT record; RFC 1035 3.3.14: strings of at most 255 octets."""
    strings = " ".join(f'"{value[at : at + 250]}"' for at in range(0, len(value), 250))
    return f"{name}. {TTL_S} IN TXT {strings}"
