"""Rotary angles stretched beyond the length of pre-training: fewer turns a token, by channel pair.

Stands beside position.py; a family whose models are published so has a field of this (llama.py).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor

from shardwright.config import Strict, meaning


class ScalingConfig(Strict):
    """`rope_scaling`: `linear` slows all pairs down (Chen et al. 2023), `llama3` the slow ones alone (Llama 3.1)."""

    kind: Literal["linear", "llama3"] = meaning(..., "Which pairs are slowed down: all, or the slow ones")
    factor: float = meaning(..., "How much slower", ge=1)
    low: float = meaning(1.0, "llama3: pairs with fewer turns than this in `length` are slowed down in full", gt=0)
    high: float = meaning(4.0, "llama3: pairs with more turns than this are left alone", gt=0)
    length: int = meaning(8192, "llama3: longest sequence of pre-training", ge=1)

    @model_validator(mode="after")
    def _check_order(self) -> ScalingConfig:
        if self.low >= self.high:
            raise ValueError(f"low={self.low}: has to be less than high={self.high}")
        return self

    def __call__(self, frequencies: Tensor) -> Tensor:
        """float32 [d/2], radians a token -> the same, slowed down."""
        slow = frequencies / self.factor
        if self.kind == "linear":
            return slow
        turns = self.length * frequencies / (2 * math.pi)
        share = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return torch.lerp(slow, frequencies, share)
