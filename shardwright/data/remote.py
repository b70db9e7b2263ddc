"""Shards from elsewhere: fsspec URLs, retries, and a bounded cache of what arrived whole.

Used by `manifest` and `stream`; nothing here knows tokens. What a URL may do is decided here too: a `pipe:` URL runs a
command and a pickled member runs code, so both are refused unless the user allows them by name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import random
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shardwright.config import ConfigError
from shardwright.data.manifest import ShardError
from shardwright.log import get_logger

_STALE_S = 3600.0
_MAX_WAIT_S = 30.0
_PICKLED = (".pickle", ".pkl", ".pyd", ".pth", ".pt", ".joblib", ".dill")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
R = TypeVar("R")
#: (url, sha256, size) of a remote file; the size may be unknown.
Wanted = tuple[str, str, int | None]


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL or a pipe rather than a local file."""
    return "://" in str(path) or str(path).startswith("pipe:")


def join(root: str, relative: str) -> str:
    """The place of a manifest's entry; ShardError on an entry that leaves the manifest's folder.

    A manifest may come from anywhere: an absolute path, a URL or a pipe in it would read or run what it likes.
    """
    if not _NAME.fullmatch(relative) or ".." in relative.split("/"):
        raise ShardError(
            f"{root}/manifest.json: names a file outside its folder ({relative!r}); only plain relative paths are read"
        )
    return posixpath.join(root, relative)


def check_url(url: str, allow: Collection[str] = ()) -> None:
    """Refuse a URL that runs a command (`pipe:`), unless 'pipe' is allowed; ConfigError."""
    if (url.startswith("pipe:") or "::pipe:" in url) and "pipe" not in allow:
        raise ConfigError(f"{url}: a pipe: URL runs a command; allow it with data.allow=[pipe] if you trust it")


def is_pickled(name: str) -> bool:
    """Whether a file of this name is one that only unpickling would read."""
    return name.lower().endswith(_PICKLED)


def check_member(name: str, where: str, allow: Collection[str] = ()) -> None:
    """Refuse a tar member that only unpickling would read, unless 'pickle' is allowed; ConfigError."""
    if is_pickled(name) and "pickle" not in allow:
        raise ConfigError(
            f"{where}: member {name!r} is a pickle, which can run code when read; "
            "allow it with data.allow=[pickle] if you trust the file"
        )


@dataclass(frozen=True)
class Retry:
    """How a transfer is tried again: waits of base, 2 base, 4 base ... seconds, half of each by chance."""

    attempts: int = 6
    base_s: float = 0.5
    timeout_s: float = 60.0

    def run(self, what: str, work: Callable[[], R]) -> R:
        """The result of `work`, tried again on any passing failure; ShardError names what, how often and why not."""
        for attempt in range(1, self.attempts + 1):
            try:
                return work()
            except (FileNotFoundError, PermissionError, ConfigError):
                raise
            except Exception as error:  # every file system raises its own kinds, few of them OSError
                reason = _describe(error)
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                    raise ShardError(f"{what}: cannot store what arrives: {reason}; free space there") from None
            if attempt < self.attempts:
                wait = min(_MAX_WAIT_S, self.base_s * 2 ** (attempt - 1)) * (0.5 + random.random() / 2)
                get_logger(__name__).warning("%s: %s; attempt %d of %d", what, reason, attempt, self.attempts)
                time.sleep(wait)
        raise ShardError(f"{what}: {self.attempts} attempts failed, the last with: {reason}")


def read_bytes(
    url: str, *, sha256: str | None = None, allow: Collection[str] = (), retry: Retry | None = None
) -> bytes:
    """All bytes of a small remote file; FileNotFoundError, or ShardError once the attempts are used up.

    Where `sha256` is given, other bytes than those are a failed attempt.
    """
    check_url(url, allow)
    retry = retry or Retry()

    def attempt() -> bytes:
        raw = _read(url, retry.timeout_s)
        if sha256 is not None:
            _check_hash(hashlib.sha256(raw).hexdigest(), sha256)
        return raw

    return retry.run(url, attempt)


