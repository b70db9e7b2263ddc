"""Web archives and Wikipedia dumps: where their records are, and how a page becomes text. Part of `prepare`.

Finding records happens in the reading process, turning them into text in the workers.
"""

from __future__ import annotations

import codecs
import io
import logging
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from typing import Any

from shardwright.config import ConfigError
from shardwright.data.prepare.records import HTML, TEXT, WIKI, BrokenInput

_CHARSET = re.compile(r"""charset\s*=\s*["']?([\w.:-]+)""")
_SUPERSETS = {"iso8859-1": "cp1252", "ascii": "cp1252", "gb2312": "gb18030", "gbk": "gb18030", "shift_jis": "cp932"}
PAGE_TYPES = ("text/html", "application/xhtml+xml")


@cache
def strict_header() -> type[tarfile.TarInfo]:
    """A tar header for which only a block of zeros ends the archive.

    tarfile takes whatever it cannot read behind the first header, and the end of the file, for the archive's end.
    """

    class Strict(tarfile.TarInfo):
        @classmethod
        def fromtarfile(cls, tar: tarfile.TarFile) -> Any:
            try:
                return super().fromtarfile(tar)
            except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
                raise
            except tarfile.HeaderError as error:
                raise tarfile.ReadError(f"{error} where a header should be") from None

    return Strict


def read_warc(stream: io.BufferedReader) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(place, (kind, data)) of each page of a WARC and of each text of a WET file."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise ConfigError("WARC and WET files need warcio: pip install 'shardwright[data]'") from None
    number = 0
    # HTTP headers are parsed here: there warcio takes the end of the file for the end of the records.
    archive = ArchiveIterator(_Pieces(stream), no_record_parse=True)
    try:
        for number, record in enumerate(archive, 1):
            found = _warc_record(archive.loader, record, f"record {number}")
            if found is not None:
                yield f"record {number}", found
    except ConfigError:
        raise
    except (ArchiveLoadFailed, ValueError) as error:  # ValueError: a length that is no number
        raise BrokenInput(f"record {number + 1}", f"not a valid WARC record: {str(error).strip()[:80]}") from None


class _Pieces:
    """Hands a stream on as it comes: reading full pieces would lose what stands before a break."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self.read = stream.read1


def _warc_record(loader: Any, record: Any, where: str) -> tuple[str, Any] | None:
    """The page or text of a record, None for requests, images and failures; BrokenInput for one that is not whole."""
    length = record.rec_headers.get_header("Content-Length" if record.format == "warc" else "length")
    if length is None:
        raise BrokenInput(where, "its header is cut off or lacks a Content-Length; fetch the file again")
    if not length.isdecimal():
        raise BrokenInput(where, f"its Content-Length is {length!r}, expected a number; fetch the file again")
    found: tuple[str, Any] | None = None
    if record.rec_type == "conversion":
        found = TEXT, record.content_stream().read()
    elif record.rec_type == "response":
        found = _response(loader, record, int(length))
    while record.raw_stream.read(1 << 16):
        pass
    if record.raw_stream.limit > 0:  # what the record's stated length still lacks
        raise BrokenInput(where, "the record is cut off; fetch the file again")
    return found


def _response(loader: Any, record: Any, length: int) -> tuple[str, Any] | None:
    """The web page of a response, None where there is none."""
    address = record.rec_headers.get_header("WARC-Target-URI") or ""
    try:
        record.http_headers = loader.load_http_headers("response", address or "http:", record.raw_stream, length)
    except EOFError:  # the file ends, which the caller finds
        return None
    if record.http_headers is None or record.http_headers.get_statuscode() != "200":
        return None
    media_type, _, parameters = (record.http_headers.get_header("Content-Type") or "").lower().partition(";")
    if media_type.strip() not in PAGE_TYPES:
        return None
    charset = _CHARSET.search(parameters)
    return HTML, (record.content_stream().read(), address, charset[1] if charset else "")


def read_wikipedia(stream: io.BufferedReader) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(place, (kind, data)) of each article of a MediaWiki XML dump: main name space, no redirects."""
    from xml.etree import ElementTree

    number = 0
    try:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
        if _local(root.tag) != "mediawiki":
            reason = f"expected a Wikipedia dump (<mediawiki>), found XML of <{_local(root.tag)}>; take it out"
            raise BrokenInput("start", reason)
        for event, element in events:
            if event == "end" and _local(element.tag) == "page":
                number += 1
                article = _article(element)
                root.clear()  # or the whole dump would stay in memory
                if article is not None:
                    yield f"page {number}", (WIKI, article)
    except ElementTree.ParseError as error:
        raise BrokenInput(f"page {number + 1}", f"not valid XML: {error}; fetch the file again") from None


def _article(page: Any) -> tuple[str, str] | None:
    """(title, markup) of a page element, None where it is no article."""
    values = {_local(element.tag): element for element in page.iter()}
    space, text = values.get("ns"), values.get("text")
    if "redirect" in values or text is None or (space is not None and space.text != "0"):
        return None
    title = values["title"].text if "title" in values else ""
    return title or "", text.text or ""


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


def page_text(data: bytes, address: str, charset: str = "") -> str | None:
    """The main text of a web page, without menus and notices; None where there is none (trafilatura).

    `charset` is what the server said; where it does not fit, or is empty, the page itself decides.
    """
    return _trafilatura().extract(decode_page(data, charset) or data, url=address or None, include_comments=False)


def decode_page(data: bytes, charset: str) -> str | None:
    """A page by the charset of its HTTP header, None where that is unknown or does not fit.

    What is valid UTF-8 is UTF-8, since servers often call all their pages Latin-1.
    """
    try:
        name = codecs.lookup(charset).name
    except (LookupError, ValueError):
        return None
    own = _SUPERSETS.get(name, name)
    for encoding in [own] if data.isascii() else ["utf-8", own]:  # ASCII may be UTF-16 or ISO-2022
        with suppress(UnicodeError, LookupError):
            return data.decode(encoding)
    return None


@cache
def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError:
        raise ConfigError("WARC files need trafilatura: pip install 'shardwright[data]'") from None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it complains of each page without text
    return trafilatura
