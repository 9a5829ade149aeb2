"""Several processes on one store behave as one: two on a Redis, four on a SQLite file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.redis import RedisServer

ROOT = Path(__file__).parents[3]


def shared(url: str, processes: int, rounds: int, prefix: str = "mxgate:t:") -> list[dict[str, Any]]:
    """What each process was answered; they begin together."""
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.adapters.store.sharing", url, prefix, str(rounds), str(seed)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=100)[0] for process in running]
    assert [process.returncode for process in running] == [0] * processes
    return [json.loads(output) for output in outputs]


def assert_as_one(answers: list[dict[str, Any]], rounds: int) -> None:
    """Each key had one first and one replacement; no count was lost or given twice; nothing changed unseen."""
    assert sum(answer["firsts"] for answer in answers) == rounds
    assert sum(answer["replaced"] for answer in answers) == rounds
    sums = sorted(total for answer in answers for total in answer["sums"])
    assert sums == [*range(1, rounds * len(answers) + 1)]
    assert sum(answer["hot"] for answer in answers) == max(answer["last"] for answer in answers)
    # they did run at the same time
    assert all(0 < answer["firsts"] < rounds for answer in answers)


@pytest.mark.e2e
def test_four_workers_on_one_sqlite_file(tmp_path: Path) -> None:
    answers = shared(f"sqlite://{tmp_path}/state.db", 4, 1500)
    assert_as_one(answers, 1500)


@pytest.mark.e2e
def test_two_processes_on_one_redis(redis_server: RedisServer, prefix: str) -> None:
    answers = shared(redis_server.url, 2, 1500, prefix)
    assert_as_one(answers, 1500)
