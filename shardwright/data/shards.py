"""Token shards on disk: the WebDataset tar and the index beside it (the manifest above them is in `manifest`).

`prepare` writes through `ShardWriter`; `stream` reads through `Shard`. A tar member holds many whole documents, so that
plain webdataset can read the tar; the index (a safetensors file: no pickle, mappable) says where each document lies and
carries a checksum of each, which is checked the first time one of its tokens is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.manifest import (
    FORMAT,
    VERSION,
    Manifest,
    ShardError,
    ShardInfo,
    SplitInfo,
    shard_path,
    write_atomic,
)

__all__ = [
    "Manifest",
    "Shard",
    "ShardError",
    "ShardInfo",
    "ShardWriter",
    "SplitInfo",
    "map_file",
    "read_shard_info",
    "shard_path",
]

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_INDEX_DTYPES: dict[str, np.dtype[Any]] = {"I64": np.dtype("<i8"), "I32": np.dtype("<i4")}
_VERIFIED_AT_ONCE = 32768  # tokens
_MAX_TOKENS = 2**31 - 1  # word and sentence starts are int32


class ShardWriter:
    """Writes one tar of token members and its index. Same documents in, same bytes out.

    Nothing stands under the final names before `close`, and the index is renamed last: a shard with an index is whole.
    """

    def __init__(
        self,
        path: str | Path,
        dtype: str | np.dtype,
        tokenizer_sha256: str,
        member_tokens: int = 524288,
        *,
        root: str | Path | None = None,
        temporary: Path | None = None,
    ) -> None:
        """`path` ends in .tar; `root` is the manifest's folder, to which the names in ShardInfo are relative.

        `temporary` (ends in .tar too) is what the shard is called until it is whole.
        """
        self.path = Path(path)
        self.index_path = self.path.with_suffix(".idx")
        self.dtype_name = np.dtype(dtype).name
        if self.dtype_name not in DTYPES:
            raise ValueError(f"dtype={dtype}: tokens are stored as {' or '.join(DTYPES)}")
        self.num_tokens = 0
        self._dtype = DTYPES[self.dtype_name]
        self._tokenizer_sha256, self._member_tokens, self._root = tokenizer_sha256, member_tokens, root
        self._member: list[bytes] = []
        self._member_size = 0
        self._offsets, self._bytes, self._crcs = [0], [], []  # type: tuple[list[int], list[int], list[int]]
        self._member_offsets, self._member_documents = [], [0]  # type: tuple[list[int], list[int]]
        self._starts: dict[str, list[np.ndarray] | None] = {"word_starts": None, "sentence_starts": None}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A fixed name: the shard of a preparation that was killed is written over, never left behind.
        self._temporary = temporary or self.path.with_name(f".{self.path.name}.tmp")
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        self._file = _HashingFile(self._temporary.open("wb"))
        self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.abort()
        elif not self._file.closed:
            self.close()

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._bytes)

    def add(
        self,
        tokens: np.ndarray | Sequence[int],
        text_bytes: int,
        word_starts: np.ndarray | Sequence[int] | None = None,
        sentence_starts: np.ndarray | Sequence[int] | None = None,
    ) -> None:
        """Add one document: its tokens, the last being end-of-document; the UTF-8 bytes of its text; starts in tokens.

        Starts count from the document's first token, ascending. Either every document of a shard has them or none.
        """
        data = self._encode(np.asarray(tokens))
        self._add_starts("word_starts", word_starts)
        self._add_starts("sentence_starts", sentence_starts)
        self._member.append(data)
        self._member_size += len(data) // self._dtype.itemsize
        self.num_tokens += len(data) // self._dtype.itemsize
        self._offsets.append(self.num_tokens)
        self._bytes.append(int(text_bytes))
        self._crcs.append(zlib.crc32(data))
        if self._member_size >= self._member_tokens:
            self._write_member()

    def close(self) -> ShardInfo:
        """Write the index, bring both files to disk under their names, and say what they hold."""
        if self._member:
            self._write_member()
        self._tar.close()
        tar_bytes, tar_sha256 = self._file.tell(), self._file.sha256.hexdigest()
        self._file.close(sync=True)
        index = self._index_bytes(tar_bytes, tar_sha256)
        os.replace(self._temporary, self.path)
        write_atomic(self.index_path, index, self._temporary.with_suffix(".idx"))
        return ShardInfo(
            path=_relative(self.path, self._root),
            index=_relative(self.index_path, self._root),
            tokens=self.num_tokens,
            documents=self.num_documents,
            text_bytes=sum(self._bytes),
            bytes=tar_bytes,
            sha256=tar_sha256,
            index_sha256=hashlib.sha256(index).hexdigest(),
        )

    def abort(self) -> None:
        """Drop what was written; nothing stays on disk."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _encode(self, tokens: np.ndarray) -> bytes:
        if tokens.ndim != 1 or not len(tokens) or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{self.path}: document {self.num_documents} is {tokens.dtype} of shape {tokens.shape}; "
                "a document is a non-empty list of token ids that ends with end-of-document"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high > np.iinfo(self._dtype).max:
            raise ValueError(
                f"{self.path}: document {self.num_documents} holds token {low if low < 0 else high}, "
                f"outside {self.dtype_name}; write shards of this tokenizer as uint32"
            )
        if self.num_tokens + len(tokens) > _MAX_TOKENS:
            raise ValueError(f"{self.path}: a shard holds at most {_MAX_TOKENS} tokens; start another shard")
        return tokens.astype(self._dtype).tobytes()

    def _add_starts(self, name: str, starts: np.ndarray | Sequence[int] | None) -> None:
        known = self._starts[name]
        if self.num_documents and (starts is None) != (known is None):
            raise ValueError(f"{self.path}: {name} given for some documents only; give it for all or for none")
        if starts is not None:
            if known is None:
                known = self._starts[name] = []
            known.append(np.asarray(starts, np.int64) + self.num_tokens)

    def _write_member(self) -> None:
        """Flush the gathered documents as `<shard>_<member>.json` and `.tokens`, headers free of time and owner."""
        key = f"{self.path.stem}_{len(self._member_offsets):06d}"
        documents = self.num_documents - self._member_documents[-1]
        facts = json.dumps({"documents": documents, "dtype": self.dtype_name}, sort_keys=True).encode()
        for suffix, data in (("json", facts), ("tokens", b"".join(self._member))):
            header = tarfile.TarInfo(f"{key}.{suffix}")
            header.size, header.mode = len(data), 0o444
            self._tar.addfile(header, io.BytesIO(data))
        padded = -(-self._member_size * self._dtype.itemsize // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        self._member_offsets.append(self._tar.offset - padded)
        self._member_documents.append(self.num_documents)
        self._member, self._member_size = [], 0

    def _index_bytes(self, tar_bytes: int, tar_sha256: str) -> bytes:
        from safetensors.numpy import save

        arrays: dict[str, np.ndarray] = {
            "document_offsets": np.array(self._offsets, np.int64),
            "document_bytes": np.array(self._bytes, np.int32),
            "document_crc": np.array(self._crcs, np.int64),
            "member_offsets": np.array(self._member_offsets, np.int64),
            "member_documents": np.array(self._member_documents, np.int64),
        }
        for name, starts in self._starts.items():
            if starts is not None:
                arrays[name] = np.concatenate(starts).astype(np.int32)
        facts = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self.dtype_name,
            "tokenizer_sha256": self._tokenizer_sha256,
            "tar_bytes": tar_bytes,
            "tar_sha256": tar_sha256,
        }
        # One key: safetensors writes several in an order that differs from run to run.
        return save(arrays, metadata={"shardwright": json.dumps(facts, sort_keys=True)})


