"""Every input format gives the same documents, and every kind of damage is named with file and line."""

from __future__ import annotations

import bz2
import csv
import gc
import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from shardwright.config import ConfigError, RunError
from shardwright.data.prepare import PrepareConfig, prepare, streams
from shardwright.data.prepare.inputs import list_inputs
from shardwright.data.prepare.records import BROKEN, END, JSON, TEXT
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


def write(path, data):
    path.write_bytes(data)
    return path


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


def test_links_in_a_folder_are_followed_or_told(tmp_path, read, jsonl, poems):
    for name in ("in", "else/where"):
        (tmp_path / name).mkdir(parents=True)
    jsonl(tmp_path / "in" / "a.jsonl", poems[:1])
    jsonl(tmp_path / "else" / "where" / "1.jsonl", poems[1:2])
    (tmp_path / "in" / "b").symlink_to(tmp_path / "else")
    (tmp_path / "else" / "where" / "round").symlink_to(tmp_path / "in")
    assert texts(read(tmp_path / "in")) == poems[:2]
    (tmp_path / "in" / "c.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(ConfigError, match=r"c\.jsonl: is a link to a file that is not there; restore that"):
        read(tmp_path / "in")


def test_a_folder_that_cannot_be_listed_is_told(public_folder, without_root, read, jsonl, poems):
    jsonl(public_folder / "a.jsonl", poems[:1])
    (public_folder / "closed").mkdir()
    assert texts(read(public_folder)) == poems[:1]
    (public_folder / "closed").chmod(0)
    with without_root(), pytest.raises(ConfigError, match=r"closed: cannot be listed: Permission denied"):
        read(public_folder)


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


@pytest.mark.parametrize("packing", [".gz", ".zst", ".xz", ".bz2"])
def test_streams_one_behind_the_other(tmp_path, read, poems, packing):
    """All are read; damage in a later one, a cut and what is no stream at all are found."""
    pack = COMPRESS[packing]
    first, second = (pack(as_bytes(".jsonl", poems[n : n + 200])) for n in (0, 200))
    path = tmp_path / f"a.jsonl{packing}"
    assert texts(read(write(path, first + second))) == poems[:400]
    assert texts(read(write(path, pack(b"") + first + pack(b"") + second + pack(b"")))) == poems[:400]
    broken = bytearray(second)
    broken[0] ^= 0x55
    for behind in (bytes(broken), second[:3], second[: len(second) // 2], second[:-1], b"garbage", b"x"):
        records = read(write(path, first + behind))
        ((_, reason),) = faults(records)
        assert ("damaged" in reason or "cut off" in reason) and texts(records)[:200] == poems[:200]


@pytest.mark.parametrize(("zeros", "is_fine"), [(4, True), (2**16, True), (3, False)])
def test_zeros_between_xz_streams(tmp_path, read, poems, zeros, is_fine):
    first, second = (lzma.compress(as_bytes(".jsonl", poems[n : n + 200])) for n in (0, 200))
    for behind, count in ((second, 400), (b"", 200)):
        records = read(write(tmp_path / "a.jsonl.xz", first + bytes(zeros) + behind))
        assert len(faults(records)) == (not is_fine)
        assert texts(records) == poems[: count if is_fine else 200]


def test_bzip2_padding_is_damage(tmp_path, read, poems):
    ((_, reason),) = faults(read(write(tmp_path / "a.jsonl.bz2", bz2.compress(b'{"text": "a"}\n') + bytes(4))))
    assert "damaged" in reason


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


def test_rows_of_other_length_and_open_quotes(tmp_path, read):
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,fine\n2,a, b\n\n3,"open\n4,fine\n5,fine\n')
    records = read(path)
    found = dict(faults(records))
    assert texts(records) == ["fine"] and list(found) == ["line 3", "line 5"]
    assert found["line 3"] == "3 columns, expected 2 as in the header" and "not valid CSV" in found["line 5"]


def test_parquet_text_that_is_not_utf8(tmp_path, read):
    path = tmp_path / "a.parquet"
    data = pyarrow.array([b"fine", b"caf\xe9", b"fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": data}), path)
    records = read(path)
    assert faults(records) == [("row 2", "not valid UTF-8: 0xe9 at byte 4 of the text; convert it to UTF-8")]
    assert texts(records) == ["fine", "fine"]


def test_broken_parquet(tmp_path, read, english):
    path = tmp_path / "a.parquet"
    path.write_bytes(as_bytes(".parquet", english[:2])[:-50])
    ((_, reason),) = faults(read(path))
    assert "not a whole Parquet file" in reason
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"]}), path)
    assert faults(read(path)) == [("schema", "no column 'text'; it has body: say text_field=")]


def test_dotted_columns_of_parquet(tmp_path, read, poems):
    path = tmp_path / "a.parquet"
    rows = [{"meta": {"body": text, "n": {"x": 1}}, "id": n} for n, text in enumerate(poems[:3])]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {"meta": None, "id": 3}]), path)
    records = read(path, text_field="meta.body")
    assert texts(records[:3]) == poems[:3]
    assert faults(records) == [("row 4", "field 'text' is null, expected text")]
    for field in ("meta.title", "meta.body.x", "text"):
        (fault,) = faults(read(path, text_field=field))
        assert fault == ("schema", f"no column {field!r}; it has meta, id: say text_field=")
    pyarrow.parquet.write_table(pyarrow.table({"meta.body": poems[:2]}), path)
    assert texts(read(path, text_field="meta.body")) == poems[:2]


