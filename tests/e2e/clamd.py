"""A real clamd from Debian, over a Unix socket and TCP, with a database of one signature: that of the EICAR file."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from tests.e2e.machine import require
from tests.e2e.net import LOOPBACK, Address, free_port, wait_until

_START_S = 100
# In two parts, so that no scanner of this machine takes this file for it. https://www.eicar.org/download-anti-malware-testfile/
EICAR = b"X5O!P%@AP[4\\PZX54(P^)7CC)7}$EICAR-STANDARD-" + b"ANTIVIRUS-TEST-FILE!$H+H*"
SIGNATURE = "Mxgate.Eicar.UNOFFICIAL"
_CONFIG = """
LocalSocket {directory}/clamd.ctl
TCPSocket {port}
TCPAddr {host}
DatabaseDirectory {directory}/db
TemporaryDirectory {directory}
PidFile {directory}/clamd.pid
LogFile {directory}/clamd.log
Foreground yes
StreamMaxLength {max_bytes}
OfficialDatabaseOnly no
ConcurrentDatabaseReload no
SelfCheck 0
"""


class ClamdServer:
    """One clamd from construction to `close`, which takes streams of at most `max_bytes`."""

    def __init__(self, max_bytes: int = 1_000_000) -> None:
        require(program="clamd")
        self.directory = Path(tempfile.mkdtemp(prefix="mxgate-clamd-"))
        self.port = free_port()
        # it may give up root for a user of its own
        self.directory.chmod(0o755)
        database = self.directory / "db"
        database.mkdir()
        # a hash and the length of a file or attachment; and the text wherever it stands
        digest = hashlib.md5(EICAR, usedforsecurity=False).hexdigest()
        (database / "mxgate.hdb").write_text(f"{digest}:{len(EICAR)}:Mxgate.Eicar\n")
        (database / "mxgate.ndb").write_text(f"Mxgate.Eicar:0:*:{EICAR.hex()}\n")
        config = self.directory / "clamd.conf"
        config.write_text(
            _CONFIG.format(directory=self.directory, port=self.port, host=LOOPBACK, max_bytes=max_bytes)
        )
        with (self.directory / "out").open("wb") as out:
            self._process = subprocess.Popen(
                ["clamd", "--config-file", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        try:
            wait_until(self._answers, within_s=_START_S, what="clamd answers")
        except BaseException:
            self.close()
            raise

    @property
    def socket(self) -> str:
        return str(self.directory / "clamd.ctl")

    @property
    def address(self) -> Address:
        return (LOOPBACK, self.port)

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _answers(self) -> bool:
        assert self._process.poll() is None, (self.directory / "out").read_text("utf-8", "replace")
        try:
            with socket.create_connection(self.address, timeout=5) as connection:
                connection.sendall(b"zPING\0")
                return connection.recv(100) == b"PONG\0"
        except OSError:
            return False
