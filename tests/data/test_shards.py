"""Shards on disk: what is written is read, by us and by plain webdataset, and damage is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from shardwright.data.shards import (
    Manifest,
    Shard,
    ShardError,
    ShardInfo,
    ShardWriter,
    SplitInfo,
    map_file,
    read_shard_info,
    shard_path,
)

SHA = "a" * 64
SYSFS = Path("/sys/kernel/notes")


def write(path: Path, documents: list[list[int]], member_tokens: int = 50, dtype: str = "uint16") -> ShardInfo:
    with ShardWriter(path, dtype, SHA, member_tokens) as writer:
        for document in documents:
            writer.add(document, 3 * len(document))
        return writer.close()


def opened(path: Path) -> Shard:
    return Shard(path, path.with_suffix(".idx"))


def documents_of(sizes: list[int], seed: int = 0, high: int = 60000) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[*rng.integers(1, high, size).tolist(), 0] for size in sizes]


SIZES = [10, 0, 70, 5, 5, 120, 1, 33, 49, 50, 3]


@pytest.mark.parametrize(("dtype", "high"), [("uint16", 65536), ("uint32", 200000)])
def test_any_range_reads_back(tmp_path: Path, dtype: str, high: int) -> None:
    documents = documents_of(SIZES, high=high)
    info = write(tmp_path / "x.tar", documents, dtype=dtype)
    shard, flat = opened(tmp_path / "x.tar"), sum(documents, [])
    assert (info.tokens, info.documents, shard.num_tokens) == (len(flat), len(documents), len(flat))
    for start in range(0, len(flat), 7):
        for stop in range(start, len(flat) + 1, 13):
            assert shard.tokens(start, stop).tolist() == flat[start:stop]
    assert shard.document_offsets.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    assert shard.document_bytes.tolist() == [3 * len(d) for d in documents]
    assert info.text_bytes == sum(3 * len(d) for d in documents)
    assert not shard.tokens(0, 5).flags.writeable


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 90), min_size=1, max_size=15), st.integers(1, 200), st.data())
def test_read_gives_the_documents_it_touches(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], member_tokens: int, data: st.DataObject
) -> None:
    documents = documents_of(sizes)
    path = tmp_path_factory.mktemp("shard") / "x.tar"
    write(path, documents, member_tokens)
    shard, offsets = opened(path), np.cumsum([0, *map(len, documents)])
    start = data.draw(st.integers(0, shard.num_tokens - 1))
    stop = data.draw(st.integers(start + 1, shard.num_tokens))
    tokens, starts = shard.read(start, stop)
    assert tokens.tolist() == sum(documents, [])[start:stop]
    assert starts.tolist() == [a for a, b in zip(offsets, offsets[1:], strict=False) if a < stop and b > start]


def test_webdataset_reads_the_tar(tmp_path: Path) -> None:
    wds = pytest.importorskip("webdataset")
    documents = documents_of(SIZES)
    write(tmp_path / "x.tar", documents)
    samples = list(wds.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    assert len(samples) > 2
    assert b"".join(s["tokens"] for s in samples) == np.array(sum(documents, []), "<u2").tobytes()
    facts = [json.loads(s["json"]) for s in samples]
    assert sum(f["documents"] for f in facts) == len(documents)
    assert {f["dtype"] for f in facts} == {"uint16"}


def test_the_index_is_plain_safetensors(tmp_path: Path) -> None:
    documents = documents_of(SIZES)
    info = write(tmp_path / "x.tar", documents)
    with safe_open(tmp_path / "x.idx", "numpy") as index:
        facts = json.loads(index.metadata()["shardwright"])
        offsets = index.get_tensor("member_offsets")
    assert facts["tar_sha256"] == hashlib.sha256((tmp_path / "x.tar").read_bytes()).hexdigest() == info.sha256
    assert (facts["dtype"], facts["tokenizer_sha256"], facts["tar_bytes"]) == ("uint16", SHA, info.bytes)
    with tarfile.open(tmp_path / "x.tar") as tar:
        members = [m for m in tar.getmembers() if m.name.endswith(".tokens")]
    assert [m.offset_data for m in members] == offsets.tolist()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in members} == {(0, 0, 0, "", 0o444)}


def test_same_documents_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "x.tar", documents_of(SIZES))
    second = write(tmp_path / "b" / "x.tar", documents_of(SIZES))
    assert first == second == read_shard_info(tmp_path / "a" / "x.tar")
    for name in ("x.tar", "x.idx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_nothing_stands_under_a_final_name_before_close(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.tar", "uint16", SHA)
    writer.add([1, 2, 0], 2)
    assert not (tmp_path / "x.tar").exists()
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path / "x.tar", "uint16", SHA) as writer:
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_word_and_sentence_starts(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x.tar", "uint16", SHA) as writer:
        writer.add([5, 6, 7, 0], 3, word_starts=[0, 2], sentence_starts=[0])
        writer.add([8, 9, 0], 2, word_starts=[1], sentence_starts=[0])
    shard = opened(tmp_path / "x.tar")
    assert shard.word_starts is not None and shard.sentence_starts is not None
    assert shard.word_starts.tolist() == [0, 2, 5]
    assert shard.sentence_starts.tolist() == [0, 4]
    with ShardWriter(tmp_path / "y.tar", "uint16", SHA) as writer:
        writer.add([5, 0], 1)
        with pytest.raises(ValueError, match="give it for all or for none"):
            writer.add([5, 0], 1, word_starts=[0])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [([1, 70000, 0], "token 70000.*uint32"), ([-1, 0], "token -1"), ([], "non-empty"), ([0.5], "token ids")],
)
def test_documents_that_are_none(tmp_path: Path, tokens: list, message: str) -> None:
    with ShardWriter(tmp_path / "x.tar", "uint16", SHA) as writer, pytest.raises(ValueError, match=message):
        writer.add(tokens, 1)


def test_a_flipped_byte_is_named_when_its_document_is_read(tmp_path: Path) -> None:
    documents = documents_of(SIZES)
    path = tmp_path / "x.tar"
    write(path, documents)
    offsets = np.cumsum([0, *map(len, documents)])
    with tarfile.open(path) as tar:
        second = [m.offset_data for m in tar.getmembers() if m.name.endswith(".tokens")][1]
    raw = bytearray(path.read_bytes())
    raw[second + 5] ^= 4
    path.write_bytes(raw)
    shard = opened(path)
    assert shard.tokens(0, int(offsets[3])).tolist() == sum(documents[:3], [])
    with pytest.raises(ShardError, match=rf"x\.tar: document 3 \(at byte {second}\).*altered.*prepare"):
        shard.tokens(int(offsets[3]) + 2, int(offsets[3]) + 3)
    with pytest.raises(ShardError, match="document 3"):
        shard.verify()
    assert shard.tokens(int(offsets[4]), int(offsets[6])).tolist() == sum(documents[4:6], [])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    info = write(path, documents_of(SIZES))
    whole, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
    path.write_bytes(whole[:-600])
    with pytest.raises(ShardError, match=rf"x\.tar: {len(whole) - 600} bytes, expected {len(whole)}.*truncated"):
        opened(path)
    path.write_bytes(whole)
    path.with_suffix(".idx").write_bytes(index[:-9])
    with pytest.raises(ShardError, match=r"x\.idx: not a whole shard index"):
        opened(path)
    altered = bytearray(index)
    altered[-1] ^= 1
    path.with_suffix(".idx").write_bytes(altered)
    with pytest.raises(ShardError, match=r"x\.idx: not the file the manifest names"):
        Shard(path, path.with_suffix(".idx"), info.index_sha256)
    path.with_suffix(".idx").write_bytes(b"")
    with pytest.raises(ShardError, match=r"x\.idx: the file is empty"):
        opened(path)
    path.unlink()
    path.with_suffix(".idx").write_bytes(index)
    with pytest.raises(ShardError, match=r"x\.tar: no such file"):
        opened(path)
    with pytest.raises(ShardError, match=r"y\.idx: no such file"):
        read_shard_info(tmp_path / "y.tar")


@contextmanager
def without_privileges() -> Iterator[None]:
    """Root may read everything: be nobody for a while."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("suffix", [".tar", ".idx"])
