"""What ranks run for test_ring.py: torch's ring attention over a flash kernel written out for CPUs.

torch has the two operations of flash attention for GPUs alone. Here they are given to CPUs, as formulas (Dao 2023,
algorithms 1 and 2), and SDPA is made to choose them; everything between, from `context_parallel` to the collectives,
is torch's own. What is not tried is SDPA's choice on a GPU and the kernels there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor.experimental import context_parallel

from shardwright.model.transformer import Inputs
from shardwright.parallel.context import ContextRows
from shardwright.parallel.ring import Ring, apply_ring
from shardwright.train import layout, run
from shardwright.train.metrics import read_metrics
from shardwright.train.settings import read_config
from tests.parallel.work_context import (
    LENGTH,
    Case,
    Loss,
    apply_blocks,
    build_mesh,
    gradient_error,
    make,
    whole_batch,
)

aten = torch.ops.aten
HEADS, KEY_HEADS, WIDTH = 4, 2, 8


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float | None) -> Tensor:
    scores = q @ _repeat(k, q).mT * (scale or q.shape[-1] ** -0.5)
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, float("-inf")) if causal else scores).float()


def _repeat(k: Tensor, q: Tensor) -> Tensor:
    return k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)


def _fold(gradient: Tensor, k: Tensor) -> Tensor:
    return gradient.unflatten(1, (k.shape[1], -1)).sum(2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, debug: bool = False, *,
    scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    assert not dropout_p and not debug
    scores = _scores(q, k, is_causal, scale)
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp().to(v.dtype) @ _repeat(v, q)
    seeds = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
    return out, lse, None, None, q.shape[2], k.shape[2], *seeds, q.new_empty(0)


def _backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Any,
    cum_seq_k: Any, max_q: int, max_k: int, dropout_p: float, is_causal: bool, philox_seed: Any, philox_offset: Any, *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights = (_scores(query, key, is_causal, scale) - logsumexp.unsqueeze(-1)).exp()
    from_values = grad_out @ _repeat(value, query).mT - (grad_out * out).sum(-1, keepdim=True)
    inner = (weights * from_values).to(query.dtype) * (scale or query.shape[-1] ** -0.5)
    keys, values = inner.mT @ query, weights.to(grad_out.dtype).mT @ grad_out
    return inner @ _repeat(key, query), _fold(keys, key), _fold(values, value)


@contextmanager
def flash_on_cpu() -> Iterator[None]:
    """SDPA computes with the operations that it uses on GPUs."""
    library, original = torch.library.Library("aten", "IMPL"), F.scaled_dot_product_attention
    library.impl("_scaled_dot_product_flash_attention", _forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", _backward, "CPU")

    # torch replaces it by its name.
    def scaled_dot_product_attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert attn_mask is None and enable_gqa == (q.shape[1] != k.shape[1])
        return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]

    F.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original
        library._destroy()


def build_ring(length: int = LENGTH) -> Ring:
    """All ranks on one context axis, which share rows of `length`."""
    mesh = build_mesh()
    rows = ContextRows(mesh.size(), mesh.get_local_rank(), length, keys=False)
    return Ring(mesh, rows, torch.device("cpu"))


def compare(case: Case, passes: int = 2) -> tuple[float, float]:
    """Relative errors of the loss and of all gradients, summed over ranks, against one process; as work_context's."""
    ring, batch = build_ring(), whole_batch(packed=False)
    own, count = ring.rows.slice(batch), float(batch["weights"].sum())
    spread, alone = make(case.shape, torch.float32, **case.fields), make(case.shape, torch.float32, **case.fields)
    apply_ring(spread, ring)
    apply_blocks(spread, case.compiled, case.recompute)
    expected = Loss(alone)(batch, count)
    expected.backward()
    with flash_on_cpu():
        for _ in range(passes):
            spread.zero_grad()
            with ring.open():
                found = Loss(spread)(own, count)
                found.backward()
    total, value = found.detach().double(), float(expected.detach())
    dist.all_reduce(total)
    return abs(float(total) - value) / abs(value), gradient_error(spread, alone)


