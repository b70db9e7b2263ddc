"""What a preparation finds at its output and leaves there: finished, unfinished, foreign or nothing. Part of `prepare`.

The work folder OUTPUT/.prepare says in state.json what it belongs to. The manifest is written last; with it the work
folder is of no more use.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from shardwright import __version__
from shardwright.config import ConfigError, RunError
from shardwright.data.manifest import Manifest, ShardError, write_atomic
from shardwright.data.prepare.inputs import InputFile, format_of, is_remote, list_inputs
from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.units import SPLITS, read_part
from shardwright.data.tokenizers import Tokenizer, files_of
from shardwright.log import get_logger

WORK = ".prepare"
SKIPPED = "skipped.jsonl"
WORTH_KEEPING = 32  # finished units (of 2 MiB) from which unfinished work is not dropped for another recipe
HASHED_BYTES = 2**30  # what a second run reads at most of files that seem as they were
RECIPE = 3  # rises when the same recipe gives other bytes, or other intermediate files, than before


def find_finished(output: Path, config: PrepareConfig) -> Manifest | None:
    """The manifest at `output` if this recipe and input made it; ConfigError if others did; None if there is none.

    None too where files that it names are missing or altered: the work folder is then there to make them again.
    """
    if not os.path.exists(output / "manifest.json"):  # pathlib would raise where nobody may look
        return None
    try:
        manifest = Manifest.load(output)
    except ShardError as error:
        what = str(error).rpartition(";")[0]
        raise ConfigError(f"{what}; delete the folder to prepare it again, or choose another output=") from None
    if not isinstance(manifest.recipe, dict) or "tokenizer" not in manifest.recipe:
        raise ConfigError(f"{output}: holds shards that prepare did not write; choose another output=")
    mine, theirs = flatten(config.recipe()), flatten(manifest.recipe)
    changed = _changed_keys(mine, theirs)
    if changed:
        raise ConfigError(f"{output}: {_difference(changed[0], theirs, mine)}; choose another output= or delete it")
    reason = _input_change(config, manifest, output)
    if reason:
        raise ConfigError(f"{output}: is prepared from other input ({reason}); choose another output= or delete it")
    damage = _damage(output, manifest)
    if damage:
        get_logger().warning(f"{damage}; preparing {output} again")
        try:
            (output / WORK).mkdir(exist_ok=True)  # by which the folder is known as one that prepare wrote
        except OSError as error:
            raise ConfigError(f"output={output}: cannot be written: {error.strerror}") from None
        return None
    shutil.rmtree(output / WORK, ignore_errors=True)  # left by a kill in the last moment
    return manifest


def _changed_keys(mine: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Keys but `input` on which two recipes differ; one that an older recipe lacks had its default."""
    before = flatten(PrepareConfig(input=["-"], output="-").recipe()) | theirs
    return [key for key in mine if key != "input" and mine[key] != before.get(key)]


