"""From what the user named to a list of files, in an order that never changes. Part of `prepare`.

Files, folders, patterns, URLs of any fsspec protocol, `bundled:NAME` and `hf:NAME`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from shardwright.config import ConfigError
from shardwright.data.manifest import FORMAT
from shardwright.data.prepare.streams import insist
from shardwright.log import get_logger

BUNDLED = Path(__file__).parent.parent / "bundled"
COMPRESSIONS = (".gz", ".zst", ".zstd", ".xz", ".bz2")
FORMATS = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".warc": "warc",
    ".wet": "warc",
    ".xml": "wikipedia",
    ".tar": "tar",
    ".tgz": "tar",
    ".txz": "tar",
}


class InputFile(NamedTuple):
    """One file to read."""

    name: str  # as reports and the manifest call it: never an absolute path the user did not type
    location: str  # path, URL or hf:NAME
    size: int | None  # bytes as stored; None where only reading tells
    changed: int | None  # time of last change in ns, local files only
    tag: str | None = None  # ETag, or else time of last change, of a remote file whose file system says it

    @property
    def shown(self) -> str:
        """What messages call it: the path as the user typed it, so that files of one name can be told apart."""
        return readable(self.name if self.name.startswith("bundled:") else self.location)


def unpacked(name: str) -> str:
    """A file's name without the endings of its compression."""
    while name.lower().endswith(COMPRESSIONS):
        name = name.rpartition(".")[0]
    return name


def format_of(name: str) -> str | None:
    """Format that a file name promises, its compression aside; None for an unknown ending."""
    return FORMATS.get(Path(unpacked(name.lower())).suffix)


def has_ending(name: str) -> bool:
    """Whether a name, its compression aside, ends in anything that could tell a format."""
    return bool(Path(unpacked(name)).suffix)


def readable(name: str) -> str:
    """A name for reports and the manifest: bytes of it that are not UTF-8 are spelled out."""
    return name.encode("utf-8", "backslashreplace").decode()


def is_remote(location: str) -> bool:
    """Whether reading this goes through the network or fsspec."""
    return "://" in location or location.startswith("hf:")


def list_inputs(named: list[str], output: Path | None = None, attempts: int | None = None) -> list[InputFile]:
    """Every file behind the user's inputs, in the order given, folders and patterns sorted by name.

    Files under `output` are left out. ConfigError names an input behind which there is nothing, RunError a server that
    cannot be reached in so many attempts.
    """
    files: list[InputFile] = []
    for item in named:
        if item.startswith("bundled:"):
            files.append(_bundled(item))
        elif item.startswith("pipe:"):
            raise ConfigError(f"{item}: pipe: URLs are for shards; run the command and give the file that it writes")
        elif item.startswith("hf:"):
            files.append(InputFile(item, item, None, None))
        elif "://" in item:
            files += _remote(item, attempts)
        else:
            files += _local(item, output)
    return files


def _bundled(item: str) -> InputFile:
    path = BUNDLED / f"{item.removeprefix('bundled:')}.jsonl.gz"
    if not path.is_file():
        known = ", ".join(f"bundled:{p.name.removesuffix('.jsonl.gz')}" for p in sorted(BUNDLED.glob("*.jsonl.gz")))
        raise ConfigError(f"{item}: no such bundled corpus; there are: {known or 'none in this installation'}")
    stat = path.stat()
    return InputFile(item, str(path), stat.st_size, stat.st_mtime_ns)


def _local(item: str, output: Path | None) -> list[InputFile]:
    path = Path(item).expanduser()
    if (path / "dataset_dict.json").is_file() or all((path / n).is_file() for n in ("state.json", "dataset_info.json")):
        raise ConfigError(f"{item}: is a data set that Hugging Face's save_to_disk wrote; give it as hf:{item}")
    if path.is_dir():
        found = _known(item, sorted(_below(path)))
        root = path
    elif path.exists():
        found, root = [path], path.parent
    else:
        names = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(item) else []
        found, root = [Path(name) for name in names if Path(name).is_file()], Path(_fixed_part(str(path)))
    if output is not None:
        found = [p for p in found if output.resolve() not in p.resolve().parents]
    if not found:
        what = "holds no file to read" if path.is_dir() else "no such file, folder or pattern"
        raise ConfigError(f"{item}: {what}; expected text, JSON lines, CSV, Parquet, WARC, Wikipedia XML or tar files")
    return [_describe(p, root) for p in found]


