"""Classification of texts or of their tokens, for fine-tuning a stack that was trained otherwise, on a head of classes.

Of a text the class is told at one token, which differs by kind of model: [CLS] before it (Devlin et al. 2019, section
4.1), [CLS] after it (Yang et al. 2019), the end of document after it (Radford et al. 2018, section 3.2), or the
decoder's last token, where encoder and decoder read the same text (Lewis et al. 2020, section 3.1). Of tokens
(Devlin et al. 2019, section 5.3) it is told at each token that has one: give the first token of a word the word's.
Examples hold 1 + the class, and 0 for none, since shards hold no negative numbers. A text pair is one list of ids with
[SEP] in it.
Shapes: B batch, T tokens of a row, P places, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective.heads import Heads, at_places, class_loss
from shardwright.objective.objective import Objective
from shardwright.objective.pairs import fill_rows
from shardwright.objective.raw import Arrays, Empty, Examples
from shardwright.objective.segments import counting
from shardwright.objective.setting import Setting


class Frame(NamedTuple):
    """What stands around a text, by use of special tokens, what fills a row up, and where the text's class is told."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    padding: str
    at_end: bool


#: By kind of model. A decoder's padding is seen by nobody, so it needs no token of its own.
FRAMES = {
    "encoder": Frame(("cls",), ("sep",), "pad", at_end=False),
    "two-stream": Frame((), ("sep", "cls"), "pad", at_end=True),
    "decoder": Frame((), ("end",), "end", at_end=True),
    "encoder-decoder": Frame((), ("end",), "pad", at_end=True),
}


class ClassifyConfig(ObjectiveConfig):
    """`objective: {name: classify}`."""

    name: Literal["classify"] = meaning("classify", "Predict classes")
    of: Literal["text", "tokens"] = meaning("text", "What has a class")
    classes: int = meaning(2, "Classes there are", ge=2)
    frame: Literal["encoder", "two-stream", "decoder", "encoder-decoder"] | None = meaning(
        None, "Special tokens around a text, as models of this kind read it; null is the family's kind"
    )
    start: Literal["pad", "bos", "end"] = meaning("pad", "What a decoder beside an encoder starts with")
    begin: bool = meaning(False, "Rows of an encoder-decoder begin with <s>, as BART's do")

    @property
    def ends(self) -> Frame:
        """What stands around a text."""
        frame = FRAMES[self.frame or "encoder"]
        return frame._replace(before=("bos",)) if self.begin and self.frame == "encoder-decoder" else frame

    def specials(self, length: int) -> tuple[str, ...]:
        """See the base class."""
        frame = self.ends
        start = (self.start,) if self.frame == "encoder-decoder" else ()
        uses = dict.fromkeys((*frame.before, *frame.after, frame.padding, *start))
        return tuple(use for use in uses if use != "end")  # which every tokenizer has


class Classify(Objective[Examples]):
    """One term, of `heads.others["label"]`."""

    supervised = True
    trains = ("encoder", "decoder", "two-stream", "encoder-decoder", "generator and discriminator")

    def __init__(self, config: ClassifyConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config, self.frame = config, config.ends
        self.terms = {"label": 1.0}

    def stride(self, length: int) -> int:
        """Texts are not cut from a stream: a row each."""
        return length

    def corrupt(self, raw: Examples, empty: Empty = np.empty) -> Arrays:
        """`input_ids` [B,T]; `labels` and `weights` [B,1] beside `places`, or [B,T]; see objective.py."""
        specials, length = self.setting.specials, self.setting.length
        before, after = ([specials[use] for use in uses] for uses in (self.frame.before, self.frame.after))
        ids, real = fill_rows(raw.sources, before, after, length, specials[self.frame.padding])
        places = (real.sum(axis=1, keepdims=True) - 1) if self.frame.at_end else np.zeros((len(ids), 1), np.int64)
        documents = np.where(real & (raw.numbers >= 0)[:, None], 0, -1).astype(np.int32)
        positions = np.broadcast_to(counting(length), ids.shape).copy()
        labels = self._of_texts(raw, places) if self.config.of == "text" else self._of_tokens(raw)
        arrays = {"input_ids": ids, "position_ids": positions, "documents": documents, "sequence": raw.numbers}
        return {**(self._both(arrays) if self.config.frame == "encoder-decoder" else arrays), **labels}

    def _both(self, arrays: Arrays) -> Arrays:
        """The same text for encoder and decoder, whose own is a place later."""
        moved = np.roll(arrays["input_ids"], 1, axis=1)
        moved[:, 0] = self.setting.specials[self.config.start]
        names = {"encoder_ids": "input_ids", "encoder_positions": "position_ids", "encoder_documents": "documents"}
        return {**arrays, **{name: arrays[own] for name, own in names.items()}, "input_ids": moved}

    def _of_texts(self, raw: Examples, places: np.ndarray) -> Arrays:
        given, _ = fill_rows(raw.targets, [], [], 1, 0)
        return {**_counted(given), "places": places}

    def _of_tokens(self, raw: Examples) -> Arrays:
        # As the ids, with no class at the ends.
        before, after = ([0] * len(uses) for uses in (self.frame.before, self.frame.after))
        given, _ = fill_rows(raw.targets, before, after, self.setting.length, 0)
        return _counted(given)

    def loss(
        self, hidden: Tensor, heads: Heads, batch: Mapping[str, Tensor], scales: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """See the base class."""
        logits = heads.others["label"](at_places(hidden, batch.get("places")))
        return {"label": class_loss(logits, batch["labels"], batch["weights"])}


def _counted(given: np.ndarray) -> Arrays:
    """Labels, and weights where there are any, from 1 + the class."""
    return {"labels": np.maximum(given - 1, 0), "weights": (given > 0).astype(np.float32)}
