"""prepare from end to end: what comes out, that it is the same bytes always, and what a user is told."""

from __future__ import annotations

import gzip
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from shardwright.config import ConfigError, RunError
from shardwright.data.manifest import Manifest
from shardwright.data.prepare import PrepareConfig, prepare
from shardwright.data.prepare.starts import sentence_starts
from shardwright.data.shards import Shard
from shardwright.data.tokenizers import Tokenizer

SMALL = {"vocab_size": 300}


def run(input_, output, **options):
    inputs = [str(item) for item in (input_ if isinstance(input_, list) else [input_])]
    options = {"tokenizer": SMALL, "workers": 1, "validation_every": 5} | options
    return prepare(PrepareConfig(input=inputs, output=str(output), **options), progress=False)


def documents(output: Path, split: str = "train"):
    """Decoded documents of a split, read through the index."""
    manifest, tokenizer = Manifest.load(output), Tokenizer.load(output)
    for info in manifest.split(split).shards:
        shard = Shard(output / info.path, output / info.index, info.index_sha256)
        for n in range(len(shard.document_bytes)):
            tokens = shard.tokens(int(shard.document_offsets[n]), int(shard.document_offsets[n + 1]))
            assert tokens[-1] == manifest.end_of_document
            text = tokenizer.decode(tokens[:-1])
            assert shard.document_bytes[n] == len(text.encode())
            yield text


# --- what comes out -------------------------------------------------------------------------------------------------


