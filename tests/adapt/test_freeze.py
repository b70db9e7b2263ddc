"""Freezing by pattern: what is frozen keeps its bits, has no gradient, master or state, and is in checkpoints."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardwright.adapt.freeze import choose_trained
from shardwright.checkpoint import find_newest
from shardwright.checkpoint.integrity import read_manifest
from shardwright.config import Config, ConfigError
from shardwright.parallel.mesh import World
from shardwright.train.build import build_corpus, build_step, fit_to_corpus
from shardwright.train.load import load
from shardwright.train.run import train
from shardwright.train.step import Step
from tests.train.conftest import tiny

__all__ = ["tiny"]

FREEZE = "adapt.freeze=['embed.*', 'blocks.0.*', '*.bias']"
NAMES = ["embed.tokens.weight", "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight", "head.label.weight"]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """All of the model in one checkpoint of a run."""
    loaded = load(run / "checkpoints" / f"step_{step:08d}", device="cpu")
    return {name: p.detach() for name, p in loaded.model.named_parameters()}


def built(config: Config) -> Step:
    fit_to_corpus(config, build_corpus(config))
    return build_step(config, World(device=torch.device("cpu")))


def test_patterns() -> None:
    assert choose_trained(NAMES, ["blocks.*", "embed.*"], ["blocks.1.*"]) == set(NAMES[2:])
    assert choose_trained(NAMES, [], []) == set(NAMES)
    assert choose_trained(NAMES, ["*"], []) == {"head.label.weight"}, "a new head is trained whatever is said"


@pytest.mark.parametrize(
    ("freeze", "train", "said"),
    [(["block.0.*"], [], "adapt.freeze"), (["blocks.*"], ["hed.*"], "adapt.train"), (["*"], [], "every parameter")],
)
def test_mistakes(freeze: list[str], train: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        choose_trained(NAMES[:3], freeze, train)
    assert "\n" not in str(caught.value)


def test_frozen_parameters_have_nothing(tiny: Callable[..., Config]) -> None:
    step = built(tiny(FREEZE, "precision.compute=bf16"))
    model = step.stages.models[0].model
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {"embed.tokens.weight", "blocks.0.mlp.up.weight", "blocks.1.mlp.up.bias"} <= frozen
    parts, weights = step.masters.parts, step.masters.weights  # type: ignore[attr-defined]
    assert parts.keys() == weights.keys() - frozen
    assert parts.keys() == {name for group in step.optimizer.param_groups for name in group["param_names"]}
    held = {p.data_ptr() for group in step.optimizer.param_groups for p in group["params"]}
    assert not held & {weights[name].data_ptr() for name in frozen}
    assert all(weights[name].dtype == torch.bfloat16 for name in frozen), "no copy in float32"
    assert all(weight.grad is None for name, weight in weights.items() if name in frozen)


@pytest.mark.parametrize("settings", [(), ("precision.compute=bf16",), ("train.recompute=full",)])
def test_frozen_parameters_keep_their_bits(tiny: Callable[..., Config], settings: tuple[str, ...]) -> None:
    config = tiny(FREEZE, *settings, "checkpoint.keep_last=9", "train.steps=4", "optimizer.weight_decay=0.1")
    train(config)
    first, last = tensors(Path(config.run or ""), 2), tensors(Path(config.run or ""), 4)
    changed = {name for name in first if not torch.equal(first[name], last[name])}
    assert changed == {name for name in first if name.startswith(("blocks.1.", "final_norm.")) and "bias" not in name}
    checkpoint, _ = find_newest(Path(config.run or "") / "checkpoints")
    assert checkpoint is not None
    states = {n for n in read_manifest(checkpoint).tensors if n.startswith("optimizer.exp_avg.")}
    assert states == {f"optimizer.exp_avg.{name}" for name in changed}


def test_resume_is_the_same_to_the_bit(tiny: Callable[..., Config], tmp_path: Path) -> None:
    train(tiny(FREEZE, f"run={tmp_path}/two", "train.steps=6", "checkpoint.every=3"))
    train(tiny(FREEZE, f"run={tmp_path}/three"))
    shutil.rmtree(tmp_path / "three/checkpoints/step_00000006")
    (tmp_path / "three/checkpoints/latest").unlink(missing_ok=True)
    train(tiny(FREEZE, f"run={tmp_path}/three"))
    whole, resumed = tensors(tmp_path / "two", 6), tensors(tmp_path / "three", 6)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
