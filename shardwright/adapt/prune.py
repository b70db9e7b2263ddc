"""Zeros in the weights of linear layers through torch's own tools, and fine-tuning that leaves them.

Magnitude pruning (Han et al. 2015) by `torch.nn.utils.prune`, matrix by matrix; 2 zeros in every 4 neighbours of a row
(Mishra et al. 2021) by `torch.ao.pruning`, which is what sparse tensor cores compute with. Under train, which applies
both.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import L1Unstructured

from shardwright.config import ConfigError

PATTERNS = ("2:4",)
BLOCK, ZEROS = 4, 2


def linear_weights(blocks: Iterable[tuple[str, nn.Module]]) -> list[str]:
    """Names of the weights of all linear layers in these blocks, each given with its own name."""
    found = [(f"{name}.{part}", module) for name, block in blocks for part, module in block.named_modules()]
    return [f"{name}.weight" for name, module in found if isinstance(module, nn.Linear)]


def choose(names: Iterable[str], include: str | None) -> list[str]:
    """Those of `names` that a pattern such as `*.mlp.*` matches; ConfigError where it matches none."""
    known = list(names)
    chosen = [name for name in known if include is None or fnmatchcase(name, include)]
    if not chosen:
        raise ConfigError(f"--include {include}: matches no weight of a linear layer; one of them is {known[0]}")
    return chosen


def prune_by_magnitude(weight: Tensor, sparsity: float) -> Tensor:
    """`weight` with this share of its values zero, the smallest."""
    mask = L1Unstructured(amount=sparsity).compute_mask(weight, torch.ones_like(weight))
    return weight * mask


def prune_2_of_4(weight: Tensor, name: str) -> Tensor:
    """`weight` [out, in] with 2 zeros in every 4 of a row, the smallest; ConfigError where they do not fit."""
    from torch.ao.pruning import WeightNormSparsifier  # half a second that no other command should wait

    if weight.shape[1] % BLOCK:
        raise ConfigError(
            f"--pattern 2:4: the {weight.shape[1]} inputs of {name} are no multiple of 4; leave it out with --include"
        )
    shell = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    shell[0].weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    sparsifier = WeightNormSparsifier(sparsity_level=1.0, sparse_block_shape=(1, BLOCK), zeros_per_block=ZEROS)
    sparsifier.prepare(shell, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    sparsifier.squash_mask()
    pruned = shell[0].weight.detach()
    assert num_violations(pruned) == 0, f"torch left more than 2 of 4 in {name}"
    return pruned


def num_violations(weight: Tensor) -> int:
    """Groups of 4 neighbours of a row with fewer than 2 zeros."""
    zeros = (weight.unflatten(1, (-1, BLOCK)) == 0).sum(-1)
    return int((zeros < ZEROS).sum())


class ZeroKeeper:
    """Around an update: what is zero before it is zero after it. It holds no mask, so nothing of it is to be saved.

    `parts` are what the optimizer updates: whole masters, or this rank's parts of them under any layout.
    """

    def __init__(self, parts: Iterable[Tensor]) -> None:
        self.parts = list(parts)
        self._zero: list[Tensor] = []

    @torch.no_grad()
    def note(self) -> None:
        """Once gradients are there: zeros have none, so they count in no norm and move no moment."""
        self._zero = [part == 0 for part in self.parts]
        for part, zero in zip(self.parts, self._zero, strict=True):
            assert part.grad is not None
            part.grad.masked_fill_(zero, 0)

    @torch.no_grad()
    def apply(self) -> None:
        """After the update: rules that mix a matrix (Muon) or add to it move zeros too."""
        for part, zero in zip(self.parts, self._zero, strict=True):
            part.masked_fill_(zero, 0)
        self._zero = []
