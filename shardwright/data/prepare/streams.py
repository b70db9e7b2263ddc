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
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from shardwright.config import ConfigError, RunError
from shardwright.data.prepare.records import BrokenInput

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bz2"}
BUFFER = 1 << 20
RETRIES = 6


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
        if self._file is not None:
            self._file.close()
        super().close()

    def _retry(self, action: Callable[[Any], Any]) -> Any:
        import fsspec

        for attempt in range(RETRIES):
            try:
                if self._file is None:
                    self._file = fsspec.open(self._url, "rb").open()
                    self._file.seek(self._position)
                return action(self._file)
            except FileNotFoundError:
                raise ConfigError(f"{self._url}: there is nothing at this URL") from None
            except Exception as error:  # each protocol has exceptions of its own
                self._file = None
                if attempt + 1 == RETRIES:
                    raise RunError(
                        f"{self._url}: reading failed {RETRIES} times at byte {self._position} "
                        f"({type(error).__name__}: {error}); run again to go on"
                    ) from None
                time.sleep(0.1 * 2**attempt)


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
        head = stream.peek(6)[:6]
        kind = next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)
        if kind is None:
            return stream
        opened: Any
        if kind == "gzip":
            opened = Stepwise(gzip.GzipFile(fileobj=stream))
        elif kind == "bz2":
            opened = Stepwise(bz2.BZ2File(stream))
        elif kind == "xz":
            opened = Stepwise(lzma.LZMAFile(stream))  # noqa: SIM115  (closed with the file below it)
        else:
            opened = ZstdFile(stream)
        stream = io.BufferedReader(opened, BUFFER)


class Stepwise(io.RawIOBase):
    """Gives out what a library could uncompress before it met damage; read in large pieces it would keep that back."""

    def __init__(self, file: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read1(len(buffer))
        buffer[: len(data)] = data
        return len(data)


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
                    raise EOFError("the zstd stream ends before its end marker")
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
    except EOFError:
        raise BrokenInput(where(), "the compressed stream is cut off; fetch the file again") from None
    except (zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise BrokenInput(where(), f"the compressed stream is damaged ({error}); fetch the file again") from None
    except OSError as error:
        if str(error).startswith("Invalid data stream"):  # what bz2 says
            raise BrokenInput(where(), "the compressed stream is damaged; fetch the file again") from None
        raise
