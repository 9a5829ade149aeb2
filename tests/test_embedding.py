"""embedding: the gatekeeper of a configuration; what of [log] counts for it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from gateway.config import load
from gateway.embedding import open_gatekeeper
from tests.e2e.gateway import config_for, to_toml

DOWNSTREAM = ("127.0.0.1", 1)


def test_its_log_is_the_one_of_the_configuration(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "embedded.toml"
    file.write_text(
        to_toml(config_for(DOWNSTREAM, overrides={"log": {"redact": ["local_parts", "client_addresses"]}}))
    )

    async def told() -> None:
        async with open_gatekeeper(load(file, environ={})) as gatekeeper:
            gatekeeper.services.log.info("noted", mail_from="ann@example.net", client="192.0.2.7")

    asyncio.run(told())
    (line,) = [
        each for each in map(json.loads, capfd.readouterr().err.splitlines()) if each["event"] == "noted"
    ]
    assert (line["mail_from"], line["client"]) == ("***@example.net", "192.0.2.0/24")
