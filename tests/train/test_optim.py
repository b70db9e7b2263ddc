"""What every optimizer promises: groups by name, state that goes on bit for bit, a skip that the host never reads."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.config import ConfigError, OptimizerConfig
from shardwright.train.optim import build_optimizer, load_state_tensors, set_factor, state_tensors
from shardwright.train.optim.groups import kind_of

NAMES = ("adamw", "adam", "sgd", "adafactor", "lamb", "muon")
OPTIONS = [{"name": name} for name in NAMES] + [
    {"name": "sgd", "momentum": 0.0},
    {"name": "sgd", "nesterov": False},
    {"name": "adafactor", "relative_step": True},
    {"name": "muon", "nesterov": False, "matrix_lr": 0.02},
]
each_optimizer = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
SHAPES = {
    "embed.tokens.weight": (19, 8),
    "blocks.0.attention_norm.weight": (8,),
    "blocks.0.attention.q.weight": (8, 8),
    "blocks.0.attention.k.weight": (4, 8),
    "blocks.0.attention.q.bias": (8,),
    "blocks.0.mlp.up.weight": (24, 8),
    "blocks.0.mlp.down.weight": (8, 24),
    "head.weight": (19, 8),
}


def make_weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator, dtype=dtype) * 0.1 for n, shape in SHAPES.items()}


def give_grads(weights: dict[str, Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for weight in weights.values():
        weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def build(weights: dict[str, Tensor], options: dict) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig(**options), list(weights.items()))


def take_steps(optimizer: torch.optim.Optimizer, weights: dict[str, Tensor], steps: range) -> None:
    for step in steps:
        give_grads(weights, step)
        set_factor(optimizer, 1.0 / (1 + step))
        optimizer.step()


def copy_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        a, b = (t.reshape(-1).contiguous().view(torch.uint8) for t in (left[name], right[name]))
        assert torch.equal(a, b), name


class CountHostReads(TorchDispatchMode):
    """Counts values of tensors that Python asks for, each of which would wait for a device."""

    reads = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_host_reads_are_counted() -> None:
    with CountHostReads() as counter:
        assert torch.ones(()).item() == float(torch.ones(()))
    assert counter.reads == 2


def test_kinds() -> None:
    kinds = {name: kind_of(name, torch.empty(shape)) for name, shape in SHAPES.items()}
    assert kinds["embed.tokens.weight"] == "embedding"
    assert kinds["head.weight"] == "head"
    assert kinds["blocks.0.attention.q.bias"] == kinds["blocks.0.attention_norm.weight"] == "vector"
    assert kinds["blocks.0.mlp.up.weight"] == kinds["blocks.0.attention.k.weight"] == "matrix"
    assert kind_of("head.bias", torch.empty(19)) == "vector"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decay_embeddings", [True, False])
def test_decay_by_name(name: str, decay_embeddings: bool) -> None:
    config = {"name": name, "weight_decay": 0.3, "decay_embeddings": decay_embeddings}
    optimizer = build(make_weights(), config)
    decays = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decays.keys() == SHAPES.keys()
    plain = {"blocks.0.attention_norm.weight", "blocks.0.attention.q.bias"}
    plain |= set() if decay_embeddings else {"embed.tokens.weight"}
    assert {n for n, decay in decays.items() if decay == 0.0} == plain
    assert {n for n, decay in decays.items() if decay == 0.3} == SHAPES.keys() - plain


def test_muon_takes_hidden_matrices_at_their_own_rate() -> None:
    optimizer = build(make_weights(), {"name": "muon", "lr": 1e-3, "matrix_lr": 0.02})
    labels = {n: g["label"] for g in optimizer.param_groups for n in g["param_names"]}
    assert {n for n, label in labels.items() if label == "matrices"} == {n for n in SHAPES if kinds_matrix(n)}
    set_factor(optimizer, 0.5)
    assert {g["label"]: g["lr"] for g in optimizer.param_groups} == {"matrices": 0.01, "decayed": 5e-4, "plain": 5e-4}
    set_factor(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] == 0.005, "a factor is of the peak, not of the last rate"


def kinds_matrix(name: str) -> bool:
    return kind_of(name, torch.empty(SHAPES[name])) == "matrix"


@each_optimizer
def test_state_is_whole_from_the_start_and_named(options: dict) -> None:
    weights = make_weights()
    optimizer = build(weights, options)
    before = {n: (t.shape, t.dtype) for n, t in state_tensors(optimizer).items()}
    take_steps(optimizer, weights, range(2))
    assert {n: (t.shape, t.dtype) for n, t in state_tensors(optimizer).items()} == before
    assert all(isinstance(t, Tensor) and not t.requires_grad for t in state_tensors(optimizer).values())
    assert all(name.partition(".")[2] in SHAPES for name in before)


@each_optimizer
@settings(max_examples=8, deadline=None)
@given(first=st.integers(0, 4), then=st.integers(1, 3))
def test_saved_and_loaded_goes_on_bit_for_bit(options: dict, first: int, then: int) -> None:
    weights = make_weights()
    optimizer = build(weights, options)
    take_steps(optimizer, weights, range(first))
    saved_weights, saved_state = copy_of(weights), copy_of(state_tensors(optimizer))
    take_steps(optimizer, weights, range(first, first + then))

    other = make_weights(seed=9)
    fresh = build(other, options)
    take_steps(fresh, other, range(1))  # so that nothing it needs is zero by luck
    for name, weight in other.items():
        weight.copy_(saved_weights[name])
    load_state_tensors(fresh, saved_state)
    take_steps(fresh, other, range(first, first + then))
    assert_same_bits(other, weights)
    assert_same_bits(state_tensors(fresh), state_tensors(optimizer))


@each_optimizer
def test_overflow_leaves_every_bit_and_asks_the_host_nothing(options: dict) -> None:
    """Also at the very first step, and then the run is the one that never saw the bad gradients."""
    weights, clean = make_weights(), make_weights()
    optimizer, reference = build(weights, options), build(clean, options)
    for step in range(3):
        give_grads(weights, step)
        for weight in weights.values():
            weight.grad.view(-1)[0] = (float("inf"), float("nan"), float("-inf"))[step]
        before, state = copy_of(weights), copy_of(state_tensors(optimizer))
        optimizer.found_inf = torch.ones(())
        with CountHostReads() as counter:
            optimizer.step()
        assert counter.reads == 0
        assert_same_bits(weights, before)
        assert_same_bits(state_tensors(optimizer), state)

        optimizer.found_inf = torch.zeros(())
        give_grads(weights, step)
        give_grads(clean, step)
        with CountHostReads() as counter:
            optimizer.step()
        assert counter.reads == 0
        reference.step()
        assert_same_bits(weights, clean)
    assert_same_bits(state_tensors(optimizer), state_tensors(reference))


@each_optimizer
def test_gradients_with_other_strides_count_the_same(options: dict) -> None:
    """torch 2.13's fused CPU kernels pair the wrong elements when strides differ, and say nothing."""
    weights, straight = make_weights(), make_weights()
    optimizer, reference = build(weights, options), build(straight, options)
    give_grads(weights, 0)
    give_grads(straight, 0)
    for weight in weights.values():
        if weight.ndim == 2:
            weight.grad = weight.grad.t().contiguous().t()
            assert weight.grad.stride() != weight.stride()
    optimizer.step()
    reference.step()
    assert_same_bits(weights, straight)


