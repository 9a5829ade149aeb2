"""A certificate for the gateway under test, by an authority that only the tests trust."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.e2e.gateway import HOSTNAME, Value
from tests.e2e.net import LOOPBACK, free_port


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate for mx.example.org and 127.0.0.1 in files, and a client's context that trusts its issuer."""

    cert_file: Path
    key_file: Path
    trusting: ssl.SSLContext

    def server_section(self) -> dict[str, Value]:
        """[server] with STARTTLS and, on a free port, a listener of implicit TLS."""
        return {
            "listen_tls": [f"{LOOPBACK}:{free_port()}"],
            "tls": {"cert_file": str(self.cert_file), "key_file": str(self.key_file)},
        }


def issue(directory: Path) -> Tls:
    """A new authority and its certificate; the files are written below `directory`."""
    authority = trustme.CA()
    certificate = authority.issue_cert(HOSTNAME, LOOPBACK)
    cert_file, key_file = directory / "cert.pem", directory / "key.pem"
    for index, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(cert_file), append=index > 0)
    certificate.private_key_pem.write_to_path(str(key_file))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return Tls(cert_file, key_file, trusting)
