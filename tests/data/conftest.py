"""Prepared folders for the tests of this room, made from given documents or from the bundled text, one token a byte."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from shardwright.data.shards import Manifest, ShardWriter, SplitInfo, shard_path

BUNDLED = Path(__file__).resolve().parents[2] / "shardwright" / "data" / "bundled"
END = 0
TOKENIZER = {"end_of_document": END, "file": "tokenizer.json", "sha256": "5" * 64, "vocab_size": 257}

Documents = Sequence[Sequence[int]]
BuildFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def build_folder() -> BuildFolder:
    """`build_folder(folder, train=[shard, ...], validation=[...])`; a shard: documents without their end.

    With `marked` every third token begins a word and every seventh a sentence.
    """

    def build(
        folder: Path,
        member_tokens: int = 300,
        dtype: str = "uint16",
        marked: bool = False,
        **splits: Sequence[Documents],
    ) -> Path:
        found = {}
        for split, shards in splits.items():
            infos = []
            for number, documents in enumerate(shards):
                path = folder / shard_path(split, number)
                writer = ShardWriter(path, dtype, TOKENIZER["sha256"], member_tokens, root=folder)
                for document in documents:
                    words, sentences = (range(0, len(document), n) if marked else None for n in (3, 7))
                    writer.add([*document, END], len(document), words, sentences)
                infos.append(writer.close())
            found[split] = SplitInfo.of(infos)
        Manifest(tokenizer=TOKENIZER, dtype=dtype, splits=found).save(folder)
        return folder

    return build


@pytest.fixture(scope="session")
def texts() -> list[list[int]]:
    """Real documents, English and Chinese, as UTF-8 bytes plus one."""
    documents = []
    for name, count, most in (("english", 40, 1500), ("chinese_poems", 200, 400)):
        with gzip.open(BUNDLED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for _, line in zip(range(count), lines, strict=False):
                data = json.loads(line)["text"].encode()[:most]
                documents.append((np.frombuffer(data, np.uint8).astype(np.int64) + 1).tolist())
    return documents


@pytest.fixture(scope="session")
def folder(build_folder: BuildFolder, texts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real documents as seven training shards of several members, and two validation shards."""
    return build_folder(
        tmp_path_factory.mktemp("prepared") / "corpus",
        member_tokens=4000,
        train=[texts[start:200:7] for start in range(7)],
        validation=[texts[200::2], texts[201::2]],
    )