def test_a_column_of_parquet_is_that_of_the_name(tmp_path, read, poems):
    """pyarrow takes `text` for the beginning of `text.language` as well."""
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text.language": ["zh", "zh"], "text": poems[:2]}), path)
    assert texts(read(path)) == poems[:2]
    rows = {"meta": [{"body": "no"}] * 2, "meta.body": poems[:2]}
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    assert texts(read(path, text_field="meta.body")) == poems[:2]


@pytest.mark.parametrize("head", [b"\n  ", b"\xef\xbb\xbf", b"\xef\xbb\xbf\r\n\t"])
def test_json_arrays_behind_blanks_and_a_byte_order_mark(tmp_path, read, poems, head):
    path = tmp_path / "a.json"
    path.write_bytes(head + as_bytes(".json", poems[:3]))
    assert texts(read(path)) == poems[:3]
    path.write_bytes(head + b"[" * 100000)
    ((_, reason),) = faults(read(path))
    assert "not valid JSON" in reason


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


@pytest.mark.parametrize("damage", ["cut at a header", "cut in a header", "header", "zeroed header", "cut in a member"])
def test_a_tar_that_does_not_end_as_it_should(tmp_path, read, poems, damage):
    data = bytearray(tar_of({f"{n}.txt": poems[n].encode() for n in range(4)}))
    if damage.startswith("cut"):
        del data[{"cut at a header": 2048, "cut in a header": 2300, "cut in a member": 2600}[damage] :]
    elif damage == "header":
        data[2048 + 150] ^= 1
    else:
        data[2048:2560] = bytes(512)
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    records = read(path)
    assert texts(records) == poems[:2]
    ((where, reason),) = faults(records)
    assert where == ("2.txt: start" if damage == "cut in a member" else "1.txt: start")
    assert "the tar is cut off or damaged" in reason


def test_pickles_in_a_tar_are_refused_by_name(tmp_path, read):
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({"a.txt": b"fine", "x/b.PKL": b"", "c.pth": b"x", "d.txt": b"fine"}))
    records = read(path)
    assert [where for where, _ in faults(records)] == ["x/b.PKL", "c.pth"] and texts(records) == ["fine"] * 2
    assert all("is a pickle" in why and "allow it with allow=[pickle]" in why for _, why in faults(records))
    assert [r.kind for r in read(path, members="*.txt")] == [TEXT, TEXT, END]


def test_pickles_in_a_tar_are_read_where_they_are_allowed(tmp_path, read, poems):
    rows = [{"text": poems[0], "meta": {"text": poems[1]}}, {"text": poems[2], "meta": {"text": poems[3]}}]
    members = {"a.pkl": pickle.dumps(rows), "b.pyd": pickle.dumps(poems[4]), "c.pickle": pickle.dumps(b"fine"),
               "d.pkl": pickle.dumps({"url": 1}), "e.pkl": b"no pickle", "f.pkl": pickle.dumps(7)}  # fmt: skip
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(members))
    records = read(path, allow=["pickle"])
    assert [extract(r, "text") for r in records[:4]] == [poems[0], poems[2], poems[4], "fine"]
    assert faults(records) == [
        ("d.pkl: item 1", "no field 'text'; it has url: say text_field= or which members= to read"),
        ("e.pkl: item 1", "cannot be unpickled (UnpicklingError: invalid load key, 'n'.); take it out"),
        ("f.pkl: item 1", "field 'text' is of type int, expected text"),
    ]
    inner = read(path, allow=["pickle"], text_field="meta.text", members="a.*")
    assert texts(inner) == [poems[1], poems[3]]
    assert faults(read(path, allow=["pickle"], members="*.txt")) == []


