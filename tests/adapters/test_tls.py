"""tls: handshakes use the certificate that is in the files now, and a bad one never replaces a good one."""

from __future__ import annotations

import contextlib
import os
import ssl
import subprocess
import warnings
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

from gateway.adapters.tls import CertificateError, ServerTls
from tests.fakes import FakeLog

NAME = "mx.example.org"


class Files:
    """A certificate and its key in two files, and clients that trust its issuers."""

    def __init__(self, folder: Path) -> None:
        self.cert, self.key = folder / "cert.pem", folder / "key.pem"
        self.trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        self.log = FakeLog()

    def issue(self, kind: trustme.KeyType = trustme.KeyType.ECDSA) -> trustme.LeafCert:
        """A new certificate, from an authority of its own, in the files."""
        authority = trustme.CA()
        authority.configure_trust(self.trusting)
        certificate = authority.issue_cert(NAME, key_type=kind)
        self.write(self.cert, b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
        self.write(self.key, certificate.private_key_pem.bytes())
        return certificate

    def write(self, path: Path, content: bytes) -> None:
        """Replace a file as certificate tools do: its inode is another one."""
        new = path.with_suffix(".new")
        new.write_bytes(content)
        new.replace(path)

    def server(self) -> ServerTls:
        return ServerTls(str(self.cert), str(self.key), self.log)

    @property
    def events(self) -> list[str]:
        return [line.event for line in self.log.lines]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_it_says_when_the_certificate_in_use_ends(files: Files) -> None:
    authority = trustme.CA()
    ends = datetime(2040, 1, 2, 3, 4, 5, tzinfo=UTC)
    certificate = authority.issue_cert(NAME, not_after=ends)
    chain = b"".join(blob.bytes() for blob in certificate.cert_chain_pems)
    files.write(files.cert, chain)
    files.write(files.key, certificate.private_key_pem.bytes())
    server = files.server()
    assert server.expires_at == ends.timestamp()
    # the first that ends counts, as it does for who verifies the chain
    sooner = authority.issue_cert("intermediate.example", not_after=ends - timedelta(days=1))
    files.write(files.cert, chain + sooner.cert_chain_pems[0].bytes())
    server.refresh()
    assert server.expires_at == (ends - timedelta(days=1)).timestamp()
    files.write(files.cert, b"nothing")
    server.refresh()
    assert server.expires_at == (ends - timedelta(days=1)).timestamp()


def handshake(server: ssl.SSLContext, client: ssl.SSLContext, name: str | None = NAME) -> ssl.SSLObject:
    """The client's side of a finished handshake, without any socket."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    for _ in range(4):
        for side in sides:
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    assert sides[0].version()
    return sides[0]


def serial(client: ssl.SSLObject) -> str:
    certificate = client.getpeercert()
    assert certificate
    return str(certificate["serialNumber"])


def test_handshakes_are_tls_1_2_or_newer(files: Files) -> None:
    files.issue()
    server = files.server().context

    assert handshake(server, files.trusting).version() == "TLSv1.3"
    files.trusting.maximum_version = ssl.TLSVersion.TLSv1_2
    assert handshake(server, files.trusting).version() == "TLSv1.2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        files.trusting.minimum_version = ssl.TLSVersion.TLSv1
        files.trusting.maximum_version = ssl.TLSVersion.TLSv1_1
        files.trusting.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(ssl.SSLError):
            handshake(server, files.trusting)


def test_renegotiation_is_off(files: Files) -> None:
    files.issue()

    assert files.server().context.options & ssl.OP_NO_RENEGOTIATION


def test_a_client_need_not_name_the_server(files: Files) -> None:
    files.issue()
    files.trusting.check_hostname = False

    assert serial(handshake(files.server().context, files.trusting, name=None))


def test_a_renewed_certificate_is_used_from_the_next_handshake_on(files: Files) -> None:
    files.issue()
    server = files.server()
    first = serial(handshake(server.context, files.trusting))

    files.issue()
    assert serial(handshake(server.context, files.trusting)) == first
    server.refresh()

    assert serial(handshake(server.context, files.trusting)) != first
    assert files.events == ["tls.reloaded"]


def mounted(folder: Path, number: int) -> None:
    """As Kubernetes mounts a Secret: the names are links through `..data`, which is changed at once by a rename."""
    data, new = folder / "..data", folder / "..data_tmp"
    new.symlink_to(f"..{number}")
    new.replace(data)


def test_a_certificate_is_followed_through_links(tmp_path: Path) -> None:
    made = []
    for number in (1, 2):
        folder = tmp_path / f"..{number}"
        folder.mkdir()
        made.append(Files(folder))
        made[-1].issue()
    mounted(tmp_path, 1)
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).symlink_to(f"..data/{name}")
    log = FakeLog()
    server = ServerTls(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"), log)
    first = serial(handshake(server.context, made[0].trusting))
    mounted(tmp_path, 2)
    server.refresh()
    assert serial(handshake(server.context, made[1].trusting)) != first
    assert [line.event for line in log.lines] == ["tls.reloaded"]


def test_what_is_wrong_with_the_files_is_shown_without_their_names(files: Files) -> None:
    files.issue()
    server = files.server()
    assert server.state() == {"last_error": ""}
    files.write(files.key, b"no key")
    server.refresh()
    assert server.state()["last_error"]
    assert "/" not in server.state()["last_error"]
    files.cert.unlink()
    server.refresh()
    assert server.state() == {"last_error": "No such file or directory"}
    files.issue()
    server.refresh()
    assert server.state() == {"last_error": ""}


def test_files_that_did_not_change_are_not_loaded_again(files: Files) -> None:
    files.issue()
    server = files.server()

    for _ in range(3):
        server.refresh()

    assert files.events == []


def test_a_certificate_of_another_kind_of_key_leaves_nothing_of_the_old_one(files: Files) -> None:
    files.issue(trustme.KeyType.RSA)
    server = files.server()
    old_fashioned = files.trusting
    old_fashioned.maximum_version = ssl.TLSVersion.TLSv1_2
    old_fashioned.set_ciphers("ECDHE-RSA-AES128-GCM-SHA256")
    assert handshake(server.context, old_fashioned).version() == "TLSv1.2"

    files.issue(trustme.KeyType.ECDSA)
    server.refresh()

    with pytest.raises(ssl.SSLError, match=r"NO_SHARED_CIPHER|HANDSHAKE_FAILURE"):
        handshake(server.context, old_fashioned)
    old_fashioned.set_ciphers("ECDHE-ECDSA-AES128-GCM-SHA256")
    assert handshake(server.context, old_fashioned).version() == "TLSv1.2"


@pytest.mark.parametrize("name", ["cert", "key"])
@pytest.mark.parametrize("content", [b"", b"no certificate", None], ids=["empty", "junk", "missing"])
def test_a_bad_file_does_not_replace_a_good_one_and_is_logged_once(
    files: Files, name: str, content: bytes | None
) -> None:
    files.issue()
    server = files.server()
    first = serial(handshake(server.context, files.trusting))

    path: Path = getattr(files, name)
    if content is None:
        path.unlink()
    else:
        files.write(path, content)
    for _ in range(3):
        server.refresh()

    assert serial(handshake(server.context, files.trusting)) == first
    assert files.events == ["tls.reload_failed"]
    assert str(files.cert) in files.log.lines[0].keys["error"]
    files.issue()
    server.refresh()
    assert serial(handshake(server.context, files.trusting)) != first, "repaired"
    assert files.events == ["tls.reload_failed", "tls.reloaded"]


def test_a_pair_that_is_replaced_one_file_after_the_other_is_taken_when_it_fits(files: Files) -> None:
    files.issue()
    server = files.server()
    first = serial(handshake(server.context, files.trusting))
    old_key = files.key.read_bytes()
    files.issue()
    new_key = files.key.read_bytes()

    files.write(files.key, old_key)
    server.refresh()
    assert serial(handshake(server.context, files.trusting)) == first
    files.write(files.key, new_key)
    server.refresh()

    assert serial(handshake(server.context, files.trusting)) != first


@pytest.mark.parametrize("name", ["cert", "key"])
@pytest.mark.parametrize("content", [b"no certificate", None], ids=["junk", "missing"])
def test_does_not_start_with_a_bad_file(files: Files, name: str, content: bytes | None) -> None:
    files.issue()
    path: Path = getattr(files, name)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)

    with pytest.raises(CertificateError, match=r"cert\.pem with key .*key\.pem"):
        files.server()


def test_does_not_start_with_a_key_that_does_not_fit(files: Files) -> None:
    files.issue()
    key = files.key.read_bytes()
    files.issue()
    files.write(files.key, key)

    with pytest.raises(CertificateError, match=r"KEY_VALUES_MISMATCH|mismatch"):
        files.server()


def test_does_not_ask_the_terminal_for_the_password_of_a_key(files: Files) -> None:
    files.issue(trustme.KeyType.RSA)
    encrypted = files.key.with_suffix(".encrypted")
    subprocess.run(
        ["openssl", "rsa", "-aes256", "-passout", "pass:secret", "-in", files.key, "-out", encrypted],
        check=True,
        capture_output=True,
        env={"PATH": os.environ["PATH"]},
    )
    encrypted.replace(files.key)

    with pytest.raises(CertificateError):
        files.server()
