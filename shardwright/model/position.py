"""What tells a token where it stands: sinusoidal vectors and rotary angles, computed from positions.

Both are pure functions of the positions, so there is no table to store, to shard or to rebuild after a model was made
on the meta device; sinusoids may have a learned scale. Shapes: B batch (or 1), T tokens, D width, H heads,
d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sinusoidal(positions: Tensor, width: int) -> Tensor:
    """float32 vectors [B, T, D] of positions [B, T]: sines in even channels, cosines in odd (Vaswani et al. 2017)."""
    angles = _angles(positions, width, 10000.0)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class ScaledSinusoids(nn.Module):
    """Sinusoidal vectors times one learned number, at first 1 / sqrt(D) (Hua et al. 2022, FLASH)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.full((1,), width**-0.5))

    def forward(self, positions: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        return self.scale * sinusoidal(positions, self.width).to(self.scale.dtype)


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
