"""The store in one SQLite file: `sqlite:///path`, shared by the workers of one machine, kept over restarts.

A thread of its own does the work; what is asked while it is busy is answered in the next batch, a transaction. The
file is in WAL mode with synchronous=NORMAL: a crash of the process loses nothing that was answered, a crash of the
machine perhaps the last seconds, and neither harms the file (https://www.sqlite.org/wal.html). The log is written
back into the file between batches, after the answers were given, since that is when SQLite waits for the disk.

The file stays under `max_bytes`: what has ended is pruned, and when it is full, what would end first goes first, so
that entries of two days cannot drive out those that stay for weeks. The file does not shrink, its pages are used again.

SQLite on a network file system is not to be trusted; WAL does not work there at all.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, assert_never

from gateway.store import (
    Add,
    Delete,
    Entry,
    Get,
    NotACounterError,
    Operation,
    Page,
    Put,
    PutIfAbsent,
    Replace,
    StoreError,
    Take,
    added,
    taken,
)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
  key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL, end_ms INTEGER NOT NULL
) WITHOUT ROWID, STRICT;
CREATE INDEX IF NOT EXISTS entries_by_end ON entries (end_ms);
"""
_APPLICATION_ID = 0x6D786774  # "mxgt": this file is ours
_VERSION = 1  # of the schema

_GET = "SELECT value FROM entries WHERE key = ? AND end_ms > ?"
_GET_END = "SELECT value, end_ms FROM entries WHERE key = ? AND end_ms > ?"
_PUT = "INSERT OR REPLACE INTO entries VALUES (?, ?, ?)"
_REPLACE = "UPDATE entries SET value = ?, end_ms = ? WHERE key = ? AND end_ms > ? AND value = ?"
_DELETE = "DELETE FROM entries WHERE key = ? RETURNING end_ms"
_SCAN = "SELECT key, value, end_ms FROM entries WHERE key > ? AND key >= ? ORDER BY key LIMIT ?"
_PRUNE = (
    "DELETE FROM entries WHERE key IN (SELECT key FROM entries WHERE end_ms <= ? ORDER BY end_ms LIMIT ?)"
)
_EVICT = "DELETE FROM entries WHERE key IN (SELECT key FROM entries ORDER BY end_ms LIMIT ?)"

_PAGE_BYTES = 4096
_BATCH = 256  # questions answered in one transaction
_SLICE = 256  # entries pruned after a batch
_PRUNE_EVERY_MS = 1000
_CHECKPOINT_AFTER = 1000  # entries written
# Other workers have the file for a batch each; who waits longer is out of time anyway (`state.timeout_s`).
_BUSY_TIMEOUT_S = 1.0
_RETRY_S = 0.01
_REASONS = {
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_BUSY: "timeout",
    sqlite3.SQLITE_LOCKED: "timeout",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_CANTOPEN: "connect",
    sqlite3.SQLITE_NOTADB: "protocol",
    sqlite3.SQLITE_CORRUPT: "protocol",
}


