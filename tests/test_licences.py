"""What we depend on may be used with Apache-2.0 and has no hole that we know of; without a network."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.message import Message
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import cast

import pytest

ROOT = Path(__file__).parents[1]
LOCKS = (
    ROOT / "requirements.lock",
    ROOT / "deploy" / "requirements.lock",
    ROOT / "tests" / "fuzz" / "requirements.lock",
)
# As they stand in metadata: SPDX expressions, classifiers' last words, and what people wrote before there was either
COMPATIBLE = {
    *("Apache-2.0", "Apache", "Apache 2.0", "Apache Software License", "MIT", "MIT License", "MIT-0", "ISC"),
    *(
        "ISC License (ISCL)",
        "BSD",
        "BSD License",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "BSD-like",
        "0BSD",
        "PSF-2.0",
    ),
    *("Python Software Foundation License", "Unlicense", "Zlib", "CC0-1.0"),
}
# Of single files, and only for them: it may stand beside Apache-2.0 (the ASF's category B), unchanged as we install it
COMPATIBLE |= {"MPL-2.0", "Mozilla Public License 2.0 (MPL 2.0)"}
# Packages that say it in no field of their metadata; looked up by hand in what they ship.
BY_HAND = {"atheris": "Apache-2.0"}
# The first version without it; in what we or our dependencies use. (Those that only reach others are not here.)
ADVISORIES = (
    ("aiohttp", "3.12.14", "CVE-2025-53643"),
    ("aiosmtpd", "1.4.6", "CVE-2024-34083"),
    ("certifi", "2024.7.4", "CVE-2024-39689"),
    ("cryptography", "44.0.1", "CVE-2024-12797"),
    ("dnspython", "2.6.1", "CVE-2023-29483"),
    ("h11", "0.16.0", "CVE-2025-43859"),
    ("idna", "3.7", "CVE-2024-3651"),
    ("redis", "4.5.4", "CVE-2023-28859"),
)


def pins(lock: Path) -> dict[str, str]:
    """Package -> version."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;]+)", lock.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def licences(package: str) -> set[str]:
    """Every licence that it is under; those of an alternative ("OR") are one string."""
    if package in BY_HAND:
        return {BY_HAND[package]}
    said = cast("Message", metadata(package))
    if expression := said.get("License-Expression"):
        return {*re.split(r"\s+AND\s+", expression)}
    classifiers = [
        each.rpartition(" :: ")[2] for each in said.get_all("Classifier") or [] if "License ::" in each
    ]
    # "OSI Approved" and "DFSG approved" alone name none
    named = {each for each in classifiers if "pproved" not in each}
    if len(named) > 1:
        return {" OR ".join(sorted(named))}
    return named or {str(said.get("License") or "").strip().splitlines()[0] if said.get("License") else ""}


def is_one_of(licence: str) -> bool:
    """Whether we may choose a licence that is compatible."""
    return any(COMPATIBLE & {each, each.strip("() ")} for each in re.split(r"\s+OR\s+", licence))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: str(lock.relative_to(ROOT)))
def test_every_licence_is_compatible_with_ours(lock: Path) -> None:
    wrong: dict[str, set[str]] = {}
    seen = 0
    for package in pins(lock):
        try:
            found = licences(package)
        except PackageNotFoundError:  # of another platform, or of `./dev fuzz --atheris`
            continue
        seen += 1
        if not all(is_one_of(each) for each in found):
            wrong[package] = found
    assert wrong == {}
    assert seen > 10 or lock == LOCKS[2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"License-Expression": "GPL-3.0-only"}, False),
        ({"License-Expression": "MIT AND GPL-3.0-only"}, False),
        ({"License-Expression": "MIT OR GPL-3.0-only"}, True),
        ({"License": "GPL"}, False),
        ({}, False),
        ({"License": "MIT"}, True),
    ],
)
def test_what_is_not_compatible_is_found(
    fields: Mapping[str, str], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Said(dict[str, str]):
        def get_all(self, name: str) -> list[str]:
            return []

    monkeypatch.setitem(licences.__globals__, "metadata", lambda _: Said(fields))
    assert all(is_one_of(each) for each in licences("some-package")) == expected


@pytest.mark.parametrize("lock", LOCKS[:2], ids=lambda lock: str(lock.relative_to(ROOT)))
def test_nothing_that_is_pinned_has_a_hole_that_is_known(lock: Path) -> None:
    pinned = pins(lock)
    old = [
        f"{package} {pinned[package]}: {advisory}"
        for package, fixed, advisory in ADVISORIES
        if package in pinned and numbers(pinned[package]) < numbers(fixed)
    ]
    assert old == []
    assert {package for package, _, _ in ADVISORIES} & {*pinned}


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)))
