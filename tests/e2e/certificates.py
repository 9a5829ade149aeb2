"""Certificates for the gateway under test and for its downstreams, by authorities that only the tests trust."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import trustme

from tests.e2e.gateway import HOSTNAME, Value
from tests.e2e.net import LOOPBACK, free_port


@dataclass(frozen=True, slots=True)
class Tls:
    """A certificate in files, and a client's context that trusts its issuer, whose own certificate is `ca_file`."""

    cert_file: Path
    key_file: Path
    ca_file: Path
    trusting: ssl.SSLContext

    def postfix_settings(self) -> dict[str, str]:
        """STARTTLS for a Postfix, which says in Received how it was used."""
        return {
            "smtpd_tls_security_level": "may",
            "smtpd_tls_cert_file": str(self.cert_file),
            "smtpd_tls_key_file": str(self.key_file),
            "smtpd_tls_received_header": "yes",
        }

    def server_section(self) -> dict[str, Value]:
        """[server] with STARTTLS and, on a free port, a listener of implicit TLS."""
        return {
            "listen_tls": [f"{LOOPBACK}:{free_port()}"],
            "tls": {"cert_file": str(self.cert_file), "key_file": str(self.key_file)},
        }


def issue(directory: Path, *names: str) -> Tls:
    """A new authority and its certificate for the names, or else for the gateway's; files below `directory`."""
    authority = trustme.CA()
    certificate = authority.issue_cert(*(names or (HOSTNAME, LOOPBACK)))
    cert_file, key_file, ca_file = (directory / f"{name}.pem" for name in ("cert", "key", "ca"))
    for index, blob in enumerate(certificate.cert_chain_pems):
        blob.write_to_path(str(cert_file), append=index > 0)
    certificate.private_key_pem.write_to_path(str(key_file))
    authority.cert_pem.write_to_path(str(ca_file))
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    return Tls(cert_file, key_file, ca_file, trusting)
