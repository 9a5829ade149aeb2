"""Lists of domains as operators write them: "example.org" is that domain, ".example.org" each one below it."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.api import Domain


class DomainList:
    """Whether a domain is on the list takes a step a label, however long the list is. Raises AddressError."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._exact: set[str] = set()
        self._parents: set[str] = set()
        for entry in entries:
            is_parent = entry.startswith(".")
            (self._parents if is_parent else self._exact).add(Domain.parse(entry[is_parent:]))

    def __bool__(self) -> bool:
        return bool(self._exact or self._parents)

    def __contains__(self, domain: str) -> bool:
        if domain in self._exact:
            return True
        above = domain
        while self._parents and (above := above.partition(".")[2]):
            if above in self._parents:
                return True
        return False