def default_cache_folder() -> Path:
    """The user's cache folder for shards."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shardwright" / "shards"


@dataclass
class ShardCache:
    """Local copies of remote files, named by their sha256 and bounded in bytes; the least recently used go first.

    Safe between processes without locks: a file appears under its name whole (atomic rename) and its name says what it
    holds, so two that fetch it at once write the same; a file deleted while mapped stays readable until unmapped.
    """

    folder: Path = field(default_factory=default_cache_folder)
    max_bytes: int = 20 << 30
    retry: Retry = Retry()
    allow: tuple[str, ...] = ()
    _held: set[Path] = field(default_factory=set, init=False, repr=False)
    _seen: set[Path] = field(default_factory=set, init=False, repr=False)
    _locks: dict[Path, threading.Lock] = field(default_factory=dict, init=False, repr=False)

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), (self.folder, self.max_bytes, self.retry, self.allow)

    @contextmanager
    def holding(self, *wanted: Wanted) -> Iterator[list[Path]]:
        """Copies of these (url, sha256, size), which no other thread evicts before the block ends, when they are open.

        Another process may: then opening fails, and the caller asks again.
        """
        places = [self._place(url, sha256) for url, sha256, _ in wanted]
        self._held.update(places)
        try:
            yield [self.fetch(*one) for one in wanted]
        finally:
            self._held.difference_update(places)

    def fetch(self, url: str, sha256: str, size: int | None = None) -> Path:
        """The local copy of `url`, fetched if it is not here; ShardError where what arrives is not what was named."""
        check_url(url, self.allow)
        path = self._place(url, sha256)
        with self._locks.setdefault(path, threading.Lock()):  # a thread that wants what another fetches waits for it
            return self._fetch(url, path, sha256, size)

    def _fetch(self, url: str, path: Path, sha256: str, size: int | None) -> Path:
        with suppress(OSError):
            found = path.stat().st_size
            if size is None or found == size:
                os.utime(path)  # the time of last use, which eviction sorts by
                return path
        self._warn_if_too_small(path)
        try:
            self.retry.run(url, lambda: self._transfer(url, path, sha256, size))
        except FileNotFoundError:
            raise ShardError(f"{url}: no such file, though the manifest names it; restore it at its source") from None
        except PermissionError as error:
            raise ShardError(f"{url}: {_describe(error)}; check the credentials and the folder {self.folder}") from None
        self._evict(keep=path)
        return path

    def forget(self, path: str | Path) -> None:
        """Drop a copy that turned out bad, so that the next fetch gets it anew."""
        self._seen.discard(Path(path))
        with suppress(FileNotFoundError):
            os.unlink(path)

    def _warn_if_too_small(self, path: Path) -> None:
        if path in self._seen:
            get_logger(__name__).warning(
                "%s: a shard cache of %.3g GiB is too small, shards in use are fetched again; raise data.cache_gib",
                self.folder,
                self.max_bytes / 2**30,
            )
            self._seen.clear()
        self._seen.add(path)

    def _place(self, url: str, sha256: str) -> Path:
        if len(sha256) != 64 or not all(c in "0123456789abcdef" for c in sha256):
            raise ShardError(f"{url}: the manifest's sha256 {sha256!r} is none; run `shardwright prepare` again")
        return Path(self.folder) / sha256[:2] / (sha256 + posixpath.splitext(url)[1])

    def _transfer(self, url: str, path: Path, sha256: str, size: int | None) -> None:
        """One attempt: download to a name of our own, compare size and hash, and only then rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            _download(url, temporary, self.retry.timeout_s)
            received = temporary.stat().st_size
            if size is not None and received != size:
                raise OSError(f"{received} bytes arrived, expected {size}: the file is truncated")
            with temporary.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            _check_hash(found, sha256)
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()

    def _evict(self, keep: Path) -> None:
        """Unlink the least recently used files until the rest fits, and leftovers of processes that were killed."""
        found, total = [], 0
        for path in Path(self.folder).glob("??/*"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                if path.suffix == ".tmp":
                    if time.time() - facts.st_mtime > _STALE_S:
                        path.unlink()
                    continue
                found.append((facts.st_mtime, facts.st_size, path))
                total += facts.st_size
        for _, size, path in sorted(found):
            if total <= self.max_bytes:
                break
            if path != keep and path not in self._held:
                with suppress(FileNotFoundError):
                    path.unlink()
                total -= size


def _check_hash(found: str, expected: str) -> None:
    """OSError where what arrived is something else."""
    if found != expected:
        raise OSError(f"sha256 {found} arrived, expected {expected}: the file was altered")


def _open_system(url: str, timeout_s: float) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Files are read whole by one request each: fsspec's file objects ask for the size first, and over HTTP report any
    failure of that as a missing file.
    """
    from fsspec.config import conf
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        # A stalled server must be a failure that is tried again, not a hang.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        own = conf.get(url.partition(":")[0], {}).get("client_kwargs", {})  # headers that the user gave to fsspec
        options = {"client_kwargs": {**own, "timeout": timeout}}
    return url_to_fs(url, **options)


def _download(url: str, path: Path, timeout_s: float) -> None:
    if url.startswith("pipe:"):
        with path.open("wb") as file:
            _run_pipe(url, stdout=file)
    else:
        system, place = _open_system(url, timeout_s)
        system.get_file(place, str(path))


def _read(url: str, timeout_s: float) -> bytes:
    if url.startswith("pipe:"):
        return _run_pipe(url, stdout=subprocess.PIPE)
    system, place = _open_system(url, timeout_s)
    return system.cat_file(place)


def _run_pipe(url: str, stdout: Any) -> bytes:
    done = subprocess.run(url.removeprefix("pipe:"), shell=True, stdin=subprocess.DEVNULL, stdout=stdout)
    if done.returncode:
        raise OSError(f"the command ended with code {done.returncode}")
    return done.stdout


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
