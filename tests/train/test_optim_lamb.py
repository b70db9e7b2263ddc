"""LAMB against algorithm 2 of its paper, written out here in float64."""

import math

import pytest
import torch
from torch import Tensor

from shardwright.config import OptimizerConfig
from shardwright.parallel.logical import Logical
from shardwright.train.optim import Lamb, build_optimizer, set_factor, state_tensors
from shardwright.train.optim.groups import build_decay_groups
from shardwright.train.optim.spread import batch_by_size

SHAPES = {
    "embed.tokens.weight": (19, 8),
    "blocks.0.attention.q.weight": (8, 8),
    "blocks.0.mlp.up.weight": (24, 8),
    "blocks.0.attention_norm.weight": (8,),
    "blocks.0.mlp.up.bias": (24,),
}
RATE, DECAY, BETAS, EPS = 0.01, 0.1, (0.9, 0.95), 1e-6


def draw(seed: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator, dtype=torch.float64) * scale for n, s in SHAPES.items()}


def reference(weights: dict[str, Tensor], grads: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """You et al. 2020, algorithm 2 line by line; layers without decay and ratio are those of its experiments."""
    result = {}
    for name, x in weights.items():
        m, v = torch.zeros_like(x), torch.zeros_like(x)
        for t in range(1, len(grads) + 1):
            g = grads[t - 1][name]
            m = BETAS[0] * m + (1 - BETAS[0]) * g
            v = BETAS[1] * v + (1 - BETAS[1]) * g**2
            r = (m / (1 - BETAS[0] ** t)) / (torch.sqrt(v / (1 - BETAS[1] ** t)) + EPS)
            update = r + DECAY * x if x.ndim > 1 else r
            ratio = 1.0
            if x.ndim > 1 and x.norm() > 0 and update.norm() > 0:
                ratio = (x.norm() / update.norm()).item()
            x = x - RATE * ratio * update
        result[name] = x
    return result


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("zero", [False, True])
def test_same_as_the_paper(dtype: torch.dtype, bound: float, zero: bool) -> None:
    """Also from weights that are zero, whose ratio is 1."""
    start = draw(0, 0.0 if zero else 0.3)
    grads = [draw(1 + t, 10.0 ** (t - 3)) for t in range(8)]
    weights = {n: w.to(dtype, copy=True) for n, w in start.items()}
    config = OptimizerConfig(name="lamb", lr=RATE, weight_decay=DECAY, betas=list(BETAS), eps=EPS)
    optimizer = build_optimizer(config, list(weights.items()))
    for grad in grads:
        for name, weight in weights.items():
            weight.grad = grad[name].to(dtype)
        optimizer.step()
    for name, expected in reference(start, grads).items():
        assert (weights[name] - expected).abs().max() < bound * expected.abs().max(), name


def test_a_matrix_moves_by_the_rate_times_its_norm() -> None:
    """Whatever the gradient's size; that is what lets a batch grow."""
    for scale in (1e-3, 1.0, 1e3):
        weight = torch.randn(16, 16)
        before = weight.clone()
        optimizer = build_optimizer(OptimizerConfig(name="lamb", lr=0.02), [("blocks.0.mlp.up.weight", weight)])
        set_factor(optimizer, 0.5)
        weight.grad = torch.randn(16, 16) * scale
        optimizer.step()
        assert math.isclose((weight - before).norm() / before.norm(), 0.01, rel_tol=1e-5)


def test_norms_and_biases_move_as_adam() -> None:
    """No decay, no ratio."""
    ours, theirs = torch.full((8,), 3.0), torch.full((8,), 3.0)
    lamb = build_optimizer(OptimizerConfig(name="lamb", lr=0.01), [("final_norm.weight", ours)])
    adam = build_optimizer(OptimizerConfig(name="adamw", lr=0.01), [("final_norm.weight", theirs)])
    for _ in range(3):
        ours.grad = torch.randn(8)
        theirs.grad = ours.grad.clone()
        lamb.step()
        adam.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_many_batches_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many tensors are updated together changes no bit."""
    results = []
    for most in (1, 2**22):
        monkeypatch.setattr("shardwright.train.optim.spread.MOST_TOGETHER", most)
        assert len([*batch_by_size([Logical.whole(torch.zeros(2))] * 3)]) == (3 if most == 1 else 1)
        weights = {n: w.float() for n, w in draw(0, 0.3).items()}
        groups = build_decay_groups(
            list(weights.items()), lr=RATE, weight_decay=DECAY, decay_embeddings=False, betas=BETAS, eps=EPS
        )
        optimizer = Lamb(groups)
        for name, grad in draw(1, 1.0).items():
            weights[name].grad = grad.float()
        optimizer.step()
        results.append(weights)
    assert all(torch.equal(results[0][name], results[1][name]) for name in SHAPES)


def test_state_is_adams() -> None:
    optimizer = build_optimizer(OptimizerConfig(name="lamb"), [("head.weight", torch.zeros(4, 4))])
    assert set(state_tensors(optimizer)) == {"step.head.weight", "exp_avg.head.weight", "exp_avg_sq.head.weight"}