def evaluate(shape: str) -> float:
    """The largest difference of hidden states without gradients from those of one process."""
    ring, batch = build_ring(), whole_batch(packed=False)
    spread, alone = make(shape, torch.float32).eval(), make(shape, torch.float32).eval()
    apply_ring(spread, ring)
    own = ring.rows.slice(batch)
    with torch.no_grad():
        whole = alone.hidden(Inputs(batch["input_ids"]))
        with flash_on_cpu(), ring.open():
            mine = spread.hidden(Inputs(own["input_ids"], row_index=own["row_index"]))
    return float((mine - whole[:, ring.rows.rows]).abs().max())


def heads(seed: int) -> tuple[list[Tensor], Tensor]:
    """Whole q, k and v with grouped heads, and the gradient of what attention makes of them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, h, LENGTH, WIDTH) for h in (HEADS, KEY_HEADS, KEY_HEADS, HEADS)]
    q, k, v, g = (torch.randn(shape, generator=generator) for shape in shapes)
    return [q, k, v], g


def bare(backward_inside: bool) -> tuple[list[int], float, float]:
    """torch's door without what we put around it: the rows it gives, and errors of output and gradients."""
    mesh, (whole, g) = build_mesh(), heads(0)
    ones = [x.clone().requires_grad_() for x in whole]
    expected = F.scaled_dot_product_attention(*ones, is_causal=True, enable_gqa=True)
    expected.backward(g)
    rows = torch.arange(LENGTH)
    with flash_on_cpu():
        with context_parallel(mesh, buffers=[rows], buffer_seq_dims=[0], no_restore_buffers={rows}):
            own = [x[:, :, rows].clone().requires_grad_() for x in whole]
            found = F.scaled_dot_product_attention(*own, is_causal=True, enable_gqa=True)
            if backward_inside:
                found.backward(g[:, :, rows])
        if not backward_inside:
            found.backward(g[:, :, rows])
    pairs = [(x.grad, y.grad[:, :, rows]) for x, y in zip(own, ones, strict=True)]  # type: ignore[index]
    error = max(float((x - y).abs().max()) for x, y in pairs)  # type: ignore[operator]
    return rows.tolist(), float((found - expected[:, :, rows]).abs().max()), error


def misuse() -> list[str]:
    """What is said to passes outside of the open context, and to a model that was given a mask."""
    ring, model = build_ring(), make("gpt2", torch.float32)
    apply_ring(model, ring)
    own, said = ring.rows.slice(whole_batch(packed=False)), []

    def attempt(what: Any) -> None:
        try:
            what()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            said.append(str(error))

    with flash_on_cpu():
        attempt(lambda: Loss(model)(own, 1.0))
        with ring.open():
            value = Loss(model)(own, 1.0)
            keyed = ContextRows(ring.mesh.size(), ring.mesh.get_local_rank(), LENGTH)
            attempt(lambda: Loss(model)(keyed.slice(whole_batch(packed=False)), 1.0))
            attempt(lambda: ring.open().__enter__())
        attempt(value.backward)
        attempt(lambda: ring.rows.slice(whole_batch(packed=True)))
    with ring.open():
        attempt(lambda: Loss(model)(own, 1.0))  # torch's own SDPA of CPUs
    before = F.scaled_dot_product_attention
    with ring.open():
        assert F.scaled_dot_product_attention is not before
    assert F.scaled_dot_product_attention is before
    other = Ring(ring.mesh, ContextRows(ring.mesh.size(), ring.mesh.size() - 1 - ring.rows.index, LENGTH), ring.device)
    attempt(lambda: other.open().__enter__())
    assert F.scaled_dot_product_attention is before
    return said


def train(raw: dict[str, Any], overrides: list[str]) -> list[dict[str, Any]]:
    """A whole run with the ring on CPUs, which is refused to users; the records of metrics.jsonl."""
    torch.set_num_threads(1)
    originals = run.check_layout, layout.check_device
    run.check_layout, layout.check_device = lambda _: None, lambda _: None  # type: ignore[assignment]
    try:
        with flash_on_cpu():
            return read_metrics(run.Path(run.train(read_config(raw, overrides)).run))
    finally:
        run.check_layout, layout.check_device = originals  # type: ignore[assignment]
