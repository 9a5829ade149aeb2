"""tapped: every command is heard, in order, and nothing of the content."""

from __future__ import annotations

from collections import defaultdict
from unittest.mock import MagicMock

from gateway.smtp.reply import OK
from gateway.smtp.server import Extensions, ServerSettings
from gateway.smtp.tapped import TappedServer


def test_commands_are_heard_and_content_is_not() -> None:
    heard: list[bytes] = []
    handler = MagicMock()
    server = TappedServer(
        ServerSettings(hostname="mx.example.org"), handler, defaultdict(int), defaultdict(int), heard.append
    )
    handler.greeted.side_effect = lambda *_, **__: server.greet(Extensions(1_000_000, frozenset()))
    handler.mail.side_effect = lambda _: server.answer(OK)
    handler.rcpt.side_effect = lambda rcpts: server.answer_rcpts([OK] * len(rcpts))
    handler.content_begins.side_effect = lambda **_: server.accept_content()
    server.open()
    server.receive(b"EHLO client.example.net\r\n")
    server.receive(
        b"MAIL FROM:<a@example.net>\r\nRCPT TO:<b@example.org>\r\nRCPT TO:<c@example.org>\r\nNOOP\r\nDATA\r\n"
    )
    server.receive(b"QUIT is content\r\n.\r\n")
    assert heard == [
        b"EHLO client.example.net",
        b"MAIL FROM:<a@example.net>",
        b"RCPT TO:<b@example.org>",
        b"RCPT TO:<c@example.org>",
        b"NOOP",
        b"DATA",
    ]
