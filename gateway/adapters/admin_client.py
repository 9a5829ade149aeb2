"""Asks the admin port of a gateway that runs, for the commands; by the standard library's HTTP, without any proxy.

Whatever listens there is not trusted: what it says is bounded in time and size, and is JSON or an AdminError.
"""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from urllib.parse import urlencode

from gateway.errors import GatewayError

TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024 * 1024
# What an admin port that listens on all addresses is reached by from its own machine.
_OWN_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


class AdminError(GatewayError):
    """The admin port does not answer, or not as one does; the text says so on one line."""


def ask_admin(
    host: str, port: int, path: str, query: Mapping[str, str], *, token: bytes = b""
) -> tuple[int, Mapping[str, object]]:
    """GET a page: its HTTP status and the object in it. Raises AdminError."""
    host = _OWN_ADDRESS.get(host, host)
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    headers = {"Authorization": b"Bearer " + token} if token else {}
    try:
        connection.request("GET", f"{path}?{urlencode(query)}" if query else path, headers=headers)
        with connection.getresponse() as response:
            status, body = response.status, response.read(MAX_ANSWER_BYTES + 1)
    except OSError as exc:
        why = exc.strerror or ("no answer in time" if isinstance(exc, TimeoutError) else type(exc).__name__)
        raise AdminError(f"the admin port {where} does not answer: {why}; does the gateway run?") from exc
    except (http.client.HTTPException, ValueError) as exc:
        raise AdminError(f"what answers at {where} is no admin port: {type(exc).__name__}") from exc
    finally:
        connection.close()
    if len(body) > MAX_ANSWER_BYTES:
        raise AdminError(f"the answer of {where} is larger than {MAX_ANSWER_BYTES} bytes")
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError) as exc:
        raise AdminError(f"what answers at {where} is no admin port: status {status}, and no JSON") from exc
    if not isinstance(answer, dict):
        raise AdminError(f"what answers at {where} is no admin port: JSON, but no object")
    return status, answer
