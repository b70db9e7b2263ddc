"""What readers hand to workers: records, still raw, each with the place it came from. Part of `prepare`.

A reader only finds where records begin and end; parsing JSON, HTML and wiki markup is left to the workers, so that
one reading process feeds many of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# Kinds of records, by what `data` holds.
JSON = "json"  # bytes of one JSON object, which holds the text field
VALUE = "value"  # the text field's value, whatever its type
TEXT = "text"  # bytes in UTF-8
HTML = "html"  # (bytes of a web page, its address, the charset its server said)
WIKI = "wiki"  # (title, wiki markup)
BROKEN = "broken"  # why there is no record here
END = "end"  # the file is read: sha256 of its bytes, empty where it was not read in one go


class Record(NamedTuple):
    """One record of file number `file` of the input list; `where` is for people: `line 17`, `a.txt line 3`."""

    file: int
    where: str
    kind: str
    data: Any

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        data = self.data if isinstance(self.data, tuple) else (self.data,)
        return 64 + sum(len(part) for part in data if isinstance(part, str | bytes))


class Found(NamedTuple):
    """A record as a reader of one file sees it."""

    where: str
    kind: str
    data: Any


class BrokenInput(Exception):
    """A file cannot be read any further; says where and why."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason


def which_text(where: str) -> str:
    """What to say where the text is not found at that place: `b.json: line 1` is in a member of a tar."""
    return "say text_field=" + (" or which members= to read" if ": " in where else "")


def field_of(record: Mapping[Any, Any], field: str, where: str) -> tuple[str, Any]:
    """(VALUE, what the field holds) or (BROKEN, why); a dotted name reaches inside, unless the record itself has it."""
    if field in record:
        return VALUE, record[field]
    node: Any = record
    for part in field.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return BROKEN, f"no field {field!r}; it has {', '.join(map(str, list(record)[:8]))}: {which_text(where)}"
        node = node[part]
    return VALUE, node


class Unit(NamedTuple):
    """The unit of work: some 2 MiB of records, cut at the same places however the work is spread or resumed."""

    number: int
    records: list[Record]
    next_file: int  # where the following unit begins: file, and records of it that are behind
    next_record: int


UNIT_BYTES = 2 << 20
STRETCH_BYTES = 64 << 20
_UNITS = 10**7  # numbers for the units of a stretch


class Stretch(NamedTuple):
    """Neighbouring files [start, stop) that are read by one process; units do not go across its ends."""

    number: int
    start: int
    stop: int

    def unit(self, place: int) -> int:
        """Number of one of its units: input order is that of the numbers."""
        return self.number * _UNITS + place


def cut_stretches(sizes: Sequence[int | None]) -> list[Stretch]:
    """Group files by their stored bytes (None where only reading tells); what comes later moves no earlier end."""
    stretches: list[Stretch] = []
    start, held = 0, 0
    for file, size in enumerate(sizes):
        held += STRETCH_BYTES if size is None else size
        if held >= STRETCH_BYTES or file == len(sizes) - 1:
            stretches.append(Stretch(len(stretches), start, file + 1))
            start, held = file + 1, 0
    return stretches


def cut_units(records: Iterable[Record], first: int, file: int, behind: int) -> Iterator[Unit]:
    """Group records in their order into units numbered from `first`.

    `file` and `behind` say where the records begin: in that file, after so many of its records.
    """
    gathered: list[Record] = []
    size = 0
    for record in records:
        if record.file != file:
            file, behind = record.file, 0
        behind += 1
        gathered.append(record)
        size += record.size
        if size >= UNIT_BYTES:
            yield Unit(first, gathered, file, behind)
            first, gathered, size = first + 1, [], 0
    if gathered:
        yield Unit(first, gathered, file, behind)