class SqliteStore:
    """A store in the file `path`, which is made if it is not there; `now` gives seconds since the epoch."""

    def __init__(self, path: str, now: Callable[[], float], *, max_bytes: int) -> None:
        self._path = path
        self._now = now
        self._max_pages = max(64, max_bytes // _PAGE_BYTES)
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._database: sqlite3.Connection | None = None
        self._prune_at_ms = 0
        self._written = 0

    def open(self) -> None:
        """Open the file and start the thread. Raises StoreError that names the file."""
        try:
            # What it holds are addresses of people: nobody else's to read.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600))
            self._database = _opened(self._path, self._max_pages)
        except OSError as exc:
            raise StoreError("connect", f"{self._path}: {exc.strerror}") from exc
        except sqlite3.Error as exc:
            raise StoreError(_reason(exc), f"{self._path}: {exc}") from exc
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    async def close(self) -> None:
        """Answer what was asked, then close the file."""
        if self._thread is not None:
            self._questions.put(None)
            await asyncio.to_thread(self._thread.join)

    async def run(self, operations: Sequence[Operation[Any]]) -> Sequence[Any]:
        answers = await self._ask(operations)
        for answer in answers:
            if isinstance(answer, NotACounterError):
                raise answer
        return answers

    async def scan(self, prefix: str, cursor: str, limit: int) -> Page:
        (page,) = await self._ask((_Scan(prefix, cursor, limit),))
        return page  # type: ignore[no-any-return]  # a scan's answer

    async def _ask(self, what: Sequence[Operation[Any]]) -> Sequence[Any]:
        assert self._loop is not None
        question = _Question(what, self._loop.create_future())
        self._questions.put(question)
        answers: Sequence[Any] = await question.answer
        return answers

    # --- in the thread --------------------------------------------------------------------------------

    def _work(self) -> None:
        assert self._loop is not None
        assert self._database is not None
        is_last = False
        while not is_last:
            batch: list[_Question] = []
            question = self._questions.get()
            while question is not None:
                # a caller that is out of time has gone
                if not question.answer.cancelled():
                    batch.append(question)
                if len(batch) == _BATCH or self._questions.empty():
                    break
                question = self._questions.get()
            is_last = question is None
            answers = self._answers(batch)
            # the loop is gone where a process ends without `close`
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(_give, batch, answers)
            with contextlib.suppress(sqlite3.Error):
                self._tidy()
        self._database.close()

    def _answers(self, batch: Sequence[_Question]) -> Sequence[Any]:
        """What to give to each question: its answer, or the StoreError that all have in common."""
        database = self._database
        assert database is not None
        is_reading = all(each.is_reading for each in batch)
        try:
            database.execute("BEGIN" if is_reading else "BEGIN IMMEDIATE")
            now_ms = int(self._now() * 1000)
            answers = [self._answer(each.what, now_ms) for each in batch]
            database.execute("COMMIT")
        except sqlite3.Error as exc:
            with contextlib.suppress(sqlite3.Error):
                database.execute("ROLLBACK")
            if _reason(exc) == "full":
                self._make_room()
            return [StoreError(_reason(exc), str(exc)) for _ in batch]
        if not is_reading:
            self._written += sum(0 if each.is_reading else len(each.what) for each in batch)
        return answers

    def _answer(self, what: Sequence[Operation[Any]], now_ms: int) -> Sequence[Any]:
        answers: list[Any] = []
        for each in what:
            try:
                answers.append(self._do(each, now_ms))
            except NotACounterError as exc:
                answers.append(exc)
        return answers

    def _do(self, operation: Operation[Any], now_ms: int) -> Any:
        assert self._database is not None
        execute = self._database.execute
        key = operation.key
        match operation:
            case Get():
                row = execute(_GET, (key, now_ms)).fetchone()
                return row and row[0]
            case Put():
                execute(_PUT, (key, operation.value, _end_ms(now_ms, operation.ttl_s)))
                return None
            case PutIfAbsent():
                row = execute(_GET, (key, now_ms)).fetchone()
                if row is None:
                    execute(_PUT, (key, operation.value, _end_ms(now_ms, operation.ttl_s)))
                return row and row[0]
            case Replace():
                end_ms = _end_ms(now_ms, operation.ttl_s)
                return execute(_REPLACE, (operation.value, end_ms, key, now_ms, operation.old)).rowcount == 1
            case Add():
                value, end_ms = execute(_GET_END, (key, now_ms)).fetchone() or (None, 0)
                count, digits = added(value, operation.amount)
                if value is None or operation.renew:
                    end_ms = _end_ms(now_ms, operation.ttl_s)
                execute(_PUT, (key, digits, end_ms))
                return count
            case Take():
                return self._take(operation, now_ms)
            case Delete():
                row = execute(_DELETE, (key,)).fetchone()
                return row is not None and row[0] > now_ms
            case _Scan():
                return self._page(operation, now_ms)
            case _:
                assert_never(operation)  # type: ignore[arg-type]  # Operation is no union, but these are all

    def _take(self, take: Take, now_ms: int) -> float:
        assert self._database is not None
        execute, key = self._database.execute, take.key
        _, end_ms = execute(_GET_END, (key, now_ms)).fetchone() or (None, now_ms)
        lacks_s = (end_ms - now_ms) / 1000
        after_s, wait_s = taken(lacks_s, take)
        if after_s > 0 and (wait_s == 0 or after_s < lacks_s):
            execute(_PUT, (key, b"", _end_ms(now_ms, after_s)))
        elif wait_s == 0:
            execute(_DELETE, (key,)).fetchone()
        return wait_s

    def _page(self, scan: _Scan, now_ms: int) -> Page:
        assert self._database is not None
        rows = self._database.execute(_SCAN, (scan.cursor, scan.key, scan.limit)).fetchall()
        ours = [row for row in rows if row[0].startswith(scan.key)]
        entries = tuple(
            [Entry(key, value, (end - now_ms) / 1000) for key, value, end in ours if end > now_ms]
        )
        return Page(entries, rows[-1][0] if len(ours) == scan.limit else "")

    def _tidy(self) -> None:
        """Between batches: prune what has ended, keep the file from filling up, write its log back."""
        assert self._database is not None
        now_ms = int(self._now() * 1000)
        if now_ms >= self._prune_at_ms:
            pruned = self._database.execute(_PRUNE, (now_ms, _SLICE)).rowcount
            # more to do: at once after the next batch
            self._prune_at_ms = now_ms + (0 if pruned == _SLICE else _PRUNE_EVERY_MS)
            self._make_room()
        if self._written >= _CHECKPOINT_AFTER:
            self._written = 0
            self._database.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    def _make_room(self) -> None:
        """Drop what ends first when less than an eighth of the file is free."""
        assert self._database is not None
        (pages,) = self._database.execute("PRAGMA page_count").fetchone()
        (free,) = self._database.execute("PRAGMA freelist_count").fetchone()
        if pages - free > self._max_pages * 7 // 8:
            self._database.execute(_EVICT, (4 * _SLICE,))
            self._prune_at_ms = 0


@dataclass(frozen=True, slots=True)
class _Scan(Operation[Page]):
    """A page of entries; `key` is their prefix."""

    cursor: str
    limit: int


class _Question:
    """What was asked, and where the answer goes."""

    __slots__ = ("answer", "what")

    def __init__(self, what: Sequence[Operation[Any]], answer: asyncio.Future[Any]) -> None:
        self.what = what
        self.answer = answer

    @property
    def is_reading(self) -> bool:
        return all(isinstance(each, Get | _Scan) for each in self.what)


def _opened(path: str, max_pages: int) -> sqlite3.Connection:
    database = sqlite3.connect(
        path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, cached_statements=32
    )
    try:
        # in this order: who makes the tables sets the id with them, and may do so between these two
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        (application,) = database.execute("PRAGMA application_id").fetchone()
        if tables and application != _APPLICATION_ID:
            raise sqlite3.DatabaseError("this database is not a store of mxgate")
        _use_wal(database)
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("PRAGMA wal_autocheckpoint = 0")
        database.execute(f"PRAGMA max_page_count = {max_pages}").fetchone()
        # Several workers start at once: the first one makes the tables.
        database.execute("BEGIN IMMEDIATE")
        for statement in _SCHEMA.split(";"):
            database.execute(statement)
        database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("COMMIT")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _use_wal(database: sqlite3.Connection) -> None:
    """Of several that do so at once SQLite tells all but one, without waiting, that the file is busy."""
    last = time.monotonic() + _BUSY_TIMEOUT_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > last:
                raise
            time.sleep(_RETRY_S)
        else:
            return


def _give(batch: Sequence[_Question], answers: Sequence[Any]) -> None:
    for question, answer in zip(batch, answers, strict=True):
        if question.answer.done():
            continue
        if isinstance(answer, StoreError):
            question.answer.set_exception(answer)
        else:
            question.answer.set_result(answer)


def _end_ms(now_ms: int, ttl_s: float) -> int:
    return now_ms + max(1, round(ttl_s * 1000))


def _reason(exc: sqlite3.Error) -> str:
    # the lowest octet is the primary code (https://www.sqlite.org/rescode.html)
    return _REASONS.get(getattr(exc, "sqlite_errorcode", 0) & 0xFF, "error")
