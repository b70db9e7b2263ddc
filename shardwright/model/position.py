"""What tells a token where it stands: sinusoidal vectors and rotary angles, computed from positions.

Both are pure functions of the positions, so there is no table to store, to shard or to rebuild
after a model was made on the meta device. Shapes: B batch (or 1), T tokens, D width, H heads, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """float32 vectors [B, T, D] of positions [B, T]: sines in even channels, cosines in odd (Vaswani et al. 2017)."""
    angles = _angles(positions, width, 10000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def relative_sinusoidal(length: int, width: int, device: torch.device) -> Tensor:
    """float32 vectors [2 length - 1, D] of the distances length - 1, ..., 1 - length: all sines, then all cosines.

    Transformer-XL's (Dai et al. 2019), in the order of its program.
    """
    distances = torch.arange(length - 1, -length, -1, device=device)
    angles = _angles(distances, width, 10000.0)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


def rotary(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """float32 cosines and sines [B, T, 1, d/2] of positions [B, T], for `rotate` (Su et al. 2021)."""
    angles = _angles(positions, head_dim, theta).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d/2) of x [B, T, H, d] by their angles, in float32 (float64 as it is); dtype of x.

    The pairs are those of Hugging Face's Llama, so weights need no permutation.
    """
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _angles(positions: Tensor, width: int, theta: float) -> Tensor:
    """float32 [B, T, width/2]: position x theta^(-2i/width)."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.int64).float() / width
    return positions.float().unsqueeze(-1) * (1.0 / theta**exponents)
