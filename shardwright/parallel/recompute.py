"""Activation checkpointing of blocks: none, full, every n-th, or selective.

Full recomputation wraps what ``torch.compile`` made of a block, so that the second forward runs
the very kernels of the first and the result is equal bit for bit. Selective recomputation keeps
the results of matrix products and attention and repeats the cheap rest; it must stand inside the
compiled graph, and is therefore applied before compilation. There the rest is fused with other
operations the second time; the bits stay the same since ROUNDING is how all modes are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
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


#: Options of ``torch.compile``: in bf16 and fp16 every operation rounds its result, whatever it is fused with.
ROUNDING: dict[str, Any] = {"emulate_precision_casts": True}


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


def apply_activation_offload(blocks: Sequence[nn.Module], device: torch.device) -> None:
    """Make `blocks` keep what their backward pass needs in host memory (pinned where `device` is a GPU).

    Call it last: with recomputation what goes there is a block's input alone.
    """
    for block in blocks:
        block.forward = partial(_offloaded, block.forward, device.type == "cuda")


def _offloaded(forward: Callable[..., Any], pinned: bool, *args: Any, **kwargs: Any) -> Any:
    with save_on_cpu(pin_memory=pinned):
        return forward(*args, **kwargs)


def _policy(_context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE
