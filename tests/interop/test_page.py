"""The commands of docs/huggingface.md, as they stand there and in their order, in one folder.

A tiny model takes the place of the one on the hub, a small text that of the books, and two steps that of many.
"""

from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path

import pytest

from shardwright.launcher.cli import run
from tests.interop.models import add_tokenizer, save_theirs
from tests.launcher.test_commands import commands, has_extra

transformers = pytest.importorskip("transformers")

SMALL = ["data.sequence_length=64", "batch.sequences=4", "batch.micro=2", "train.compile=false", "train.device=cpu"]
INSTEAD = {
    "openai-community/gpt2": "theirs",
    "configs/gpt2.yaml": "models/gpt2/config.yaml",
    "train.tokens=100000000": "train.steps=2",
    "50": "5",
}


def test_the_commands_of_the_page(bundled, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_theirs(tmp_path / "theirs", "gpt2", vocab_size=512)
    add_tokenizer(tmp_path / "theirs", prepared)
    (tmp_path / "books").mkdir()
    for number, line in enumerate((bundled / "english.jsonl").read_text("utf-8").splitlines()):
        (tmp_path / f"books/{number:02}.txt.gz").write_bytes(gzip.compress(json.loads(line)["text"].encode()))
    for command in commands("huggingface"):
        program, *words = shlex.split(command, comments=True)
        if program == "pip":
            assert has_extra(command)
            continue
        words = [INSTEAD.get(word, word) for word in words]
        words = [str(path) for word in words for path in (sorted(Path().glob(word)) if "*" in word else [word])]
        small = {"train": SMALL, "prepare": ["validation_every=5", "workers=1"]}.get(words[0], [])
        assert run([*words, *small]) == 0, f"{command}\n{capsys.readouterr().err}"
    model = transformers.AutoModelForCausalLM.from_pretrained("mine")
    tokenizer = transformers.AutoTokenizer.from_pretrained("mine")
    assert model.config.vocab_size == 512 and tokenizer.eos_token == "<|endoftext|>"
