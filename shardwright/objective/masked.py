"""Masked language modelling: some tokens of a row are hidden, and each is predicted from both its sides.

BERT (Devlin et al. 2019), with whole words as its later release has them; RoBERTa (Liu et al. 2019): another mask each
time a text comes, which sequence numbers, that never repeat, give by themselves; n-grams and sentence order as ALBERT
(Lan et al. 2020). A row has a fixed number of predictions, its rate times its length; a row that is filled up with
padding has fewer of weight 1. Special tokens, padding and ends of documents are never predicted.

Shapes: B batch, T tokens of a row, P predictions of a row, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import model_validator
from torch import Tensor

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective.chance import Chance
from shardwright.objective.choose import choose
from shardwright.objective.heads import Heads, at_places, class_loss
from shardwright.objective.lay import places_of
from shardwright.objective.objective import Objective
from shardwright.objective.pairing import pair_rows, slack
from shardwright.objective.raw import Arrays, Empty, Raw
from shardwright.objective.rows import Rows, common_arrays, full_rows
from shardwright.objective.setting import Setting

_FATE, _RANDOM = 21, 22  # purposes of random numbers


class HidingConfig(ObjectiveConfig):
    """How tokens are hidden; what masked language modelling and replaced-token detection share."""

    rate: float = meaning(0.15, "Share of a row's tokens that is predicted", gt=0, lt=1)
    mask: float = meaning(0.8, "Share of these that [MASK] stands for", ge=0, le=1)
    random: float = meaning(0.1, "Share of these that a random token stands for; the rest stays", ge=0, le=1)
    whole_words: bool = meaning(False, "All tokens of a word or none; needs prepare starts=true")
    ngrams: int = meaning(
        1, "Most neighbouring tokens or words that are hidden as one, n of them with p(n) ~ 1/n", ge=1
    )

    @model_validator(mode="after")
    def _check_shares(self) -> HidingConfig:
        if self.mask + self.random > 1:
            raise ValueError(f"mask={self.mask} and random={self.random} are more than all; lower one")
        return self

    def specials(self, length: int) -> tuple[str, ...]:
        """See the base class."""
        return ("mask", "cls", "sep", "pad")


class MaskedConfig(HidingConfig):
    """`objective: {name: masked}`."""

    name: Literal["masked"] = meaning("masked", "Predict hidden tokens from both sides")
    sentence: Literal["none", "next", "order"] = meaning(
        "none", "Rows of sentence pairs and a second term: is B next to A, or in its order? Needs prepare starts=true"
    )
    pairs: int = meaning(1, "Most sentence pairs of a row; more than 1 is for documents shorter than rows", ge=1)


class Hiding(Objective[Raw]):
    """The data side: rows, and what is hidden in them."""

    config: HidingConfig

    def __init__(self, config: HidingConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.marks = ("words",) if config.whole_words else ()

    def stride(self, length: int) -> int:
        """What [CLS] and [SEP] leave."""
        return length - 2

    def num_predictions(self, length: int) -> int:
        """Predictions of a row, P."""
        return max(1, round(self.config.rate * length))

    def rows(self, raw: Raw) -> Rows:
        """The rows, with nothing hidden yet."""
        return full_rows(raw, self.setting)

    def corrupt(self, raw: Raw, empty: Empty = np.empty) -> Arrays:
        """`input_ids` [B,T]; `labels`, `places` and `weights` [B,P] of what is predicted; see objective.py."""
        rows = self.rows(raw)
        arrays = common_arrays(rows, raw, self.setting)
        return {**arrays, **self._hidden(self.setting.chance(arrays["sequence"]), rows)}

    def _hidden(self, chance: Chance, rows: Rows) -> Arrays:
        config, most = self.config, self.num_predictions(self.setting.length)
        budget = np.rint(config.rate * rows.real.sum(1)).astype(np.int64).clip(1, most)
        chosen = choose(chance, rows.text, rows.begins if config.whole_words else None, budget, config.ngrams)
        places, used = places_of(chosen, most)
        labels = np.where(used, np.take_along_axis(rows.ids, places, 1), 0)
        input_ids = rows.ids.copy()
        input_ids[np.nonzero(used)[0], places[used]] = self._instead(chance, places, labels)[used]
        return {"input_ids": input_ids, "labels": labels, "places": places, "weights": used.astype(np.float32)}

    def _instead(self, chance: Chance, places: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """What stands where a token is predicted: [MASK], a random token, or itself."""
        fate, config = chance.uniform(_FATE, places), self.config
        other = chance.below(_RANDOM, places, self.setting.vocab_size)
        kept = np.where(fate < config.mask + config.random, other, labels)
        return np.where(fate < config.mask, self.setting.specials["mask"], kept)


class Masked(Hiding):
    """One term over the hidden tokens, and with sentence pairs one over the pairs."""

    config: MaskedConfig

    def __init__(self, config: MaskedConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.paired = config.sentence != "none"
        self.terms = {"masked": 1.0, "sentence": 1.0} if self.paired else {"masked": 1.0}
        self.marks += ("sentences",) if self.paired else ()
        self.neighbours = config.sentence == "next"

    def stride(self, length: int) -> int:
        """What the special tokens leave."""
        return length - 3 if self.paired else length - 2

    def raw_length(self, length: int) -> int:
        """Pairs begin at a sentence, so they get some tokens more; in an evaluation every token is in one row."""
        return self.stride(length) + (slack(length) if self.paired and not self.setting.evaluation else 0)

    def rows(self, raw: Raw) -> Rows:
        """See the base class."""
        if self.config.sentence == "none":
            return full_rows(raw, self.setting)
        return pair_rows(raw, self.setting, self.config.sentence, self.config.pairs)

    def loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See the base class; the second term is of `heads.others["sentence"]`, at each pair's [CLS]."""
        sums = super().loss(hidden, heads, batch, scales)
        if self.paired:
            logits = heads.others["sentence"](at_places(hidden, batch["sentence_places"]))
            sums["sentence"] = class_loss(logits, batch["sentence_labels"], batch["sentence_weights"])
        return sums
