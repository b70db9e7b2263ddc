"""From one input file to its records, streaming: memory holds one document at a time. Part of `prepare`.

The format goes by the option, else by content (tar, WARC, Parquet, XML), else by the name's ending. Broken records are
yielded as such and reading goes on behind them; a broken stream ends its file.
"""

from __future__ import annotations

import csv
import fnmatch
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shardwright.config import ConfigError, RunError
from shardwright.data.prepare import archives
from shardwright.data.prepare.inputs import InputFile, format_of, has_ending, is_remote, readable, unpacked
from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.pickled import pickled_records
from shardwright.data.prepare.records import BROKEN, END, JSON, TEXT, VALUE, BrokenInput, Found, Record, which_text
from shardwright.data.prepare.streams import BUFFER, Tally, broken_streams, open_raw, uncompress
from shardwright.data.remote import check_member, is_pickled

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_inputs(
    files: list[InputFile],
    config: PrepareConfig,
    *,
    first_file: int = 0,
    behind: int = 0,
    start: int = 0,
    advance: Callable[[int], None] = lambda count: None,
    every_field: bool = False,
) -> Iterator[Record]:
    """Every record of the files in order, from record `behind` of file `first_file`; END closes each file.

    `start` is the number of the first of the files, where they are not all of the input. With `every_field` a row of a
    table is a list of all its values, not the text field's.
    """
    for number in range(first_file, start + len(files)):
        records = read_file(number, files[number - start], config, advance, every_field)
        for index, record in enumerate(records):
            if number > first_file or index >= behind:
                yield record


def read_file(
    number: int,
    file: InputFile,
    config: PrepareConfig,
    advance: Callable[[int], None] = lambda count: None,
    every_field: bool = False,
) -> Iterator[Record]:
    """Records of one file, the last being END with the sha256 of the stored bytes (empty for remote random access)."""
    reader = Reader(config, every_field)
    sha256 = ""
    try:
        if file.location.startswith("hf:"):
            yield from (Record(number, *found) for found in reader.hugging_face(file.location))
        else:
            with open_raw(file.location) as raw:
                tally = Tally(raw, advance)
                stream: io.BufferedReader = io.BufferedReader(tally, BUFFER)
                if stream.peek(4)[:4] == b"PAR1" or config.format == "parquet":
                    raw.seek(0)
                    if not is_remote(file.location):  # there a second pass over the bytes costs little
                        sha256 = hashlib.file_digest(raw, "sha256").hexdigest()
                        raw.seek(0)
                    yield from (Record(number, *found) for found in reader.parquet(raw))
                else:
                    try:
                        with broken_streams(lambda: reader.where):
                            found_records = reader.stream(uncompress(stream), file.location.partition("?")[0], "")
                            yield from (Record(number, *found) for found in found_records)
                    finally:
                        while stream.read(BUFFER):
                            pass
                        sha256 = tally.sha256.hexdigest()
    except BrokenInput as broken:
        yield Record(number, broken.where, BROKEN, broken.reason)
    yield Record(number, "end", END, sha256)