def test_a_broken_member_costs_itself_alone(tmp_path, read, english):
    """OpenWebText's layout: compressed tars in a tar, one of them cut off, one damaged, one with a bad tar inside."""
    inner = [tar_of({f"{n}.txt": english[n].encode()}) for n in range(6)]
    packed = [lzma.compress(data) for data in inner]
    packed[1] = packed[1][:-100]
    packed[2] = packed[2][:200] + bytes([packed[2][200] ^ 0xFF]) + packed[2][201:]
    packed[3] = lzma.compress(inner[3][:600])
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of({f"subset{n}.xz": data for n, data in enumerate(packed)}))
    records = read(path)
    assert texts(records) == [english[n] for n in (0, 4, 5)]
    assert [where.partition(":")[0] for where, _ in faults(records)] == [f"subset{n}.xz" for n in (1, 2, 3)]
    path.write_bytes(tar_of({f"subset{n}.xz": data for n, data in enumerate(packed)})[:-12000])
    records = read(path)
    assert [where.partition(":")[0] for where, _ in faults(records)] == [f"subset{n}.xz" for n in (1, 2, 3, 5)]
    assert "the tar is cut off or damaged" in faults(records)[-1][1]


@pytest.mark.parametrize("packing", ["", ".gz"])
@pytest.mark.parametrize("ending", [".csv", ".tsv", ".parquet", ".json", ".jsonl"])
def test_tables_in_a_tar(tmp_path, read, poems, ending, packing):
    path = tmp_path / "a.tar"
    parts = [as_bytes(ending, poems[n : n + 3]) for n in (0, 3)]
    path.write_bytes(tar_of({f"{n}{ending}{packing}": COMPRESS[packing](part) for n, part in enumerate(parts)}))
    assert texts(read(path)) == poems[:6]


def test_members_of_a_webdataset(tmp_path, read, poems):
    shard = {}
    for n in range(3):
        shard |= {f"{n:04d}.txt": poems[n].encode(), f"{n:04d}.json": b'{"width": 8}', f"{n:04d}.cls": str(n).encode()}
    (tmp_path / "a.tar").write_bytes(tar_of(shard))
    (tmp_path / "b.tar").write_bytes(tar_of({"inner.tar.gz": gzip.compress(tar_of(shard)), "0.txt.gz": b"\x1f\x8b"}))
    assert [reason for _, reason in faults(read(tmp_path / "a.tar"))] == [
        "no field 'text'; it has width: say text_field= or which members= to read"
    ] * 3
    for members in (".txt", "*.txt", "000[0-9].t*"):
        assert texts(read(tmp_path / "a.tar", members=members)) == poems[:3]
    assert texts(read(tmp_path / "a.tar", members="*.cls")) == ["0", "1", "2"]
    records = read(tmp_path / "b.tar", members="*.txt")
    assert texts(records) == poems[:3] and [where for where, _ in faults(records)] == ["0.txt.gz: start"]


def test_what_ends_in_tar_is_a_tar(tmp_path, read):
    path = tmp_path / "a.tar"
    path.write_bytes(bytes(10240))
    assert [r.kind for r in read(path)] == [r.kind for r in read(path, format="jsonl")] == [END]
    path.write_bytes(b"no tar at all")
    ((_, reason),) = faults(read(path))
    assert "the tar is cut off or damaged" in reason
    old = tar_of({"a.txt": b"fine"})
    header = bytearray(old[:512])
    header[257:265] = bytes(8)  # as tar wrote headers before POSIX
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path.write_bytes(bytes(header) + old[512:])
    assert texts(read(path)) == ["fine"]


def test_names_that_are_not_utf8(tmp_path, read):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"fine")
    (tmp_path / "in" / "b.tar").write_bytes(tar_of({os.fsdecode(b"na\xefve.txt"): b"\xff"}))
    names = [(file.name, file.shown) for file in list_inputs([str(tmp_path / "in")])]
    assert names[1] == ("caf\\udce9.txt", f"{tmp_path}/in/caf\\udce9.txt")
    config = PrepareConfig(
        input=[str(tmp_path / "in")], output=str(tmp_path / "out"), on_error="skip", workers=1, validation_every=0,
        tokenizer={"vocab_size": 300},
    )  # fmt: skip
    manifest = prepare(config, progress=False)
    assert [file["name"] for file in manifest.source["files"]] == ["b.tar", "caf\\udce9.txt"]
    (skipped,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped)["where"] == "na\\udcefve.txt: line 1"
    typed = config.model_copy(update={"input": [os.fsdecode(bytes(tmp_path) + b"/in/caf\xe9.txt")]})
    typed = typed.model_copy(update={"output": os.fsdecode(bytes(tmp_path) + b"/\xff")})
    assert prepare(typed, progress=False).recipe["input"] == [f"{tmp_path}/in/caf\\udce9.txt"]
    prepare(typed, progress=False)


