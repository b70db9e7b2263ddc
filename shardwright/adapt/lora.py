"""LoRA (Hu et al. 2022): a matrix that is frozen, plus a product of two thin ones that are trained.

Under build.py. b begins at zero, so that the first step sees the model as it was. Dropout of what goes in is stateless,
as model/dropout.py has it, keyed by token and layer: the same under every layout.
Shapes: B batch, T tokens, I in, O out, r rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.config import AdaptConfig, ConfigError
from shardwright.model.dropout import keep, mix, token_keys
from shardwright.model.layers import Linear, linear
from shardwright.model.transformer import Inputs

LEAVES = ("lora_a", "lora_b")


class Keys:
    """What tells apart the tokens of the rows that a model is just computing; all of its LoRA layers have it."""

    def __init__(self) -> None:
        self.tokens: Tensor | None = None  # [B, longest], int64

    def take(self, inputs: Inputs) -> None:
        """Before a forward pass in training."""
        ids = [i for i in (inputs.input_ids, inputs.encoder_ids) if i is not None]
        assert inputs.sequence is not None, "batches name their sequences"
        index = torch.arange(max(i.shape[1] for i in ids), device=ids[0].device)
        self.tokens = token_keys(inputs.seed, inputs.step, inputs.sequence, index)


class LoRALinear(Linear):
    """x W^T + bias + scale (dropout(x) a^T) b^T, with the weight and bias of the layer that it takes the place of."""

    def __init__(self, base: nn.Linear, name: str, config: AdaptConfig, keys: Keys) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        like = base.weight
        self.lora_a = nn.Parameter(like.new_empty(config.rank, base.in_features))
        self.lora_b = nn.Parameter(like.new_empty(base.out_features, config.rank))
        self.scale, self.rate, self.keys = config.scale, config.dropout, keys
        self.site = zlib.crc32(name.encode())

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]."""
        return super().forward(x) + linear(linear(self._dropped(x), self.lora_a), self.lora_b) * self.scale

    def _dropped(self, x: Tensor) -> Tensor:
        """Of rows of tokens [B, T, I] what dropout leaves; tables that have no rows are left alone."""
        tokens = self.keys.tokens
        if not self.training or not self.rate or tokens is None or x.dim() != 3:
            return x
        rows = mix(tokens[:, : x.shape[1]] ^ self.site)
        return torch.where(keep(rows, x.shape[-1], self.rate), x * (1.0 / (1.0 - self.rate)), 0.0)


def lora_targets(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the layers in blocks that are called so; ConfigError where the model has none of a name."""
    layers = [n for n, m in model.named_modules() if isinstance(m, Linear) and n.startswith("blocks.")]
    return [name for name in layers if name.rpartition(".")[2] in targets]


def check_targets(model: nn.Module, family: str, targets: Sequence[str]) -> None:
    """ConfigError where a whole model has no layer of such a name."""
    known = {name.rpartition(".")[2] for name in lora_targets(model, ("q", "k", "v", "out", "gate", "up", "down"))}
    if missing := [target for target in targets if target not in known]:
        raise ConfigError(
            f"adapt.targets: no layer of a block of {family} is called {missing[0]}; it has {', '.join(sorted(known))}"
        )


def apply_lora(model: Any, config: AdaptConfig) -> None:
    """Put the additions into a model, or a part of it, in place."""
    keys = Keys()
    for name in lora_targets(model, config.targets):
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, leaf, LoRALinear(getattr(holder, leaf), name, config, keys))
        if hasattr(holder, "fused"):
            holder.fused = False  # a joined product would pass over what is added
    if config.dropout:
        hidden = model.hidden

        def keyed(inputs: Inputs, *args: Any, **kwargs: Any) -> Tensor:
            if model.training:
                keys.take(inputs)
            return hidden(inputs, *args, **kwargs)

        model.hidden = keyed


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """The matrix [O, I] that does as the layer does: products are taken in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(wide) + scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)
