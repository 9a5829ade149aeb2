"""What `mxgate explain` does, without its options: a file, a client and a configuration in, something to show out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from gateway.app import SystemClock
from gateway.config import Config
from gateway.decision import read_record
from gateway.explain.ask import read_zone, resolver
from gateway.explain.given import case_of, domains_of
from gateway.explain.lines import explained_lines
from gateway.explain.mail_file import MailFile
from gateway.explain.remembered import observed, offline
from gateway.explain.replay import replay
from gateway.explain.run import Explained, ExplainError, explain, world_of
from gateway.plugins import plan

Load = Callable[[Iterable[str]], Config]
"""The configuration; where there is none, one for mail to these domains."""

# A record's ring keeps 256 KiB of it, and JSON says them at more length.
_MAX_RECORD_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Shown:
    """What is printed."""

    as_json: dict[str, Any]
    is_good: bool = True

    @property
    def lines(self) -> list[str]:
        """For people."""
        return [*explained_lines(self.as_json)]


def explain_message(
    load: Load,
    *,
    file: BinaryIO,
    ip: str,
    helo: str | None,
    mail_from: str,
    rcpts: Sequence[str],
    zone: Path | None,
) -> Shown:
    """Explain the message of a file. Raises GivenError for what no client could say, ExplainError, ConfigError."""
    case = case_of(ip=ip, helo=helo or "", mail_from=mail_from, rcpts=rcpts)
    known = None if zone is None else read_zone(zone)
    config = load(domains_of(case.rcpts))
    server = config.server
    content = MailFile(file, max_bytes=server.max_message_bytes, max_line_bytes=server.max_line_bytes)
    case = replace(case, content=content)
    planned = observed(plan(config))
    if known is not None:
        planned = offline(planned)

    async def play() -> Explained:
        async with resolver(config, known) as dns:
            return await explain(case, world_of(config, planned, SystemClock(), dns))

    return Shown(asyncio.run(play()).as_json())


def replay_record(file: BinaryIO, load: Load) -> Shown:
    """Judge the decision of a file again. Raises RecordError, ExplainError and ConfigError."""
    octets = file.read(_MAX_RECORD_BYTES + 1)
    if len(octets) > _MAX_RECORD_BYTES:
        raise ExplainError(f"a record has at most {_MAX_RECORD_BYTES} octets")
    try:
        record = json.loads(octets)
    except (ValueError, RecursionError) as exc:
        raise ExplainError(f"the record is no JSON: {exc}") from exc
    recorded = read_record(record)
    config = load(domains_of([rcpt for rcpt, _, _ in recorded.rcpts]))
    replayed = asyncio.run(replay(recorded, config, plan(config), SystemClock()))
    return Shown(replayed.as_json(), replayed.is_same)