def _difference(key: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    return f"is of another recipe ({key} was {old.get(key)!r}, now {new[key]!r})"


def _damage(output: Path, manifest: Manifest) -> str | None:
    """Which file of a finished output is not as its manifest says: by size, and by hash up to HASHED_BYTES in all."""
    infos = [info for split in manifest.splits.values() for info in split.shards]
    named: list[tuple[str, int | None, str]] = [(info.path, info.bytes, info.sha256) for info in infos]
    named += [(info.index, None, info.index_sha256) for info in infos]
    named.append((manifest.tokenizer["file"], None, manifest.tokenizer["sha256"]))
    is_small = sum(info.bytes for info in infos) <= HASHED_BYTES
    if not is_small:
        get_logger().info(f"{output}: shards over 1 GiB are held against the manifest by size alone")
    for name, size, sha256 in named:
        path = output / name
        if not path.is_file():
            return f"{path}: is missing"
        if size is not None and path.stat().st_size != size:
            return f"{path}: has {path.stat().st_size} bytes, expected {size}"
        if is_small and _sha256(path) != sha256:
            return f"{path}: is altered"
    return None


def _input_change(config: PrepareConfig, manifest: Manifest, output: Path) -> str | None:
    """What differs between the input now and then; input that is gone or out of reach is believed by its name."""
    source, newest = manifest.source, (output / "manifest.json").stat().st_mtime_ns
    path = config.tokenizer.path
    if path is not None and Path(path).exists() and source.get("tokenizer") != files_of(path):
        return f"{path} has changed"
    is_same = config.recipe()["input"] == manifest.recipe["input"]
    return _changed_file(config.input, source["files"], output, newest, is_same) or _changed_file(
        config.filters.decontaminate, source.get("evaluation", []), None, newest, True
    )


def _changed_file(
    named: list[str], then: list[dict[str, Any]], output: Path | None, newest: int, is_same: bool
) -> str | None:
    """The first file behind `named` that is not as the manifest says; `newest`: when that was written, in ns.

    Names and sizes are compared, of remote files also what their file system says of their last change, of local ones
    hashes as far as HASHED_BYTES go; beyond, those of files changed since.
    """
    otherwise = None if is_same else "input= names others"
    try:
        files = list_inputs(named, output, attempts=1)
    except ConfigError:
        return otherwise
    except RunError as error:
        get_logger().info(f"{str(error).rpartition(';')[0]}; believed to be as it was")
        return otherwise
    is_small = sum(file.size or 0 for file in files if not is_remote(file.location)) <= HASHED_BYTES
    if not is_small:
        get_logger().info("input over 1 GiB: files not changed since are compared by name and size alone")
    for old, new in zip_longest(then, files):
        sizes = old and old.get("bytes"), new and new.size
        if old is None or new is None or old["name"] != new.name or (None not in sizes and sizes[0] != sizes[1]):
            return f"{_file_words(old)} then, {_file_words(new and new._asdict() | {'bytes': new.size})} now"
        if is_remote(new.location):
            has_changed = None not in (new.tag, old.get("tag")) and new.tag != old["tag"]
        else:
            is_hashed = old["sha256"] and (is_small or (new.changed or 0) >= newest)
            has_changed = is_hashed and old["sha256"] != _sha256(new.location)
        if has_changed:
            return f"{new.shown} has changed"
    return None


def _sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_words(file: dict[str, Any] | None) -> str:
    if file is None:
        return "nothing"
    return f"{file['name']} of {file['bytes']} bytes" if file.get("bytes") is not None else file["name"]


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(flatten(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item})
    return flat


@contextmanager
def locked(output: Path) -> Iterator[Path]:
    """The work folder of an output, for one process at a time; the lock dies with its holder."""
    work = output / WORK
    try:
        if output.is_dir() and not work.is_dir() and any(output.iterdir()):
            raise ConfigError(f"{output}: holds files that prepare did not write; choose another output= or empty it")
        work.mkdir(parents=True, exist_ok=True)
        lock = open(work / "lock", "w")  # noqa: SIM115  (held as long as the lock)
    except OSError as error:
        raise ConfigError(f"output={output}: cannot be written: {error.strerror}") from None
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # no such locks on this system
            pass
        except OSError:
            raise ConfigError(f"{output}: another prepare is at work there; wait for it or choose another") from None
        yield work


def begin(work: Path, config: PrepareConfig, files: list[InputFile], source: dict[str, Any]) -> None:
    """Note in the work folder what it belongs to, or check it. `source`: hashes of tokenizer and evaluation files.

    Another recipe is refused where more than a minute's work lies there, else it starts over. Other library versions,
    or changed files, make what was done from them worthless; what came before the first changed file stays.
    """
    path = work / "state.json"
    now: dict[str, Any] = {
        "recipe": config.recipe(),
        "files": [[*file] for file in files],
        "versions": {"recipe": RECIPE} | versions(config, files, None),
        "source": source,
    }
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        mine, theirs = flatten(config.recipe()), flatten(before["recipe"])
        changed = _changed_keys(mine, theirs)
        if changed and sum(1 for _ in work.rglob("*.part")) >= WORTH_KEEPING:
            raise ConfigError(
                f"{work.parent}: its unfinished preparation {_difference(changed[0], theirs, mine)}; "
                f"go on with that, choose another output= or delete {work}"
            )
        if changed:
            _forget(work)
        elif before["versions"] != now["versions"] or before["source"] != source:
            get_logger().warning(f"{work.parent}: libraries, tokenizer or evaluation files have changed; starting over")
            _forget(work)
        elif before["files"] != now["files"]:
            _forget_from(work, _first_difference(before["files"], now["files"]))
    write_atomic(path, json.dumps(now).encode())


def _forget(work: Path) -> None:
    for entry in work.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != "lock":
            entry.unlink()


def _forget_from(work: Path, file: int) -> None:
    """Drop everything but the cleaned units that end before input file `file`."""
    get_logger().warning(f"{work.parent}: input has changed from file {file + 1} on; work on earlier files is kept")
    keep = [] if (work / "cleaned.json").exists() else sorted((work / "clean").rglob("*.part"))
    kept = {path for path in keep if _unit_facts(path)["next"][0] < file}
    for entry in list(work.iterdir()):
        if entry.name in ("lock", "clean"):
            continue
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for path in (work / "clean").rglob("*.part"):
        if path not in kept:
            path.unlink()


def _first_difference(before: list[Any], now: list[Any]) -> int:
    return next((n for n, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))


def _unit_facts(path: Path) -> dict[str, Any]:
    return read_part(path, ())[1]


def publish(work: Path, output: Path, tokenizer: Tokenizer) -> Manifest:
    """Move what is complete in the work folder to its place, the manifest last, and drop the work folder.

    Its manifest says that it is complete. Killed in between, the next run comes here again and moves the rest.
    """
    (output / "manifest.json").unlink(missing_ok=True)  # of a folder whose damage is being repaired
    for split in SPLITS:
        if (work / "shards" / split).is_dir():
            shutil.rmtree(output / split, ignore_errors=True)  # of an attempt whose input has changed since
            os.rename(work / "shards" / split, output / split)
    tokenizer.save(output)
    if (work / SKIPPED).exists():
        os.replace(work / SKIPPED, output / SKIPPED)
    Manifest.load(work).save(output)
    shutil.rmtree(work, ignore_errors=True)
    return Manifest.load(output)


def save_skipped(work: Path, broken: list[dict[str, str]]) -> None:
    """The list of broken input that was left out, if there is any."""
    lines = (json.dumps(entry, ensure_ascii=False, sort_keys=True) + "\n" for entry in broken)
    if broken:
        write_atomic(work / SKIPPED, "".join(lines).encode())


def save_array(path: Path, array: np.ndarray) -> None:
    """An .npy file, whole or not at all."""
    import io

    buffer = io.BytesIO()
    np.save(buffer, array)
    write_atomic(path, buffer.getvalue())


def versions(config: PrepareConfig, files: list[InputFile], tokenizer: Tokenizer | None) -> dict[str, str]:
    """Versions of the libraries that have a say in the bytes of the result."""
    used = {
        "ftfy": config.cleaning.fix_text,
        "py3langid": bool(config.filters.languages),
        "datasketch": config.dedup.near,
        "tokenizers": tokenizer is None or tokenizer.file.endswith(".json"),
        "sentencepiece": config.tokenizer.kind == "unigram" or (tokenizer is not None and ".model" in tokenizer.file),
        "trafilatura": any(format_of(f.name) == "warc" for f in files),
    }
    found = {"shardwright": __version__}
    for name, is_used in used.items():
        if is_used:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                continue
    return found
