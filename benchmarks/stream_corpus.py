"""The corpora of stream.py: synthetic tokens in this project's shards and in the peers' formats, and ten thousand
shards by their indexes alone.

Tokens are random (no format compresses them), documents have lengths like a web corpus's. Made once and kept.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from common import HERE, peers_python, say
from stream_contenders import CONTENDERS

from shardwright.data.manifest import Manifest, ShardInfo, SplitInfo, shard_path
from shardwright.data.shards import ShardWriter

VOCABULARY, END = 8192, 0
SHARD_TOKENS = 1 << 24  # what `prepare` writes by default
HASH = "0" * 64  # of a tokenizer that does not exist
TOKENIZER = {"file": "tokenizer.json", "sha256": HASH, "vocab_size": VOCABULARY, "end_of_document": END}


def build_corpus(folder: Path, num_tokens: int, names: Sequence[str]) -> None:
    """`tokens.npy` and the same tokens in the formats of these contenders, what is there already being kept."""
    once(folder / "tokens", lambda _: np.save(folder / "tokens.npy", random_tokens(num_tokens)))
    once(folder / "ours", lambda target: write_ours(folder / "tokens.npy", target))
    for name, contender in CONTENDERS.items():
        if contender.convert is not None and name in names:
            once(folder / contender.format, partial(convert, name, folder))


def once(target: Path, make: Callable[[Path], object]) -> None:
    """Make a folder unless it was made whole before."""
    done = target / ".whole"
    if done.is_file():
        return
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    say(f"making {target}")
    make(target)
    done.touch()


def random_tokens(count: int) -> np.ndarray:
    """Random tokens, uint16, with an end-of-document token after each document."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, count, dtype=np.uint16)
    ends = np.cumsum(document_lengths(count // 400, rng)) - 1
    tokens[ends[ends < count]] = END
    tokens[-1] = END
    return tokens


def document_lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """Lengths in tokens, log-normal: median 550, mean about 1,000, as in web text."""
    return np.clip(rng.lognormal(np.log(550), 1.1, count), 8, 65536).astype(np.int64)


def write_ours(source: Path, target: Path) -> None:
    """The tokens through this project's own writer."""
    tokens = np.load(source, mmap_mode="r")
    bounds = np.concatenate([[0], np.flatnonzero(tokens == END) + 1])
    shards: list[ShardInfo] = []
    writer: ShardWriter | None = None
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        if writer is None:
            writer = ShardWriter(target / shard_path("train", len(shards)), "uint16", HASH, root=target)
        writer.add(tokens[start:stop], text_bytes=4 * (stop - start))
        if writer.num_tokens >= SHARD_TOKENS:
            shards.append(writer.close())
            writer = None
    if writer is not None:
        shards.append(writer.close())
    Manifest(TOKENIZER, "uint16", {"train": SplitInfo.of(shards)}).save(target)


def convert(name: str, folder: Path, _: Path) -> None:
    """The tokens into a peer's format, by the peer."""
    command = [str(peers_python()), str(HERE / "stream_contenders.py"), name, "convert", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"stream: converting for {name} failed:\n{done.stdout[-2000:]}")


def build_many_shards(folder: Path, count: int, shard_tokens: int = 1 << 20) -> None:
    """A corpus of `count` shards whose indexes are real and whose tars are holes: every token reads as zero."""

    def make(target: Path) -> None:
        first = zero_shard(target, shard_tokens)
        index = (target / first.index).read_bytes()
        assert hashlib.sha256(index).hexdigest() == first.index_sha256
        shards = []
        for number in range(count):
            path = shard_path("train", number)
            info = replace(first, path=path, index=str(Path(path).with_suffix(".idx")))
            (target / path).parent.mkdir(parents=True, exist_ok=True)
            (target / info.index).write_bytes(index)
            with (target / path).open("wb") as file:
                os.truncate(file.fileno(), first.bytes)
            shards.append(info)
        Manifest(TOKENIZER, "uint16", {"train": SplitInfo.of(shards)}).save(target)

    once(folder, make)


def zero_shard(target: Path, num_tokens: int) -> ShardInfo:
    """A shard of documents that are all zeros, of which only the index is of use."""
    rng = np.random.default_rng(1)
    with ShardWriter(target / "zeros.tar", "uint16", HASH, root=target) as writer:
        for length in document_lengths(num_tokens, rng).tolist():
            writer.add(np.zeros(length, np.uint16), text_bytes=4 * length)
            if writer.num_tokens >= num_tokens:
                break
        return writer.close()