def test_reports_name_the_path(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text('{"text": "fine"}\n' if name == "x" else "broken\n")
    config = PrepareConfig(input=[str(tmp_path / n / "a.jsonl") for n in "xy"], output=str(tmp_path / "out"), workers=1)
    with pytest.raises(ConfigError, match="y/a.jsonl: line 1: not valid JSON"):
        prepare(config, progress=False)


def test_zstd_frames_to_skip_and_text_like_bz2(tmp_path, read, english):
    skip = b"\x5a\x2a\x4d\x18\x03\x00\x00\x00abc"
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(skip + zstandard.compress(as_bytes(".jsonl", english[:2])) + skip)
    assert texts(read(path)) == english[:2]
    (tmp_path / "a.txt").write_bytes(b"BZh is how bzip2 begins, BZh9 too")
    assert texts(read(tmp_path / "a.txt")) == ["BZh is how bzip2 begins, BZh9 too"]
    (tmp_path / "b.txt").write_bytes(bz2.compress(b""))
    assert faults(read(tmp_path / "b.txt")) == [("start", "the file is empty; remove it")]


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


@pytest.mark.parametrize(
    ("charset", "codec", "story"),
    [
        ("gb2312", "gbk", "京剧是中国的国粹之一，流传已久。"),
        ('"Shift_JIS"', "cp932", "これは日本語の文章です。今日は天気がいい。"),
        ("windows-1251", "cp1251", "Это обычный русский текст."),
        ("ISO-8859-1", "cp1252", "Le café – fermé déjà."),
        ("iso-8859-1", "utf-8", "Le café – fermé déjà."),
        ("utf-16", "utf-16", "Plain enough, this story."),
        ("none-such", "utf-8", "Le café – fermé déjà."),
    ],
)
def test_warc_pages_are_read_by_the_servers_charset(tmp_path, read, charset, codec, story):
    page = PAGE.format(f"<p>{story * 9}</p>").encode(codec)
    path = tmp_path / "a.warc.gz"
    path.write_bytes(warc_of([(f"text/html; Charset={charset}", page)]))
    (found,) = texts(read(path))
    assert story * 9 in found


def test_a_warc_length_that_is_no_number(tmp_path, read):
    path = tmp_path / "a.wet"
    head = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: %s\r\n\r\n"
    path.write_bytes(head % b"5" + b"hello\r\n\r\n" + head % b"abc" + b"hello\r\n\r\n")
    records = read(path)
    ((where, reason),) = faults(records)
    assert where == "record 2" and "its Content-Length is 'abc', expected a number" in reason
    assert texts(records) == ["hello"]


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


@pytest.mark.parametrize("packing", [p for p in COMPRESS if p])
def test_a_cut_off_compressed_warc_is_never_whole(tmp_path, read, english, packing):
    pages = [("text/plain", t.encode()) for t in english[:4]]
    packed = COMPRESS[packing](gzip.decompress(warc_of(pages, "conversion")))
    if packing == ".gz":
        packed = warc_of(pages, "conversion")
    whole = len(texts(read(write(tmp_path / f"a.wet{packing}", packed))))
    for share in (0.3, 0.6, 0.999):
        records = read(write(tmp_path / f"a.wet{packing}", packed[: int(len(packed) * share)]))
        ((_, reason),) = faults(records)
        assert "cut off" in reason and len(texts(records)) <= whole == 4


@pytest.mark.parametrize("kind", ["conversion", "response"])
def test_a_warc_cut_at_any_byte_is_never_whole(tmp_path, read, kind):
    """Whole is only what ends between records: of three, 0 to 3 bytes before or behind their ends."""
    texts_ = [b"<p>one</p>", b"<p>two</p>", b"<p>three</p>"]
    data = gzip.decompress(warc_of([("text/html" if n < 2 else "image/png", t) for n, t in enumerate(texts_)], kind))
    ends = [place for n in range(3) if (place := data.index(texts_[n]) + len(texts_[n]))]
    for cut in range(10, len(data)):
        found = faults(read(write(tmp_path / "a.warc", data[:cut])))
        assert len(found) == (not any(end <= cut <= end + 4 for end in ends)), data[:cut][-40:]


def test_warc_records_without_a_length_or_an_address(tmp_path, read):
    head = b"WARC/1.0\r\nWARC-Type: %s\r\n%s\r\n"
    path = write(tmp_path / "a.wet", head % (b"conversion", b"") + b"hello\r\n\r\n")
    assert faults(read(path)) == [("record 1", "its header is cut off or lacks a Content-Length; fetch the file again")]
    page = (
        b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n" + PAGE.format("<p>Plain enough, this story.</p>").encode()
    )
    path.write_bytes(head % (b"response", b"Content-Length: %d\r\n" % len(page)) + page + b"\r\n\r\n")
    assert texts(read(path)) == ["Home\nPlain enough, this story."]


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


def test_other_xml_is_refused(tmp_path, read):
    path = tmp_path / "feed.xml"
    path.write_text('<?xml version="1.0"?><rss version="2.0"><channel><item><title>News</title></item></channel></rss>')
    assert faults(read(path)) == [("start", "expected a Wikipedia dump (<mediawiki>), found XML of <rss>; take it out")]


def test_hugging_face_datasets(tmp_path, read, english):
    import datasets

    datasets.Dataset.from_dict({"meta": [{"body": t} for t in english[:2]]}).save_to_disk(str(tmp_path / "nested"))
    assert texts(read(f"hf:{tmp_path / 'nested'}", text_field="meta.body")) == english[:2]
    datasets.Dataset.from_dict({"text": english[:3]}).save_to_disk(str(tmp_path / "saved"))
    assert texts(read(f"hf:{tmp_path / 'saved'}")) == english[:3]
    with pytest.raises(ConfigError, match=r"save_to_disk wrote; give it as hf:.*saved"):
        read(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.load_from_disk(str(tmp_path / "saved"))}).save_to_disk(tmp_path / "both")
    with pytest.raises(ConfigError, match=r"hf:.*both: has no split 'test'; it has train: say hf:.*both::SPLIT"):
        read(f"hf:{tmp_path / 'both'}::test")
    assert texts(read(f"hf:{tmp_path / 'both'}")) == english[:3]
    with pytest.raises(ConfigError, match="both: is a data set that Hugging Face's save_to_disk wrote"):
        read(tmp_path / "both")
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