def test_a_shard_without_read_permission_is_named(suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:  # whose parents everyone may enter, unlike those of tmp_path
        os.chmod(folder, 0o755)
        path = Path(folder) / "x.tar"
        write(path, documents_of(SIZES))
        path.with_suffix(suffix).chmod(0)
        with without_privileges(), pytest.raises(ShardError, match=rf"x\{suffix}: cannot be read: Perm") as error:
            opened(path)
        assert "\n" not in str(error.value)


@pytest.mark.skipif(not SYSFS.is_file(), reason="needs sysfs, whose files cannot be mapped")
def test_a_file_that_cannot_be_mapped_is_named() -> None:
    with pytest.raises(ShardError, match=r"kernel/notes: cannot be mapped into memory: ") as error:
        map_file(SYSFS)
    assert "\n" not in str(error.value)


def test_a_folder_in_place_of_a_shard_is_named(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", documents_of(SIZES))
    (tmp_path / "x.idx").unlink()
    (tmp_path / "x.idx").mkdir()
    with pytest.raises(ShardError, match=r"x\.idx: cannot be read: Is a directory"):
        opened(tmp_path / "x.tar")


def test_a_shard_keeps_no_file_descriptor_and_pickles(tmp_path: Path) -> None:
    write(tmp_path / "x.tar", documents_of(SIZES))
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.exists() else 0
    shards = [opened(tmp_path / "x.tar") for _ in range(20)]
    if before:
        assert len(list(descriptors.iterdir())) == before
    copy = pickle.loads(pickle.dumps(shards[0]))
    assert copy.tokens(0, 40).tolist() == shards[0].tokens(0, 40).tolist()


def test_manifest_round_trip_and_refusals(tmp_path: Path) -> None:
    info = ShardInfo("train/000/00000.tar", "train/000/00000.idx", 10, 2, 30, 10240, "b" * 64, "c" * 64)
    manifest = Manifest(
        tokenizer={"file": "tokenizer.json", "sha256": SHA, "vocab_size": 9, "end_of_document": 3},
        dtype="uint16",
        splits={"train": SplitInfo.of([info, info])},
        source={"files": ["語"]},
        recipe={"lower": False},
    )
    path = manifest.save(tmp_path)
    first = path.read_bytes()
    assert Manifest.load(tmp_path) == manifest and Manifest.load(f"file://{tmp_path}") == manifest
    assert manifest.end_of_document == 3 and manifest.split("train").tokens == 20
    Manifest.load(tmp_path).save(tmp_path)
    assert path.read_bytes() == first and [p.name for p in tmp_path.iterdir()] == ["manifest.json"]
    with pytest.raises(ShardError, match="no split 'test'; it has train"):
        Manifest.load(tmp_path).split("test")
    path.write_text(path.read_text().replace('"version": 1', '"version": 9'))
    with pytest.raises(ShardError, match="version 9, expected"):
        Manifest.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ShardError, match="not a shard manifest"):
        Manifest.load(tmp_path)
    with pytest.raises(ShardError, match="nowhere/manifest.json: no such file"):
        Manifest.load(tmp_path / "nowhere")


def test_folders_stay_small() -> None:
    assert shard_path("train", 0) == "train/000/00000.tar"
    assert shard_path("train", 399) == "train/000/00399.tar"
    assert shard_path("train", 400) == "train/001/00400.tar"
