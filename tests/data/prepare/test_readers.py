"""Every input format gives the same documents, and every kind of damage is named with file and line."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from shardwright.config import ConfigError
from shardwright.data.prepare.records import BROKEN, END, JSON
from shardwright.data.prepare.units import BrokenRecord, extract

COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
}


def texts(records, field="text"):
    return [extract(record, field) for record in records if record.kind not in (END, BROKEN)]


def faults(records):
    found = []
    for record in records:
        try:
            if record.kind != END:
                extract(record, "text")
        except BrokenRecord as error:
            found.append((error.where(record), str(error)))
    return found


def as_bytes(ending, documents):
    if ending == ".jsonl":
        return "".join(json.dumps({"text": d}) + "\n\n" for d in documents).encode()
    if ending == ".json":
        return json.dumps([{"text": d} for d in documents], indent=1).encode()
    if ending == ".parquet":
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(documents)), "text": documents}), buffer)
        return buffer.getvalue()
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, delimiter="\t" if ending == ".tsv" else ",")
    writer.writerows([["id", "text"], *enumerate(documents)])
    return buffer.getvalue().encode()


@pytest.mark.parametrize("packing", COMPRESS)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_formats_and_compressions(tmp_path, read, english, poems, ending, packing):
    documents = english[:3] + poems[:5]
    path = tmp_path / f"a{ending}{packing}"
    path.write_bytes(COMPRESS[packing](as_bytes(ending, documents)))
    assert texts(read(path)) == documents


@pytest.mark.parametrize("packing", COMPRESS)
def test_plain_text_as_files_lines_and_paragraphs(tmp_path, read, poems, packing):
    path = tmp_path / f"a.txt{packing}"
    whole = "\n\n".join(poems[:9])
    path.write_bytes(COMPRESS[packing](b"\xef\xbb\xbf" + whole.encode()))
    assert texts(read(path)) == [whole]
    lines = [line for line in whole.split("\n") if line]
    assert [t.rstrip("\n") for t in texts(read(path, documents="line"))] == lines
    assert [t.rstrip("\n") for t in texts(read(path, documents="paragraph"))] == poems[:9]


def test_names_do_not_matter_where_content_tells(tmp_path, read, english):
    path = tmp_path / "a.jsonl"  # compressed, though its name does not say so
    path.write_bytes(gzip.compress(as_bytes(".jsonl", english[:2])))
    assert texts(read(path)) == english[:2]
    other = tmp_path / "data"
    other.write_bytes(as_bytes(".jsonl", english[:2]))
    assert texts(read(other, format="jsonl")) == english[:2]


def test_folders_patterns_and_order(tmp_path, read, jsonl, poems):
    (tmp_path / "b").mkdir()
    jsonl(tmp_path / "b" / "2.jsonl", poems[2:4])
    jsonl(tmp_path / "b" / "1.jsonl", poems[:2])
    (tmp_path / "b" / ".hidden.jsonl").write_text("no")
    (tmp_path / "b" / "photo.png").write_bytes(b"no")
    assert texts(read(tmp_path)) == poems[:4]
    assert texts(read(tmp_path / "b" / "*.jsonl")) == poems[:4]
    assert texts(read(tmp_path / "b" / "2.jsonl", tmp_path / "b" / "1.jsonl")) == poems[2:4] + poems[:2]
    with pytest.raises(ConfigError, match="nothing.jsonl: no such file, folder or pattern"):
        read(tmp_path / "nothing.jsonl")


def test_dotted_and_other_fields(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": {"b": "x"}}\n{"a.b": "y"}\n')
    assert texts(read(path), "a.b") == ["x", "y"]


def test_bundled(read):
    assert len(texts(read("bundled:english"))) == 368
    with pytest.raises(ConfigError, match="bundled:klingon: no such bundled corpus; there are: bundled:chinese_poems"):
        read("bundled:klingon")


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [p for p in COMPRESS if p])
@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".csv"])
def test_cut_off_compression_is_named(tmp_path, read, english, ending, packing):
    data = as_bytes(ending, english[:8])
    path = tmp_path / f"a{ending}{packing}"
    packed = COMPRESS[packing](data)
    path.write_bytes(packed[: len(packed) // 2])
    ((where, reason),) = faults(read(path))
    assert "cut off; fetch the file again" in reason
    assert where.startswith(("line", "start"))


@pytest.mark.parametrize("packing", [p for p in COMPRESS if p])
def test_altered_compression_is_named(tmp_path, read, english, packing):
    packed = bytearray(COMPRESS[packing](as_bytes(".jsonl", english[:8])))
    packed[len(packed) // 2] ^= 0x55
    path = tmp_path / f"a.jsonl{packing}"
    path.write_bytes(packed)
    assert any("damaged" in reason or "cut off" in reason for _, reason in faults(read(path)))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "\xff"}', "not valid UTF-8: 0xff at byte 11 of the line"),
        (b'{"text": "a"', "not valid JSON"),
        (b'{"title": "a"}', "no field 'text'; it has title: say text_field="),
        (b'{"text": null}', "field 'text' is null, expected text"),
        (b'{"text": ["a"]}', "field 'text' is of type list, expected text"),
        (b'{"text": "\\ud800"}', "lone surrogate \\ud800"),
        (b"17", "expected a JSON object"),
        (b"[" * 100000, "not valid JSON"),
    ],
)
def test_broken_json_lines(tmp_path, read, line, reason):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n\n' + line + b'\n{"text": "also fine"}\n')
    records = read(path)
    ((where, found),) = faults(records)
    assert where == "line 3" and reason in found
    assert len([r for r in records if r.kind == JSON]) == 3


def test_bad_utf8_in_text_names_the_line(tmp_path, read):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nfine\nna\xefve\n")
    ((where, reason),) = faults(read(path))
    assert where == "line 3" and "0xef at byte 3" in reason


def test_broken_csv(tmp_path, read):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,"two\nlines"\n2\n3,na\xefve\n4,fine\n')
    records = read(path)
    assert faults(records) == [
        ("line 4", "1 columns, expected 2 as in the header"),
        ("line 5", "not valid UTF-8: byte 0xef at character 3 of the text"),
    ]
    path.write_bytes(b"id,body\n1,a\n")
    assert faults(read(path)) == [("line 1", "no column 'text'; it has id, body: say text_field=")]


def test_broken_parquet(tmp_path, read, english):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_bytes(".parquet", english[:2])[:-50])
    ((_, reason),) = faults(read(path))
    assert "not a whole Parquet file" in reason
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    assert faults(read(path)) == [("schema", "no column 'text'; it has body: say text_field=")]


def test_empty_files(tmp_path, read):
    (tmp_path / "a.txt").touch()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b""))
    assert faults(read(tmp_path)) == [("start", "the file is empty; remove it")] * 2


def test_documents_over_the_limit(tmp_path, read):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (1 << 20) + b'"}\n{"text": "fine"}\n')
    records = read(path, max_document_mib=1)
    assert faults(records) == [("line 1", "a document over 1 MiB; say max_document_mib=2")]
    assert texts(records) == ["fine"]
    big = tmp_path / "b.txt"
    big.write_bytes(b"x" * (1 << 20) + b"\n\nfine\n")
    assert "say documents=line or paragraph, or max_document_mib=2" in faults(read(big, max_document_mib=1))[0][1]
    for kind in ("line", "paragraph"):
        records = read(big, max_document_mib=1, documents=kind)
        assert [t.strip() for t in texts(records)] == ["fine"] and len(faults(records)) == 1


# --- archives -------------------------------------------------------------------------------------------------------


def tar_of(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_openwebtext_is_tars_in_a_tar(tmp_path, read, english):
    inner = [tar_of({f"{n}.txt": english[n].encode(), "x.png": b"\x89PNG"}) for n in range(4)]
    outer = tar_of({f"openwebtext/subset{n}_data.xz": lzma.compress(data) for n, data in enumerate(inner)})
    path = tmp_path / "openwebtext.tar.xz"
    path.write_bytes(lzma.compress(outer))
    assert texts(read(path)) == english[:4]
    path.write_bytes(lzma.compress(outer[:-12000]))
    ((where, reason),) = faults(read(path))
    assert "subset3_data.xz" in where and "cut off" in reason


def warc_of(pages, kind="response"):
    from warcio.statusandheaders import StatusAndHeaders
    from warcio.warcwriter import WARCWriter

    buffer = io.BytesIO()
    writer = WARCWriter(buffer, gzip=True)
    for n, (media_type, body) in enumerate(pages):
        headers = StatusAndHeaders("200 OK", [("Content-Type", media_type)], protocol="HTTP/1.0")
        headers = headers if kind == "response" else None
        record = writer.create_warc_record(
            f"http://example.org/{n}", kind, payload=io.BytesIO(body), http_headers=headers
        )
        writer.write_record(record)
    return buffer.getvalue()


PAGE = "<html><head><title>T</title></head><body><nav><a href='/'>Home</a></nav><article>{}</article></body></html>"


def test_warc_pages_become_text(tmp_path, read, english):
    story = english[0][:3000]
    page = PAGE.format(f"<h1>An address</h1><p>{story}</p>").encode()
    path = tmp_path / "a.warc.gz"
    path.write_bytes(warc_of([("text/html; charset=utf-8", page), ("image/png", b"\x89PNG"), ("text/html", page)]))
    found = texts(read(path))
    assert len(found) == 2 and all(story[:200] in text and "Home" not in text for text in found)


def test_wet_texts(tmp_path, read, english):
    path = tmp_path / "a.warc.wet.gz"
    path.write_bytes(warc_of([("text/plain", t.encode()) for t in english[:3]], "conversion"))
    assert texts(read(path)) == english[:3]


def test_cut_off_warc(tmp_path, read, english):
    path = tmp_path / "a.warc.gz"
    data = warc_of([("text/plain", t.encode()) for t in english[:3]], "conversion")
    path.write_bytes(data[:-2000])
    assert [where for where, reason in faults(read(path)) if "cut off" in reason]
    path.write_bytes(gzip.decompress(data)[:-2000])
    assert [where for where, reason in faults(read(path)) if "cut off" in reason] == ["record 3"]


WIKI = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/"><siteinfo/>
<page><title>Paris</title><ns>0</ns><revision>
<text>'''Paris''' is [[city|a city]].&lt;ref&gt;x&lt;/ref&gt;</text></revision></page>
<page><title>Lutetia</title><ns>0</ns><redirect title="Paris"/><revision><text>#REDIRECT</text></revision></page>
<page><title>Talk:Paris</title><ns>1</ns><revision><text>talk</text></revision></page>
<page><title>北京</title><ns>0</ns><revision><text>'''北京'''是[[中国]]的首都。</text></revision></page>
</mediawiki>"""