def _below(folder: Path) -> Iterator[Path]:
    """Every file below a folder that is not hidden, those of linked folders too; ConfigError for what cannot be listed.

    pathlib would pass over linked folders, and over folders without permission, in silence.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f"{error.filename}: cannot be listed: {error.strerror}; mend that or take it out")

    own, linked = Path(folder).resolve(), set[Path]()

    def is_new(path: Path) -> bool:
        """Whether a folder is reached by no other way: links may lead back, or twice to one place."""
        if not path.is_symlink():
            return True
        real = path.resolve()
        fresh = real not in linked and own not in (real, *real.parents)
        linked.add(real)
        return fresh

    for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = [f for f in sorted(folders) if not _hidden(f) and is_new(Path(place, f))]
        yield from (Path(place, name) for name in names if not _hidden(name))


def _describe(path: Path, root: Path) -> InputFile:
    if not os.access(path, os.R_OK):
        raise ConfigError(f"{path}: no permission to read it")
    stat = path.stat()
    return InputFile(readable(path.relative_to(root).as_posix()), str(path), stat.st_size, stat.st_mtime_ns)


def _known(item: str, paths: Any) -> list[Path]:
    """The files of a folder that end like data; the others are named once, never dropped in silence.

    Folders that prepare wrote are no text and are passed over.
    """
    paths = list(paths)
    for path in paths:
        if format_of(path.name) and not path.exists():
            raise ConfigError(f"{path}: is a link to a file that is not there; restore that or take the link out")
    files = [p for p in paths if p.is_file()]
    prepared = {p.parent for p in files if p.name == "manifest.json" and FORMAT.encode() in p.read_bytes()}
    files = [p for p in files if prepared.isdisjoint(p.parents)]
    known = [p for p in files if format_of(p.name)]
    if len(known) < len(files):
        other = [readable(p.name) for p in files if not format_of(p.name)]
        get_logger().warning(
            f"{item}: {len(other)} files of unknown ending are not read: {', '.join(other[:3])}"
            f"{', ...' if len(other) > 3 else ''} (name them as input to read them as text)"
        )
    return known


def _hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _fixed_part(pattern: str) -> str:
    """The folder in front of the first part of a pattern that varies."""
    parts = Path(pattern).parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return str(Path(*parts[:fixed])) if fixed else "."


def _remote(item: str, attempts: int | None) -> list[InputFile]:
    try:
        found = insist(item, lambda: "cannot be reached", lambda: _look_up(item), attempts)
    except ImportError as error:
        raise ConfigError(f"{item}: {str(error).splitlines()[0]}") from None
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{item}: is not a URL that can be read: {error}") from None
    if not found:
        raise ConfigError(f"{item}: there is nothing at this URL")
    return [InputFile(url, url, info.get("size"), None, _tag(info)) for url, info in found]


def _tag(info: dict[str, Any]) -> str | None:
    """What a file system says of a file that changes when the file does: each calls it otherwise."""
    names = ("ETag", "etag", "Last-Modified", "LastModified", "last_modified", "updated", "mtime")
    return next((str(info[name]) for name in names if info.get(name)), None)


def _look_up(item: str) -> list[tuple[str, dict[str, Any]]]:
    """(URL, facts of its file system) of each file behind a URL; unless of HTTP it may be a pattern or a folder."""
    import fsspec

    system, path = fsspec.core.url_to_fs(item)
    if glob.has_magic(path.partition("?")[0]) and not item.startswith(("http://", "https://")):
        paths = sorted(system.glob(path))
    elif not item.startswith(("http://", "https://")) and system.isdir(path):
        paths = sorted(p for p in system.find(path) if format_of(p))
    else:
        return [(item, system.info(path))]
    return [(system.unstrip_protocol(p), system.info(p)) for p in paths]
