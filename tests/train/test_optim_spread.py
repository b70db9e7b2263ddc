"""Optimizers over parts of tensors on several gloo ranks against one process that holds them whole."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from shardwright import checkpoint
from shardwright.config import OptimizerConfig
from shardwright.parallel.logical import Logical
from shardwright.train.optim import build_optimizer
from tests.parallel.work_logical import (
    LAYOUTS,
    OPTIONS,
    SHAPES,
    STEPS,
    alone,
    make_weights,
    take_steps,
    tensors_of,
)
from tests.ranks import Ranks

WORK = "tests.parallel.work_logical"
SIZES = {layout: int(torch.tensor(sizes).prod()) for layout, sizes in LAYOUTS.items()}


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight, relative to the largest weight of its tensor."""
    assert found.keys() == expected.keys()
    return max(((found[n] - expected[n]).abs().max() / expected[n].abs().max()).item() for n in expected)


@pytest.mark.in_turn
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_optimizer_takes_the_steps_of_one_process(ranks: Ranks, layout: str) -> None:
    answers = ranks.run(SIZES[layout], f"{WORK}:train", layout)
    for label, options in OPTIONS.items():
        expected = alone(options, range(STEPS))
        start = make_weights()
        for answer in answers:
            apart = furthest({name: whole for name, (whole, _, _) in answer[label].items()}, expected)
            assert apart < 1e-6, (label, apart)
        assert furthest(start, expected) > 1e-2, "the steps went somewhere"
        bits: dict[tuple[str, object], set[str]] = {}
        for answer in answers:
            for name, (_, box, digest) in answer[label].items():
                bits.setdefault((name, box), set()).add(digest)
        assert all(len(same) == 1 for same in bits.values()), "ranks with the same part stay equal to the bit"


def test_muon_in_bf16_loses_nothing_on_the_way(ranks: Ranks) -> None:
    """Updates travel in the format of the products."""
    (one, _) = ranks.run(2, f"{WORK}:train", "shard 2", "bfloat16")
    expected = alone(OPTIONS["muon"], range(STEPS), torch.bfloat16)
    exact = alone(OPTIONS["muon"], range(STEPS))
    apart = furthest({name: whole for name, (whole, _, _) in one["muon"].items()}, expected)
    assert apart < 0.1 * furthest(exact, expected), apart


@pytest.mark.parametrize("most", [1, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matrices_are_dealt_once_and_evenly(ranks: Ranks, layout: str, most: int) -> None:
    """Every matrix is the work of one rank; none has two more than another in one dealing."""
    answers = ranks.run(SIZES[layout], f"{WORK}:dealt", layout, most)
    counts = Counter(name for hands in answers for hand in hands for name in hand)
    assert counts == dict.fromkeys((n for n, shape in SHAPES.items() if len(shape) == 2), 1)
    for hands in zip(*answers, strict=True):
        sizes = [len(hand) for hand in hands]
        assert max(sizes) - min(sizes) <= len([size for size in LAYOUTS[layout] if size > 1])
    assert (len(answers[0]) > 2) == (most == 1), "rounds are as long as memory allows"


@pytest.mark.in_turn
@pytest.mark.parametrize("layout", ["shard 2", "shard 2 x tensor 2"])
def test_states_are_loaded_whole_or_in_parts(ranks: Ranks, layout: str) -> None:
    ranks.run(SIZES[layout], f"{WORK}:load_states", layout)


@pytest.mark.in_turn
@pytest.mark.parametrize(
    ("written", "read"),
    [("shard 2", "shard 2 x tensor 2"), ("shard 3 x tensor 2", "replicate 2"), ("shard 2 x tensor 2", "shard 4")],
)
def test_saved_under_one_layout_goes_on_under_another(ranks: Ranks, tmp_path: Path, written: str, read: str) -> None:
    """And in one process, always as if nothing had happened."""
    ranks.run(SIZES[written], f"{WORK}:save_run", written, tmp_path)
    answers = ranks.run(SIZES[read], f"{WORK}:resume_run", read, tmp_path)
    for label, options in OPTIONS.items():
        expected = alone(options, range(STEPS))
        logical = {name: Logical.whole(tensor) for name, tensor in make_weights(seed=9).items()}
        named = [(name, one.local) for name, one in logical.items()]
        config = OptimizerConfig(**{"lr": 0.01, **options})
        optimizer = build_optimizer(config, named, logical=logical, matmul_dtype=torch.float32)
        checkpoint.load(tmp_path / label / "step_00000003", tensors_of(optimizer, logical))
        take_steps(optimizer, logical, range(3, STEPS))
        for found in ({name: one.local for name, one in logical.items()}, *(answer[label] for answer in answers)):
            assert furthest(found, expected) < 1e-6, label


def test_a_part_that_logical_does_not_say_is_refused() -> None:
    logical = {"head.weight": Logical.whole(torch.zeros(4, 4))}
    with pytest.raises(AssertionError, match="is not the part"):
        build_optimizer(OptimizerConfig(), [("head.weight", torch.zeros(2, 4))], logical=logical)
