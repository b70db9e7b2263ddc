"""Pruned folders: how many zeros and which, what takes them, and training that leaves them where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardwright.adapt.prune import num_violations, prune_2_of_4, prune_by_magnitude
from shardwright.config import Config, ConfigError
from shardwright.train.load import load
from shardwright.train.pruned import prunable, prune_model
from shardwright.train.run import train
from tests.equivalence.cells import BOUNDS, config, disagreement, weights
from tests.equivalence.work import leg
from tests.interop.commands import done, logits, refused
from tests.ranks import Ranks

Tiny = Callable[..., Config]
LLAMA = {"family": "llama", "kv_heads": 1, "mlp_width": 96}


@pytest.fixture(scope="session")
def dense(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned something."""
    run = tmp_path_factory.mktemp("pruned") / "dense"
    train(tiny(run, "train.steps=20", "checkpoint.every=null", **LLAMA))
    return run


@pytest.fixture(scope="session")
def sparse(dense: Path) -> Path:
    """The same with 2 zeros in every 4."""
    prune_model(dense, dense.parent / "sparse", pattern="2:4")
    return dense.parent / "sparse"


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in load(folder).model.named_parameters()}


# ------------------------------------------------------------------------------------------ which are zero


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_smallest_of_a_matrix_go(sparsity: float) -> None:
    weight = torch.randn(24, 32)
    found = prune_by_magnitude(weight, sparsity)
    assert int((found == 0).sum()) == round(sparsity * weight.numel())
    kept = found != 0
    assert torch.equal(found[kept], weight[kept]) and weight[kept].abs().min() >= weight[~kept].abs().max()


def test_the_two_smallest_of_every_four_go() -> None:
    weight = torch.randn(24, 32)
    found = prune_2_of_4(weight, "w")
    order = weight.unflatten(1, (-1, 4)).abs().argsort(-1)
    wanted = weight.unflatten(1, (-1, 4)).scatter(-1, order[..., :2], 0).flatten(1)
    assert torch.equal(found, wanted) and num_violations(found) == 0
    assert num_violations(weight) == weight.numel() // 4 and num_violations(prune_by_magnitude(weight, 0.5)) > 0


def test_linear_layers_are_pruned_and_nothing_else(dense: Path, sparse: Path) -> None:
    before, after = parameters(dense), parameters(sparse)
    pruned = set(prunable(load(dense).config.model))
    assert len(pruned) == 14 and before.keys() == after.keys()
    for name in before:
        if name in pruned:
            assert num_violations(after[name]) == 0 and (after[name] == 0).float().mean() == 0.5
        else:
            assert torch.equal(before[name], after[name])


def test_the_command_and_what_takes_its_folder(dense: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    said = done(capsys, "prune", dense, "--output", out, "--sparsity", 0.25, "--include", "*.mlp.*")
    assert "25.0% of 18,432 weights in 6 tensors are zero" in said
    changed = {name for name, p in parameters(out).items() if not torch.equal(p, parameters(dense)[name])}
    assert changed == {f"blocks.{n}.mlp.{part}.weight" for n in (0, 1) for part in ("gate", "up", "down")}
    done(capsys, "export", out, "--output", tmp_path / "theirs")
    ids = torch.randint(0, 512, (1, 9))
    wanted = load(out)(input_ids=ids)["logits"]
    torch.testing.assert_close(logits(tmp_path / "theirs", ids), wanted, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused(dense: Path, tiny: Tiny, tmp_path: Path, capsys) -> None:
    out = ("--output", tmp_path / "out")
    refused(capsys, "prune", dense, *out, says="give one of --sparsity 0.5 and --pattern 2:4")
    refused(capsys, "prune", dense, *out, "--sparsity", 1.5, says="--sparsity 1.5: expected a share")
    refused(capsys, "prune", dense, *out, "--pattern", "1:3", says="--pattern 1:3: expected 2:4")
    refused(
        capsys,
        "prune",
        dense,
        *out,
        "--sparsity",
        0.5,
        "--include",
        "*.nothing",
        says="--include *.nothing: matches no",
    )
    train(tiny(tmp_path / "lora", f"begin={dense}", "adapt.method=lora", "train.steps=1", **LLAMA))
    refused(capsys, "prune", tmp_path / "lora", *out, "--sparsity", 0.5, says="has an adapter; take it in first")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="the 34 inputs of x are no multiple of 4"):
        prune_2_of_4(torch.randn(3, 34), "x")
    with pytest.raises(ConfigError, match="train.keep_zeros: there are none to keep"):
        train(tiny(tmp_path / "run", "train.keep_zeros=true"))


# ------------------------------------------------------------------------------------------ training on


def keeping(sparse: Path) -> tuple[str, ...]:
    return (f"begin={sparse}", "train.keep_zeros=true")


def same_zeros(run: Path, sparse: Path) -> None:
    """Every zero of the pruned linear layers is one still, and the rest has learned."""
    before, after = parameters(sparse), parameters(run)
    for name in prunable(load(sparse).config.model):
        assert torch.equal(before[name] == 0, after[name] == 0), name
        assert not torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "lamb", "sgd"])
def test_zeros_stay_under_every_rule(tiny: Tiny, sparse: Path, tmp_path: Path, optimizer: str) -> None:
    keys = (f"optimizer.name={optimizer}", "train.steps=3", "checkpoint.every=null")
    train(tiny(tmp_path / "run", *keeping(sparse), *keys, **LLAMA))
    same_zeros(tmp_path / "run", sparse)


def test_without_the_key_they_are_gone(tiny: Tiny, sparse: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", f"begin={sparse}", "train.steps=1", **LLAMA))
    assert (parameters(tmp_path / "run")["blocks.0.mlp.up.weight"] == 0).float().mean() < 0.1


@pytest.mark.parametrize("settings", [(), ("precision.compute=bf16", "optimizer.name=muon")])
def test_a_resumed_run_is_bit_identical(tiny: Tiny, sparse: Path, tmp_path: Path, settings: tuple[str, ...]) -> None:
    given = [*keeping(sparse), *settings]
    train(tiny(tmp_path / "whole", *given, **LLAMA))
    leg(tiny(tmp_path / "parts", *given, **LLAMA).model_dump(), [], 4)
    train(tiny(tmp_path / "parts", *given, **LLAMA))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    same_zeros(tmp_path / "parts", sparse)


LAYOUTS = {f"zero{n}": (2, [f"parallel.zero={n}"]) for n in range(4)} | {
    "tensor2": (2, ["parallel.tensor=2"]),
    "pipeline2": (2, ["parallel.pipeline=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(ranks: Ranks, prepared: Path, tmp_path: Path, layout: str) -> None:
    """Against one process, within the bounds of the equivalence matrix."""
    work, (size, spread) = "tests.equivalence.matrix:train_quietly", LAYOUTS[layout]
    short = ["train.steps=2", "schedule.warmup_steps=1"]
    ranks.run(1, work, config(prepared, tmp_path / "dense", "llama"), short, None)
    prune_model(tmp_path / "dense", tmp_path / "sparse", sparsity=0.5)
    given = [*keeping(tmp_path / "sparse"), "train.clip=0.2"]
    expected = ranks.run(1, work, config(prepared, tmp_path / "one", "llama"), given, None)[0]
    records = ranks.run(size, work, config(prepared, tmp_path / "two", "llama"), [*given, *spread], None)[0]
    found = disagreement(tmp_path / "two", records, tmp_path / "one", expected)
    assert all(value < BOUNDS["fp32"][name] for name, value in found.items()), found
    same_zeros(tmp_path / "two", tmp_path / "sparse")
