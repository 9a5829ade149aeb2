"""A configuration with the workers that it asks for; each that is loaded makes a new generation."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from gateway.config import Config
from gateway.config.render import show
from gateway.listening import Listening

# Every integer up to this many bits is one that a metric can show.
_HASH_BITS = 48


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """A configuration with the sockets and the number of workers that it asks for."""

    number: int
    config: Config
    listening: Listening
    workers: int


def worker_count(config: Config) -> int:
    """How many workers it asks for; "auto" is one for each core that this process may use."""
    count = config.server.workers
    return len(os.sched_getaffinity(0)) if count == "auto" else count


def config_hash(config: Config) -> str:
    """Of what `mxgate config show` prints, so of no secret; hexadecimal."""
    shown = "\n".join(f"{'.'.join(map(str, key.path))} = {key.value}" for key in show(config))
    return hashlib.sha256(shown.encode("utf-8", "surrogatepass")).hexdigest()[: _HASH_BITS // 4]
