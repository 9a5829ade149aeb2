"""DNS for the commands: the configuration's name servers, or a zone file that is the whole world."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

import click

from gateway.adapters.dns import Dns, DnsSettingsError
from gateway.adapters.dns.resolver import CachingResolver
from gateway.adapters.metrics import ProcessMetrics
from gateway.app import SystemClock, dns_settings
from gateway.config import Config
from gateway.decision.show import asked_json, result_json
from gateway.decision.text import dns_lines, finding_lines, printable
from gateway.explain.mail_file import MailFile
from gateway.explain.run import ExplainError
from gateway.explain.stand_ins import KeptLog, ZoneServer
from gateway.lookup import Answer, Asked, Lookup, Question
from gateway.mail.digest import BodyDigests
from gateway.mail.message import Header, HeaderError, HeaderReader
from gateway.services import Instruments
from gateway.testing import Zone
from gateway.testing.zone import ZoneError
from gateway.verdict import AuthResult, Result

T = TypeVar("T")

_GOOD = frozenset({Result.PASS, Result.NONE, Result.NEUTRAL})


def read_zone(file: Path) -> Zone:
    """The zone of a master file. Raises ExplainError."""
    try:
        return Zone.parse(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ZoneError) as exc:
        raise ExplainError(f"{file}: {exc}") from exc


@asynccontextmanager
async def resolver(config: Config, zone: Zone | None) -> AsyncIterator[CachingResolver]:
    """The resolver that policies have, of a zone where there is one. Raises ExplainError."""
    instruments = Instruments(SystemClock(), KeptLog(), ProcessMetrics())
    settings = dns_settings(config)
    try:
        dns = (
            Dns(settings, instruments)
            if zone is None
            else CachingResolver(ZoneServer(zone), instruments, total_timeout_s=settings.total_timeout_s)
        )
    except DnsSettingsError as exc:
        raise ExplainError(str(exc)) from exc
    try:
        yield dns
    finally:
        await dns.close()


class Check:
    """What a command that makes one check is given: messages to read, DNS to ask, a way to tell what was found.

    `trail` is what was asked, each question once.
    """

    def __init__(self, config: Config, zone: Zone | None) -> None:
        self.trail: list[Asked] = []
        self._config = config
        self._zone = zone

    def run(self, lookup: Lookup[T]) -> T:
        """Drive a Lookup to its end. Raises ExplainError where the name servers cannot be used."""
        return asyncio.run(self._run(lookup))

    def message(
        self, file: BinaryIO, on_header: Callable[[Header, BodyDigests], T]
    ) -> tuple[Header, BodyDigests, T]:
        """The header of a message, the digests of its body that `on_header` wanted, and what that returned.

        Raises ExplainError for a message that a session would refuse.
        """
        server = self._config.server
        content = MailFile(file, max_bytes=server.max_message_bytes, max_line_bytes=server.max_line_bytes)
        reader = HeaderReader(
            is_stuffed=False, max_bytes=server.max_header_bytes, max_fields=server.max_header_fields
        )
        digests = BodyDigests()
        before = b""
        noted: list[T] = []
        try:
            for block in content.blocks():
                if noted:
                    digests.block(block)
                    continue
                before += block
                if reader.feed(block):
                    header = reader.finish()
                    noted.append(on_header(header, digests))
                    digests.block(before[header.wire_bytes + len(b"\r\n") :])
            header = reader.finish()
        except HeaderError as exc:
            raise ExplainError(f"the message would be refused: {exc}") from exc
        if content.fault is not None:
            raise ExplainError(f"the message would be refused: {content.fault.reply}")
        if not noted:
            noted.append(on_header(header, digests))
        digests.end()
        return header, digests, noted[0]

    def tell(self, results: Sequence[AuthResult], evidence: Sequence[str], *, as_json: bool) -> int:
        """Print what was found; the exit code: 0 where one of the results is pass, none or neutral."""
        shown = {
            "results": [result_json(result) for result in results],
            "evidence": [*evidence],
            "dns": [asked_json(asked) for asked in self.trail],
        }
        if as_json:
            click.echo(json.dumps(shown, indent=2))
        else:
            lines = [
                *(line.strip() for line in finding_lines(shown)),
                *(f"  {printable(line)}" for line in evidence),
                *dns_lines(shown),
            ]
            encoding = sys.stdout.encoding  # not every terminal's is UTF-8
            click.echo("\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))
        return 0 if any(result.result in _GOOD for result in results) else 1

    async def _run(self, lookup: Lookup[T]) -> T:
        async with resolver(self._config, self._zone) as dns:
            return await dns.run(self._watched(lookup))

    def _watched(self, lookup: Lookup[T]) -> Lookup[T]:
        known: set[Question] = set()
        try:
            questions = next(lookup)
            while True:
                answers: Sequence[Answer] = yield questions
                for question, answer in zip(questions, answers, strict=True):
                    if question not in known:
                        known.add(question)
                        self.trail.append(Asked("", question, answer))
                questions = lookup.send(answers)
        except StopIteration as done:
            result: T = done.value
            return result
