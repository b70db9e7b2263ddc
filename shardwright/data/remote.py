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
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from shardwright.config import ConfigError
from shardwright.data.manifest import ShardError
from shardwright.log import get_logger

_CHUNK = 1 << 20
_STALE_S = 3600.0
_MAX_WAIT_S = 30.0
_PICKLED = (".pickle", ".pkl", ".pyd", ".pth", ".pt", ".bin", ".joblib", ".dill")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
R = TypeVar("R")


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


def check_member(name: str, where: str, allow: Collection[str] = ()) -> None:
    """Refuse a tar member that only unpickling would read, unless 'pickle' is allowed; ConfigError."""
    if name.lower().endswith(_PICKLED) and "pickle" not in allow:
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


def read_bytes(url: str, *, allow: Collection[str] = (), retry: Retry | None = None) -> bytes:
    """All bytes of a small remote file; FileNotFoundError, or ShardError once the attempts are used up."""
    retry = retry or Retry()
    return retry.run(url, lambda: b"".join(_chunks(url, allow, retry.timeout_s)))


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

    def fetch(self, url: str, sha256: str, size: int | None = None) -> Path:
        """The local copy of `url`, fetched if it is not here; ShardError where what arrives is not what was named."""
        check_url(url, self.allow)
        path = self._place(url, sha256)
        with suppress(OSError):
            found = path.stat().st_size
            if size is None or found == size:
                os.utime(path)  # the time of last use, which eviction sorts by
                return path
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
        with suppress(FileNotFoundError):
            os.unlink(path)

    def _place(self, url: str, sha256: str) -> Path:
        if len(sha256) != 64 or not all(c in "0123456789abcdef" for c in sha256):
            raise ShardError(f"{url}: the manifest's sha256 {sha256!r} is none; run `shardwright prepare` again")
        return Path(self.folder) / sha256[:2] / (sha256 + posixpath.splitext(url)[1])

    def _transfer(self, url: str, path: Path, sha256: str, size: int | None) -> None:
        """One attempt: stream to a name of our own, compare size and hash, and only then rename."""
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        digest, received = hashlib.sha256(), 0
        try:
            with temporary.open("wb") as file:
                for chunk in _chunks(url, self.allow, self.retry.timeout_s):
                    file.write(chunk)
                    digest.update(chunk)
                    received += len(chunk)
            if size is not None and received != size:
                raise OSError(f"{received} bytes arrived, expected {size}: the file is truncated")
            if digest.hexdigest() != sha256:
                raise OSError(f"sha256 {digest.hexdigest()} arrived, expected {sha256}: the file was altered")
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
            if path != keep:
                with suppress(FileNotFoundError):
                    path.unlink()
                total -= size


def _chunks(url: str, allow: Collection[str], timeout_s: float) -> Iterator[bytes]:
    """The bytes of a URL as they arrive."""
    check_url(url, allow)
    if url.startswith("pipe:"):
        yield from _pipe_chunks(url)
        return
    import fsspec

    with fsspec.open(url, "rb", **_options(url, timeout_s)) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _options(url: str, timeout_s: float) -> dict[str, Any]:
    """A stalled server must be a failure that is tried again, not a hang; plain streaming, whole files are read."""
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
    return {"block_size": 0, "client_kwargs": {"timeout": timeout}}


def _pipe_chunks(url: str) -> Iterator[bytes]:
    command = url.removeprefix("pipe:")
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        while chunk := process.stdout.read(_CHUNK):
            yield chunk
    if process.returncode:
        raise OSError(f"the command ended with code {process.returncode}")


def _describe(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
