"""Activation checkpointing of blocks: none, full, every n-th, or selective.

Full recomputation wraps what ``torch.compile`` made of a block, so that the second forward runs
the very kernels of the first and the result is equal bit for bit. Selective recomputation keeps
the results of matrix products and attention and repeats the cheap rest; it must stand inside the
compiled graph, and is therefore applied before compilation.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_KEPT = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}


def apply_recompute(blocks: Sequence[nn.Module], mode: str | int, *, compiled: bool) -> None:
    """Make `blocks` recompute their activations in the backward pass.

    Call it twice, before compilation (`compiled=False`) and after: each mode acts at its place.
    """
    if mode == "none" or (mode == "selective") == compiled:
        return
    every = mode if isinstance(mode, int) else 1
    contexts: dict[str, Any] = {}
    if mode == "selective":
        contexts["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for block in blocks[::every]:
        inner = block.forward
        # Attention dropout inside SDPA draws from torch's generator: its state has to be put back.
        block.forward = partial(checkpoint, inner, use_reentrant=False, preserve_rng_state=True, **contexts)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
