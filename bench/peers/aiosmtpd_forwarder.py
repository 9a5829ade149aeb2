"""A gateway as people write it with aiosmtpd: smtplib to the downstream before the 250.

    python aiosmtpd_forwarder.py PORT SINK_PORT

It does what `mxgate` with the relay guard alone does, in the ordinary way: refuses other domains, prepends a Received
field, and answers 250 when the downstream did.  aiosmtpd has no client, so the standard library's runs in threads.
uvloop is used when installed, as mxgate does.
"""

import asyncio
import contextlib
import smtplib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate

from aiosmtpd.smtp import SMTP, Envelope, Session

THREADS = 20  # as many as there are clients at once, so that none waits for a thread


class Forwarder:
    """The handler, in aiosmtpd's terms."""

    def __init__(self, sink_port: int) -> None:
        self._sink_port = sink_port
        self._threads = ThreadPoolExecutor(THREADS)

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, rcpt_options: list[str]
    ) -> str:
        if not address.lower().endswith("@rcpt.example"):
            return "550 5.7.1 Relaying denied"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 Ok"

    async def handle_DATA(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        assert isinstance(envelope.content, bytes)
        assert session.peer is not None
        received = (
            f"Received: from {session.host_name} ([{session.peer[0]}]) by gw.example; {formatdate()}\r\n"
        )
        content = received.encode() + envelope.content
        sender, recipients = envelope.mail_from or "", envelope.rcpt_tos
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._threads, self._forward, sender, recipients, content)
        except (OSError, smtplib.SMTPException):
            return "451 4.3.0 Try again later"
        return "250 2.0.0 Ok"

    def _forward(self, sender: str, recipients: list[str], content: bytes) -> None:
        with smtplib.SMTP(
            "127.0.0.1", self._sink_port, local_hostname="gw.example", timeout=60
        ) as downstream:
            downstream.sendmail(sender, recipients, content)


async def serve(port: int, sink_port: int) -> None:
    """Run until killed."""
    forwarder = Forwarder(sink_port)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: SMTP(forwarder, hostname="gw.example"), "127.0.0.1", port, backlog=1024
    )
    await server.serve_forever()


def main() -> None:
    """On the event loop that mxgate would take."""
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    with contextlib.suppress(ImportError):
        from uvloop import new_event_loop as factory  # noqa: PLC0415 - optional
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(serve(int(sys.argv[1]), int(sys.argv[2])))


if __name__ == "__main__":
    main()
