"""Adafactor against transformers' own on the same gradients, and its paper's claims."""

import pytest
import torch
from torch import Tensor

from shardwright.config import OptimizerConfig
from shardwright.train.optim import Adafactor, build_optimizer, state_tensors
from shardwright.train.optim.groups import build_decay_groups

SHAPES = {
    "embed.tokens.weight": (23, 8),
    "blocks.0.attention.q.weight": (8, 8),
    "blocks.0.mlp.up.weight": (24, 8),
    "blocks.0.experts.weight": (3, 4, 8),
    "blocks.0.attention_norm.weight": (8,),
    "blocks.0.mlp.up.bias": (24,),
}


def make_weights(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


def compare(steps: int, dtype: torch.dtype, weight_decay: float, lr: float | None, **options: object) -> float:
    """Largest relative difference of any weight from transformers.Adafactor after some steps."""
    transformers = pytest.importorskip("transformers", reason="pip install 'shardwright[hf]' for this oracle")
    ours, theirs = make_weights(dtype), make_weights(dtype)
    relative = lr is None
    groups = build_decay_groups(
        list(ours.items()), lr=1.0 if relative else lr, weight_decay=weight_decay, decay_embeddings=True
    )
    optimizer = Adafactor(groups, relative_step=relative, **options)
    flat = [
        {"params": [w for w in theirs.values() if w.ndim >= 2], "weight_decay": weight_decay},
        {"params": [w for w in theirs.values() if w.ndim < 2], "weight_decay": 0.0},
    ]
    reference = transformers.Adafactor(flat, lr=lr, relative_step=relative, **options)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for name in SHAPES:
            # Every third gradient is large, so that the update clipping is at work.
            grad = torch.randn(SHAPES[name], generator=generator, dtype=torch.float64) * (
                50.0 if step % 3 == 2 else 1.0
            )
            ours[name].grad, theirs[name].grad = grad.to(dtype), grad.to(dtype)
        optimizer.step()
        reference.step()
    return max(((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()).item() for n in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("beta1", [None, 0.9])
@pytest.mark.parametrize(("lr", "weight_decay"), [(0.01, 0.0), (0.01, 0.1), (None, 0.0)])
def test_same_as_transformers(
    dtype: torch.dtype, scale_parameter: bool, beta1: float | None, lr: float | None, weight_decay: float
) -> None:
    # Our counter and its powers are float32 on the device, theirs are Python floats.
    assert compare(12, dtype, weight_decay, lr, scale_parameter=scale_parameter, beta1=beta1) < 2e-6


def test_memory_is_sublinear() -> None:
    weights = {"blocks.0.mlp.up.weight": torch.ones(256, 64)}
    optimizer = build_optimizer(OptimizerConfig(name="adafactor"), list(weights.items()))
    assert sum(t.numel() for t in state_tensors(optimizer).values()) == 256 + 64 + 1


def test_an_update_is_no_larger_than_rate_times_scale() -> None:
    """Section 6 and 8 of the paper: its root mean square is at most lr * rms(parameter)."""
    weights = make_weights()
    optimizer = build_optimizer(OptimizerConfig(name="adafactor", lr=0.01, weight_decay=0.0), list(weights.items()))
    generator = torch.Generator().manual_seed(2)
    for step in range(6):
        before = {n: w.clone() for n, w in weights.items()}
        for w in weights.values():
            w.grad = torch.randn(w.shape, generator=generator) * 100.0**step
        optimizer.step()
        for name, w in weights.items():
            moved, scale = (w - before[name]).square().mean().sqrt(), before[name].square().mean().sqrt()
            assert moved <= 0.01 * scale * 1.001