def test_documents_come_back_from_the_shards(tmp_path, jsonl, english, poems):
    texts = [t[:3000].strip() for t in english] + poems[:80]
    manifest = run(jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", shard_tokens=8192)
    train, validation = list(documents(tmp_path / "out")), list(documents(tmp_path / "out", "validation"))
    from shardwright.data.prepare.units import is_validation

    assert validation == [t for t in texts if is_validation(t, 5)]
    assert train == [t for t in texts if not is_validation(t, 5)]
    assert len(manifest.splits["train"].shards) > 3
    assert manifest.counts["documents"] == manifest.counts["records"] == len(texts)
    assert Manifest.load(tmp_path / "out") == manifest
    with tarfile.open(tmp_path / "out" / manifest.splits["train"].shards[0].path) as tar:
        names = tar.getnames()
    assert names[0].endswith(".json") and names[1].endswith(".tokens")
    assert not (tmp_path / "out" / ".prepare").exists()


@pytest.mark.slow
def test_bundled_english_has_17_validation_documents(tmp_path):
    manifest = run("bundled:english", tmp_path / "out", validation_every=20, tokenizer={**SMALL, "sample_mib": 1})
    assert (manifest.splits["validation"].documents, manifest.splits["train"].documents) == (17, 351)
    assert manifest.source["files"][0]["name"] == "bundled:english"
    assert len(manifest.source["files"][0]["sha256"]) == 64


def test_every_record_is_accounted_for(tmp_path, english, poems):
    lines = [{"text": t} for t in english[:20]]
    lines += [{"text": english[0]}, {"text": english[1] + " More."}, {"text": "  \n"}, {"text": "tiny"}, {"body": "x"}]
    lines += [{"text": poems[0]}, {"text": english[2].replace("Congress", "Congress (me@x.org)", 1)}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = tmp_path / "quiz.jsonl"
    evaluation.write_text(json.dumps({"q": english[5][500:700]}))
    manifest = run(
        path,
        tmp_path / "out",
        on_error="skip",
        dedup={"near": True},
        filters={
            "languages": ["en"], "language_confidence": 0.2, "min_characters": 10, "mask_emails": "<email>",
            "decontaminate": [str(evaluation)],
        },
    )  # fmt: skip
    counts = manifest.counts
    assert counts["broken"] == 1 and counts["empty"] == 1
    assert counts["filtered"] == {"length": 1, "language": 1, "contamination": 1}
    assert counts["duplicates"] == {"exact": 1, "near": 2}
    assert counts["changed_by_cleaning"]["masked_emails"] == 1
    left_out = sum([counts["broken"], counts["empty"], *counts["filtered"].values(), *counts["duplicates"].values()])
    assert counts["records"] == len(lines) == counts["documents"] + left_out
    (skipped,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped) == {
        "file": str(path),
        "where": "line 25",
        "reason": "no field 'text'; it has body: say text_field=",
    }
    assert manifest.source["evaluation"][0]["name"] == "quiz.jsonl"


def test_starts(tmp_path, jsonl, english, poems):
    texts = [t[:2000].strip() for t in english[:8]] + poems[:8]
    manifest = run(jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", starts=True, validation_every=0)
    info = manifest.splits["train"].shards[0]
    shard = Shard(tmp_path / "out" / info.path, tmp_path / "out" / info.index)
    tokenizer = Tokenizer.load(tmp_path / "out")
    for n, text in enumerate(texts):
        begin, end = (int(x) for x in shard.document_offsets[n : n + 2])
        marks = shard.sentence_starts[(shard.sentence_starts >= begin) & (shard.sentence_starts < end)]
        assert len(marks) == len(sentence_starts(text))
        places = [*marks, end - 1]
        pieces = [tokenizer.decode(shard.tokens(int(a), int(b))) for a, b in zip(places, places[1:], strict=False)]
        starts = [*sentence_starts(text), len(text)]
        assert [p.strip() for p in pieces] == [text[a:b].strip() for a, b in zip(starts, starts[1:], strict=False)]
    assert len(shard.word_starts) > len(shard.sentence_starts)


def test_given_tokenizers(tmp_path, jsonl, english):
    first = run(jsonl(tmp_path / "a.jsonl", english[:6]), tmp_path / "one", validation_every=0)
    again = run(tmp_path / "a.jsonl", tmp_path / "two", validation_every=0, tokenizer={"path": str(tmp_path / "one")})
    assert again.tokenizer == first.tokenizer
    assert again.splits["train"].shards[0].sha256 == first.splits["train"].shards[0].sha256


# --- what the user is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_input_is_fatal_with_file_line_and_remedy(tmp_path, jsonl, poems, workers):
    jsonl(tmp_path / "a.jsonl", poems[:5])
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    (tmp_path / "c.jsonl").touch()
    with pytest.raises(ConfigError) as error:
        run(tmp_path, tmp_path / "out", workers=workers)
    assert str(error.value) == (
        f"{tmp_path}/b.jsonl: line 2: field 'text' is of type int, expected text "
        "(or leave such input out, counted, with on_error=skip)"
    )


def test_truncated_gzip_is_skipped_with_what_came_before(tmp_path, poems):
    data = "".join(json.dumps({"text": t}) + "\n" for t in poems)
    packed = gzip.compress(data.encode(), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    manifest = run(tmp_path / "a.jsonl.gz", tmp_path / "out", on_error="skip")
    assert manifest.counts["broken"] == 1 and manifest.counts["documents"] > 50
    assert "cut off" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_nothing_left_and_no_training_text(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    with pytest.raises(ConfigError, match="no document is left; counts:"):
        run(path, tmp_path / "out", filters={"min_characters": 10**6})
    with pytest.raises(ConfigError, match="validation_every=1: no document is left for training"):
        run(path, tmp_path / "out2", validation_every=1)


def test_files_without_records_are_told_and_counted(tmp_path, jsonl, poems, capsys):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "in"
    folder.mkdir()
    jsonl(folder / "a.jsonl", poems[:60])
    (folder / "b.csv").write_text("id,text\n")
    (folder / "c.tar").write_bytes(bytes(10240))
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), folder / "d.parquet")
    (folder / "e.json").write_text("[]")
    manifest = run(folder, tmp_path / "out")
    assert manifest.counts["files_without_records"] == 4 and manifest.counts["records"] == 60
    said = capsys.readouterr().err
    told = [file.name for file in sorted(folder.iterdir()) if f"{file}: holds no record" in said]
    assert told == ["b.csv", "c.tar", "d.parquet", "e.json"]
    with pytest.raises(ConfigError, match="b.csv: no document is left"):
        run(folder / "b.csv", tmp_path / "out2")


def test_an_empty_validation_split_is_told(tmp_path, jsonl, poems, capsys):
    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    run(path, tmp_path / "out", validation_every=10**6)
    said = capsys.readouterr().err
    assert "validation_every=1000000: of 3 documents none is in the validation split" in said
    assert "lower validation_every" in said
    run(path, tmp_path / "out2", validation_every=0)
    assert "validation split" not in capsys.readouterr().err


def test_wrong_tokenizer_is_told_before_any_work(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    with pytest.raises(ConfigError, match="no such tokenizer file or folder"):
        run(path, tmp_path / "out", tokenizer={"path": str(tmp_path / "none.json")})
    with pytest.raises(ValidationError, match="give either train or path, not both"):
        run(path, tmp_path / "out", tokenizer={"path": "x", "train": "bpe"})


@pytest.mark.parametrize("mode", [0o555, 0o500])  # of root: one that others may look into, and one that they may not
def test_no_permission(mode, public_folder, without_root, jsonl, poems):
    path = jsonl(public_folder / "a.jsonl", poems[:3])
    run(path, public_folder / "out")
    (public_folder / "locked").mkdir(mode=mode)
    with without_root(), pytest.raises(ConfigError, match="cannot be written"):
        run(path, public_folder / "locked" / "out")


def test_full_disk_is_one_line(tmp_path, jsonl, poems, monkeypatch):
    import errno

    from shardwright.data.prepare import units

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    monkeypatch.setattr(units, "write_atomic", full)
    with pytest.raises(RunError, match="the disk is full .* make room and run again"):
        run(path, tmp_path / "out")
    monkeypatch.undo()
    assert run(path, tmp_path / "out", validation_every=0).counts["documents"] == 3


def test_dtype_of_tokens(tmp_path, jsonl, poems):
    manifest = run(jsonl(tmp_path / "a.jsonl", poems[:9]), tmp_path / "out", validation_every=0)
    info = manifest.splits["train"].shards[0]
    assert manifest.dtype == "uint16"
    assert Shard(tmp_path / "out" / info.path, tmp_path / "out" / info.index).tokens(0, 3).dtype == np.dtype("<u2")
