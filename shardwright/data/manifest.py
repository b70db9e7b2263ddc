"""The manifest of a prepared folder: which shards there are, what each holds, and what made them.

Written last by `prepare`, read first by `stream`: with its totals alone the place of any sequence is known.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shardwright.config import RunError

FORMAT = "shardwright-shards"
VERSION = 1
SHARDS_PER_FOLDER = 400


class ShardError(RunError):
    """A shard, index or manifest that is missing, truncated or altered; the message names the file and the remedy.

    `path` is the tar of which a document is altered, where that is the reason.
    """

    path: str | None = None


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard; `path` and `index` are relative to the manifest."""

    path: str
    index: str
    tokens: int
    documents: int
    text_bytes: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class SplitInfo:
    """The shards of one split and their totals."""

    shards: list[ShardInfo] = field(default_factory=list)
    tokens: int = 0
    documents: int = 0
    text_bytes: int = 0

    @classmethod
    def of(cls, shards: Sequence[ShardInfo]) -> SplitInfo:
        """A split of these shards, with the totals summed."""
        return cls(
            shards=list(shards),
            tokens=sum(s.tokens for s in shards),
            documents=sum(s.documents for s in shards),
            text_bytes=sum(s.text_bytes for s in shards),
        )


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` of a prepared folder: a pure function of input and recipe (no clock, host or output path)."""

    tokenizer: dict[str, Any]
    dtype: str
    splits: dict[str, SplitInfo]
    source: Any = field(default_factory=dict)
    recipe: Any = field(default_factory=dict)
    counts: Any = field(default_factory=dict)
    versions: Any = field(default_factory=dict)
    root: str = field(default="", compare=False)

    @classmethod
    def load(cls, folder: str | Path, allow: Collection[str] = ()) -> Manifest:
        """Read `folder/manifest.json`, a local folder or an fsspec URL; ShardError where it is missing or not ours.

        `allow` names what may run code ('pipe'), as `data.allow` does.
        """
        root = str(folder).removeprefix("file://").rstrip("/")
        where = f"{root}/manifest.json"
        try:
            return cls._parse(json.loads(_read_text(where, allow)), root)
        except FileNotFoundError:
            raise ShardError(
                f"{where}: no such file; give a folder that `shardwright prepare` wrote (its manifest is written last)"
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{where}: not a shard manifest ({error}); run `shardwright prepare` again") from None

    @classmethod
    def _parse(cls, data: dict[str, Any], root: str) -> Manifest:
        if data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ShardError(
                f"{root}/manifest.json: format {data.get('format')!r} version {data.get('version')!r}, "
                f"expected {FORMAT!r} version {VERSION}; run `shardwright prepare` with this version"
            )
        splits = {
            name: SplitInfo(**{**split, "shards": [ShardInfo(**shard) for shard in split["shards"]]})
            for name, split in data["splits"].items()
        }
        rest = {key: data[key] for key in ("source", "recipe", "counts", "versions") if key in data}
        return cls(tokenizer=data["tokenizer"], dtype=data["dtype"], splits=splits, root=root, **rest)

    def save(self, folder: str | Path) -> Path:
        """Write `folder/manifest.json` whole or not at all; the same manifest always gives the same bytes."""
        path = Path(folder) / "manifest.json"
        write_atomic(path, self._encoded())
        return path

    def _encoded(self) -> bytes:
        data = dataclasses.asdict(self)
        del data["root"]
        text = json.dumps({"format": FORMAT, "version": VERSION, **data}, sort_keys=True, indent=1, ensure_ascii=False)
        return (text + "\n").encode()

    @property
    def sha256(self) -> str:
        """Names this corpus: the hash of what `save` writes."""
        return hashlib.sha256(self._encoded()).hexdigest()

    @property
    def end_of_document(self) -> int:
        """Id of the token that ends each document."""
        return int(self.tokenizer["end_of_document"])

    def split(self, name: str) -> SplitInfo:
        """The split of this name; ShardError where the folder has none."""
        if name not in self.splits:
            raise ShardError(f"{self.root}/manifest.json: no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def shard_path(split: str, number: int) -> str:
    """Where shard `number` of a split lies in a prepared folder: at most 400 shards (800 files) a folder."""
    return f"{split}/{number // SHARDS_PER_FOLDER:03d}/{number:05d}.tar"


def write_atomic(path: Path, data: bytes, temporary: Path | None = None) -> None:
    """Write a file whole, on disk, or not at all; `temporary` is what it is called until then."""
    temporary = temporary or path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def _read_text(where: str, allow: Collection[str]) -> str:
    from shardwright.data.remote import is_remote, read_bytes  # which needs ShardError from here

    return read_bytes(where, allow=allow).decode() if is_remote(where) else Path(where).read_text("utf-8")
