"""Pickled members of a tar, which run code as they are read: only where `allow=[pickle]` says so. Part of `prepare`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from shardwright.data.prepare.records import BROKEN, TEXT, VALUE, which_text


def pickled_records(data: bytes, field: str | None, where: str) -> Iterator[tuple[str, Any]]:
    """(kind, data) of each record: a text, a mapping with the text in `field` (None takes all of it), or a list of
    these. Runs whatever the pickle asks for."""
    try:
        value = pickle.loads(data)
    except Exception as error:  # the classes that it names may be missing, and raise what they like
        yield BROKEN, f"cannot be unpickled ({type(error).__name__}: {' '.join(str(error).split())}); take it out"
        return
    for item in value if isinstance(value, list | tuple) else [value]:
        yield _record(item, field, where)


def _record(value: Any, field: str | None, where: str) -> tuple[str, Any]:
    if isinstance(value, bytes):
        return TEXT, value
    if field is None or not isinstance(value, dict):
        return VALUE, value
    if field in value:
        return VALUE, value[field]
    found: Any = value
    for step in field.split("."):
        if not isinstance(found, dict) or step not in found:
            return BROKEN, f"no field {field!r}; it has {', '.join(map(str, list(value)[:8]))}: {which_text(where)}"
        found = found[step]
    return VALUE, found
