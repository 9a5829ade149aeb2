"""supervisor: with real processes, sockets and signals; the workers are fakes (fake_worker.py)."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gateway.config import load
from gateway.config.values import HostPort
from gateway.listening import StartError, bind
from gateway.supervisor import Supervisor, _restart_delay_s
from tests.running import Running, Start, starting, wait_until
from tests.submission_keys import SUBMISSION

start = pytest.fixture(starting, name="start")


def test_the_files_of_both_roles_policies_are_watched(tmp_path: Path) -> None:
    file = tmp_path / "mxgate.toml"
    keys = """
        policy.a.file = "/etc/mxgate/a.py"
        [server]
        hostname = "mx.example.org"
        reload_on_change = true
        tls = { cert_file = "/etc/cert.pem", key_file = "/etc/key.pem" }
        [relay]
        domains = ["example.org"]
        [[relay.routes]]
        downstream = ["127.0.0.1:9"]
    """
    watching: Any = SimpleNamespace(_config_path=str(file))

    def watched(content: str) -> list[str]:
        file.write_text(content)
        return [path.name for path in Supervisor._files_of(watching, load(file, environ={}))]

    assert watched(keys) == ["mxgate.toml", "a.py"]
    assert watched(keys + SUBMISSION + 'policy.b.file = "/etc/mxgate/b.py"') == [
        "mxgate.toml",
        "a.py",
        "b.py",
    ]


# --- start -----------------------------------------------------------------------------------------------------


def test_serves_and_says_so(start: Start) -> None:
    gateway = start()
    pid = gateway.greeted()
    ready = gateway.wait_ready()
    assert ready == {
        "ready": True,
        "reasons": [],
        "listening": True,
        "draining": False,
        "config": {"hash": ready["config"]["hash"], "generation": 1, "last_reload": None},
        "workers": [
            {
                "worker": 1,
                "pid": pid,
                "listening": True,
                "draining": False,
                "policies_started": True,
                "detail": {"relay": {"is_up": True}},
            }
        ],
    }
    assert gateway.ask("/livez") == (200, {"live": True, "reasons": []})
    metrics = gateway.metrics()
    assert metrics["mxgate_workers"] == 1
    assert metrics["mxgate_worker_restarts_total"] == 0
    assert metrics["mxgate_fakes_total"] == 1
    assert abs(metrics["mxgate_start_time_seconds"] - time.time()) < 3600
    assert any(name.startswith("mxgate_build_info{") for name in metrics)


def test_an_ill_downstream_is_shown_for_its_worker_and_is_no_reason_to_get_no_mail(start: Start) -> None:
    gateway = start(workers=2)
    gateway.wait_ready()
    pid = gateway.tell(b"lose-downstream")

    def shown() -> dict[int, Any]:
        status, body = gateway.ask("/readyz")
        assert (status, body["ready"], body["reasons"]) == (200, True, [])
        return {worker["pid"]: worker["detail"] for worker in body["workers"]}

    wait_until(lambda: shown()[pid] == {"relay": {"is_up": False}})
    (other,) = (detail for each, detail in shown().items() if each != pid)
    assert other == {"relay": {"is_up": True}}


@pytest.mark.parametrize("restarted", [False, True])
def test_a_worker_inherits_nothing_that_is_not_its_own(start: Start, restarted: bool) -> None:
    gateway = start(workers=2)
    gateway.wait_ready()
    if restarted:
        # Its successor is forked from a process with a loop, an admin port and channels.
        gateway.tell(b"die")
        gateway.wait_log("worker.died")
        gateway.wait_ready()
    status, body = gateway.ask("/api/v1/status")
    assert status == 200
    assert [worker["worker"] for worker in body["workers"]] == [1, 2]
    for worker in body["workers"]:
        facts = worker["status"]
        # standard ones, one listening socket, the channel, the way of its stack
        assert facts["descriptors"] == 3 + 1 + 1 + 1
        assert facts["ignored"] == [1, 1]  # SIGHUP and SIGINT
        assert facts["blocked"] == 0
    assert restarted or not any(worker["status"]["has_aiohttp"] for worker in body["workers"])


def test_an_address_that_is_taken_is_named(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        gateway = start("sound", f'server.listen=["{address}"]', started=False)
        assert gateway.wait_exit() == 1
    assert gateway.lines == [f"mxgate: cannot listen on {address}: Address already in use\n"]


def test_an_admin_address_that_this_machine_lacks_is_a_wrong_configuration(start: Start) -> None:
    gateway = start("sound", 'admin.listen="192.0.2.1:9464"', started=False)
    assert gateway.wait_exit() == 78
    assert gateway.lines == ["mxgate: cannot listen on 192.0.2.1:9464: Cannot assign requested address\n"]


@pytest.mark.parametrize("content", [None, " \n"])
def test_a_token_file_that_holds_none_is_a_wrong_configuration(
    start: Start, tmp_path: Path, content: str | None
) -> None:
    token = tmp_path / "token"
    if content is not None:
        token.write_text(content)
    gateway = start("sound", f'admin.token_file="{token}"', started=False)
    assert gateway.wait_exit() == 78
    (line,) = gateway.lines
    assert f"admin.token_file {token}" in line


def test_ipv6_sockets_leave_ipv4_alone() -> None:
    with bind(HostPort("0.0.0.0", 0)) as ipv4:
        try:
            ipv6 = bind(HostPort("::", ipv4.getsockname()[1]))
        except StartError as exc:
            pytest.skip(str(exc))
        ipv6.close()


def test_a_worker_that_refuses_its_configuration_stops_the_start(start: Start) -> None:
    gateway = start("refuses", workers=2, started=False)
    assert gateway.wait_exit() == 78
    assert not any("worker.died" in line for line in gateway.lines)


def test_is_not_ready_before_its_policies_are(start: Start) -> None:
    gateway = start("never-ready")
    status, body = wait_until(lambda: (answer := gateway.ask("/readyz"))[1] and answer)
    assert status == 503
    assert body["reasons"] == ["worker 1: policies are not started"]
    assert gateway.ask("/livez")[0] == 200


# --- workers that die ------------------------------------------------------------------------------------------


def test_a_worker_that_died_is_replaced_and_its_counts_are_kept(start: Start) -> None:
    gateway = start()
    gateway.wait_ready()
    wait_until(lambda: gateway.metrics().get("mxgate_fakes_total") == 1)
    killed = gateway.tell(b"die")
    died = gateway.wait_log("worker.died")
    assert (died["pid"], died["code"]) == (killed, -signal.SIGKILL)
    (worker,) = gateway.wait_ready()["workers"]
    assert worker["pid"] != killed
    wait_until(lambda: gateway.metrics()["mxgate_fakes_total"] == 2)
    metrics = gateway.metrics()
    assert metrics["mxgate_fakes"] == 1
    assert metrics["mxgate_workers"] == 1
    assert metrics["mxgate_worker_restarts_total"] == 1


def test_connections_wait_for_the_next_worker(start: Start) -> None:
    gateway = start("dies-twice")
    assert gateway.greeted()
    assert [gateway.wait_log("worker.died")["code"] for _ in range(2)] == [3, 3]


def test_pauses_between_deaths_grow_to_a_bound() -> None:
    assert [_restart_delay_s(deaths) for deaths in range(5)] == [0, 0.5, 1, 2, 4]
    assert _restart_delay_s(10_000) == 30


def test_a_worker_that_raises_says_why_and_is_replaced(start: Start) -> None:
    gateway = start("raises-once", started=False)
    assert "RuntimeError: as it was told" in gateway.wait_log("worker.failed")["error"]
    gateway.wait_started()
    assert gateway.greeted()


def test_a_worker_that_refuses_its_configuration_later_is_only_replaced(start: Start) -> None:
    gateway = start()
    gateway.wait_ready()
    gateway.tell(b"refuse")
    assert gateway.wait_log("worker.died")["code"] == 78
    gateway.wait_ready()


def test_a_worker_that_garbles_its_channel_is_replaced(start: Start) -> None:
    gateway = start()
    gateway.wait_ready()
    gateway.tell(b"garble")
    assert "4294967295 bytes" in gateway.wait_log("channel.failed")["error"]
    gateway.wait_log("worker.died")
    gateway.wait_ready()


def test_is_not_live_when_a_worker_falls_silent(start: Start) -> None:
    gateway = start("falls-silent")
    status, body = wait_until(lambda: (answer := gateway.ask("/livez"))[0] == 503 and answer)
    assert (status, body["live"]) == (503, False)
    (reason,) = body["reasons"]
    assert reason.startswith("worker 1: nothing heard for ")
    assert gateway.ask("/readyz")[1]["reasons"] == [reason]


def test_a_worker_that_does_not_answer_is_named(start: Start) -> None:
    gateway = start("never-answers")
    gateway.wait_ready()
    status, body = gateway.ask("/api/v1/status")
    assert status == 200
    assert body["workers"][0]["error"] == "no answer within 2 s"


def test_decisions_of_all_workers_are_one_answer_by_time(start: Start) -> None:
    gateway = start(workers=2)
    gateway.wait_ready()
    decided_by: list[int] = []
    while len(set(decided_by)) < 2 or len(decided_by) < 4:
        decided_by.append(gateway.tell(b"refuse-mail"))
        # it is kept before the connection ends, which tell() does not wait for
        wait_until(lambda: len(_decisions(gateway)["decisions"]) == len(decided_by))
    answer = _decisions(gateway)
    assert [int(record["session"][1:]) for record in answer["decisions"]] == decided_by[::-1]
    times = [record["timestamp"] for record in answer["decisions"]]
    assert times == sorted(times, reverse=True)
    pids = {worker["worker"]: worker["pid"] for worker in gateway.ask("/readyz")[1]["workers"]}
    assert [pids[record["worker"]] for record in answer["decisions"]] == decided_by[::-1]
    assert (answer["truncated"], answer["errors"]) == (False, [])
    newest, older = answer["decisions"][0], answer["decisions"][-1]
    assert _decisions(gateway, "?limit=1") == {"decisions": [newest], "truncated": True, "errors": []}
    assert _decisions(gateway, "?action=accepted")["decisions"] == []
    status, body = gateway.ask(f"/api/v1/decisions/{older['tx']}")
    assert (status, {key: body[key] for key in older}) == (200, older)
    assert (body["header"], body["header_octets"], body["dns"]) == ([], "", [])
    assert gateway.ask("/api/v1/decisions/s-1")[0] == 404
    assert gateway.ask("/api/v1/decisions?limit=0")[0] == 400


def test_a_worker_that_does_not_answer_hides_no_decisions_of_others(start: Start) -> None:
    gateway = start("never-answers")
    pid = gateway.wait_ready()["workers"][0]["pid"]
    answer = _decisions(gateway)
    assert answer["decisions"] == []
    assert answer["errors"] == [{"worker": 1, "pid": pid, "error": "no answer within 0.5 s"}]
    assert gateway.ask("/api/v1/decisions/s-1")[0] == 503


def _decisions(gateway: Running, query: str = "") -> dict[str, Any]:
    status, body = gateway.ask(f"/api/v1/decisions{query}")
    assert status == 200
    assert isinstance(body, dict)
    return body


# --- the end ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 2)])
def test_drains_at_a_signal(start: Start, number: signal.Signals, workers: int) -> None:
    gateway = start("sound", "server.drain_timeout_s=60", workers=workers)
    gateway.wait_ready()
    with gateway.connected():
        if number == signal.SIGINT:
            os.killpg(gateway.process.pid, number)  # as a terminal does
        else:
            gateway.process.send_signal(number)
        gateway.wait_log("drain.started")
        wait_until(lambda: not gateway.greeted())
        status, body = gateway.ask("/readyz")
        assert status == 503
        assert "draining" in body["reasons"]
        assert body["draining"]
        assert gateway.ask("/livez")[0] == 200
    assert gateway.wait_exit() == 0


def test_kills_workers_that_do_not_end(start: Start) -> None:
    gateway = start("ignores-all")
    gateway.process.terminate()
    gateway.wait_log("worker.killed")
    assert gateway.wait_exit() == 0


@pytest.mark.parametrize("behaviour", ["never-drains", "ignores-all"])
def test_a_second_signal_ends_it_at_once(start: Start, behaviour: str) -> None:
    gateway = start(behaviour, "server.drain_timeout_s=600")
    gateway.process.terminate()
    gateway.wait_log("drain.started")
    gateway.process.send_signal(signal.SIGINT)
    gateway.wait_log("drain.aborted")
    assert gateway.wait_exit() == 1


def test_sigterm_while_no_worker_runs_ends_it(start: Start) -> None:
    gateway = start("dies-twice")
    gateway.wait_log("worker.died")
    gateway.wait_log("worker.died")
    gateway.process.terminate()
    assert gateway.wait_exit() == 0


def test_workers_end_when_the_supervisor_dies(start: Start) -> None:
    gateway = start(workers=2)
    gateway.wait_ready()
    gateway.process.kill()
    assert gateway.wait_exit() == -signal.SIGKILL  # not before the workers have gone