class Shard:
    """One shard, mapped into memory and checked as it is read.

    Opening compares the tar's size with the index (a truncated file is found at once); the first touch of a document
    compares its checksum. Picklable: the copy opens the files again.
    """

    def __init__(self, tar_path: str | Path, index_path: str | Path, index_sha256: str | None = None) -> None:
        """Map both files; ShardError where one is missing, truncated or (with `index_sha256`) not the manifest's."""
        self.path, self.index_path = str(tar_path), str(index_path)
        self._arguments = (self.path, self.index_path, index_sha256)
        index = map_file(self.index_path)
        if index_sha256 is not None and hashlib.sha256(index.data).hexdigest() != index_sha256:
            raise ShardError(f"{self.index_path}: not the file the manifest names (sha256 differs); {_REMEDY}")
        arrays, self.facts = _parse_index(index, self.index_path)
        self.document_offsets: np.ndarray = arrays["document_offsets"]  # int64 [n+1], in tokens
        self.num_tokens = int(self.document_offsets[-1])
        self.document_bytes: np.ndarray = arrays["document_bytes"]  # int32 [n], UTF-8 bytes
        self.word_starts: np.ndarray | None = arrays.get("word_starts")  # int32, in tokens of the shard
        self.sentence_starts: np.ndarray | None = arrays.get("sentence_starts")
        self._marks: dict[str, Any] = {"words": self.word_starts, "sentences": self.sentence_starts}
        self.dtype = DTYPES[self.facts["dtype"]]
        self._crcs = arrays["document_crc"]
        self._offsets = self.document_offsets.data  # gives Python integers, which is what bisect is quick with
        self._bytes = map_file(self.path, self.facts["tar_bytes"])
        self._words = self._bytes.view(self.dtype)
        self._place_members(arrays["member_offsets"], arrays["member_documents"])
        self._verified = bytearray(self.num_documents)  # 1 for each document whose checksum was compared
        self._unverified = self.num_documents

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), self._arguments

    @property
    def num_documents(self) -> int:
        """Documents in the shard."""
        return len(self.document_bytes)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the shard, uint16 or uint32 [stop - start], read-only; ShardError on altered bytes.

        A view of the mapping, except across members of the tar, where it is a copy.
        """
        assert 0 <= start <= stop <= self.num_tokens, f"{self.path}: tokens [{start}, {stop}) of {self.num_tokens}"
        return self.read(start, stop)[0]

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """`tokens(start, stop)`, and the tokens at which the documents it touches begin (int64, a view of the index).

        The first of these may lie before `start`. Called for every sequence, hence sparing with calls.
        """
        member = bisect_right(self._member_stops, start)
        if member < len(self._shifts) and stop <= self._member_stops[member]:
            shift = self._shifts[member]
            first = bisect_right(self._offsets, start) - 1
            last = bisect_left(self._offsets, stop, first)
            if self._unverified and 0 in self._verified[first:last]:
                self._verify(first, last, member)
            return self._words[start + shift : stop + shift], self.document_offsets[first:last]
        if start >= stop:
            return self._words[:0], self.document_offsets[:0]
        middle = self._member_stops[member]
        pieces = zip(self.read(start, middle), self.read(middle, stop), strict=True)
        return np.concatenate(next(pieces)), np.concatenate(next(pieces))

    def check_marks(self, kinds: Sequence[str]) -> None:
        """ConfigError unless the index says where each of `words`, `sentences` begins."""
        for kind in kinds:
            if self._marks[kind] is None:
                raise ConfigError(
                    f"{self.index_path}: does not say where {kind} start, which the objective needs; "
                    "run `shardwright prepare` again with starts=true"
                )

    def marks(self, kind: str, start: int, stop: int) -> np.ndarray:
        """Tokens of [start, stop) at which `words` or `sentences` begin, int32 ascending, a view of the index."""
        self.check_marks((kind,))
        starts = self._marks[kind]
        places = starts.data  # gives Python integers, which is what bisect is quick with
        first = bisect_left(places, start)
        return starts[first : bisect_left(places, stop, first)]

    def verify(self) -> None:
        """Check every document now; ShardError names the first that differs."""
        edges = [0, *self._member_stops]
        for start, stop in zip(edges, edges[1:], strict=False):
            self.read(start, stop)

    def _place_members(self, offsets: np.ndarray, documents: np.ndarray) -> None:
        """Where the tokens of each member lie: element of the tar = token of the shard + shift of its member."""
        edges = self.document_offsets[documents]
        self._member_stops: list[int] = edges[1:].tolist()
        self._shifts: list[int] = (offsets // self.dtype.itemsize - edges[:-1]).tolist()

    def _verify(self, first: int, last: int, member: int) -> None:
        """Compare the checksums of documents [first, last) of a member, and of those after them while we are there.

        Going on for some kilobytes costs a third of coming back; a document beyond `last` that proves bad is left
        for whoever reads it.
        """
        ahead = bisect_left(self._offsets, self._offsets[first] + _VERIFIED_AT_ONCE, last)
        ahead = max(last, min(ahead, bisect_left(self._offsets, self._member_stops[member])))
        known = self._verified.find(1, last, ahead)
        ahead = ahead if known < 0 else known
        size, data, crc32 = self.dtype.itemsize, self._bytes.data, zlib.crc32
        edges = ((self.document_offsets[first : ahead + 1] + self._shifts[member]) * size).tolist()
        found = [crc32(data[a:b]) for a, b in zip(edges, edges[1:], strict=False)]
        good = np.array(found, np.int64) == self._crcs[first:ahead]
        if not good[: last - first].all():
            place = int(good.argmin())
            raise self._altered(first + place, edges[place])
        self._unverified -= int(good.sum()) - sum(self._verified[first:ahead])
        self._verified[first:ahead] = good.tobytes()

    def _altered(self, document: int, byte: int) -> ShardError:
        error = ShardError(
            f"{self.path}: document {document} (at byte {byte}) does not match its checksum: "
            f"the file was altered; {_REMEDY}"
        )
        error.path = self.path
        return error


def read_shard_info(path: str | Path, root: str | Path | None = None) -> ShardInfo:
    """The facts of a finished shard, from its index alone: what a preparation that goes on needs of it."""
    path = Path(path)
    index = path.with_suffix(".idx")
    try:
        raw = index.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{index}: no such file; {_REMEDY}") from None
    arrays, facts = _parse_index(np.frombuffer(raw, np.uint8), index)
    return ShardInfo(
        path=_relative(path, root),
        index=_relative(index, root),
        tokens=int(arrays["document_offsets"][-1]),
        documents=len(arrays["document_bytes"]),
        text_bytes=int(arrays["document_bytes"].sum(dtype=np.int64)),
        bytes=int(facts["tar_bytes"]),
        sha256=str(facts["tar_sha256"]),
        index_sha256=hashlib.sha256(raw).hexdigest(),
    )


_REMEDY = "restore the file from its source or run `shardwright prepare` again"


def map_file(path: str | Path, size: int | None = None) -> np.ndarray:
    """The bytes of a file as a read-only array over its pages; ShardError where it is unreadable or not `size` long.

    Mapped by torch, which lets go of the file descriptor (Python's own mmap keeps one): a stream of 64 lanes has some
    hundred shards open.
    """
    import torch

    try:
        with open(path, "rb") as file:
            found = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file, though the manifest names it; {_REMEDY}") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}; mend that, or {_REMEDY}") from None
    if size is not None and found != size:
        change = "truncated" if found < size else "changed"
        raise ShardError(f"{path}: {found} bytes, expected {size}: the file was {change}; {_REMEDY}")
    if not found:
        raise ShardError(f"{path}: the file is empty; {_REMEDY}")
    try:
        array = torch.from_file(str(path), shared=False, size=found, dtype=torch.uint8).numpy()
    except RuntimeError as error:  # many lines, of which the first says it: no memory for it, too many mappings, ...
        raise ShardError(f"{path}: cannot be mapped into memory: {str(error).splitlines()[0]}") from None
    array.flags.writeable = False
    return array


def _parse_index(raw: np.ndarray, path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (views of `raw`, so that a mapped index stays mapped) and facts of a safetensors index."""
    try:
        length = int.from_bytes(raw[:8].tobytes(), "little")
        header = json.loads(raw[8 : 8 + length].tobytes())
        facts = json.loads(header.pop("__metadata__")["shardwright"])
        body = raw[8 + length :]
        arrays = {}
        for name, spec in header.items():
            begin, end = spec["data_offsets"]
            arrays[name] = body[begin:end].view(_INDEX_DTYPES[spec["dtype"]])
        if facts["format"] != FORMAT or facts["version"] != VERSION or not len(arrays["document_offsets"]):
            raise ValueError(f"format {facts['format']} version {facts['version']}")
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise ShardError(f"{path}: not a whole shard index ({error}); {_REMEDY}") from None
    return arrays, facts


class _HashingFile:
    """A file to write to that hashes on the way: what tarfile needs of one, no more."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.sha256, self._size = file, hashlib.sha256(), 0

    @property
    def closed(self) -> bool:
        return self.file.closed

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self._size += len(data)
        return self.file.write(data)

    def tell(self) -> int:
        return self._size

    def close(self, sync: bool = False) -> None:
        if sync and not self.file.closed:
            self.file.flush()
            os.fsync(self.file.fileno())
        self.file.close()


def _relative(path: Path, root: str | Path | None) -> str:
    return path.name if root is None else path.resolve().relative_to(Path(root).resolve()).as_posix()