def test_wikipedia_dump(tmp_path, read):
    path = tmp_path / "enwiki-pages-articles.xml.bz2"
    path.write_bytes(bz2.compress(WIKI.encode()))
    assert texts(read(path)) == ["Paris\n\nParis is a city.", "北京\n\n北京是中国的首都。"]
    path.write_bytes(bz2.compress(WIKI[:-200].encode()))
    ((where, reason),) = faults(read(path))
    assert where == f"page {WIKI[:-200].count('</page>') + 1}" and "not valid XML" in reason


def test_hugging_face_datasets(tmp_path, read, english):
    import datasets

    datasets.Dataset.from_dict({"text": english[:3]}).save_to_disk(str(tmp_path / "saved"))
    assert texts(read(f"hf:{tmp_path / 'saved'}")) == english[:3]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_bytes(as_bytes(".jsonl", english[:3]))
    assert texts(read(f"hf:{tmp_path / 'folder'}")) == english[:3]


# --- remote ---------------------------------------------------------------------------------------------------------


def test_fsspec_urls(read, english):
    system = fsspec.filesystem("memory")
    system.pipe("/corpus/b.jsonl.gz", gzip.compress(as_bytes(".jsonl", english[2:4])))
    system.pipe("/corpus/a.parquet", as_bytes(".parquet", english[:2]))
    assert texts(read("memory://corpus/*.gz")) == english[2:4]
    assert texts(read("memory://corpus")) == english[:4]
    with pytest.raises(ConfigError, match="memory://missing.txt: there is nothing at this URL"):
        read("memory://missing.txt")


class Dropping(BaseHTTPRequestHandler):
    """Serves ranges and drops every second connection in the middle."""

    data = b""
    served = 0

    def do_HEAD(self):  # noqa: N802
        self._answer(False)

    def do_GET(self):  # noqa: N802
        self._answer(True)

    def _answer(self, with_body):
        begin, end = 0, len(self.data)
        if self.headers.get("Range"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            begin, end = int(first), min(int(last) + 1 if last else end, end)
        body = self.data[begin:end]
        self.send_response(206 if self.headers.get("Range") else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(self.data)}")
        self.end_headers()
        if with_body:
            type(self).served += 1
            self.wfile.write(body if type(self).served % 2 == 0 else body[: len(body) // 2])
            self.close_connection = True

    def log_message(self, *_):
        pass


def test_connections_that_drop_are_opened_again(read, english):
    Dropping.data = gzip.compress(as_bytes(".jsonl", english[:6]), mtime=0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Dropping)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        assert texts(read(f"http://127.0.0.1:{server.server_port}/a.jsonl.gz")) == english[:6]
        assert Dropping.served >= 2
    finally:
        server.shutdown()
        server.server_close()
