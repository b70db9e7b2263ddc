"""A capsule is run again in one process: the same module, the same error, or word that it went well."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from shardwright.checkpoint import find_newest, load, save
from shardwright.checkpoint.integrity import DTYPES, read_manifest
from shardwright.config import ConfigError, RunError
from shardwright.launcher.cli import run as command
from shardwright.train.replay import replay
from shardwright.train.run import train


def plant(run: str | Path, name: str) -> None:
    """A NaN in a weight of the newest checkpoint, whose checksums are right: what a broken host writes."""
    checkpoint, _ = find_newest(Path(run) / "checkpoints")
    manifest = read_manifest(checkpoint)
    tensors = {n: torch.empty(i.shape, dtype=DTYPES[i.dtype][0]) for n, i in manifest.tensors.items()}
    state = load(checkpoint, tensors)
    tensors[f"model.{name}"].view(-1)[5] = torch.nan
    save(checkpoint.parent, tensors, state, step=manifest.step)


@pytest.fixture
def stopped(tiny) -> Path:
    """The capsule of a run that a NaN in one module of its checkpoint stopped."""
    settings = ("train.steps=5", "checkpoint.every=4", "guard.nonfinite=stop", "model.residual_dropout=0.1")
    config = tiny(*settings)
    train(config)
    again = tiny(*settings, f"run={config.run}2")
    shutil.copytree(*(Path(run) / "checkpoints" / "step_00000004" for run in (config.run, again.run)))
    plant(again.run, "blocks.1.attention.out.weight")
    with pytest.raises(RunError, match="not finite"):
        train(again)
    return Path(again.run) / "capsules" / "step_00000005"


def test_the_module_with_the_nan_is_named_again(stopped, capsys):
    answer = replay(stopped)
    assert answer.reproduced and answer.module == "blocks.1.attention.out (forward), micro-batch 0"
    assert answer.text.startswith(
        "reproduced: step 5 (sequences 16 to 19): not finite, first in blocks.1.attention.out"
    )
    assert answer.batch == "bit-equal, 4 of 4 sequences compared"
    assert command(["replay", str(stopped), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["reproduced"]


def test_data_that_changed_since_are_noticed(stopped):
    path = stopped / "rank_00000.safetensors"
    tensors = load_file(path)
    tensors["0001.input_ids"][0, 3] += 1
    save_file(tensors, path)
    answer = replay(stopped)
    assert not answer.reproduced and "differs in input_ids" in answer.text


def test_weights_that_are_gone_or_others_are_refused(stopped):
    raw = json.loads((stopped / "capsule.json").read_text())
    raw["weights"]["sha256"] = "0" * 64
    (stopped / "capsule.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="is not the checkpoint that"):
        replay(stopped / "capsule.json")
    raw["weights"]["path"] = "nowhere/step_00000001"
    (stopped / "capsule.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match="are gone"):
        replay(stopped)


def test_what_does_not_happen_again_is_said(tiny, monkeypatch, capsys):
    """An exception of the moment; and the steps from the checkpoint to it are taken again, dropout and all."""
    from shardwright.model.layers import MLP

    forward, calls = MLP.forward, [0]

    def fail(layer, *given):
        calls[0] += 1
        if calls[0] == 15:  # 2 layers, 2 micro-batches a step: the second micro-batch of step 4
            raise ArithmeticError("a kernel gave up")
        return forward(layer, *given)

    monkeypatch.setattr(MLP, "forward", fail)
    config = tiny(
        "model.residual_dropout=0.1", "batch.ramp={start: 2, increment: 2, sequences: 4}", "checkpoint.every=2"
    )
    with pytest.raises(ArithmeticError):
        train(config)
    (folder,) = (Path(config.run) / "capsules").iterdir()
    assert command(["replay", str(folder)]) == 1
    assert f"not reproduced: step {int(folder.name[5:])} went well on one device" in capsys.readouterr().out
    monkeypatch.setattr(MLP, "forward", lambda layer, *given: 1 / 0)
    answer = replay(folder)
    assert not answer.reproduced and "ZeroDivisionError" in answer.text


def test_a_replay_is_one_process(stopped, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="replay: is one process"):
        replay(stopped)
