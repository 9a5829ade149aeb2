"""gateway.overview: what the page and /api/v1/status say of the whole gateway."""

from pathlib import Path
from typing import Any, cast

from gateway.adapters.metrics import ProcessMetrics
from gateway.config import load
from gateway.generation import Generation
from gateway.overview import Overview
from gateway.workers import Workers

CONFIG = 'server.hostname = "mx.example.org"\nrelay.domains = ["example.org"]\n'


async def test_transactions_are_added_up_whoever_decided_and_in_all_workers(tmp_path: Path) -> None:
    file = tmp_path / "mxgate.toml"
    file.write_text(CONFIG + '[[relay.routes]]\ndownstream = ["192.0.2.1:25"]\n')
    overview = Overview(Workers(), Generation(1, load(file, environ={}), cast("Any", None), 1), None)
    for pid in (1, 2):
        worker = ProcessMetrics()
        counted = worker.counters("mxgate_transactions_total", "T", ("action", "policy", "reason", "role"))
        counted.labels("accepted", "", "", "mx").inc(5)
        counted.labels("rejected", "dmarc", "dmarc_fail", "mx").inc(2)
        counted.labels("rejected", "relay_guard", "relaying_denied", "mx").inc(1)
        counted.labels("accepted", "", "", "submission").inc(1)
        overview.merged.update(pid, worker.snapshot())
    assert (await overview.status())["transactions"] == {"accepted": 12, "rejected": 6}
