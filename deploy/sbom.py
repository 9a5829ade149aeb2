"""Prints the bill of materials of an installed mxgate: CycloneDX 1.6, as JSON.

It lists the Python distributions beside the interpreter that runs it, or those of them that a lock file names, with
licence and package URL, and which needs which. What an image's base brings along is not in it. Standard library only,
so that the image can make its own: python3 deploy/sbom.py [--lock deploy/requirements.lock]
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

ROOT = "mxgate"


def main() -> None:
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--lock", type=Path, help="only what this file names")
    lock: Path | None = parser.parse_args().lock
    names = None if lock is None else {*locked(lock.read_text("utf-8"))}
    json.dump(bill(names), sys.stdout, indent=2)
    sys.stdout.write("\n")


def locked(text: str) -> Iterator[str]:
    """The distributions that a lock file names."""
    for found in re.finditer(r"^([A-Za-z0-9._-]+)==", text, re.MULTILINE):
        yield normalised(found[1])


def bill(names: set[str] | None) -> dict[str, Any]:
    """The document, of all distributions that are installed or of those with these names; of mxgate in any case."""
    found = {normalised(each.name): each for each in distributions()}
    if names is not None:
        found = {name: each for name, each in found.items() if name in names or name == ROOT}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": {**_component(found[ROOT]), "type": "application"}},
        "components": [_component(found[name]) for name in sorted(found) if name != ROOT],
        "dependencies": [
            {"ref": _url(found[name]), "dependsOn": [*_needed(found[name], found)]} for name in sorted(found)
        ],
    }


def _component(distribution: Distribution) -> dict[str, Any]:
    about: dict[str, Any] = {
        "type": "library",
        "bom-ref": _url(distribution),
        "name": normalised(distribution.name),
        "version": distribution.version,
        "purl": _url(distribution),
    }
    if summary := _said(distribution, "Summary"):
        about["description"] = summary
    # PEP 639; older distributions have a text of their own, or say it in a classifier
    if expression := _said(distribution, "License-Expression"):
        about["licenses"] = [{"expression": expression}]
    elif licence := _licence(distribution):
        about["licenses"] = [{"license": {"name": licence}}]
    return about


def _licence(distribution: Distribution) -> str:
    classifiers = distribution.metadata.get_all("Classifier") or []
    said = [each.rpartition(" :: ")[2] for each in classifiers if each.startswith("License :: ")]
    return " or ".join(said) or _said(distribution, "License").partition("\n")[0].strip()


def _said(distribution: Distribution, field: str) -> str:
    """A field of its metadata; empty where there is none."""
    values: list[str] = distribution.metadata.get_all(field) or [""]
    return values[0]


def _needed(distribution: Distribution, found: Mapping[str, Distribution]) -> list[str]:
    """The package URLs of what it needs and what is there."""
    needed = {normalised(each) for each in distribution.requires or ()}
    return [_url(found[name]) for name in sorted(needed & found.keys())]


def _url(distribution: Distribution) -> str:
    return f"pkg:pypi/{normalised(distribution.name)}@{distribution.version}"


def normalised(requirement: str) -> str:
    """The distribution's name in a requirement, as PEP 503 compares names."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name, requirement
    return re.sub(r"[-_.]+", "-", name[0]).lower()


if __name__ == "__main__":
    main()
