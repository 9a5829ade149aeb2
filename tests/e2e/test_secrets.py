"""A secret of the configuration is shown nowhere: each is a canary, and everything that is printed is searched."""

from __future__ import annotations

import json
import os
import signal
import socket
import textwrap
from pathlib import Path

import pytest

from tests.e2e.certificates import Tls
from tests.e2e.downstream import Downstream
from tests.e2e.gateway import Gateway, Value, config_for, run_mxgate, to_toml
from tests.e2e.net import wait_until

pytestmark = pytest.mark.e2e

CANARIES = {
    name: f"canary-{name}-4711"
    for name in (
        "redis-password",
        "sentinel-password",
        "admin-token",
        "environment",
        "api-key",
        "policy-token",
    )
}
POLICY = """
    from dataclasses import dataclass, field
    from gateway.api import Policy, proceed

    @dataclass(frozen=True)
    class Settings:
        api_key: str = field(default="", metadata={"doc": "A secret."})
        upstream_token: str = field(default="", metadata={"doc": "Another one."})
        url: str = field(default="", metadata={"doc": "With a password in it."})

    class Secretive(Policy[Settings]):
        name = "secretive"
        Settings = Settings
        needs_store = True

        async def on_mail(self, tx):
            raise RuntimeError("the service is down")
"""


def found(text: str, key_file: Path) -> list[str]:
    """The canaries in a text, and whether the private key is there."""
    key_line = key_file.read_text("ascii").splitlines()[2]
    return [value for value in CANARIES.values() if value in text] + ["key"] * (key_line in text)


def test_no_secret_is_in_log_errors_metrics_pages_or_commands(
    sink: Downstream, tmp_path: Path, tls: Tls
) -> None:
    policy = tmp_path / "secretive.py"
    policy.write_text(textwrap.dedent(POLICY))
    token = tmp_path / "token"
    token.write_text(CANARIES["admin-token"])
    settings: dict[str, Value] = {
        "api_key": CANARIES["api-key"],
        "upstream_token": CANARIES["policy-token"],
        "url": "https://user:${MXGATE_TEST_CANARY}@127.0.0.1:1/x",
    }
    url = (
        f"redis+sentinel://user:{CANARIES['redis-password']}@127.0.0.1:1/service/0"
        f"?sentinel_password={CANARIES['sentinel-password']}"
    )
    config = config_for(
        sink.address,
        overrides={
            "server": tls.server_section(),
            "admin": {"token_file": str(token)},
            "state": {"url": url},
            "policy": {"secretive": {"file": str(policy), "mode": "enforce", "settings": settings}},
        },
    )
    file = tmp_path / "mxgate.toml"
    file.write_text(to_toml(config))
    os.environ["MXGATE_TEST_CANARY"] = CANARIES["environment"]
    try:
        printed = [
            run_mxgate(*words, "--config", str(file))
            for words in (
                ("config", "show"),
                ("config", "show", "--origin"),
                ("config", "show", "--json"),
                ("check-config",),
                ("plan",),
            )
        ]
        assert [done.returncode for done in printed] == [0] * len(printed)
        gateway = Gateway(config, tmp_path)
        try:
            gateway.wait_ready()
            with gateway.connect() as client:
                client.hello()
                client.submit(
                    "a@client.example.net", ["ann@example.org"], b"From: <a@example.net>\r\n\r\nHello\r\n"
                )
            token_answer = ask_with_token(gateway)
            pages = [
                gateway.admin(page)[1]
                for page in ("/readyz", "/metrics", "/api/v1/status", "/api/v1/decisions")
            ]
            # a reload that fails shows excerpts of the file
            good = file.read_text()
            for wrong in ("upstream_token", "api_key", "url"):
                file.write_text(good.replace(wrong, f"{wrong}x"))
                before = gateway.log().count("reload.failed")
                gateway.process.send_signal(signal.SIGHUP)
                wait_until(
                    lambda before=before: gateway.log().count("reload.failed") > before,  # type: ignore[misc]
                    within_s=20,
                    what="reload.failed",
                )
                printed.append(run_mxgate("check-config", "--config", str(file)))
                assert printed[-1].returncode == 78
            pages.append(gateway.admin("/api/v1/status")[1])
            file.write_text(good)
            gateway.stop()
        finally:
            gateway.kill()
    finally:
        del os.environ["MXGATE_TEST_CANARY"]
    for text in (gateway.log(), token_answer, *pages, *(done.stdout + done.stderr for done in printed)):
        assert found(text, tls.key_file) == [], text
    # the search was one: the policy did fail, the store was not there, the pages had something in them
    assert "policy.failed" in gateway.log()
    assert "store.down" in gateway.log()
    assert json.loads(pages[3])


def ask_with_token(gateway: Gateway) -> str:
    """What a wrong token is answered with, from somebody who has to show one."""
    host, port = gateway._admin
    with socket.create_connection((host, port), timeout=10) as sock:
        sock.sendall(
            b"GET /api/v1/status HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer wrong\r\nConnection: close\r\n\r\n"
        )
        return b"".join(iter(lambda: sock.recv(65536), b"")).decode("utf-8", "replace")
