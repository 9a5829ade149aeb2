"""What a DKIM signature costs: dkim_sign's signer with the streaming digest, and dkimpy, on the same messages and keys.

    .venv/bin/python bench/sign.py [--json]

CPU time and the memory that Python allocates for one signature (relaxed/relaxed, oversigned), the least of several
runs. dkimpy is given the whole message; ours the header, and the body in the blocks in which it arrives.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
from base64 import b64encode
from collections.abc import Callable

import dkim  # type: ignore[import-untyped]  # it has no annotations
from cryptography.hazmat.primitives import serialization

from gateway.mail.digest import BodyDigests
from gateway.mail.message import parse_header
from gateway.testing.mail import SigningKey, compose
from policies.verify.dkim.sign import MODE, OVERSIGNED, SIGNED, read_key, signature

_BLOCK_BYTES = 64 * 1024
_SIZES = (2 * 1024, 1024 * 1024, 10 * 1024 * 1024)
_RUNS = 5
_LINE = "The quick brown fox  jumps over the lazy dog and does it again. \r\n"


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    as_json: bool = parser.parse_args().json
    rows = []
    for key in (SigningKey("example.org"), SigningKey("example.org", bits=0)):
        for size in _SIZES:
            message = compose("ann@example.org", body=_LINE * (size // len(_LINE)))
            for name, sign in (("mxgate", _ours(message, key)), ("dkimpy", _theirs(message, key))):
                seconds, peak = _measured(sign)
                rows.append(
                    {
                        "signer": name,
                        "algorithm": key.algorithm,
                        "size_bytes": len(message),
                        "cpu_ms": round(seconds * 1000, 3),
                        "peak_kib": round(peak / 1024),
                    }
                )
    if as_json:
        json.dump(rows, sys.stdout, indent=2)
        return
    for row in rows:
        print("{signer:8} {algorithm:15} {size_bytes:>9} {cpu_ms:>10} ms {peak_kib:>8} KiB".format(**row))


def _ours(message: bytes, key: SigningKey) -> Callable[[], object]:
    head, _, body = message.partition(b"\r\n\r\n")
    octets = head + b"\r\n"
    private = read_key(_pem(key))

    def sign() -> str:
        header = parse_header(octets, max_fields=1000, wire_bytes=len(octets))
        digests = BodyDigests()
        digests.want(MODE)
        for at in range(0, len(body), _BLOCK_BYTES):
            digests.block(body[at : at + _BLOCK_BYTES])
        digests.end()
        digest = digests.get(MODE).sha256
        return signature(header, digest, private, domain=key.domain, selector=key.selector, now=time.time())

    return sign


def _theirs(message: bytes, key: SigningKey) -> Callable[[], object]:
    pem = _pem(key)
    if not key.bits:
        # dkimpy wants the seed
        seed = key.private.private_bytes(
            serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
        )
        pem = b64encode(seed)
    names = [name.encode() for name in dict.fromkeys((*SIGNED, *OVERSIGNED))]

    def sign() -> bytes:
        signer = dkim.DKIM(message, signature_algorithm=key.algorithm.encode())
        signer.should_sign = set(names)
        signer.frozen_sign = {name.encode() for name in OVERSIGNED}
        signed: bytes = signer.sign(
            key.selector.encode(), key.domain.encode(), pem, canonicalize=(b"relaxed", b"relaxed")
        )
        return signed

    return sign


def _pem(key: SigningKey) -> bytes:
    return key.private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL if key.bits else serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _measured(sign: Callable[[], object]) -> tuple[float, int]:
    sign()
    least = float("inf")
    for _ in range(_RUNS):
        begun = time.process_time()
        sign()
        least = min(least, time.process_time() - begun)
    tracemalloc.start()
    sign()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return least, peak


if __name__ == "__main__":
    main()
