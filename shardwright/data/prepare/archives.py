"""Web archives and Wikipedia dumps: where their records are, and how a page becomes text. Part of `prepare`.

Finding records happens in the reading process, turning them into text in the workers.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from functools import cache
from typing import Any

from shardwright.config import ConfigError
from shardwright.data.prepare.records import HTML, TEXT, WIKI, BrokenInput

PAGE_TYPES = ("text/html", "application/xhtml+xml")


def read_warc(stream: io.BufferedReader) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(place, (kind, data)) of each page of a WARC and of each text of a WET file."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError:
        raise ConfigError("WARC and WET files need warcio: pip install 'shardwright[data]'") from None
    number = 0
    try:
        for number, record in enumerate(ArchiveIterator(stream), 1):
            found = _warc_record(record, f"record {number}")
            if found is not None:
                yield f"record {number}", found
    except ArchiveLoadFailed as error:
        raise BrokenInput(f"record {number + 1}", f"not a valid WARC record: {str(error).strip()[:80]}") from None


def _warc_record(record: Any, where: str) -> tuple[str, Any] | None:
    """The page or text of a record, None for requests, images and failures."""
    if record.rec_type not in ("response", "conversion"):
        return None
    if record.rec_type == "conversion":
        data = record.content_stream().read()
        if len(data) != int(record.rec_headers.get_header("Content-Length", len(data))):
            raise BrokenInput(where, "the record is cut off; fetch the file again")
        return TEXT, data
    if record.http_headers is None or record.http_headers.get_statuscode() != "200":
        return None
    media_type = (record.http_headers.get_header("Content-Type") or "").partition(";")[0].strip().lower()
    if media_type not in PAGE_TYPES:
        return None
    data = record.content_stream().read()
    if record.raw_stream.limit > 0:  # what the record's stated length still lacks
        raise BrokenInput(where, "the record is cut off; fetch the file again")
    return HTML, (data, record.rec_headers.get_header("WARC-Target-URI") or "")


def read_wikipedia(stream: io.BufferedReader) -> Iterator[tuple[str, tuple[str, Any]]]:
    """(place, (kind, data)) of each article of a MediaWiki XML dump: main name space, no redirects."""
    from xml.etree import ElementTree

    number = 0
    try:
        events = ElementTree.iterparse(stream, events=("start", "end"))
        _, root = next(events)
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


def page_text(data: bytes, address: str) -> str | None:
    """The main text of a web page, without menus and notices; None where there is none (trafilatura)."""
    return _trafilatura().extract(data, url=address or None, include_comments=False)


@cache
def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError:
        raise ConfigError("WARC files need trafilatura: pip install 'shardwright[data]'") from None
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it complains of each page without text
    return trafilatura