@pytest.fixture
def serve():
    """Base URL of a server that answers with the given statuses, one a request, and then with data (None: hangs up)."""
    servers = []

    def start(data, statuses):
        left = list(statuses)

        class Answering(BaseHTTPRequestHandler):
            def do_GET(self):  # noqa: N802
                status = left.pop(0) if left else 200
                if status is not None:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)) if status == 200 else "0")
                    self.send_header("Accept-Ranges", "none")
                    self.send_header("ETag", f'"{len(data)}"')
                    self.end_headers()
                if status == 200 and self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("statuses", [[500] * 4, [None] * 4, [429, 503, 200, 500, 500]])
def test_passing_trouble_of_a_server_is_waited_for(read, serve, english, statuses):
    assert texts(read(serve(as_bytes(".jsonl", english[:2]), statuses) + "/a.jsonl")) == english[:2]


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_a_cut_off_warc_behind_a_url(read, serve, english, packing):
    data = warc_of([("text/plain", t.encode()) for t in english[:3]], "conversion")
    data = data if packing else gzip.decompress(data)
    records = read(serve(data[:-2000], []) + f"/a.wet{packing}")
    ((_, reason),) = faults(records)
    assert "cut off" in reason and texts(records) == english[:2]


def test_parquet_needs_a_server_that_sends_parts(read, serve, english, capfd):
    url = serve(as_bytes(".parquet", english[:2]), []) + "/a.parquet"
    assert list_inputs([url])[0].tag == f'"{len(as_bytes(".parquet", english[:2]))}"'
    with pytest.raises(
        ConfigError, match="cannot begin in the middle of a file, .*; download it first and give the copy"
    ):
        read(url)
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_lasting_trouble_of_a_server_is_told_apart(read, serve, monkeypatch):
    monkeypatch.setattr(streams, "RETRIES", 2)
    with pytest.raises(RunError, match=r"a.jsonl: the server refuses it \(HTTP 403\)"):
        read(serve(b"", [403] * 9) + "/a.jsonl")
    with pytest.raises(RunError, match=r"a.jsonl: cannot be reached \(HTTP 500\); run again"):
        read(serve(b"", [500] * 9) + "/a.jsonl")
    with pytest.raises(ConfigError, match="a.jsonl: there is nothing at this URL"):
        read(serve(b"", [404] * 9) + "/a.jsonl")
    with pytest.raises(RunError, match=r"cannot be reached \(ClientConnectorError"):
        read("http://127.0.0.1:9/a.jsonl")
