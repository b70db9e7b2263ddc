"""Attention and its masks against a loop written out; the cache against attention without one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.model.attention import Attention, LayerCache, as_bias, document_mask, padding_mask
from shardwright.model.position import rotary


def build(heads: int = 4, kv_heads: int = 2, qk_norm: str | None = None) -> Attention:
    torch.manual_seed(0)
    return Attention(24, heads, kv_heads, 6, qkv_bias=True, out_bias=True, qk_norm=qk_norm).double()


def by_hand(attention: Attention, x: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    """One query and one head at a time; allowed [B, T, T]."""
    q, k, v = (p.unflatten(-1, (-1, 6)) for p in (attention.q(x), attention.k(x), attention.v(x)))
    if attention.q_norm is not None and attention.k_norm is not None:
        q, k = attention.q_norm(q), attention.k_norm(k)
    group = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(x.shape[0]):
        for h in range(q.shape[2]):
            for t in range(x.shape[1]):
                seen = allowed[b, t].nonzero().squeeze(-1)
                scores = k[b, seen, h // group] @ q[b, t, h] / 6**0.5
                out[b, t, h] = scores.softmax(-1) @ v[b, seen, h // group]
    return attention.out(out.flatten(2))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("qk_norm", [None, "rms", "layer"])
def test_causal_attention_by_hand(heads: int, kv_heads: int, qk_norm: str | None) -> None:
    attention = build(heads, kv_heads, qk_norm)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    expected = by_hand(attention, x, torch.ones(2, 7, 7).tril().bool())
    torch.testing.assert_close(attention(x), expected)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_document_mask_by_hand(lengths: list[int]) -> None:
    attention = build()
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)
    x = torch.randn(1, sum(lengths), 24, dtype=torch.float64)
    mask = document_mask(documents)
    expected = torch.cat([attention(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(attention(x, mask=mask), expected)
    torch.testing.assert_close(attention(x, mask=as_bias(mask, x.dtype)), expected)


def test_documents_may_come_back() -> None:
    """Segment numbers are compared, not their order."""
    documents = torch.tensor([[0, 1, 0, 1]])
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 1, 0, 1]]).bool()
    assert torch.equal(document_mask(documents)[0, 0], expected)


def test_padding_mask_lets_every_query_see_itself() -> None:
    mask = padding_mask(torch.tensor([[0, 0, 1, 1]]))[0, 0]
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]).bool()
    assert torch.equal(mask, expected)
    assert torch.equal(padding_mask(torch.tensor([[0, 0, 1, 1]]), past=3)[0, 0], expected[3:])


def test_some_of_the_heads_make_a_part_of_the_sum() -> None:
    """What tensor parallelism relies on: a module with half of the heads computes their share."""
    whole = build(4, 2)
    x = torch.randn(1, 5, 24, dtype=torch.float64)
    total = torch.zeros_like(x)
    for half in range(2):
        part = build(4, 2)
        for name in ("q", "k", "v"):
            linear = getattr(part, name)
            linear.weight.data = getattr(whole, name).weight.data.chunk(2)[half]
            linear.bias.data = getattr(whole, name).bias.data.chunk(2)[half]
        part.out.weight.data = whole.out.weight.data.chunk(2, dim=1)[half]
        part.out.bias.data = whole.out.bias.data / 2
        total += part(x)
    torch.testing.assert_close(total, whole(x))


@pytest.mark.parametrize("chunks", [[7], [1] * 7, [3, 1, 1, 2]])
def test_cache_by_chunks(chunks: list[int]) -> None:
    attention = build()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    cos, sin = rotary(torch.arange(7).unsqueeze(0), 6, 10000.0)
    whole = attention(x, cos=cos, sin=sin)
    cache, start, parts = LayerCache(9), 0, []
    for size in chunks:
        stop = start + size
        mask = padding_mask(torch.ones(1, stop), past=start)
        part = slice(start, stop)
        parts.append(attention(x[:, part], mask=mask, cos=cos[:, part], sin=sin[:, part], cache=cache))
        start = stop
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
