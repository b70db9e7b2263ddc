"""Runs that begin from an imported model, or from another run: `begin=` under every engine and a layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from shardwright.checkpoint import StoredTensors
from shardwright.train.load import load
from tests.equivalence.cells import config
from tests.interop.commands import done, logits, refused
from tests.interop.models import CASES, add_tokenizer, save_theirs

transformers = pytest.importorskip("transformers")


def same_start(run_folder: Path, source: Path) -> None:
    """A run's first checkpoint holds the weights of the checkpoint `source`, to the bit."""
    first = StoredTensors(run_folder / "checkpoints/step_00000000", within="model.")
    weights = StoredTensors(source, within="model.")
    assert first.keys() == weights.keys() and all(torch.equal(first[name], weights[name]) for name in first)


def test_a_run_begins_from_an_imported_model_and_goes_out_again(prepared, tmp_path, capsys):
    theirs = tmp_path / "theirs"
    model = save_theirs(theirs, "qwen3", vocab_size=512)
    add_tokenizer(theirs, prepared)
    ours, own = tmp_path / "ours", tmp_path / "run"
    done(capsys, "import", theirs, "--output", ours)
    start = ["train", ours / "config.yaml", f"begin={ours}", f"run={own}", f"data.path={prepared}", "train.steps=2"]
    start += [
        "data.sequence_length=64",
        "batch.sequences=4",
        "batch.micro=2",
        "train.compile=false",
        "checkpoint.keep_last=3",
    ]
    done(capsys, *start, "checkpoint.every=1", "checkpoint.keep_last=3")
    same_start(own, ours / "checkpoints/step_00000000")
    shutil.rmtree(ours)  # a run that has a checkpoint needs it no more
    done(capsys, "train", own / "config.yaml")
    shutil.move(theirs, tmp_path / "elsewhere")
    done(capsys, "export", own, "--output", tmp_path / "back")
    assert json.loads((tmp_path / "back/generation_config.json").read_text())["top_k"] == 20
    ids = torch.randint(0, 512, (1, 9))
    found = logits(tmp_path / "back", ids)
    torch.testing.assert_close(found, load(own)(input_ids=ids)["logits"], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(found, model(ids).logits, atol=1e-4), "two steps have moved it"
    one = own / "checkpoints/step_00000001"
    done(capsys, "train", own / "config.yaml", f"begin={one}", f"run={tmp_path / 'second'}")
    same_start(tmp_path / "second", one)


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_a_run_of_another_engine_begins_from_the_same_weights(engine, prepared, tmp_path, capsys):
    pytest.importorskip(engine, reason=f"{engine} is not installed: pip install 'shardwright[{engine}]'")
    save_theirs(tmp_path / "theirs", vocab_size=512)
    ours, own = tmp_path / "ours", tmp_path / "run"
    done(capsys, "import", tmp_path / "theirs", "--output", ours)
    start = ["train", ours / "config.yaml", f"begin={ours}", f"run={own}", f"data.path={prepared}", f"engine={engine}"]
    start += ["data.sequence_length=64", "batch.sequences=4", "batch.micro=2", "train.compile=false", "train.steps=1"]
    done(capsys, *start, "precision.compute=bf16")
    same_start(own, ours / "checkpoints/step_00000000")


@pytest.mark.in_turn
def test_a_sharded_run_begins_from_the_same_weights(ranks, prepared, tmp_path, capsys):
    """ZeRO 3 with a pipeline, on four ranks, against one process."""
    save_theirs(tmp_path / "theirs", vocab_size=512)
    add_tokenizer(tmp_path / "theirs", prepared)
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours", "--dtype", "bf16")
    raw = {**config(prepared, tmp_path / "one"), "begin": str(tmp_path / "ours")}
    raw["model"] = CASES["llama"] | {"vocab_size": 512}
    raw["train"] |= {"steps": 3}
    raw["schedule"] = {"warmup_steps": 1}
    one = ranks.run(1, "tests.equivalence.work:run", raw, [])[0]
    layout = ["parallel.zero=3", "parallel.pipeline=2", "parallel.schedule=gpipe", f"run={tmp_path / 'four'}"]
    four = ranks.run(4, "tests.equivalence.work:run", raw, layout)[0]
    losses = [[record["loss"] for record in records if "loss" in record] for records in (one, four)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 3


def test_what_a_run_cannot_begin_with_is_refused(prepared, bundled, tmp_path, capsys):
    save_theirs(tmp_path / "theirs", vocab_size=512)
    add_tokenizer(tmp_path / "theirs", prepared)
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    own = [f"run={tmp_path / 'run'}", "data.sequence_length=64", "train.steps=1"]
    start = ["train", tmp_path / "ours/config.yaml", f"data.path={prepared}", *own]
    refused(capsys, *start, f"begin={tmp_path / 'theirs'}", says="is a Hugging Face folder; first: shardwright import")
    refused(capsys, *start, f"begin={tmp_path / 'none'}", says="is neither a run folder nor a checkpoint")
    refused(capsys, *start, f"run={tmp_path / 'ours'}", says="holds an imported model, not a run; begin a run with")
    other = [f"begin={tmp_path / 'ours'}", "model.width=64", "model.mlp_width=96"]
    refused(capsys, *start, *other, says="30 different", code=1)
    done(capsys, "prepare", bundled / "english.jsonl", "--output", tmp_path / "data", "tokenizer.vocab_size=300")
    another = ["train", "debug/llama", f"data.path={tmp_path / 'data'}", f"begin={tmp_path / 'ours'}", *own]
    refused(capsys, *another, says="its model reads tokenizer")
