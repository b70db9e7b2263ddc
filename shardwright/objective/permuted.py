"""Permutation language modelling (XLNet, Yang et al. 2019): tokens are predicted in a random order of factorisation.

Only the last ones of that order are predicted, one token in `context`: spans of 1 to 5 tokens, n of them with
p(n) ~ 1/n, each somewhere in a stretch `context` times as long, much as in XLNet's own data preparation. So a row has
a fixed number of predictions. What is not predicted comes first, in no order of its own: every place sees all of it.

`order` int64 [B,T] says this: 0 for what is not predicted (text, [SEP], [CLS]), 1, 2, ... for what is. A place's
content stream sees what has at most its own number, its query stream what has a smaller one. `input_ids` are the text
as it is; `places` are predicted by the query stream. Rows are `text [SEP] [CLS]`.
Shapes: B batch, T tokens of a row, P predictions of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective.chance import Chance
from shardwright.objective.heads import Heads
from shardwright.objective.lay import places_of
from shardwright.objective.objective import Objective
from shardwright.objective.raw import Arrays, Empty, Raw
from shardwright.objective.rows import common_arrays, full_rows
from shardwright.objective.segments import counting
from shardwright.objective.setting import Setting

_SIZE, _PLACE, _ORDER = 51, 52, 53  # purposes of random numbers


class PermutedConfig(ObjectiveConfig):
    """`objective: {name: permuted}`."""

    name: Literal["permuted"] = meaning("permuted", "Predict tokens in a random order, one in `context` of them")
    context: int = meaning(6, "Tokens of which one is predicted", ge=2)
    longest: int = meaning(5, "Most neighbouring tokens that are predicted together", ge=1)

    def specials(self, length: int) -> tuple[str, ...]:
        """See the base class."""
        return ("cls", "sep", "pad")


class Permuted(Objective[Raw]):
    """One term, over the predicted places."""

    trains = ("two-stream",)

    def __init__(self, config: PermutedConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config

    def stride(self, length: int) -> int:
        """What [SEP] and [CLS] leave."""
        return length - 2

    def num_predictions(self, length: int) -> int:
        """Predictions of a row, P."""
        return max(1, (length - 2) // self.config.context)

    def corrupt(self, raw: Raw, empty: Empty = np.empty) -> Arrays:
        """`input_ids`, `order` [B,T]; `labels`, `places`, `weights` [B,P]; see objective.py."""
        setting = self.setting
        rows = full_rows(raw, setting, cls_first=False)
        chance = setting.chance(raw.numbers)
        places, used = places_of(self._predicted(chance, raw.lengths), self.num_predictions(setting.length))
        keys = np.where(used, chance.bits(_ORDER, places), ~np.uint64(0))
        ranks = np.argsort(np.argsort(keys, axis=1), axis=1) + 1
        order = np.zeros_like(rows.ids)
        order[np.nonzero(used)[0], places[used]] = ranks[used]
        return {
            **common_arrays(rows, raw, setting),
            "input_ids": rows.ids,
            "order": order,
            "labels": np.where(used, np.take_along_axis(rows.ids, places, 1), 0),
            "places": places,
            "weights": used.astype(np.float32),
        }

    def _predicted(self, chance: Chance, lengths: np.ndarray) -> np.ndarray:
        """bool [B,T]: a span in each stretch; exactly one of `context` tokens, rounded down for the whole row."""
        context, length = self.config.context, self.setting.length
        shares = 1 / np.arange(1, self.config.longest + 1)
        stretches = counting(-(-length // context))
        sizes = 1 + chance.drawn(_SIZE, stretches, np.cumsum(shares) / shares.sum())
        begins = (np.cumsum(sizes, axis=1) - sizes) * context
        # The last stretch is what is left.
        widths = np.clip(lengths[:, None] - begins, 0, sizes * context)
        sizes = widths // context
        starts = begins + chance.below(_PLACE, stretches, widths - sizes + 1)
        edges = np.zeros((len(lengths), length + 1), np.int64)
        rows, number = np.nonzero(sizes)
        np.add.at(edges, (rows, starts[rows, number]), 1)
        np.add.at(edges, (rows, (starts + sizes)[rows, number]), -1)
        return np.cumsum(edges, axis=1)[:, :length] > 0

    def predicting(self, hidden: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
        """See the base class; the query stream's hidden states, which may be filled up, are of these places alone."""
        return hidden[:, : batch["labels"].shape[1]]

    def loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See the base class; hidden [B,P or more,D] is the query stream's, which has the predicted places alone."""
        own = {name: x for name, x in batch.items() if name != "places"}
        return super().loss(self.predicting(hidden, batch), heads, own, scales)