@each_optimizer
def test_a_parameter_without_gradient_stays(options: dict) -> None:
    weights = make_weights()
    optimizer = build(weights, options)
    give_grads(weights, 0)
    left_out = ["blocks.0.attention.q.weight", "embed.tokens.weight"]
    before = {n: weights[n].clone() for n in left_out}
    for name in left_out:
        weights[name].grad = None
    optimizer.step()
    assert_same_bits({n: weights[n] for n in left_out}, before)


@pytest.mark.parametrize("name", NAMES)
def test_learns(name: str) -> None:
    """The weights of a linear map are found from its outputs: the loss falls to under a tenth."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(8, 8, generator=generator)
    inputs = torch.randn(64, 8, generator=generator)
    weight = torch.zeros(8, 8, requires_grad=True)
    optimizer = build({"blocks.0.mlp.up.weight": weight}, {"name": name, "lr": 0.1, "weight_decay": 0.0})
    losses = []
    for step in range(200):
        loss = (inputs @ weight.T - inputs @ truth.T).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        set_factor(optimizer, 1.0 - step / 200)
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


@each_optimizer
def test_runs_in_float64(options: dict) -> None:
    """For tight comparisons of layouts: float32 agrees with it to rounding after 5 steps."""
    results = []
    for dtype in (torch.float32, torch.float64):
        weights = {n: w.to(dtype) for n, w in make_weights().items()}
        optimizer = build_optimizer(OptimizerConfig(**options), list(weights.items()), matmul_dtype=dtype)
        for step in range(5):
            single = make_weights()
            give_grads(single, step)
            for name, weight in weights.items():
                weight.grad = single[name].grad.to(dtype)
            optimizer.step()
        results.append({n: w.double() for n, w in weights.items()})
    for name in SHAPES:
        torch.testing.assert_close(*(r[name] for r in results), rtol=1e-4, atol=1e-5)


@each_optimizer
def test_runs_on_fake_tensors(options: dict) -> None:
    """The planner steps models that do not exist."""
    with FakeTensorMode():
        weights = {name: torch.empty(shape) for name, shape in SHAPES.items()}
        optimizer = build(weights, options)
        optimizer.found_inf = torch.empty(())
        for weight in weights.values():
            weight.grad = torch.empty_like(weight)
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_torch_rules_are_torchs_own(name: str) -> None:
    """Against torch's plain loops in float64, with the groups and a skipped step in between."""
    weights = make_weights(dtype=torch.float64)
    theirs = make_weights(dtype=torch.float64)
    optimizer = build(weights, {"name": name, "lr": 0.01, "weight_decay": 0.1})
    decayed = [w for w in theirs.values() if w.ndim == 2]
    plain = [w for w in theirs.values() if w.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    betas = {"betas": (0.9, 0.95), "eps": 1e-8}
    reference = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01, foreach=False, **betas),
        "adam": lambda: torch.optim.Adam(groups, lr=0.01, foreach=False, **betas),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.95, nesterov=True, foreach=False),
    }[name]()
    for step in range(5):
        give_grads(weights, step)
        give_grads(theirs, step)
        optimizer.found_inf = torch.tensor(float(step == 1))
        optimizer.step()
        if step != 1:
            reference.step()
    for key in weights:
        torch.testing.assert_close(weights[key], theirs[key], rtol=1e-10, atol=1e-12)


def test_state_that_does_not_fit_is_refused_and_changes_nothing() -> None:
    weights = make_weights()
    optimizer = build(weights, {"name": "adamw"})
    take_steps(optimizer, weights, range(2))
    good = copy_of(state_tensors(optimizer))
    lacking = {n: t + 1 for n, t in good.items() if n != "exp_avg.head.weight"}
    extra = {n: t + 1 for n, t in good.items()} | {"exp_avg.blocks.9.mlp.up.weight": torch.zeros(1)}
    other = {n: t + 1 for n, t in good.items()} | {"step.head.weight": torch.zeros(2)}
    for bad, said in [(lacking, "lacks 1 tensors"), (extra, "has unknown 1"), (other, "other shapes for 1")]:
        with pytest.raises(ValueError, match=said) as caught:
            load_state_tensors(optimizer, bad)
        assert "\n" not in str(caught.value)
        assert_same_bits(state_tensors(optimizer), good)


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter to train"):
        build({}, {"name": "adamw"})
