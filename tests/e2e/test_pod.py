"""The pod that the chart renders, as a process of this checkout: it serves, and drains as kubelet ends it."""

from __future__ import annotations

import contextlib
import json
import ssl
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.e2e.certificates import Tls, issue
from tests.e2e.client import Client
from tests.e2e.downstream import Downstream
from tests.e2e.net import wait_until
from tests.e2e.pod import Pod, assert_drains, assert_serves, objects_for, secrets_for, start_by_hand

pytestmark = pytest.mark.e2e


@pytest.fixture
def running(sink: Downstream, tls: Tls, tmp_path: Path) -> Iterator[Pod]:
    pod = Pod(objects_for(sink.address), secrets_for(tls), tmp_path, start_by_hand)
    yield pod
    pod.close()


def test_serves(running: Pod, sink: Downstream, tls: Tls) -> None:
    assert_serves(running, sink, tls)


def test_drains(running: Pod, sink: Downstream) -> None:
    assert_drains(running, sink)


def test_takes_up_a_renewed_certificate_of_its_secret(running: Pod, tmp_path: Path) -> None:
    (tmp_path / "renewed").mkdir()
    renewed = issue(tmp_path / "renewed")
    assert not is_trusted(running, renewed)
    running.update("tls", secrets_for(renewed)["mx"])
    wait_until(partial(is_trusted, running, renewed), within_s=15, what="the new certificate is shown")
    assert "tls.reload_failed" not in running.log()


@pytest.mark.full
def test_takes_up_a_new_configmap(sink: Downstream, tls: Tls, tmp_path: Path) -> None:
    objects = objects_for(sink.address, 'onConfigChange="reload"')
    pod = Pod(objects, secrets_for(tls), tmp_path, start_by_hand)
    try:
        shown = json.loads((tmp_path / "config" / "mxgate.json").read_text())
        shown["relay"]["domains"].append("example.com")
        pod.update("config", {"mxgate.json": json.dumps(shown).encode()})
        wait_until(lambda: '"reload.done"' in pod.log(), within_s=30, what="the configuration is loaded")
        with Client(pod.address) as client:
            client.hello()
            _, reply = client.envelope("sender@client.example.net", ["user@example.com"])
            assert reply.code == 250
        # a wrong one changes nothing
        shown["relay"]["domains"] = 5
        pod.update("config", {"mxgate.json": json.dumps(shown).encode()})
        wait_until(lambda: '"reload.failed"' in pod.log(), within_s=30, what="the wrong one is refused")
        assert pod.get("/readyz")[0] == 200
    finally:
        pod.close()


def is_trusted(pod: Pod, tls: Tls) -> bool:
    """Whether the pod shows a certificate of this issuer."""
    with Client(pod.address) as client:
        client.hello()
        assert client.command("STARTTLS").code == 220
        with contextlib.suppress(ssl.SSLCertVerificationError):
            client.start_tls(tls.trusting)
            return True
    return False
