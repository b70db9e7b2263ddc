"""Opening a run: all of the model and nothing else, with the tokenizer it was trained with, or one line why not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from shardwright.checkpoint import CheckpointError
from shardwright.config import Config, ConfigError, parse
from shardwright.data.prepare import PrepareConfig, prepare
from shardwright.train.load import load
from shardwright.train.run import train


@pytest.fixture
def run(tiny: Callable[..., Config]) -> Path:
    """A finished run of two steps."""
    return Path(train(tiny("train.steps=2")).run)


def test_all_of_the_model_is_restored_and_that_is_said(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    count = len(list(load(run).model.parameters()))
    assert f"restored {count} of {count} tensors" in capsys.readouterr().err


def test_a_config_that_lacks_a_layer_of_the_checkpoint_is_refused(run: Path) -> None:
    raw = yaml.safe_load((run / "config.yaml").read_text())
    raw["model"]["layers"] = 1
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(CheckpointError, match=r"in the checkpoint but not asked for: model\.blocks\.1\.") as error:
        load(run)
    assert "exp_avg" not in str(error.value), "the optimizer's tensors are none of the model's"


def test_another_tokenizer_is_refused(run: Path) -> None:
    tokenizer = run / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is not the tokenizer of the training") as error:
        load(run)
    assert "\n" not in str(error.value)


def test_the_end_of_document_is_that_of_the_corpus(bundled: Path, tiny: Callable[..., Config], tmp_path: Path) -> None:
    names = {"special_tokens": ["<|endoftext|>", "<|stop|>"], "end_of_document": "<|stop|>", "vocab_size": 300}
    raw = {"input": [str(bundled / "english.jsonl")], "output": str(tmp_path / "corpus"), "tokenizer": names}
    prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    result = train(tiny(f"data.path={tmp_path / 'corpus'}", "train.steps=1"))
    shutil.rmtree(tmp_path / "corpus")
    tokenizer = load(result.run).tokenizer
    assert tokenizer.end_of_document == tokenizer.token_id("<|stop|>") != tokenizer.token_id("<|endoftext|>")
