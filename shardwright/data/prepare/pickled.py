"""Pickled members of a tar, which run code as they are read: only where `allow=[pickle]` says so. Part of `prepare`."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

from shardwright.data.prepare.records import BROKEN, TEXT, VALUE, field_of


def pickled_records(data: bytes, field: str | None, where: str) -> Iterator[tuple[str, Any]]:
    """(kind, data) of each record: a text, a mapping with the text in `field`, or a list of these.

    Without a field all of a mapping. Runs whatever the pickle asks for.
    """
    try:
        value = pickle.loads(data)
    except Exception as error:  # the classes that it names may be missing, and raise what they like
        yield BROKEN, f"cannot be unpickled ({type(error).__name__}: {' '.join(str(error).split())}); take it out"
        return
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, bytes):
            yield TEXT, item
        elif field is None or not isinstance(item, dict):
            yield VALUE, item
        else:
            yield field_of(item, field, where)
