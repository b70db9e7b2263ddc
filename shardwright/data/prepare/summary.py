"""What cleaning left of the input, added up unit by unit: counts, broken records, hashes. Part of `prepare`."""

from __future__ import annotations

from collections import Counter
from typing import Any


class Summary:
    """The facts of units (of `units.clean_unit`), given in any order."""

    def __init__(self) -> None:
        self._documents: dict[int, int] = {}
        self._counts: dict[str, Counter[str]] = {}
        self._broken: dict[int, list[list[Any]]] = {}
        self._sha256: dict[int, str] = {}
        self._with_records: set[int] = set()

    def add(self, facts: dict[str, Any]) -> None:
        """One more unit."""
        unit = facts["unit"]
        self._documents[unit] = facts["documents"]
        for group, values in facts["counts"].items():
            self._counts.setdefault(group, Counter()).update(values)
        if facts["broken"]:
            self._broken[unit] = facts["broken"]
        self._sha256.update((file, sha256) for file, sha256 in facts["ends"])
        self._with_records.update(file for file, _ in facts["records"])

    @property
    def num_units(self) -> int:
        """Units so far."""
        return len(self._documents)

    @property
    def files(self) -> list[int]:
        """Files that are read to their ends."""
        return sorted(self._sha256)

    @property
    def barren(self) -> list[int]:
        """Files that are read and hold no record."""
        return [file for file in self.files if file not in self._with_records]

    def as_dict(self) -> dict[str, Any]:
        """What the other passes work from, in input order, as plain JSON values; `units` are (number, documents)."""
        return {
            "units": sorted(self._documents.items()),
            "counts": {group: dict(sorted(values.items())) for group, values in sorted(self._counts.items())},
            "broken": [entry for _, entries in sorted(self._broken.items()) for entry in entries],
            "barren": len(self.barren),
            "sha256": self._sha256,
        }
