"""A policy service of Postfix's access policy delegation: one recipient's mailbox is full for larger messages.

Postfix asks it at RCPT with what MAIL has declared (SIZE=), as it asks Dovecot's quota-status. It is the kind of
refusal that a gateway meets at delivery only, when its client has not declared a size.
"""

from __future__ import annotations

import socketserver
import threading

from tests.e2e.net import LOOPBACK, Address, free_port

FULL = "552 5.2.2 Mailbox is full"


class QuotaService:
    """Runs from construction to `close`. `full` is the recipient, `free_bytes` what still goes into its mailbox."""

    def __init__(self, full: str, free_bytes: int) -> None:
        self.address: Address = (LOOPBACK, free_port())

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                asked: dict[bytes, bytes] = {}
                for line in self.rfile:
                    name, found, value = line.strip().partition(b"=")
                    if found:
                        asked[name] = value
                        continue
                    is_full = asked[b"recipient"] == full.encode() and int(asked[b"size"]) > free_bytes
                    self.wfile.write(f"action={FULL if is_full else 'DUNNO'}\n\n".encode())
                    asked = {}

        self._server = socketserver.ThreadingTCPServer(self.address, Handler, bind_and_activate=True)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def restriction(self) -> str:
        """The word for smtpd_recipient_restrictions."""
        return f"check_policy_service inet:{self.address[0]}:{self.address[1]}"

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
