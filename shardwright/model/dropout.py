"""Dropout without a generator: the mask is a hash of who is dropped, so it is the same under every layout.

A bit depends on (seed, step, layer, site, sequence number, position in the sequence, channel) and on nothing
else: not on the batch around it, nor on which device computes it, nor on what ran before. Recomputing
activations repeats it by construction. Keys of tokens and layers are mixed in int64 (small tensors, once
a forward); each element then costs two 32-bit multiplications that a compiler fuses with the addition around.
Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_MASK = 0xFFFFFFFF
# Multipliers of "lowbias32" (C. Wellons, hash-prospector): bias 0.17 with two rounds.
_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B


def mix(x: Tensor) -> Tensor:
    """A 32-bit hash of int64 values in [0, 2^32), in the same range."""
    x = x ^ (x >> 16)
    x = (x * _FIRST) & _MASK
    x = x ^ (x >> 15)
    # The second multiplier is over 2^31: split it so that no product leaves int64.
    x = (((x * (_SECOND >> 16)) & 0xFFFF) * 65536 + x * (_SECOND & 0xFFFF)) & _MASK
    return x ^ (x >> 16)


def token_keys(seed: int, step: int | Tensor, sequence: Tensor, index: Tensor) -> Tensor:
    """int64 keys [B, T] of tokens `index` [T] or [B, T] in sequences numbered `sequence` [B], at one step."""
    start = torch.zeros((), dtype=torch.int64, device=sequence.device)
    key = mix(mix(start + (seed & _MASK)) ^ ((seed >> 32) & _MASK))
    key = mix(key ^ (start + step) & _MASK)
    key = mix(key ^ (sequence & _MASK))
    key = mix(key ^ ((sequence >> 32) & _MASK))
    return mix(key.unsqueeze(-1) ^ index)


def layer_keys(layers: int, device: torch.device) -> Tensor:
    """int64 keys [layers + 1]: of the embedding, then of each block."""
    return mix(torch.arange(layers + 1, dtype=torch.int64, device=device) + 0x9E3779B9)


class Dropout(nn.Module):
    """Zeroes a share `rate` of x and scales the rest by 1 / (1 - rate), in training alone.

    `site` tells apart the dropouts of one layer.
    """

    def __init__(self, rate: float, site: int) -> None:
        super().__init__()
        self.rate, self.site = rate, site

    def forward(self, x: Tensor, tokens: Tensor | None, layer: Tensor | None) -> Tensor:
        """x [B, T, D], token keys [B, T] and a layer key [] -> [B, T, D]."""
        if not self.training or self.rate == 0.0:
            return x
        assert tokens is not None and layer is not None, "dropout needs the keys of its tokens and layer"
        rows = mix(tokens ^ mix(layer ^ self.site))
        return torch.where(keep(rows, x.shape[-1], self.rate), x * (1.0 / (1.0 - self.rate)), 0.0)


def keep(rows: Tensor, width: int, rate: float) -> Tensor:
    """bool [B, T, D], true with probability 1 - rate, from row keys [B, T]."""
    channels = torch.arange(width, dtype=torch.int64, device=rows.device)
    return _bits(rows, channels) >= round(rate * 2**31)


def uniform(rows: Tensor, channels: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers in (0, 1], multiples of 2^-31 less a half, from row keys [N] and channels' numbers [C] -> [N, C].

    float32 keeps small ones as they are and rounds those near 1. Keys are to be hashed for their purpose: `mix` alone
    is what becomes of the channels' numbers too.
    """
    return (_bits(rows, channels).to(dtype) + 0.5) * 2.0**-31


def _bits(rows: Tensor, channels: Tensor) -> Tensor:
    """31 random bits as int32 [..., C] from row keys [...] and int64 numbers of channels [C]."""
    return _hash32(_to_int32(rows).unsqueeze(-1) ^ _to_int32(mix(channels))) & 0x7FFFFFFF


def _hash32(x: Tensor) -> Tensor:
    """The hash of `mix` in wrapping int32 arithmetic, for the many elements."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * _FIRST
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (_SECOND - 2**32)
    return x ^ ((x >> 16) & 0xFFFF)


def _to_int32(x: Tensor) -> Tensor:
    """int64 in [0, 2^32) as the int32 of the same bits."""
    return torch.where(x >= 2**31, x - 2**32, x).to(torch.int32)
