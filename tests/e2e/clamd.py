"""A real clamd from Debian, over a Unix socket and TCP, with a database of one signature: that of the EICAR file."""

from __future__ import annotations

import hashlib
import socket

from tests.e2e.daemon import Daemon
from tests.e2e.net import LOOPBACK, Address

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


class ClamdServer(Daemon):
    """One clamd, which takes streams of at most `max_bytes`."""

    def __init__(self, max_bytes: int = 1_000_000) -> None:
        super().__init__("clamd")
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
        self.start(["--config-file", str(config)])

    @property
    def socket(self) -> str:
        return str(self.directory / "clamd.ctl")

    @property
    def address(self) -> Address:
        return (LOOPBACK, self.port)

    def answers(self) -> bool:
        with socket.create_connection(self.address, timeout=5) as connection:
            connection.sendall(b"zPING\0")
            return connection.recv(100) == b"PONG\0"
