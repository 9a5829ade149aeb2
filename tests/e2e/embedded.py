"""A program of somebody else's that receives mail with aiosmtpd, and has our gatekeeper judge it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

from aiosmtpd.smtp import SMTP

from gateway.adapters.aiosmtpd_handler import GatewayHandler
from gateway.config import load
from gateway.embedding import open_gatekeeper
from gateway.testing import FakeLog
from tests.e2e.gateway import Config, config_for, to_toml
from tests.e2e.net import LOOPBACK, Address, free_port


class Embedded:
    """The server in a thread of its own, from the constructor on; `options` are aiosmtpd's."""

    def __init__(
        self,
        downstream: Address,
        directory: Path,
        overrides: Config | None = None,
        *,
        max_recipients: int = 200,
        proxy_protocol_from: Sequence[IPv4Network | IPv6Network] = (),
        **options: Any,
    ) -> None:
        self.address = (LOOPBACK, free_port())
        self.log = FakeLog()
        file = directory / "embedded.toml"
        file.write_text(to_toml(config_for(downstream, overrides=overrides or {})))
        self._config = load(file, environ={})
        self._settings: dict[str, Any] = {
            "max_recipients": max_recipients,
            "proxy_protocol_from": proxy_protocol_from,
        }
        self._options = options
        self._is_ready = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))
        self._thread.start()
        assert self._is_ready.wait(30)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with open_gatekeeper(self._config, log=self.log) as gatekeeper:
            self.handler = GatewayHandler(gatekeeper, **self._settings)
            server = await self._loop.create_server(
                lambda: SMTP(self.handler, hostname="mx.example.org", **self._options), *self.address
            )
            async with server:
                self._is_ready.set()
                await self._end.wait()
            await self.handler.close()

    def close(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)
