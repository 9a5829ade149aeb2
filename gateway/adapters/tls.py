"""The server's TLS context: TLS 1.2 and up (RFC 8996, RFC 8314), certificate reloaded when its files change."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.errors import GatewayError

if TYPE_CHECKING:
    from gateway.services import Log


class CertificateError(GatewayError):
    """The certificate or its key cannot be used; the text says why and names the file."""


class ServerTls:
    """One SSLContext for all listeners. New handshakes use what `refresh` loaded last."""

    def __init__(self, cert_file: str, key_file: str, log: Log) -> None:
        """Raises CertificateError when the files cannot be read, or the key does not fit."""
        self._files = (cert_file, key_file)
        self._log = log
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        # a client that renegotiates costs a handshake each time
        self.context.options |= ssl.OP_NO_RENEGOTIATION
        self._seen = self._stamp()
        self._load(self.context)

    def refresh(self) -> None:
        """Load the certificate again if its files changed; one that cannot be loaded is logged and not taken."""
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._seen = stamp
            # a half-written pair must not replace a good one: it is tried on a context of its own
            self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
            self._load(self.context)
        except CertificateError as exc:
            self._log.error("tls.reload_failed", error=str(exc))
        else:
            self._log.info("tls.reloaded")

    def _load(self, context: ssl.SSLContext) -> None:
        cert_file, key_file = self._files
        try:
            context.load_cert_chain(cert_file, key_file)
        except (OSError, ssl.SSLError) as exc:
            raise CertificateError(f"certificate {cert_file} with key {key_file}: {exc}") from exc

    def _stamp(self) -> tuple[tuple[int, int], ...]:
        try:
            stats = [Path(name).stat() for name in self._files]
        except OSError as exc:
            raise CertificateError(f"{exc.filename}: {exc.strerror}") from exc
        return tuple((s.st_mtime_ns, s.st_ino) for s in stats)
