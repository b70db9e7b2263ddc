"""Muon's update against the singular value decomposition, float64 and torch.optim.Muon."""

import math

import pytest
import torch
from torch import Tensor

from shardwright.config import OptimizerConfig
from shardwright.train.optim import build_optimizer
from shardwright.train.optim.muon import (
    COEFFICIENTS,
    MOST_STACKED_ELSEWHERE,
    STEPS,
    batch_by_shape,
    orthogonalize_,
    pick_matmul_dtype,
)

SHAPES = [(16, 16), (16, 64), (64, 16), (1, 8), (48, 40)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def random_matrix(shape: tuple[int, int], seed: int = 0, least: float = 0.05) -> Tensor:
    """float64, singular values from `least` to 1."""
    generator = torch.Generator().manual_seed(seed)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    return u * torch.linspace(1.0, least, u.shape[1], dtype=torch.float64) @ v


def reference(matrix: Tensor) -> Tensor:
    """The iteration in float64, by the singular values alone."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    a, b, c = COEFFICIENTS
    s = s / s.norm()
    for _ in range(STEPS):
        s = a * s + b * s**3 + c * s**5
    return u * s @ v


@each_shape
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_update_is_near_orthogonal(shape: tuple[int, int], dtype: torch.dtype, bound: float) -> None:
    matrix = random_matrix(shape)
    update = orthogonalize_(matrix.float()[None].clone(), dtype)[0].double()
    values = torch.linalg.svdvals(update)
    assert values.min() > 0.6 and values.max() < 1.3, values
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    turned = u.T @ update @ v.T
    off_diagonal = turned - torch.diag(turned.diag())
    assert off_diagonal.norm() < bound * math.sqrt(min(shape)), "its singular vectors are the gradient's"
    relative = (update - reference(matrix)).norm() / update.norm()
    assert relative < bound


@pytest.mark.parametrize("scale", [1e-20, 1e-6, 1.0, 1e6])
def test_scale_of_the_gradient_does_not_matter(scale: float) -> None:
    matrix = random_matrix((16, 24)).float()
    small = orthogonalize_((matrix * scale)[None].clone(), torch.float32)[0]
    if scale < 1e-7:
        assert small.norm() < 1e-6, "a vanishing gradient gives a vanishing update, never a made-up direction"
    else:
        torch.testing.assert_close(small, orthogonalize_(matrix[None].clone(), torch.float32)[0], rtol=0, atol=1e-4)


def test_zero_gradient_moves_nothing() -> None:
    assert torch.equal(orthogonalize_(torch.zeros(1, 8, 4), torch.bfloat16), torch.zeros(1, 8, 4))


@each_shape
def test_a_stack_is_its_matrices(shape: tuple[int, int]) -> None:
    """What else is multiplied at once changes nothing but rounding."""
    stack = torch.stack([random_matrix(shape, seed) for seed in range(3)]).float()
    together = orthogonalize_(stack.clone(), torch.float32)
    for alone, one in zip(stack, together, strict=True):
        torch.testing.assert_close(orthogonalize_(alone[None].clone(), torch.float32)[0], one, rtol=0, atol=1e-5)


def test_batches_hold_one_shape_and_are_bounded() -> None:
    side = 4096
    shapes = [(side, side)] * 10 + [(side, 64), (64, side)] + [(side, 4 * side)] * 3 + [(side, side)]
    batches = list(batch_by_shape([torch.empty(s, device="meta") for s in shapes]))
    assert sorted(i for batch in batches for i in batch) == list(range(len(shapes)))
    for batch in batches:
        assert len({shapes[i] for i in batch}) == 1
        assert len(batch) == 1 or sum(math.prod(shapes[i]) for i in batch) <= MOST_STACKED_ELSEWHERE
    assert max(len(batch) for batch in batches) == 4
    on_cpu = list(batch_by_shape([torch.empty(1024, 1024) for _ in range(6)]))
    assert on_cpu == [[0, 1, 2, 3], [4, 5]], "a CPU's cache is smaller"


def muon_config(**options: object) -> OptimizerConfig:
    return OptimizerConfig(name="muon", lr=0.01, weight_decay=0.1, momentum=0.95, **options)


@pytest.mark.parametrize("nesterov", [True, False])
def test_same_as_torch_muon_on_single_matrices(nesterov: bool) -> None:
    """Both multiply in bf16; theirs rounds the norm too, so they agree to bf16 rounding, 6 steps long."""
    ours = [random_matrix(s, i).float() for i, s in enumerate(SHAPES)]
    theirs = [torch.nn.Parameter(w.clone()) for w in ours]
    start = [w.clone() for w in ours]
    named = [(f"blocks.{i}.mlp.up.weight", w) for i, w in enumerate(ours)]
    optimizer = build_optimizer(muon_config(nesterov=nesterov), named, matmul_dtype=torch.bfloat16)
    peer = torch.optim.Muon(
        theirs, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = random_matrix(SHAPES[i], 10 * step + i).float()
            b.grad = a.grad.clone()
        optimizer.step()
        peer.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        assert (a - b).norm() / (a - s).norm() < 0.02


def test_whole_rule_against_float64() -> None:
    """Momentum, Nesterov, decoupled decay and the scale 0.2 sqrt(max(rows, columns)) of Liu et al. 2025."""
    for shape in SHAPES:
        weight = random_matrix(shape, 3).float()
        expected, buffer = weight.double(), torch.zeros(shape, dtype=torch.float64)
        optimizer = build_optimizer(muon_config(), [("blocks.0.mlp.up.weight", weight)], matmul_dtype=torch.float32)
        for step in range(4):
            grad = random_matrix(shape, step).float()
            weight.grad = grad.clone()
            optimizer.step()
            buffer = 0.95 * buffer + 0.05 * grad.double()
            update = reference(0.05 * grad.double() + 0.95 * buffer)
            expected = expected * (1 - 0.01 * 0.1) - 0.01 * 0.2 * math.sqrt(max(shape)) * update
            assert torch.equal(weight.grad, grad), "gradients are left as they were"
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=2e-5)


def test_update_has_the_size_of_adamws() -> None:
    """A root mean square of about 0.2 * lr whatever the shape, so that one learning rate serves both."""
    for shape in [(16, 16), (16, 64), (64, 16), (48, 40)]:
        weight = torch.zeros(shape)
        config = OptimizerConfig(name="muon", lr=1.0, weight_decay=0.0)
        optimizer = build_optimizer(config, [("blocks.0.mlp.up.weight", weight)], matmul_dtype=torch.float32)
        weight.grad = random_matrix(shape).float()
        optimizer.step()
        assert 0.13 < weight.square().mean().sqrt() < 0.25


def test_q_k_v_are_orthogonalized_apart() -> None:
    """One tall matrix of all three would get another update."""
    grads = [random_matrix((8, 8), i).float() * 10.0**i for i in range(3)]
    apart = torch.cat([orthogonalize_(g[None].clone(), torch.float32)[0] for g in grads])
    weights = [torch.zeros(8, 8) for _ in grads]
    named = [(f"blocks.0.attention.{k}.weight", w) for k, w in zip("qkv", weights, strict=True)]
    config = OptimizerConfig(name="muon", lr=1.0, weight_decay=0.0)
    optimizer = build_optimizer(config, named, matmul_dtype=torch.float32)
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = grad
    optimizer.step()
    moved = -torch.cat(weights) / (0.2 * math.sqrt(8))
    torch.testing.assert_close(moved, apart, rtol=0, atol=1e-5)
    fused = orthogonalize_(torch.cat(grads)[None].clone(), torch.float32)[0]
    assert (fused - apart).norm() > 0.3 * apart.norm()


def test_the_rest_is_adamw() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.tokens.weight": (9, 4), "head.weight": (9, 4), "final_norm.weight": (4,)}
    ours = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    theirs = {n: w.clone() for n, w in ours.items()}
    options = {"lr": 0.01, "weight_decay": 0.1}
    muon = build_optimizer(OptimizerConfig(name="muon", matrix_lr=0.5, **options), list(ours.items()))
    adamw = build_optimizer(OptimizerConfig(name="adamw", **options), list(theirs.items()))
    for _ in range(3):
        for name in shapes:
            ours[name].grad = torch.randn(shapes[name], generator=generator)
            theirs[name].grad = ours[name].grad.clone()
        muon.step()
        adamw.step()
    for name in shapes:
        assert torch.equal(ours[name], theirs[name])


def test_number_format_of_the_products() -> None:
    assert pick_matmul_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64
    assert pick_matmul_dtype(torch.zeros(1, device="meta")) == torch.float32
    assert pick_matmul_dtype(torch.zeros(1)) in (torch.float32, torch.bfloat16)
