"""Bytes of a file, local or remote, uncompressed on the way. Part of `prepare`.

Compression is told by the first bytes, not by the name. A cut-off or damaged stream raises BrokenInput, whichever
library found it; a network that fails is retried and then a RunError, since it says nothing about the input.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import re
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, TypeVar

from shardwright.config import ConfigError, RunError
from shardwright.data.prepare.records import BrokenInput

MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # a frame with data, or one to skip
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),  # a block, or the end: text may well begin with BZh
}
BUFFER = 1 << 20
PIECE = 1 << 13  # compressed bytes taken at a time: with damage in a piece, what it gives is lost
T = TypeVar("T")
RETRIES = 6


class CutStream(Exception):
    """A compressed stream ends before its end mark. Not EOFError, which some libraries take for a file's good end."""


class Tally(io.RawIOBase):
    """Passes bytes through, counts and hashes them."""

    def __init__(self, file: BinaryIO | io.RawIOBase, advance: Callable[[int], None]) -> None:
        self._file, self._advance, self.sha256 = file, advance, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)  # type: ignore[union-attr]
        self.sha256.update(memoryview(buffer)[: count or 0])
        self._advance(count or 0)
        return count or 0


class RemoteFile(io.RawIOBase):
    """A file behind a URL that is opened again where it stopped when the connection breaks."""

    def __init__(self, url: str) -> None:
        self._url, self._position = url, 0
        self._file: Any = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = self._retry(lambda file: file.seek(offset, whence))
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._retry(lambda file: file.read(len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    def _drop(self) -> None:
        """Close the connection; one that is only forgotten is complained of when the program ends."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(Exception):  # it may be broken already
                file.close()

    def _retry(self, action: Callable[[Any], Any]) -> Any:
        import fsspec

        def act() -> Any:
            try:
                if self._file is None:
                    self._file = fsspec.open(self._url, "rb").open()
                    self._file.seek(self._position)
                return action(self._file)
            except Exception as error:
                self._drop()
                if isinstance(error, ValueError) and ("seek" in str(error) or "range requests" in str(error)):
                    raise ConfigError(
                        f"{self._url}: its server cannot begin in the middle of a file, which Parquet needs, and any "
                        "file after a break; download it first and give the copy"
                    ) from None
                if isinstance(error, ValueError):  # which `insist` would take for a fault of the URL
                    raise OSError(str(error)) from None
                raise

        return insist(self._url, lambda: f"reading failed {RETRIES} times at byte {self._position}", act)


def insist(url: str, failed: Callable[[], str], action: Callable[[], T], attempts: int | None = None) -> T:
    """The result of `action`, which reaches for `url`, tried `attempts` times (RETRIES) on failures that may pass.

    ConfigError where there is nothing, RunError where the server refuses or the failure does not pass; `failed` says
    what did not work. ImportError and ValueError (a URL that is none) go through.
    """
    attempts = attempts or RETRIES
    for attempt in range(attempts):
        try:
            return action()
        except (ImportError, ValueError):
            raise
        except Exception as error:  # each protocol has exceptions of its own
            cause = _cause(error)
        status = getattr(cause, "status", None)
        if isinstance(cause, FileNotFoundError) or status in (404, 410):
            raise ConfigError(f"{url}: there is nothing at this URL") from None
        reason = f"{type(cause).__name__}: {cause}" if status is None else f"HTTP {status}"
        if isinstance(cause, PermissionError) or (status in range(400, 500) and status not in (408, 425, 429)):
            raise RunError(f"{url}: the server refuses it ({reason}); check the address and your access to it")
        if attempt + 1 < attempts:
            time.sleep(0.1 * 2**attempt)
    raise RunError(f"{url}: {failed()} ({reason}); run again to go on")


def _cause(error: BaseException) -> BaseException:
    """What an exception came from: fsspec calls every failure of HTTP a missing file."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def open_raw(location: str) -> io.RawIOBase:
    """The stored bytes of a local path or URL."""
    if "://" in location:
        return RemoteFile(location)
    try:
        return open(location, "rb", buffering=0)  # noqa: SIM115  (the caller closes it)
    except OSError as error:
        raise ConfigError(f"{location}: cannot be read: {error.strerror}") from None


def uncompress(stream: io.BufferedReader) -> io.BufferedReader:
    """The stream without its compression, of which there may be several layers."""
    while True:
        head = stream.peek(10)[:10]
        kind = next((name for name, magic in MAGIC.items() if magic.match(head)), None)
        if kind is None:
            return stream
        opened: Any
        if kind == "gzip":
            opened = Stepwise(gzip.GzipFile(fileobj=stream))
        elif kind == "bz2":
            opened = Concatenated(stream, bz2.BZ2Decompressor)
        elif kind == "xz":
            opened = Concatenated(stream, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ), padding=4)
        else:
            opened = ZstdFile(stream)
        stream = io.BufferedReader(opened, BUFFER)


class Stepwise(io.RawIOBase):
    """Gives out what a library could uncompress before it met damage; read in large pieces it would keep that back."""

    def __init__(self, file: gzip.GzipFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._file.read1(len(buffer))
        except EOFError as error:
            raise CutStream(str(error)) from None
        buffer[: len(data)] = data
        return len(data)


class Concatenated(io.RawIOBase):
    """xz or bzip2 streams one after the other, to the end of the file.

    The library's own readers take whatever they cannot read behind the first stream for the file's end.
    """

    def __init__(self, stream: io.BufferedReader, build: Callable[[], Any], padding: int = 0) -> None:
        """`build` makes a decompressor of one stream; zeros in multiples of `padding` may stand behind each."""
        self._stream, self._build, self._padding = stream, build, padding
        self._current, self._rest = build(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data:
            if self._current.eof and not self._go_on():
                return 0
            fresh = b""
            if self._current.needs_input:
                fresh, self._rest = self._rest or self._stream.read1(PIECE), b""
                if not fresh:
                    raise CutStream("the stream ends before its end mark")
            data = self._current.decompress(fresh, len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def _go_on(self) -> bool:
        """Begin with the stream behind the one that has ended; False at the end of the file."""
        rest, zeros = self._current.unused_data, 0
        while True:
            bare = rest.lstrip(b"\0") if self._padding else rest
            zeros += len(rest) - len(bare)
            rest = bare or self._stream.read1(PIECE)
            if bare or not rest:
                break
        if self._padding and zeros % self._padding:
            raise lzma.LZMAError(f"{zeros} zeros behind a stream, expected a multiple of {self._padding}")
        if rest:
            self._current, self._rest = self._build(), rest
        return bool(rest)


class ZstdFile(io.RawIOBase):
    """Zstandard frames one after the other. The library's own reader takes a cut-off frame for a short file."""

    def __init__(self, stream: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            raise ConfigError("zstd files need zstandard: pip install 'shardwright[data]'") from None
        # The window of `zstd --long=31`, which corpora are often packed with.
        self._library = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._stream, self._frame, self._ready = stream, None, b""  # type: tuple[io.BufferedReader, Any, bytes]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._stream.read1(1 << 16)
            if not data:
                if self._frame is not None and not self._frame.eof:
                    raise CutStream("the stream ends before its end mark")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._library.decompressobj()
            try:
                self._ready = self._frame.decompress(data)
            except self._error as error:
                raise zlib.error(str(error)) from None
            self._rest = self._frame.unused_data
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    _rest = b""


@contextmanager
def broken_streams(where: Callable[[], str]) -> Iterator[None]:
    """Turn every library's complaint about damaged bytes into BrokenInput at `where()`."""
    try:
        yield
    except CutStream:
        raise BrokenInput(where(), "the compressed stream is cut off; fetch the file again") from None
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BrokenInput(where(), f"the compressed stream is damaged ({error}); fetch the file again") from None
    except OSError as error:
        if str(error).startswith("Invalid data stream"):  # what bz2 says
            raise BrokenInput(where(), "the compressed stream is damaged; fetch the file again") from None
        raise