class Member(io.RawIOBase):
    """A member of a tar that is read as a stream; remembers a failure of the tar, which is not the member's own."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._file.readinto1(buffer)
        except Exception as error:
            self.failure = error
            raise


class Reader:
    """Finds the records of one file; `where` is the last place it reached, for reports."""

    def __init__(self, config: PrepareConfig, every_field: bool = False) -> None:
        self.config, self.every_field = config, every_field
        self.limit = config.max_document_mib << 20
        self.where = "start"

    def stream(self, stream: io.BufferedReader, name: str, inside: str) -> Iterator[Found]:
        """Records of an uncompressed stream; `inside` is the tar member it is, as `a.jsonl: `, or empty."""
        head = stream.peek(512)[:512]
        self.where = f"{inside}start"
        kind = self._format(head, name, bool(inside))
        if kind is None:
            return
        if not head:
            yield Found(self.where, BROKEN, "the file is empty; remove it")
        elif kind == "tar":
            yield from self._tar(stream, inside)
        elif kind == "text":
            yield from self._text(stream, inside)
        elif kind == "jsonl":
            yield from self._json(stream, inside)
        elif kind in ("csv", "tsv"):
            yield from self._csv(stream, inside, "\t" if kind == "tsv" else ",")
        elif kind == "parquet":
            yield from self.parquet(io.BytesIO(stream.read()), inside)
        elif kind == "pickle":
            yield from self._pickle(stream, inside)
        else:
            read = archives.read_warc if kind == "warc" else archives.read_wikipedia
            for number, found in read(stream):
                self.where = f"{inside}{number}"
                yield Found(self.where, *found)

    def _format(self, head: bytes, name: str, is_member: bool) -> str | None:
        """Format of a stream; None for a member of a tar that is not data (an image, say) or not asked for."""
        if head[257:262] == b"ustar" or format_of(name) == "tar":
            return "tar"
        if is_member and not self._is_chosen(name):
            return None
        if is_member and is_pickled(name):  # and allowed, or it would not be read
            return "pickle"
        if self.config.format != "auto":
            return self.config.format
        if head.startswith(b"WARC/"):
            return "warc"
        if head.startswith(b"PAR1"):
            return "parquet"
        if head.removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"<mediawiki"):
            return "wikipedia"
        known = format_of(name)
        if known is not None:
            return known
        return None if is_member and has_ending(name) and self.config.members is None else "text"

    def _is_chosen(self, name: str) -> bool:
        """Whether a member of a tar is to be read, by its path with or without the endings of its compression."""
        pattern = self.config.members
        if pattern is None:
            return True
        pattern = f"*{pattern}" if pattern.startswith(".") else pattern
        return any(fnmatch.fnmatchcase(n, pattern) for n in (name, unpacked(name)))

    def _tar(self, stream: io.BufferedReader, inside: str) -> Iterator[Found]:
        """Members of a tar one after the other, compressed ones and tars among them too (OpenWebText is built so)."""
        import tarfile

        try:
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=archives.strict_header()) as tar:
                for member in tar:
                    content: Any = tar.extractfile(member) if member.isfile() else None
                    if content is not None:
                        name = readable(member.name)
                        self.where = f"{inside}{name}: start"
                        yield from self._member(Member(content), name, inside)
                behind: Any = tar.fileobj
                rest = iter(lambda: behind.read(BUFFER), b"")
                if any(block.strip(b"\0") for block in rest):
                    raise tarfile.ReadError("more stands behind its end mark")
        except tarfile.TarError as error:
            raise BrokenInput(self.where, f"the tar is cut off or damaged ({error}); fetch the file again") from None

    def _member(self, member: Member, name: str, inside: str) -> Iterator[Found]:
        """Records of one member; where it is broken by itself, reading goes on with the next."""
        try:
            if self._is_chosen(name):
                check_member(name, inside, self.config.allow)
        except ConfigError:
            reason = (
                "is a pickle, which can run code when read; take it out of the tar, say which members= to read, or "
                "allow it with allow=[pickle] if you trust whoever made it"
            )
            yield Found(f"{inside}{name}", BROKEN, reason)
            return
        try:
            with broken_streams(lambda: self.where):
                stream = uncompress(io.BufferedReader(member, BUFFER))
                yield from self.stream(stream, name, f"{inside}{name}: ")
        except BrokenInput as broken:
            if member.failure is not None:
                raise member.failure from None
            yield Found(broken.where, BROKEN, broken.reason)

    def _text(self, stream: io.BufferedReader, inside: str) -> Iterator[Found]:
        if self.config.documents == "file":
            data = stream.read(self.limit + 1)
            if len(data) > self.limit:
                yield Found(f"{inside}line 1", BROKEN, self._too_long("documents=line or paragraph, or "))
            else:
                yield Found(f"{inside}line 1", TEXT, data.removeprefix(BYTE_ORDER_MARK))
        elif self.config.documents == "line":
            for number, line in self._lines(stream, inside):
                if line is None:
                    yield Found(f"{inside}line {number}", BROKEN, self._too_long())
                elif line.strip():
                    yield Found(f"{inside}line {number}", TEXT, line)
        else:
            yield from self._paragraphs(stream, inside)

    def _paragraphs(self, stream: io.BufferedReader, inside: str) -> Iterator[Found]:
        gathered: list[bytes] = []
        size = first = 0
        for number, line in self._closed(self._lines(stream, inside)):
            if line is None or line.strip():
                first = first or number
                size += self.limit + 1 if line is None else len(line)
                if size <= self.limit and line is not None:
                    gathered.append(line)
                continue
            if size > self.limit:
                yield Found(f"{inside}line {first}", BROKEN, self._too_long())
            elif gathered:
                yield Found(f"{inside}line {first}", TEXT, b"".join(gathered))
            gathered, size, first = [], 0, 0

    @staticmethod
    def _closed(lines: Iterator[tuple[int, bytes | None]]) -> Iterator[tuple[int, bytes | None]]:
        """The lines and one blank line behind them, so that the last paragraph ends like the others."""
        yield from lines
        yield 0, b""

    def _lines(self, stream: io.BufferedReader, inside: str) -> Iterator[tuple[int, bytes | None]]:
        """(number, line) with None for a line over the limit."""
        number = 0
        while line := stream.readline(self.limit + 1):
            number += 1
            self.where = f"{inside}line {number}"
            if len(line) > self.limit:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(self.limit)
                yield number, None
            else:
                yield number, line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line

    def _json(self, stream: io.BufferedReader, inside: str) -> Iterator[Found]:
        if stream.peek(512).removeprefix(BYTE_ORDER_MARK).lstrip().startswith(b"["):
            yield from self._json_array(stream, inside)
            return
        for number, line in self._lines(stream, inside):
            where = f"{inside}line {number}"
            if line is None:
                yield Found(where, BROKEN, self._too_long())
            elif line.strip():
                yield Found(where, JSON, line.strip())

    def _json_array(self, stream: io.BufferedReader, inside: str) -> Iterator[Found]:
        """A whole file that is one JSON array; it is held in memory, so it may only be so large."""
        most = 16 * self.limit
        data = stream.read(most + 1)
        if len(data) > most:
            reason = f"a JSON array over {most >> 20} MiB is not streamed; write it as JSON lines"
            raise BrokenInput(f"{inside}line 1", reason)
        try:
            items = json.loads(data.removeprefix(BYTE_ORDER_MARK))
        except (ValueError, RecursionError) as error:
            raise BrokenInput(f"{inside}line 1", f"not valid JSON: {error}") from None
        for number, item in enumerate(items, 1):
            self.where = f"{inside}item {number}"
            yield Found(self.where, JSON, json.dumps(item).encode())

    def _pickle(self, stream: io.BufferedReader, inside: str) -> Iterator[Found]:
        data = stream.read(self.limit + 1)
        if len(data) > self.limit:
            yield Found(f"{inside}start", BROKEN, self._too_long())
            return
        field = None if self.every_field else self.config.text_field
        for number, found in enumerate(pickled_records(data, field, inside), 1):
            self.where = f"{inside}item {number}"
            yield Found(self.where, *found)

    def _csv(self, stream: io.BufferedReader, inside: str, delimiter: str) -> Iterator[Found]:
        # Bytes that are not UTF-8 travel as lone surrogates and are found, with their record, when it is cleaned.
        text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
        csv.field_size_limit(self.limit)
        rows = csv.reader(text, delimiter=delimiter, strict=True)  # or an open quote would swallow what follows
        line = 1
        try:
            header = next(rows, [])
            column = None if self.every_field else self._column(header, f"{inside}line 1")
            line = rows.line_num + 1
            for row in rows:
                self.where = f"{inside}line {line}"
                if row and len(row) != len(header):
                    yield Found(self.where, BROKEN, f"{len(row)} columns, expected {len(header)} as in the header")
                elif row:
                    yield Found(self.where, VALUE, row if column is None else row[column])
                line = rows.line_num + 1
        except csv.Error as error:
            reason = f"not valid CSV: {error} (in the record that begins here); close or double its quotes"
            raise BrokenInput(f"{inside}line {line}", reason) from None
        finally:
            text.detach()

    def _column(self, names: list[str], where: str) -> int:
        field = self.config.text_field
        if field not in names:
            listed = ", ".join(names[:8])
            raise BrokenInput(where, f"no column {field!r}; it has {listed}: {which_text(where)}")
        return names.index(field)

    def parquet(self, file: Any, inside: str = "") -> Iterator[Found]:
        """Rows of the text column, some hundred at a time."""
        try:
            import pyarrow.parquet
        except ImportError:
            raise ConfigError("Parquet files need pyarrow: pip install 'shardwright[data]'") from None
        try:
            table = pyarrow.parquet.ParquetFile(file)
            steps = [] if self.every_field else self._steps(table.schema_arrow, f"{inside}schema")
            columns = None if self.every_field else [self.config.text_field]
            number = 0
            for batch in table.iter_batches(256, columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    self.where = f"{inside}row {number}"
                    yield Found(self.where, *_row(batch, row, steps))
        except (pyarrow.ArrowException, OSError) as error:
            message = str(error).splitlines()[0]
            raise BrokenInput(self.where, f"not a whole Parquet file: {message}; fetch the file again") from None

    def _steps(self, schema: Any, where: str) -> list[str]:
        """Column that holds the text and, where `text_field` is dotted, the fields of its structs that lead there."""
        from pyarrow.types import is_struct

        field = self.config.text_field
        steps = [field] if field in schema.names else field.split(".")
        inner = {part.name: part.type for part in schema}
        for step in steps:
            if step not in inner:
                self._column(schema.names, where)
            inner = {part.name: part.type for part in inner[step]} if is_struct(inner[step]) else {}
        return steps

    def hugging_face(self, location: str) -> Iterator[Found]:
        """Rows of a Hugging Face data set: hf:NAME[:CONFIG[:SPLIT]], or a folder that `save_to_disk` wrote."""
        name, config, split = [*location.removeprefix("hf:").split(":"), "", ""][:3]
        rows = iter(_load_dataset(name, config or None, split or "train"))
        for number in itertools.count(1):
            self.where = f"row {number}"
            try:
                row = next(rows, None)
            except Exception as error:  # what the hub's client raises
                raise _unreachable(name, error) from None
            if row is None:
                return
            if self.every_field:
                yield Found(self.where, VALUE, row)
                continue
            field = self.config.text_field
            steps = [field] if field in row else field.split(".")
            if steps[0] not in row:
                self._column(list(row), self.where)
            yield Found(self.where, VALUE, _inside(row[steps[0]], steps[1:]))

    def _too_long(self, remedy: str = "") -> str:
        size = self.config.max_document_mib
        return f"a document over {size} MiB; say {remedy}max_document_mib={2 * size}"


def _row(batch: Any, row: int, steps: list[str]) -> tuple[str, Any]:
    """(kind, data) of a row of a Parquet batch: the value that `steps` lead to, or without any a list of all."""
    try:
        # By name: a choice of `text` brings a column called `text.language` as well.
        chosen = [batch.schema.get_field_index(steps[0])] if steps else range(batch.num_columns)
        values = [batch.column(number)[row].as_py() for number in chosen]
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        return BROKEN, f"not valid UTF-8: 0x{byte:02x} at byte {error.start + 1} of the text; convert it to UTF-8"
    return VALUE, _inside(values[0], steps[1:]) if steps else values


def _inside(value: Any, steps: list[str]) -> Any:
    """What the names lead to in nested mappings; None where there is nothing."""
    for step in steps:
        value = value.get(step) if isinstance(value, dict) else None
    return value


def _load_dataset(name: str, config: str | None, split: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"hf:{name} needs datasets: pip install 'shardwright[hf]'") from None
    try:
        if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            if isinstance(loaded, dict) and split not in loaded:
                there = ", ".join(loaded)
                raise ConfigError(f"hf:{name}: has no split {split!r}; it has {there}: say hf:{name}::SPLIT")
            return loaded[split] if isinstance(loaded, dict) else loaded
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except ConfigError:
        raise
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ConfigError(f"hf:{name}: {str(error).splitlines()[0]}") from None
    except Exception as error:  # what the hub's client raises
        raise _unreachable(name, error) from None


def _unreachable(name: str, error: Exception) -> RunError:
    reason = (str(error).splitlines() or [""])[0]
    return RunError(f"hf:{name}: cannot be loaded ({type(error).__name__}: {reason}); run again to go on")
