"""What tells a token where it stands: sinusoidal vectors, rotary angles and buckets of distances, from positions.

All are pure functions of the positions, so there is no table to store, to shard or to rebuild after a model was made
on the meta device; sinusoids may have a learned scale. Shapes: B batch (or 1), T tokens, D width, H heads,
d head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def sinusoidal(positions: Tensor, width: int, *, halves: bool = False) -> Tensor:
    """float32 vectors [B, T, D] of positions [B, T]: sines in even channels, cosines in odd (Vaswani et al. 2017).

    `halves`: sines in the first half of the channels, cosines in the second, as in the program of that paper.
    """
    angles = _angles(positions, width, 10000.0)
    if halves:
        return torch.cat((angles.sin(), angles.cos()), dim=-1)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def relative_sinusoidal(length: int, width: int, device: torch.device) -> Tensor:
    """float32 vectors [2 length - 1, D] of the distances length - 1, ..., 1 - length: all sines, then all cosines.

    Transformer-XL's (Dai et al. 2019), in the order of its program.
    """
    distances = torch.arange(length - 1, -length, -1, device=device)
    angles = _angles(distances, width, 10000.0)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class ScaledSinusoids(nn.Module):
    """Sinusoidal vectors times one learned number, at first 1 / sqrt(D) (Hua et al. 2022, FLASH)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.full((1,), width**-0.5))

    def forward(self, positions: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        return self.scale * sinusoidal(positions, self.width).to(self.scale.dtype)


def rotary(
    positions: Tensor, head_dim: int, theta: float, scaling: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """float32 cosines and sines [B, T, 1, d/2] of positions [B, T], for `rotate` (Su et al. 2021).

    `scaling` [d/2] -> [d/2] changes the radians a token of each pair.
    """
    angles = _angles(positions, head_dim, theta, scaling).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d/2) of x [B, T, H, d] by their angles, in float32 (float64 as it is); dtype of x.

    The pairs are those of Hugging Face's Llama, so weights need no permutation. Where there are fewer angles than
    pairs, the first channels turn, with pairs among themselves, and the others stay.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def distance_bucket(offset: Tensor, buckets: int, longest: int, *, bidirectional: bool) -> Tensor:
    """int64 number in 0..buckets-1 of each offset (place of the key less that of the query) (Raffel et al. 2020).

    Half of the buckets are of one distance each, the others grow by a factor up to `longest`, where the last one
    begins. Of both directions each has half of them; else later keys are as near as the query itself.
    """
    first = torch.zeros_like(offset)
    if bidirectional:
        buckets //= 2
        first = (offset > 0).long() * buckets
        distance = offset.abs()
    else:
        distance = -offset.clamp(max=0)
    exact = buckets // 2
    # In float32 and this order, so that no rounding puts a distance into another bucket than elsewhere.
    share = torch.log(distance.clamp(min=1).float() / exact) / math.log(longest / exact)
    far = (exact + (share * (buckets - exact)).long()).clamp(max=buckets - 1)
    return first + torch.where(distance < exact, distance, far)


def _angles(positions: Tensor, width: int, theta: float, scaling: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """float32 [B, T, width/2]: position x theta^(-2i/width)."""
    exponents = torch.arange(0, width, 2, device=positions.device, dtype=torch.int64).float() / width
    frequencies = 1.0 / theta**exponents
    return positions.float().unsqueeze(-1) * (frequencies if scaling is None else scaling(frequencies))
