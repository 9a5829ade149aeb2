"""The HTTP client that policies have, where one of them needs it.

The library behind it takes 9 MB and a tenth of a second to load, so workers whose policies need none go without it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gateway.policy import Policy
from gateway.services import Http, Instruments, NoHttp

if TYPE_CHECKING:
    from gateway.adapters.http import HttpClient


class WorkerHttp:
    """A client for each of `policies` that needs one; made before the loop runs, closed in it."""

    def __init__(self, policies: Iterable[type[Policy[Any]]], instruments: Instruments) -> None:
        self._instruments = instruments
        self._clients: list[HttpClient] = []
        if any(policy.needs_http for policy in policies):
            self._load()

    def for_policy(self, policy: type[Policy[Any]], limit_s: float) -> Http:
        """The policy's own client, of whose requests none takes more than `limit_s` seconds."""
        if not policy.needs_http:
            return NoHttp()
        client = self._load()(policy.name, limit_s, self._instruments)
        self._clients.append(client)
        return client

    async def close(self) -> None:
        """Close what is open."""
        for client in self._clients:
            await client.close()

    @staticmethod
    def _load() -> type[HttpClient]:
        from gateway.adapters.http import HttpClient  # noqa: PLC0415  # see above

        return HttpClient
