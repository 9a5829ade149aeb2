"""supervisor: SIGHUP, and workers that are replaced; with real processes and fake workers (fake_worker.py)."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from tests.running import Running, Start, starting, wait_until

start = pytest.fixture(starting, name="start")


def worker_pids(gateway: Running) -> set[int]:
    """Those that serve."""
    return {worker["pid"] for worker in gateway.wait_ready()["workers"]}


# --- a reload that works ---------------------------------------------------------------------------------------


def test_new_workers_serve_and_the_old_ones_end_with_their_sessions(start: Start) -> None:
    gateway = start(workers=2)
    old = worker_pids(gateway)
    with gateway.connected() as (_, pid):
        assert pid in old
        gateway.reload()
        assert gateway.wait_log("reload.done")["generation"] == 2
        new = worker_pids(gateway)
        assert not new & old
        assert {gateway.greeted() for _ in range(20)} <= new
        wait_until(lambda: gateway.metrics()["mxgate_workers"] == 3)
        assert {worker["pid"] for worker in gateway.ask("/api/v1/status")[1]["workers"]} == new | {pid}
    wait_until(lambda: gateway.metrics()["mxgate_workers"] == 2)
    assert gateway.metrics()["mxgate_fakes_total"] == 4
    assert gateway.metrics()["mxgate_worker_restarts_total"] == 0
    gateway.process.terminate()
    assert gateway.wait_exit() == 0


def test_no_connection_is_refused_meanwhile(start: Start) -> None:
    gateway = start(workers=2)
    gateway.wait_ready()
    for _ in range(3):
        gateway.reload()
        for _ in range(100):
            assert gateway.greeted()
        gateway.wait_log("reload.done")


def test_what_is_in_force_is_shown(start: Start) -> None:
    gateway = start()
    gateway.wait_ready()
    before, metrics = gateway.ask("/api/v1/status")[1], gateway.metrics()
    assert (before["generation"], before["last_reload"]) == (1, None)
    assert metrics[f'mxgate_config_info{{hash="{before["config_hash"]}"}}'] == 1
    gateway.configure(more="pipeline.observe = true")
    gateway.reload()
    gateway.wait_log("reload.done")
    after, metrics = gateway.ask("/api/v1/status")[1], gateway.metrics()
    assert after["generation"] == 2
    assert after["config_hash"] != before["config_hash"]
    assert metrics[f'mxgate_config_info{{hash="{after["config_hash"]}"}}'] == 1
    assert after["last_reload"].pop("timestamp")
    assert after["last_reload"] == {"ok": True, "problems": [], "needs_restart": []}
    started = metrics["mxgate_start_time_seconds"]
    assert metrics["mxgate_config_last_reload_success_timestamp_seconds"] > started
    assert metrics["mxgate_config_last_reload_success"] == 1


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1), (3, 2)])
def test_the_number_of_workers_may_change(start: Start, before: int, after: int) -> None:
    gateway = start(workers=before)
    gateway.wait_ready()
    gateway.configure(workers=after)
    for _ in range(2):
        gateway.reload()
        gateway.wait_log("reload.done")
    serving = worker_pids(gateway)
    assert len(serving) == after
    # all sockets that there ever were are served
    assert {gateway.greeted() for _ in range(60)} == serving


def test_addresses_may_come_and_go(start: Start) -> None:
    gateway = start()
    gateway.wait_ready()
    first = gateway.listen
    assert gateway.greeted()
    with socket.create_server(("127.0.0.1", 0)) as free:
        gateway.listen = f"127.0.0.1:{free.getsockname()[1]}"
    gateway.configure(listen=("127.0.0.1:0", gateway.listen))
    gateway.reload()
    gateway.wait_log("reload.done")
    assert gateway.greeted()
    gateway.configure(listen=(gateway.listen,))
    gateway.reload()
    gateway.wait_log("reload.done")
    assert gateway.greeted()
    gateway.listen = first
    assert not gateway.greeted()


def test_the_admin_port_stays_and_says_so(start: Start, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    gateway = start()
    gateway.wait_ready()
    gateway.file.write_text(
        gateway.file.read_text().replace(
            '"127.0.0.1:0"\n            ', f'"127.0.0.1:1"\ntoken_file="{tmp_path}/token"\n'
        )
    )
    gateway.reload()
    assert gateway.wait_log("reload.done")["needs_restart"] == ["admin.listen", "admin.token_file"]
    assert gateway.ask("/api/v1/status")[1]["last_reload"]["needs_restart"]


# --- a reload that fails ---------------------------------------------------------------------------------------


def test_a_bad_configuration_keeps_the_old_one_and_says_what_is_wrong(start: Start) -> None:
    gateway = start(workers=2)
    serving = worker_pids(gateway)
    good = gateway.file.read_text()
    gateway.file.write_text(good.replace("workers =", "wrokers ="))
    gateway.reload()
    (problem,) = gateway.wait_log("reload.failed")["problems"]
    assert str(gateway.file) in problem
    assert "server.wrokers" in problem
    assert worker_pids(gateway) == serving
    assert gateway.metrics()["mxgate_config_last_reload_success"] == 0
    told = gateway.ask("/api/v1/status")[1]["last_reload"]
    assert (told["ok"], told["problems"]) == (False, [problem])
    gateway.file.write_text(good)
    gateway.reload()
    gateway.wait_log("reload.done")
    assert gateway.metrics()["mxgate_config_last_reload_success"] == 1


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ("refuses", "worker 1 ended with 78"),
        ("never-ready", "policies are not started"),
        ("ignores-all", "policies are not started"),
    ],
)
def test_new_workers_that_do_not_become_ready_leave_the_old_ones_alone(
    start: Start, told: str, problem: str
) -> None:
    gateway = start("impatient")
    serving = worker_pids(gateway)
    gateway.configure(told)
    gateway.reload()
    assert problem in gateway.wait_log("reload.failed")["problems"][0]
    assert worker_pids(gateway) == serving
    wait_until(lambda: gateway.metrics()["mxgate_workers"] == 1)
    gateway.configure()
    gateway.reload()
    gateway.wait_log("reload.done")
    gateway.process.terminate()
    assert gateway.wait_exit() == 0


def test_an_address_that_is_taken_keeps_the_old_ones(start: Start) -> None:
    gateway = start()
    serving = worker_pids(gateway)
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        gateway.configure(listen=("127.0.0.1:0", address))
        gateway.reload()
        (problem,) = gateway.wait_log("reload.failed")["problems"]
    assert problem == f"cannot listen on {address}: Address already in use"
    assert {gateway.greeted() for _ in range(10)} == serving == worker_pids(gateway)


def test_requests_that_come_meanwhile_are_one_more_reload(start: Start) -> None:
    gateway = start("impatient")
    gateway.wait_ready()
    gateway.configure("never-ready")
    gateway.reload()
    # its workers are there: the file has been read
    wait_until(lambda: gateway.metrics()["mxgate_workers"] == 2)
    gateway.configure()
    for _ in range(5):
        gateway.reload()
    gateway.wait_log("reload.failed")
    gateway.wait_log("reload.done")
    gateway.process.terminate()
    assert gateway.wait_exit() == 0
    assert sum("reload.started" in line for line in gateway.lines) == 2


def test_sigterm_in_the_middle_of_a_reload_ends_it(start: Start) -> None:
    gateway = start(workers=2)
    gateway.wait_ready()
    gateway.configure("never-ready")
    gateway.reload()
    gateway.wait_log("reload.started")
    wait_until(lambda: gateway.metrics()["mxgate_workers"] == 4)
    gateway.process.terminate()
    assert gateway.wait_exit() == 0
    assert not any("reload.failed" in line for line in gateway.lines)


def test_a_new_worker_that_dies_after_its_reload_is_replaced_with_its_own_configuration(start: Start) -> None:
    gateway = start("falls-silent")
    gateway.configure("sound")
    gateway.reload()
    gateway.wait_log("reload.done")
    gateway.tell(b"die")
    gateway.wait_log("worker.died")
    gateway.wait_ready()
    assert gateway.metrics()["mxgate_worker_restarts_total"] == 1


# --- workers that hang -----------------------------------------------------------------------------------------


def test_a_worker_whose_loop_stands_still_is_replaced(start: Start) -> None:
    gateway = start("impatient")
    gateway.wait_ready()
    pid = gateway.tell(b"sleep")
    assert gateway.wait_log("worker.stuck")["pid"] == pid
    assert gateway.wait_log("worker.died")["code"] == -signal.SIGKILL
    assert worker_pids(gateway) != {pid}


# --- the end ---------------------------------------------------------------------------------------------------


def test_who_waits_in_the_queue_at_the_end_is_told_to_come_again(start: Start) -> None:
    gateway = start("ignores-all")
    host, port = gateway.listen.split(":")
    with socket.create_connection((host, int(port)), timeout=30) as waiting:
        gateway.process.terminate()
        assert waiting.makefile("rb").readline().startswith(b"421 4.3.2 ")
    assert gateway.wait_exit() == 0


# --- server.reload_on_change -----------------------------------------------------------------------------------


def test_a_changed_file_is_loaded_without_a_signal(start: Start) -> None:
    gateway = start()
    plain = gateway.file.read_text()
    watching = plain.replace("[server]", "[server]\nreload_on_change = true")
    gateway.file.write_text(watching)
    gateway.reload()
    assert gateway.wait_log("reload.done")["generation"] == 2
    gateway.file.write_text(watching + "\n[pipeline]\nobserve = true\n")
    assert gateway.wait_log("reload.done")["generation"] == 3
    gateway.file.write_text(watching + "\n[pipeline]\nobserve = 5\n")
    assert "pipeline.observe" in str(gateway.wait_log("reload.failed")["problems"])
    gateway.file.write_text(plain)
    assert gateway.wait_log("reload.done")["generation"] == 4


def test_a_new_configmap_is_loaded(start: Start, tmp_path: Path) -> None:
    # kubelet: the file is a link through `..data`, which is a link that a rename replaces
    gateway = start()
    content = gateway.file.read_text().replace("[server]", "[server]\nreload_on_change = true")
    volume = tmp_path / "volume"
    for name in ("..1", "..2"):
        (volume / name).mkdir(parents=True)
        (volume / name / "mxgate.toml").write_text(content)
    (volume / "..data").symlink_to("..1")
    gateway.file.unlink()
    gateway.file.symlink_to(volume / "..data" / "mxgate.toml")
    gateway.reload()
    gateway.wait_log("reload.done")
    (volume / "..2" / "mxgate.toml").write_text(content + "\n[pipeline]\nobserve = true\n")
    (volume / "..data_tmp").symlink_to("..2")
    (volume / "..data_tmp").rename(volume / "..data")
    assert gateway.wait_log("reload.done")["generation"] == 3
