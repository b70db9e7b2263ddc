"""Every byte of a checkpoint is covered: any flip is found and named; a rank checks just what it reads."""

import math
import random
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.checkpoint import DamagedError, damage, load, read_manifest, save
from shardwright.checkpoint.integrity import (
    BLOCK_BYTES,
    CHECKSUM,
    Chunk,
    checksums,
    open_tensor_file,
    rank_path,
    read_checked,
    read_rank_manifest,
)

TENSORS = {"embed": torch.randn(300, 1024), "norm": torch.randn(512), "count": torch.tensor(7)}  # 1.2 MB, 2 KB, 8 B


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path, TENSORS, {"loss": 2.5}, step=3)


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def test_a_whole_checkpoint_has_no_damage_and_says_how_it_is_checked(checkpoint: Path) -> None:
    assert [*damage(checkpoint)] == []
    assert f'"tensors": "{CHECKSUM}"' in (checkpoint / "manifest.json").read_text()


def test_every_tensor_byte_and_header_byte_is_covered(checkpoint: Path) -> None:
    """Header and chunks lie side by side and make up the file: there is no byte that no checksum sees."""
    manifest = read_rank_manifest(checkpoint, 0, read_manifest(checkpoint).ranks[0])
    end = manifest.header_bytes
    for chunk in sorted(manifest.chunks, key=lambda chunk: chunk.start):
        assert chunk.start == end
        end += chunk.num_bytes
        assert len(chunk.checksums) == math.ceil(chunk.num_bytes / BLOCK_BYTES)
    assert end == manifest.file_bytes == rank_path(checkpoint, 0, ".safetensors").stat().st_size


def test_a_flipped_bit_anywhere_is_found_and_the_file_named(tmp_path: Path) -> None:
    rng = random.Random(0)
    checkpoint = save(tmp_path, TENSORS, {"loss": 2.5}, step=3)
    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    assert len(files) == 4
    for path in files:
        size = path.stat().st_size
        many = size if path.name == "complete.json" else 12
        for position in {0, size - 1, *(rng.randrange(size) for _ in range(many))}:
            bit = rng.randrange(8)
            flip(path, position, bit)
            found = [*damage(checkpoint)]
            # A flip in the hash that the marker holds cannot be told from damage to what it vouches for.
            names = {path.name, "manifest.json"} if path.name == "complete.json" else {path.name}
            assert found and any(name in found[0] for name in names), (path, position, bit, found)
            flip(path, position, bit)
    assert [*damage(checkpoint)] == []


def test_a_flip_in_a_tensor_names_the_tensor_and_load_refuses_it(checkpoint: Path) -> None:
    manifest = read_rank_manifest(checkpoint, 0, read_manifest(checkpoint).ranks[0])
    path = rank_path(checkpoint, 0, ".safetensors")
    for chunk in manifest.chunks:
        flip(path, chunk.start + chunk.num_bytes // 2)
        with pytest.raises(DamagedError, match=rf"rank_00000.safetensors is damaged in tensor '{chunk.name}'"):
            load(checkpoint, {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()})
        flip(path, chunk.start + chunk.num_bytes // 2)


@pytest.mark.parametrize("suffix", [".safetensors", ".json"])
def test_a_cut_or_missing_file_is_named(checkpoint: Path, suffix: str) -> None:
    path = rank_path(checkpoint, 0, suffix)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert path.name in next(damage(checkpoint))
    path.unlink()
    assert path.name in next(damage(checkpoint))
    with pytest.raises(DamagedError, match=path.name):
        load(checkpoint, dict(TENSORS))


def test_several_things_wrong_are_all_named(checkpoint: Path) -> None:
    manifest = read_rank_manifest(checkpoint, 0, read_manifest(checkpoint).ranks[0])
    path = rank_path(checkpoint, 0, ".safetensors")
    for chunk in manifest.chunks:
        flip(path, chunk.start)
    found = [*damage(checkpoint)]
    assert len(found) == 3 and all(any(repr(name) in line for line in found) for name in TENSORS)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_read_checked_gives_the_bytes_asked_and_sees_only_blocks_it_touches(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    size = data.draw(st.integers(1, 3 * BLOCK_BYTES))
    start = data.draw(st.integers(0, size - 1))
    stop = data.draw(st.integers(start + 1, size))
    broken = data.draw(st.integers(0, size - 1))
    content = bytearray(random.Random(size).randbytes(size))
    chunk = Chunk("x", (size,), (0,), (size,), "uint8", 16, checksums(memoryview(content)))
    path = tmp_path_factory.mktemp("file") / "x"
    path.write_bytes(bytes(16) + content)
    with open(path, "rb", buffering=0) as stream:
        assert read_checked(stream, path, chunk, start, stop) == content[start:stop]
    flip(path, 16 + broken)
    touched = start // BLOCK_BYTES <= broken // BLOCK_BYTES <= (stop - 1) // BLOCK_BYTES
    with open(path, "rb", buffering=0) as stream:
        if touched:
            with pytest.raises(DamagedError, match="'x'"):
                read_checked(stream, path, chunk, start, stop)
        else:
            assert read_checked(stream, path, chunk, start, stop) == content[start:stop]


def test_checksums_are_zlibs_crc32_of_each_block() -> None:
    content = random.Random(1).randbytes(BLOCK_BYTES + 5)
    assert checksums(memoryview(content)) == (zlib.crc32(content[:BLOCK_BYTES]), zlib.crc32(content[BLOCK_BYTES:]))


def test_a_file_that_grew_is_damaged(checkpoint: Path) -> None:
    path = rank_path(checkpoint, 0, ".safetensors")
    manifest = read_rank_manifest(checkpoint, 0, read_manifest(checkpoint).ranks[0])
    with open(path, "ab") as stream:
        stream.write(b"x")
    with pytest.raises(DamagedError, match="bytes of"):
        open_tensor_file(path, manifest)
