"""Where a value of the configuration came from, and what is wrong with it.

A ConfigError holds every problem that was found, so that an operator repairs a file in one go. Nothing here
shows a secret: excerpts of a file pass through `redact`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from gateway.errors import GatewayError

KeyPath = tuple[str | int, ...]
"""A place in the configuration: ("relay", "routes", 0, "downstream")."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_SECRETS = ("password", "passwd", "passphrase", "secret", "token", "apikey", "credential", "privatekey")
_SECRET_NAME = re.compile(
    r"(?i)(?:^|[_-])(?:password|passwd|passphrase|secret|token|api_?key|credential|private_?key)s?$"
)
_ASSIGNMENT = re.compile(r"([A-Za-z0-9_-]+)[\"']?\s*[=:]\s*(?=\S)")
_URL_CREDENTIALS = re.compile(r"://[^/\s\"']*@")
HIDDEN = "***"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value came from. `line` and `column` count from 1, 0 means unknown; `excerpt` is that line."""

    source: str
    line: int = 0
    column: int = 0
    excerpt: str = ""

    def __str__(self) -> str:
        """`mxgate.toml:12:1`, `environment MXGATE__SERVER__HOSTNAME`, `--set server.hostname` or `default`."""
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


DEFAULT = Origin("default")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. `path` is dotted and empty when the whole file is meant."""

    path: str
    message: str
    origin: Origin = DEFAULT

    def __str__(self) -> str:
        where = "" if self.origin == DEFAULT else f"{self.origin}: "
        what = f"{self.path}: " if self.path else ""
        return f"{where}{what}{self.message}"


class ConfigError(GatewayError):
    """The configuration cannot be used; holds all problems that were found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def dotted(path: KeyPath) -> str:
    """`relay.routes[0].downstream`; a key that is not bare is quoted, as TOML would have it."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            key = part if _BARE_KEY.fullmatch(part) else quoted(part)
            text += f".{key}" if text else key
    return text


def quoted(text: str) -> str:
    """The text as a basic string of TOML, on one line."""
    # The escapes of JSON are TOML's too; but TOML wants DEL escaped, and no surrogates for what is beyond U+FFFF.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?` for the closest known word, or nothing."""
    close = get_close_matches(word, tuple(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def is_secret(key: str) -> bool:
    """Whether a key of this name holds a secret; `*_file` names a path and does not."""
    return _SECRET_NAME.search(key) is not None


def redact(line: str) -> str:
    """The text without the credentials of URLs, and up to the first value of a key that is named like a secret.

    What is nearly such a name counts too: an excerpt is often shown because a key is misspelt.
    """
    line = _URL_CREDENTIALS.sub(f"://{HIDDEN}@", line)
    for found in _ASSIGNMENT.finditer(line):
        if is_secret(found[1]) or _resembles_secret(found[1]):
            return line[: found.end()] + HIDDEN
    return line


def _resembles_secret(key: str) -> bool:
    parts = re.split(r"[_-]", key.lower())
    return parts[-1].removesuffix("s").endswith(_SECRETS) or any(
        get_close_matches(word, _SECRETS, n=1, cutoff=0.8) for word in (parts[-1], "".join(parts[-2:]))
    )
