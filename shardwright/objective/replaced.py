"""Replaced-token detection (ELECTRA, Clark et al. 2020): a generator fills in hidden tokens, a discriminator says of
every token whether it is the text's own.

The data side is that of masked.py. The model does two things in between, for which there are two functions here:

1. its first part, the generator, gives hidden states; `generator_loss` makes the `masked` term of them, and the model
   draws a token for each place from the generator's logits (by a stateless hash, as dropout does).
2. `replace` puts these in and says where they differ from the text; that is what the discriminator reads.

`loss` is called with the discriminator's hidden states and a batch to which the model has added `masked_sum`, the
generator's sum, and `replaced_labels` [B,T]. Gradients do not pass through the drawing.
Shapes: B batch, T tokens, P places, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from shardwright.config import meaning
from shardwright.objective.heads import Heads, binary_loss, vocabulary_loss
from shardwright.objective.masked import Hiding, HidingConfig
from shardwright.objective.raw import Arrays, Empty, Raw
from shardwright.objective.setting import Setting


class ReplacedConfig(HidingConfig):
    """`objective: {name: replaced}`."""

    name: Literal["replaced"] = meaning("replaced", "Say which tokens a generator has put in")
    mask: float = meaning(0.85, "Share of these that [MASK] stands for, as in ELECTRA's program", ge=0, le=1)
    random: float = meaning(0.0, "Share of these that a random token stands for; the rest stays", ge=0, le=1)
    weight: float = meaning(50.0, "Weight of the discriminator's term; the generator's has 1", gt=0)


class Replaced(Hiding):
    """Two terms: `masked`, the generator's; `replaced`, the discriminator's, over all that is no padding."""

    trains = ("generator and discriminator",)

    def __init__(self, config: ReplacedConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.terms = {"masked": 1.0, "replaced": config.weight}

    def corrupt(self, raw: Raw, empty: Empty = np.empty) -> Arrays:
        """As masked.py's, with `replaced_weights` float32 [B,T]."""
        arrays = super().corrupt(raw, empty)
        real = np.arange(self.setting.length) < (raw.lengths + 2)[:, None]
        arrays["replaced_weights"] = (real & (raw.numbers >= 0)[:, None]).astype(np.float32)
        return arrays

    def generator_loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The `masked` sum, a scalar, of the generator's hidden states [B,T,D] and heads."""
        scale = None if scales is None else scales["masked"]
        return vocabulary_loss(hidden, heads, batch, scale, self.kernel)

    @staticmethod
    def replace(batch: Mapping[str, Tensor], drawn: Tensor) -> tuple[Tensor, Tensor]:
        """(what the discriminator reads, 1 where a token is not the text's own), each int64 [B,T].

        `drawn` int64 [B,P]: a token for each place. One that is the text's own by chance counts as such.
        """
        ids, places, used = batch["input_ids"], batch["places"], batch["weights"] > 0
        # Unused places are all the first one: added differences of zero leave it as it is.
        there = ids.gather(1, places)
        filled = ids.scatter_add(1, places, (drawn - there) * used)
        labels = ids.new_zeros(ids.shape).scatter_add(1, places, ((drawn != batch["labels"]) & used).to(ids.dtype))
        return filled, labels

    def loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Both sums; hidden [B,T,D] is the discriminator's, `heads.others["replaced"]` its head."""
        logits = heads.others["replaced"](hidden)
        found = binary_loss(logits, batch["replaced_labels"], batch["replaced_weights"])
        return {"masked": batch["masked_sum"], "replaced": found}
