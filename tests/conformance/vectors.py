"""The third-party conformance cases: where they are, and their fake DNS as a Zone.

They lie outside the project (their licences are not ours), in the folder that MXGATE_VECTORS names.
"""

from __future__ import annotations

import json
import os
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from gateway.lookup import Mx, Record, RRType
from gateway.testing.zone import Node, Zone

FOLDER = Path(os.environ.get("MXGATE_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))


@cache
def suite(path: str) -> dict[str, Any]:
    """A file of cases, e.g. "spf-rfc7208/rfc7208-tests"; the module is skipped where the folder is absent."""
    if not FOLDER.is_dir():
        if os.environ.get("CI"):
            pytest.fail(f"the conformance cases are not in {FOLDER}", pytrace=False)
        pytest.skip(f"the conformance cases are not in {FOLDER}; see MXGATE_VECTORS", allow_module_level=True)
    loaded: dict[str, Any] = json.loads((FOLDER / f"{path}.cases.json").read_text("utf-8"))
    return loaded


@cache
def disputed(path: str) -> dict[str, Any]:
    """Our rulings on the cases of a file, by case id."""
    rulings = json.loads((FOLDER / "DISPUTED.json").read_text("utf-8"))
    return dict(rulings.get(path, {}))


def zone_of(nodes: dict[str, Any]) -> Zone:
    """The fake DNS of a case."""
    return Zone({name: _node(node) for name, node in nodes.items() if node != "NXDOMAIN"})


def _node(node: dict[str, Any]) -> Node:
    return {
        kind if kind in ("CNAME", "*") else RRType(kind): values
        if isinstance(values, str)
        else [_record(kind, value) for value in values]
        for kind, values in node.items()
        if kind in ("CNAME", "*") or kind in RRType.__members__
    }


def _record(kind: str, value: Any) -> Record:
    match kind:
        case "A" | "AAAA":
            return ip_address(value)
        case "MX":
            return Mx(value[0], value[1].removesuffix("."))
        case "TXT":
            return b"".join(part.encode("latin-1") for part in value)
        case _:
            return str(value).removesuffix(".")
