"""The server's TLS context: TLS 1.2 and up (RFC 8996, RFC 8314), certificate reloaded when its files change."""

from __future__ import annotations

import ssl
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509

from gateway.errors import GatewayError

if TYPE_CHECKING:
    from gateway.services import Log


class CertificateError(GatewayError):
    """The certificate or its key cannot be used; the text says why and names the files."""


class ServerTls:
    """One SSLContext for all listeners. New handshakes use what `refresh` loaded last.

    The certificate is in a context of its own, which each handshake takes: a context into which a second certificate
    is loaded would go on to offer the first one, where their keys are of different kinds.

    `expires_at` is when the first certificate of the chain in use ends, in seconds since the epoch.
    """

    def __init__(self, cert_file: str, key_file: str, log: Log) -> None:
        """Raises CertificateError when the files cannot be read, or the key does not fit."""
        self._files = (cert_file, key_file)
        self._log = log
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        # a client that renegotiates costs a handshake each time
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        # is called for a client that names no server, too
        self.context.sni_callback = self._take_certificate
        self._seen = self._stamp()
        self._certificate = self._load()
        self._last_error = ""

    def state(self) -> dict[str, str]:
        """What /readyz shows: why the files that are there now are not in use, "" when they are."""
        return {"last_error": self._last_error}

    def refresh(self) -> None:
        """Load the certificate again if its files changed; one that cannot be loaded is logged and not taken."""
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._certificate = self._load()
        except CertificateError as exc:
            self._last_error = _in_short(exc.__cause__)
            self._log.error("tls.reload_failed", error=str(exc))
        else:
            self._last_error = ""
            self._log.info("tls.reloaded")

    def _take_certificate(
        self, connection: ssl.SSLSocket | ssl.SSLObject, _name: str | None, _context: ssl.SSLContext
    ) -> None:
        connection.context = self._certificate

    def _load(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cert_file, key_file = self._files
        try:
            # without a password OpenSSL would ask the terminal for that of an encrypted key
            context.load_cert_chain(cert_file, key_file, password="")
            chain = Path(cert_file).read_bytes()
        except OSError as exc:  # ssl.SSLError is one
            raise CertificateError(f"certificate {cert_file} with key {key_file}: {exc}") from exc
        self.expires_at = _end_of(chain)
        return context

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        """What changes when the files do, permissions included; nothing while one of them is missing."""
        try:
            stats = [Path(name).stat() for name in self._files]
        except OSError:
            return ()
        return tuple((s.st_ctime_ns, s.st_ino) for s in stats)


def _end_of(chain: bytes) -> float:
    """When the first of these certificates ends; infinity where they are of a kind that only OpenSSL reads."""
    try:
        return min(each.not_valid_after_utc.timestamp() for each in x509.load_pem_x509_certificates(chain))
    except ValueError:
        return inf


def _in_short(cause: BaseException | None) -> str:
    """What everybody may know who may ask /readyz: no paths."""
    if isinstance(cause, ssl.SSLError):
        return (cause.reason or "unusable").lower()
    return (isinstance(cause, OSError) and cause.strerror) or "unusable"
