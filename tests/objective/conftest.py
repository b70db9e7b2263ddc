"""Raw sequences for the tests of this room: made up, or real English and Chinese with words and sentences marked."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.conftest import build_folder, folder, texts

__all__ = ["build_folder", "folder", "texts"]


@pytest.fixture(scope="session")
def marked(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Prepared folders `english` and `chinese_poems` that say where words and sentences start; leave them alone."""
    from shardwright.config import parse
    from shardwright.data.prepare import PrepareConfig, prepare

    folders = {}
    for name in ("english", "chinese_poems"):
        folders[name] = tmp_path_factory.mktemp("marked") / name
        raw = {
            "input": [str(bundled / f"{name}.jsonl")],
            "output": str(folders[name]),
            "tokenizer": {"vocab_size": 512 if name == "english" else 1024},
            "validation_every": 10,
            "starts": True,
        }
        prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    return folders
