"""Parameter groups by logical name and shape: which update rule, learning rate and decay a tensor gets.

Lowest file of the optimizer package. A name is the model's own (`blocks.3.attention.q.weight`), the same
under every layout, so that a tensor's treatment never depends on how it is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["embedding", "head", "matrix", "vector"]
Named = Sequence[tuple[str, Tensor]]

# Dotted parts of a logical name that mark look-up tables and output layers.
EMBEDDING_PARTS = frozenset(
    {"embed", "embedding", "embeddings", "positions", "relative", "encoder_relative", "decoder_relative"}
)
HEAD_PARTS = frozenset({"head", "heads"})


def kind_of(name: str, tensor: Tensor) -> Kind:
    """What a parameter is: a norm, bias or scalar is a vector; a tied table is an embedding."""
    parts = set(name.split("."))
    if tensor.ndim < 2:
        return "vector"
    if parts & EMBEDDING_PARTS:
        return "embedding"
    return "head" if parts & HEAD_PARTS else "matrix"


def is_orthogonalized(name: str, tensor: Tensor) -> bool:
    """Whether Muon takes a parameter: hidden matrices only, each projection by itself."""
    return kind_of(name, tensor) == "matrix" and tensor.ndim == 2


def is_decayed(name: str, tensor: Tensor, decay_embeddings: bool) -> bool:
    """Matrices and heads decay, vectors do not, embeddings do where the config says so."""
    kind = kind_of(name, tensor)
    return kind in ("matrix", "head") or (kind == "embedding" and decay_embeddings)


def build_group(label: str, named: Named, *, lr: float, weight_decay: float, **options: Any) -> dict[str, Any]:
    """One group as torch takes it; `base_lr` is the peak that `set_factor` scales."""
    return {
        "params": list(named),
        "label": label,
        "lr": lr,
        "base_lr": lr,
        "weight_decay": weight_decay,
        **options,
    }


def build_decay_groups(
    named: Named, *, lr: float, weight_decay: float, decay_embeddings: bool, **options: Any
) -> list[dict[str, Any]]:
    """The tensors that decay and those that do not, as two groups; an empty one is left out."""
    decayed = [(n, p) for n, p in named if is_decayed(n, p, decay_embeddings)]
    plain = [(n, p) for n, p in named if not is_decayed(n, p, decay_embeddings)]
    groups = [
        build_group("decayed", decayed, lr=lr, weight_decay=weight_decay, **options),
        build_group("plain", plain, lr=lr, weight_decay=0.0, **options),
    ]
    return [group for group in groups if group["params"]]


def set_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group `factor` times its own peak learning rate, for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
