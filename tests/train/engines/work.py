"""What the ranks of the engines' tests do: real runs, with a look at what the engine itself says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shardwright.config import ParallelConfig
from shardwright.parallel.mesh import join_world
from shardwright.train import run as loop
from shardwright.train.engines import deepspeed as engine
from shardwright.train.metrics import read_metrics
from shardwright.train.settings import read_config
from shardwright.train.verify import verify


def norms(raw: dict[str, Any], overrides: list[str]) -> list[tuple[float, float]]:
    """(norm as the run logs it, DeepSpeed's own) of every step."""
    torch.set_num_threads(1)
    found: list[float] = []

    class Watched(loop.Run):
        def _one_step(self) -> None:
            super()._one_step()
            found.append(float(self.step.masters.held.engine.get_global_grad_norm()))  # type: ignore[attr-defined]

    original, loop.Run = loop.Run, Watched  # type: ignore[misc]
    try:
        records = read_metrics(Path(loop.train(read_config(raw, overrides)).run))
    finally:
        loop.Run = original  # type: ignore[misc]
    return list(zip((r["grad_norm"] for r in records if "grad_norm" in r), found, strict=True))


def spoiled(raw: dict[str, Any], overrides: list[str], step: int, rank: int) -> list[dict[str, Any]]:
    """Train; in step `step` rank `rank` alone once has a gradient that is not finite, and a loss that is."""
    torch.set_num_threads(1)
    done = []

    class Spoiled(loop.Run):
        def _one_step(self) -> None:
            parameters = list(self.step.stages.models[0].parameters())
            hooks = []
            if self.position.step + 1 == step and self.world.rank == rank and not done:
                done.append(step)
                hooks = [parameters[-1].register_hook(lambda gradient: gradient * float("inf"))]
            super()._one_step()
            for hook in hooks:
                hook.remove()

    original, loop.Run = loop.Run, Spoiled  # type: ignore[misc]
    try:
        return read_metrics(Path(loop.train(read_config(raw, overrides)).run))
    finally:
        loop.Run = original  # type: ignore[misc]


def left_behind(raw: dict[str, Any], overrides: list[str]) -> tuple[int, int]:
    """Train: (ZeRO stage, whether torch's `linear` is another one afterwards)."""
    before = torch.nn.functional.linear
    config = read_config(raw, overrides)
    loop.train(config)
    return config.parallel.zero, int(torch.nn.functional.linear is not before)


def verified(raw: dict[str, Any], overrides: list[str]) -> tuple[bool, str]:
    """`shardwright verify`: (passed, verdict)."""
    torch.set_num_threads(1)
    report = verify(read_config(raw, overrides), steps=2)
    return report.passed, report.verdict()


def saved_by_deepspeed(folder: Path, zero: int, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A program of a user's own: Hugging Face's GPT-2 in a DeepSpeed engine, one step, saved; its weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    with join_world("cpu", 1, ParallelConfig()), engine._linear():  # which it would leave in its own way
        deepspeed = engine._load(torch.device("cpu"))
        engine._forget_groups()
        from deepspeed.utils import safe_get_full_fp32_param

        torch.manual_seed(1)
        model = GPT2LMHeadModel(GPT2Config(**settings))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        options = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": zero},
            "zero_force_ds_cpu_optimizer": False,
        }
        trained, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options, dist_init_required=False)
        tokens = torch.arange(16).reshape(1, 16)
        trained.backward(trained(input_ids=tokens, labels=tokens).loss)
        trained.step()
        trained.save_checkpoint(str(folder))
        named = dict(model.named_parameters())
        return {
            name: (parameter if zero == 0 else safe_get_full_fp32_param(parameter)).detach().clone()
            for name, parameter in named.items()
        }
