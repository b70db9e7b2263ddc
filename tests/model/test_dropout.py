"""Stateless dropout: the rate is right, and a mask depends on what it should and on nothing else."""

from __future__ import annotations

import pytest
import torch

from shardwright.model.dropout import Dropout, _hash32, _to_int32, keep, layer_keys, mix, token_keys

SEQUENCES = torch.tensor([3, 70, 2**40 + 5, -1])


def masks(
    rate: float = 0.1,
    *,
    sequences: torch.Tensor = SEQUENCES,
    index: torch.Tensor | None = None,
    seed: int = 1,
    step: int = 2,
    layer: int = 0,
    site: int = 1,
    width: int = 96,
) -> torch.Tensor:
    """What is kept, as ones and zeros [B, T, D], through the module as a block calls it."""
    tokens = token_keys(seed, step, sequences, torch.arange(128) if index is None else index)
    dropout = Dropout(rate, site)
    ones = torch.ones(*tokens.shape, width)
    return dropout(ones, tokens, layer_keys(8, tokens.device)[layer]) * (1 - rate)


def test_sharding_the_batch_changes_nothing() -> None:
    whole = masks()
    assert torch.equal(masks(sequences=SEQUENCES[[2, 0]]), whole[[2, 0]])
    index = torch.arange(128)
    parts = [masks(index=part) for part in index.split(32)]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    per_row = masks(index=index.flip(0).expand(4, 128))
    assert torch.equal(per_row, whole.flip(1))


def test_channels_do_not_depend_on_the_width() -> None:
    assert torch.equal(masks(width=40), masks()[..., :40])


@pytest.mark.parametrize("change", [{"seed": 2}, {"step": 3}, {"layer": 1}, {"site": 2}, {"seed": 1 + 2**35}])
def test_each_key_changes_the_mask(change: dict[str, int]) -> None:
    a, b = masks(0.5), masks(0.5, **change)  # type: ignore[arg-type]
    agree = (a == b).float().mean().item()
    assert abs(agree - 0.5) < 0.01  # independent fair bits


def test_sequences_positions_and_channels_are_independent() -> None:
    kept = masks(0.5) > 0.5
    for a, b in [(kept[0], kept[1]), (kept[:, :-1], kept[:, 1:]), (kept[..., :-1], kept[..., 1:])]:
        assert abs((a == b).float().mean().item() - 0.5) < 0.01
    high = masks(0.5, sequences=torch.tensor([3 + 2**33])) > 0.5
    assert abs((kept[0] == high[0]).float().mean().item() - 0.5) < 0.02


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate_and_scale(rate: float) -> None:
    rows = token_keys(0, 0, torch.arange(16), torch.arange(256))
    kept = keep(rows, 512, rate)
    count = kept.numel()
    deviation = (rate * (1 - rate) / count) ** 0.5
    assert abs(kept.float().mean().item() - (1 - rate)) < 4 * deviation
    # No channel and no token is dropped more often than chance allows.
    for dim in ((0, 1), (2,)):
        means = kept.float().mean(dim)
        spread = (rate * (1 - rate) * means.numel() / count) ** 0.5
        assert abs(means.std().item() / spread - 1) < 0.15
        assert (means - (1 - rate)).abs().max() < 6 * spread
    x = torch.randn(2, 64, 128)
    tokens = token_keys(0, 0, torch.arange(2), torch.arange(64))
    y = Dropout(rate, 1)(x, tokens, layer_keys(1, x.device)[1])
    dropped = y == 0
    torch.testing.assert_close(y[~dropped], x[~dropped] / (1 - rate))


def test_off_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(2, 3, 4)
    assert Dropout(0.0, 1)(x, None, None) is x
    assert Dropout(0.5, 1).eval()(x, None, None) is x


def test_wrapping_arithmetic_is_the_exact_hash() -> None:
    x = torch.randint(0, 2**32, (10_000,), generator=torch.Generator().manual_seed(0))

    def exact(value: int) -> int:
        value ^= value >> 16
        value = value * 0x7FEB352D % 2**32
        value ^= value >> 15
        value = value * 0x846CA68B % 2**32
        return value ^ value >> 16

    expected = torch.tensor([exact(v) for v in x.tolist()])
    assert torch.equal(mix(x), expected)
    assert torch.equal(_hash32(_to_int32(x)), _to_int32(expected))


def test_compiled_mask_equals_eager() -> None:
    rows = token_keys(0, 0, torch.arange(3), torch.arange(37))
    compiled = torch.compile(keep, fullgraph=True)
    # 100 = full vectors and a scalar rest, whatever the vector's width.
    assert torch.equal(compiled(rows, 100, 0.1), keep(rows, 100, 0.1))
