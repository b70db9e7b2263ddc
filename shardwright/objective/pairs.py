"""Supervised pairs: the encoder reads a source, the decoder predicts its target. Translation, summaries, text to text.

The original Transformer (Vaswani et al. 2017) with label smoothing 0.1, T5's fine-tuning (start `pad`), BART's (start
`end`, `begin: true`). Each side ends with the tokenizer's end-of-document token; longer lists are cut, a row that is
shorter is filled up.
Shapes: B batch, S tokens of the encoder's row, T of the decoder's.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective.objective import Objective
from shardwright.objective.raw import Arrays, Empty, Examples, Ragged
from shardwright.objective.segments import counting
from shardwright.objective.setting import Setting


class PairsConfig(ObjectiveConfig):
    """`objective: {name: pairs}`."""

    name: Literal["pairs"] = meaning("pairs", "Predict the target that belongs to a source")
    smoothing: float = meaning(
        0.0, "Share of each target that is spread over the vocabulary; 0.1 in the paper", ge=0, lt=1
    )
    target_length: int | None = meaning(None, "Tokens of the decoder's row; null is data.sequence_length", ge=2)
    start: Literal["pad", "bos", "end"] = meaning("pad", "What the decoder starts with")
    begin: bool = meaning(False, "Both sides begin with <s>, as BART's do")

    def specials(self, length: int) -> tuple[str, ...]:
        """See the base class."""
        return ("pad", "bos") if self.begin or self.start == "bos" else ("pad",)


class SupervisedPairs(Objective[Examples]):
    """One term: the decoder's targets."""

    trains = ("encoder-decoder",)
    supervised = True

    def __init__(self, config: PairsConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config, self.smoothing = config, config.smoothing

    def stride(self, length: int) -> int:
        """Pairs are not cut from a stream: a row each."""
        return length

    def target_length(self, length: int) -> int:
        """Tokens of the decoder's row."""
        return self.config.target_length or length

    def corrupt(self, raw: Examples, empty: Empty = np.empty) -> Arrays:
        """Arrays of encoder and decoder; see objective.py."""
        setting, specials = self.setting, self.setting.specials
        before = [specials["bos"]] if self.config.begin else []
        source, real = fill_rows(raw.sources, before, [specials["end"]], setting.length, specials["pad"])
        target, counted = fill_rows(
            raw.targets, before, [specials["end"]], self.target_length(setting.length), specials["pad"]
        )
        nobody = (raw.numbers < 0)[:, None]
        input_ids = np.empty_like(target)
        input_ids[:, 0], input_ids[:, 1:] = specials[self.config.start], target[:, :-1]
        return {
            "encoder_ids": source,
            "encoder_positions": _positions(source),
            "encoder_documents": np.where(real & ~nobody, 0, -1).astype(np.int32),
            "input_ids": input_ids,
            "position_ids": _positions(target),
            # Padding of the decoder comes last and is seen by nobody; it needs something to see in the encoder.
            "documents": np.broadcast_to(np.where(nobody, -1, 0), target.shape).astype(np.int32),
            "labels": target,
            "weights": (counted & ~nobody).astype(np.float32),
            "sequence": raw.numbers,
        }


def fill_rows(
    lists: Ragged, before: list[int], after: list[int], length: int, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """(rows of `length`: `before`, as much of a list as fits, `after`, padding; what is no padding)."""
    sizes = np.minimum(lists.sizes, length - len(before) - len(after))[:, None]
    places = counting(length) - len(before)
    rows = np.full((len(sizes), length), pad, np.int64)
    inside = (places >= 0) & (places < sizes)
    rows[inside] = lists.values[(lists.offsets[:-1, None] + places)[inside]]
    rows[:, : len(before)] = before
    for number, token in enumerate(after):
        np.put_along_axis(rows, sizes + len(before) + number, token, 1)
    return rows, counting(length) < sizes + len(before) + len(after)


def _positions(ids: np.ndarray) -> np.ndarray:
    return np.broadcast_to(counting(ids.shape[1]), ids.shape).copy()
