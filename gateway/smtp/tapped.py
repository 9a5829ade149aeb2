"""A Server whose commands somebody listens to, for debugging one client; content is never among them."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping

from gateway.session import Recipient
from gateway.smtp.server import Handler, Server, ServerSettings


class TappedServer(Server):
    """`tap` is given each command line as it came, without its CRLF, before it is obeyed."""

    __slots__ = ("_tap",)

    def __init__(
        self,
        settings: ServerSettings,
        handler: Handler,
        codes: MutableMapping[int, int],
        commands: MutableMapping[str, int],
        tap: Callable[[bytes], None],
        *,
        tls_active: bool = False,
        allow_bare_lf: bool = False,
    ) -> None:
        super().__init__(
            settings, handler, codes, commands, tls_active=tls_active, allow_bare_lf=allow_bare_lf
        )
        self._tap = tap

    def _obey(self, line: bytes) -> None:
        self._tap(line)
        super()._obey(line)

    def _gather_rcpts(self, rcpts: list[Recipient], most: int) -> None:
        before = self._buffer
        super()._gather_rcpts(rcpts, most)
        for line in before[: len(before) - len(self._buffer)].split(b"\r\n")[:-1]:
            self._tap(line)
