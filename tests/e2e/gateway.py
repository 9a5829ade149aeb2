"""The real program as a subprocess: `mxgate serve` with a configuration that a test makes.

Started through the console script beside the running interpreter, as an operator would. `stop` drains it with
SIGTERM and fails the test when the exit code is not 0 or when a traceback stands in its log.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from tests.e2e.client import Client
from tests.e2e.net import LOOPBACK, Address, free_port, wait_until
from tests.e2e.nowhere import nowhere

HOSTNAME = "mx.example.org"
COMMAND = str(Path(sys.executable).parent / "mxgate")
START_S = 30
STOP_S = 15

# A value of the configuration; sections are mappings.
Value = str | int | float | bool | list["Value"] | dict[str, "Value"]
Config = Mapping[str, Value]
# [relay]: faults of the downstream show after a second instead of minutes.
QUICK_RELAY: dict[str, Value] = {"connect_timeout_s": 1, "reply_timeout_s": 1, "final_timeout_s": 1}


def config_for(downstream: Address, *, overrides: Config | None = None) -> dict[str, Value]:
    """A configuration for example.org in front of one downstream; `overrides` is merged over it, section by section.

    No name exists in its DNS, and nothing is asked of this machine's name servers. Content needs no From field.
    """
    dns_host, dns_port = nowhere()
    base: dict[str, Value] = {
        "server": {"hostname": HOSTNAME, "listen": [f"{LOOPBACK}:{free_port()}"]},
        "relay": {
            "domains": ["example.org"],
            "routes": [{"domains": ["*"], "downstream": [f"{downstream[0]}:{downstream[1]}"]}],
        },
        "dns": {"nameservers": [f"{dns_host}:{dns_port}"]},
        "admin": {"listen": f"{LOOPBACK}:{free_port()}"},
        "policy": {
            "dmarc": {"settings": {"on_bad_from": "mark"}},
            # a stranger's mail is not deferred but where that is the subject
            "greylist": {"mode": "off"},
        },
    }
    return _merged(base, overrides or {})


def route(*groups: Sequence[Address], domains: Sequence[str] = ("*",), **keys: Value) -> dict[str, Value]:
    """One of `[[relay.routes]]`: downstreams in groups, the preferred one first; one group is written flat."""
    written: list[list[Value]] = [[f"{host}:{port}" for host, port in group] for group in groups]
    return {"domains": list(domains), "downstream": written[0] if len(written) == 1 else [*written], **keys}


def to_toml(config: Config) -> str:
    """The configuration as a TOML file, one table a section."""
    tables = (
        f"[{section}]\n" + "".join(f"{key} = {_toml_value(value)}\n" for key, value in values.items())
        for section, values in config.items()
        if isinstance(values, dict)
    )
    return "\n".join(tables)


class Gateway:
    """One running gateway. `address` is its first plain listener, `tls_address` the first of implicit TLS.

    `submission` and `submission_tls` are the same of [submission].
    """

    def __init__(
        self,
        config: Config,
        directory: Path,
        command: Sequence[str] = (COMMAND,),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.config_file = directory / "mxgate.toml"
        self.config_file.write_text(to_toml(config), encoding="utf-8")
        self._log_file = directory / "mxgate.log"
        self._log = self._log_file.open("ab")
        self.address = _listener(config, "server", "listen")
        self.tls_address = _listener(config, "server", "listen_tls")
        self.submission = _listener(config, "submission", "listen")
        self.submission_tls = _listener(config, "submission", "listen_tls")
        self._admin = _listener(config, "admin", "listen")
        # its own session: a signal for the test run's group is not one for the gateway
        self.process = subprocess.Popen(
            [*command, "serve", "--config", str(self.config_file)],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            pass_fds=pass_fds,
        )

    def wait_ready(self) -> None:
        """Return when /readyz says 200; AssertionError with the log when it does not, or when the process ends."""

        def is_ready() -> bool:
            assert self.process.poll() is None, f"exit {self.process.returncode} at start"
            return self.admin_status("/readyz") == 200

        try:
            wait_until(is_ready, within_s=START_S, what="/readyz answers 200")
        except AssertionError as exc:
            raise AssertionError(f"{exc}\n{self.log()}") from exc

    def wait_announces(self, extension: str) -> None:
        """Return when EHLO announces the extension: some wait for the downstream's own EHLO (DESIGN.md section 6).

        Its keyword is enough, and its whole line will do.
        """

        def is_announced() -> bool:
            return any(extension in {text, text.split(" ")[0]} for text in self.ehlo_lines()[1:])

        wait_until(is_announced, within_s=10, what=f"EHLO announces {extension}")

    def ehlo_lines(self) -> tuple[str, ...]:
        """The texts of the reply to EHLO on a new connection."""
        with self.connect() as client:
            return client.hello().texts

    def connect(self, source: str | None = None) -> Client:
        """A raw client, nothing read yet; `source` is its address."""
        return Client(self.address, source=source)

    def submit(self, source: str | None = None) -> Client:
        """The same for submission."""
        return Client(self.submission, source=source)

    def log(self) -> str:
        """What it wrote to stdout and stderr so far."""
        return self._log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def admin_address(self) -> Address:
        """Of its admin port."""
        return self._admin

    def reload(self) -> None:
        """SIGHUP. Does not wait."""
        self.process.send_signal(signal.SIGHUP)

    def admin(self, path: str) -> tuple[int, str]:
        """Status and body of GET on the admin port; OSError when nobody answers."""
        url = f"http://{self._admin[0]}:{self._admin[1]}{path}"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as exc:
            with exc:
                return exc.code, exc.read().decode()

    def admin_status(self, path: str) -> int:
        """The status of GET on the admin port; 0 when nobody answers."""
        try:
            return self.admin(path)[0]
        except OSError:
            return 0

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of this name that carry all these labels; 0 when there are none."""
        total = 0.0
        for line in self.admin("/metrics")[1].splitlines():
            sample = re.fullmatch(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
            if sample and all(
                f'{label}="{value}"' in (sample[1] or "").split(",") for label, value in labels.items()
            ):
                total += float(sample[2])
        return total

    def worker_pids(self) -> list[int]:
        """The processes that the supervisor forked and that still run."""
        return [pid for pid in _all_pids() if _parent_of(pid) == self.process.pid]

    def terminate(self) -> None:
        """SIGTERM: drain and end. Does not wait."""
        self.process.send_signal(signal.SIGTERM)

    def wait_exit(self, within_s: float = STOP_S) -> int:
        """The exit code; AssertionError with the log when it still runs after that time."""
        try:
            return self.process.wait(timeout=within_s)
        except subprocess.TimeoutExpired as exc:
            raise AssertionError(f"still running after {within_s} s:\n{self.log()}") from exc

    def stop(self) -> None:
        """Drain, then check that it ended well; whatever happens, nothing of it is left running."""
        workers = self.worker_pids()
        try:
            if self.process.poll() is None:
                self.terminate()
            code = self.wait_exit()
            assert code == 0, f"exit {code} after SIGTERM:\n{self.log()}"
            self.assert_clean_log()
        finally:
            self.kill(workers)

    def kill(self, workers: list[int] | None = None) -> None:
        """End it at once, workers too, without any check."""
        pids = [*(self.worker_pids() if workers is None else workers)]
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for pid in pids:
            if is_running(pid) and _command_line(pid).count(str(self.config_file)):
                os.kill(pid, signal.SIGKILL)
        self._log.close()

    def assert_clean_log(self) -> None:
        """AssertionError when a traceback stands in the log."""
        log = self.log()
        assert "Traceback" not in log, log


class StartGateway(Protocol):
    """The fixture `start_gateway`."""

    def __call__(self, downstream: Address, overrides: Config | None = None) -> Gateway: ...


def shared_gateway(downstream: Address, overrides: Config, directory: Path) -> Iterator[Gateway]:
    """A gateway for many tests: the body of a fixture, which checks and stops it after the last one."""
    gateway = Gateway(config_for(downstream, overrides=overrides), directory)
    try:
        gateway.wait_ready()
        yield gateway
        gateway.stop()
    finally:
        gateway.kill()


def run_mxgate(*arguments: str, timeout_s: float = 15) -> subprocess.CompletedProcess[str]:
    """Run a command of mxgate to its end; never raises for its exit code."""
    return subprocess.run(
        [COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _parent_of(pid: int) -> int:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0
    # the fields behind the command's name, which may hold blanks: state, parent
    return int(stat.rpartition(")")[2].split()[1])


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _merged(base: Config, overrides: Config) -> dict[str, Value]:
    merged = dict(base)
    for key, value in overrides.items():
        below = merged.get(key)
        merged[key] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _toml_value(value: Value) -> str:
    match value:
        case bool() | str():
            # a JSON string is a TOML basic string, and so are true and false
            return json.dumps(value, ensure_ascii=False)
        case int() | float():
            return str(value)
        case list():
            return f"[{', '.join(map(_toml_value, value))}]"
        case dict():
            return (
                f"{{{', '.join(f'{json.dumps(key)} = {_toml_value(item)}' for key, item in value.items())}}}"
            )


def _listener(config: Config, section: str, key: str) -> Address:
    table = config.get(section, {})
    assert isinstance(table, dict)
    listen = table.get(key, [])
    first = listen[0] if isinstance(listen, list) and listen else listen
    host, _, port = first.rpartition(":") if isinstance(first, str) else ("", "", "0")
    return host, int(port)
