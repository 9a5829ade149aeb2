"""dkim_sign: our users' mail leaves with DKIM signatures of their domain (RFC 6376, RSA; RFC 8463, Ed25519).

What is signed is what is sent: the header with all that the gateway has put there, the body as it came. The key is
that of the author domain, or of the closest domain above it that has one; several keys of a domain (selectors,
algorithms) make a signature each. Mail of other domains leaves unsigned, and so does that of strangers, wherever this
is planned: our signature would make a forged author a proven one.

Keys are PEM files, read again when they change. One that cannot be read any more is told in the log, and the last one
goes on signing. A message that cannot be signed is deferred (`on_error`), since unsigned it would be taken for forged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.api import (
    AddField,
    AddressError,
    AddressSource,
    AuthorError,
    Domain,
    Header,
    OnError,
    Policy,
    Services,
    Session,
    Slot,
    Transaction,
    Trust,
    Verdict,
    author_domain,
    proceed,
)
from policies.verify.dkim.sign import (
    FIELD_NAME,
    MODE,
    OVERSIGNED,
    SIGNED,
    KeyFileError,
    PrivateKey,
    read_key,
    signature,
)

_LOOK_AT_MOST_EVERY_S = 5.0
_SELECTOR = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?(?:\.[a-z0-9_-]{1,63})*", re.IGNORECASE)
# RFC 5322 2.2: a name is printable ASCII without the colon; ";" would end h=
_FIELD_NAME = re.compile(r"[!-9<-~]{1,77}")


@dataclass(frozen=True, slots=True)
class KeySettings:
    """One table of [[submission.policy.dkim_sign.settings.keys]]."""

    domain: str = field(metadata={"doc": "d=: the author domain, or one above it"})
    selector: str = field(metadata={"doc": "s=: the public key is at SELECTOR._domainkey.DOMAIN"})
    key_file: Path = field(metadata={"doc": "PEM file with the private key, RSA or Ed25519, unencrypted"})

    def __post_init__(self) -> None:
        try:
            Domain.parse(self.domain)
        except AddressError as exc:
            raise ValueError(f"domain: {exc}") from None
        if not _SELECTOR.fullmatch(self.selector):
            raise ValueError(f"{self.selector!r} is no selector: letters, digits, '-' and '.'")


@dataclass(frozen=True, slots=True)
class DkimSignSettings:
    """The table [submission.policy.dkim_sign.settings]."""

    keys: tuple[KeySettings, ...] = field(
        default=(), metadata={"doc": "the keys; each of the author's domain makes a signature"}
    )
    signed_fields: tuple[str, ...] = field(
        default=SIGNED, metadata={"doc": "names of fields that are signed where they are there"}
    )
    oversigned_fields: tuple[str, ...] = field(
        default=OVERSIGNED,
        metadata={"doc": "names of fields of which none can be added to a signed message"},
    )

    def __post_init__(self) -> None:
        if not self.keys:
            raise ValueError("keys is empty: nothing could be signed")
        names = (*self.signed_fields, *self.oversigned_fields)
        if wrong := [name for name in names if not _FIELD_NAME.fullmatch(name)]:
            raise ValueError(f"{wrong[0]!r} is no field name")
        # RFC 6376 5.4
        if "from" not in map(str.lower, names):
            raise ValueError("From must be signed")


class DkimSign(Policy[DkimSignSettings]):
    """Chooses the keys at the header, signs when the message leaves."""

    name = "dkim_sign"
    Settings = DkimSignSettings
    on_error = OnError.DEFER

    def __init__(self, settings: DkimSignSettings, services: Services) -> None:
        super().__init__(settings, services)
        keys: dict[str, list[_Key]] = {}
        for each in settings.keys:
            keys.setdefault(Domain.parse(each.domain), []).append(_Key(each, services))
        self._keys: Mapping[str, Sequence[_Key]] = keys
        self._signed = tuple(map(str.lower, settings.signed_fields))
        self._oversigned = tuple(map(str.lower, settings.oversigned_fields))

    async def start(self) -> None:
        """Raises OSError or KeyFileError when a key cannot be read now."""
        for keys in self._keys.values():
            for key in keys:
                key.load()

    def on_header(self, tx: Transaction) -> None:
        """Find the keys, and have the body hashed where there are some."""
        assert tx.message is not None  # the engine's word
        if not _is_ours(tx.session):
            return
        keys = self._keys_for(tx.message.header)
        if keys:
            tx.message.digests.want(MODE)
            _KEYS.put(tx, keys)

    async def on_send(self, tx: Transaction, header: Header) -> Verdict:
        """Sign with each of the keys."""
        keys = _KEYS.get(tx)
        if not keys:
            return proceed(reason="no_key" if _is_ours(tx.session) else "stranger")
        assert tx.message is not None
        digest = tx.message.digests.get(MODE).sha256
        now = self.services.clock.now()
        edits = [
            AddField(
                FIELD_NAME,
                signature(
                    header,
                    digest,
                    key.current(),
                    domain=key.domain,
                    selector=key.selector,
                    now=now,
                    signed=self._signed,
                    oversigned=self._oversigned,
                ),
            )
            for key in keys
        ]
        return proceed(reason="signed", edits=edits)

    def _keys_for(self, header: Header) -> Sequence[_Key]:
        try:
            domain: str = author_domain(header)
        except AuthorError:
            return ()
        while domain:
            if keys := self._keys.get(domain):
                return keys
            domain = domain.partition(".")[2]
        return ()


def _is_ours(session: Session) -> bool:
    """Whether we vouch for what the client sends; an address that hides its clients is nobody's."""
    if session.trust is Trust.TRUSTED:
        return session.address_source is not AddressSource.HIDDEN
    return session.trust is Trust.AUTHENTICATED


class _Key:
    """A key file as it was when it was read last."""

    def __init__(self, settings: KeySettings, services: Services) -> None:
        self.domain = Domain.parse(settings.domain)
        self.selector = settings.selector
        self._file = settings.key_file
        self._services = services
        self._key: PrivateKey | None = None
        self._stamp = (0, 0, 0)
        self._look_at = 0.0

    def load(self) -> None:
        """Read the file. Raises OSError and KeyFileError."""
        stat = self._file.stat()
        pem = self._file.read_bytes()
        # behind reading: a file that becomes readable (chown, chmod) looks the same
        self._stamp = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        try:
            self._key = read_key(pem)
        except KeyFileError as exc:
            raise KeyFileError(f"{self._file}: {exc}") from None

    def current(self) -> PrivateKey:
        """The key, read again where the file has changed."""
        now = self._services.clock.monotonic()
        if now >= self._look_at:
            self._look_at = now + _LOOK_AT_MOST_EVERY_S
            try:
                stat = self._file.stat()
                if (stat.st_mtime_ns, stat.st_ino, stat.st_size) != self._stamp:
                    self.load()
            except (OSError, KeyFileError) as exc:
                self._services.log.error("key.reload_failed", error=str(exc))
        assert self._key is not None  # start() has loaded it
        return self._key


_KEYS = Slot[Sequence[_Key]]("dkim_sign.keys")
