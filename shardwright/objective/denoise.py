"""BART's denoising (Lewis et al. 2020): the encoder reads a damaged text, the decoder predicts all of the text.

* infill: spans of Poisson length (mean 3), 30 % of the text in all, each replaced by one [MASK]; length 0 inserts one.
* permute: the sentences of each document in random order.
* delete: tokens left out, as many.
* rotate: each document begins at a random token, and wraps round.

BART itself uses the first two. Several are done in the order permute, rotate, infill or delete; a document's end stays
its end. Both sides are `<s> text </s>` with the tokenizer's end-of-document for the latter, with which the decoder
starts as well. With `mask_documents` off a row is treated as one document.
Shapes: B batch, L tokens of a raw row.
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective import noise
from shardwright.objective.chance import Chance
from shardwright.objective.lay import Spans, runs
from shardwright.objective.objective import Objective
from shardwright.objective.raw import Arrays, Empty, Raw
from shardwright.objective.setting import Setting
from shardwright.objective.sides import Text, two_sides, whole, without

Damage = Literal["infill", "permute", "delete", "rotate"]

_BOS, _END, _MASK = range(3)  # numbers of the special tokens


class DenoiseConfig(ObjectiveConfig):
    """`objective: {name: denoise}`."""

    name: Literal["denoise"] = meaning("denoise", "Put a damaged text right")
    damage: Annotated[list[Damage], Field(min_length=1)] = meaning(
        ["permute", "infill"], "What is done to the text; permute needs prepare starts=true"
    )
    rate: float = meaning(0.3, "Share of the text that infill or delete takes away", gt=0, lt=1)
    mean: float = meaning(3.0, "Mean length of infill's spans", ge=1)

    @model_validator(mode="after")
    def _check_damage(self) -> DenoiseConfig:
        if {"infill", "delete"} <= set(self.damage):
            raise ValueError("damage: infill and delete both take text away; keep one")
        return self

    def specials(self, length: int) -> tuple[str, ...]:
        """See the base class."""
        return ("mask", "bos", "pad")


class Denoise(Objective[Raw]):
    """One term: the decoder's targets."""

    trains = ("encoder-decoder",)

    def __init__(self, config: DenoiseConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.marks = ("sentences",) if "permute" in config.damage else ()

    def stride(self, length: int) -> int:
        """What <s> and </s> leave."""
        return length - 2

    def target_length(self, length: int) -> int:
        """Tokens of the decoder's row: as many as the encoder's."""
        return length

    def corrupt(self, raw: Raw, empty: Empty = np.empty) -> Arrays:
        """Arrays of encoder and decoder; see objective.py."""
        setting, length = self.setting, self.setting.length
        chance, specials = setting.chance(raw.numbers), setting.specials
        text = Text.of(raw, [specials["bos"], specials["end"], specials["mask"]], specials["pad"])
        damaged = self._reordered(chance, raw, text)
        encoder = whole(damaged, [_BOS], [_END], length)
        if hidden := self._taken(chance, text):
            marks = np.full_like(hidden.rows, _MASK) if "infill" in self.config.damage else None
            encoder = without(damaged, hidden, marks, [_BOS], [_END], length)
        decoder = whole(text, [_BOS], [_END], length)
        return two_sides(raw, setting, encoder, decoder, start=specials["end"])

    def _reordered(self, chance: Chance, raw: Raw, text: Text) -> Text:
        documents, fixed = text.kept_apart(self.setting)
        if "permute" in self.config.damage:
            order = noise.shuffled(chance, _sentences(raw, text), documents, fixed)
            text = text._replace(tokens=np.take_along_axis(text.tokens, order, 1))
        if "rotate" in self.config.damage:
            order = noise.rotated(chance, documents, fixed)
            text = text._replace(tokens=np.take_along_axis(text.tokens, order, 1))
        return text

    def _taken(self, chance: Chance, text: Text) -> Spans | None:
        """What infill or delete takes away."""
        hidden = noise.num_noise(text.lengths, self.config.rate)
        length = text.tokens.shape[1]
        if "infill" in self.config.damage:
            return noise.poisson_spans(chance, text.lengths, hidden, self.config.mean, length)
        if "delete" in self.config.damage:
            candidates = np.arange(length) < text.lengths[:, None]
            return runs(noise.random_tokens(chance, candidates, hidden))
        return None


def _sentences(raw: Raw, text: Text) -> np.ndarray:
    """Number of each token's sentence in its row, int64 [B,L]; a document begins one too."""
    assert raw.sentences is not None
    begins = np.zeros(text.tokens.shape, bool)
    begins[raw.sentences] = True
    begins[raw.rows, raw.starts] = True
    return np.cumsum(begins, axis=1)
