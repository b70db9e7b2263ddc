"""Classification of texts or of their tokens, for fine-tuning encoders: `[CLS] text [SEP]` and a head of a few classes.

Of a text (Devlin et al. 2019, section 4.1) the class is predicted at [CLS]; of tokens (section 5.3), at each token
that has a class: give the first token of a word the word's. Examples hold 1 + the class, and 0 for none, since shards
hold no negative numbers. A text pair is one list of ids with [SEP] in it.
Shapes: B batch, T tokens of a row, P places, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from torch import Tensor

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective.heads import Heads, at_places, class_loss
from shardwright.objective.objective import Objective
from shardwright.objective.pairs import fill_rows
from shardwright.objective.raw import Arrays, Empty, Examples, Ragged
from shardwright.objective.segments import counting
from shardwright.objective.setting import Setting


class ClassifyConfig(ObjectiveConfig):
    """`objective: {name: classify}`."""

    name: Literal["classify"] = meaning("classify", "Predict classes")
    of: Literal["text", "tokens"] = meaning("text", "What has a class")
    classes: int = meaning(2, "Classes there are", ge=2)

    def specials(self, length: int) -> tuple[str, ...]:
        """See the base class."""
        return ("cls", "sep", "pad")


class Classify(Objective[Examples]):
    """One term, of `heads.others["label"]`."""

    supervised = True

    def __init__(self, config: ClassifyConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self.terms = {"label": 1.0}

    def stride(self, length: int) -> int:
        """Texts are not cut from a stream: a row each."""
        return length

    def corrupt(self, raw: Examples, empty: Empty = np.empty) -> Arrays:
        """`input_ids` [B,T]; `labels` and `weights` [B,1] beside `places`, or [B,T]; see objective.py."""
        setting, specials = self.setting, self.setting.specials
        ids, real = fill_rows(raw.sources, [specials["cls"]], [specials["sep"]], setting.length, specials["pad"])
        real &= (raw.numbers >= 0)[:, None]
        return {
            "input_ids": ids,
            "position_ids": np.broadcast_to(counting(setting.length), ids.shape).copy(),
            "documents": np.where(real, 0, -1).astype(np.int32),
            "sequence": raw.numbers,
            **(self._of_texts(raw) if self.config.of == "text" else self._of_tokens(raw.targets)),
        }

    def _of_texts(self, raw: Examples) -> Arrays:
        given, _ = fill_rows(raw.targets, [], [], 1, 0)
        return {**_counted(given), "places": np.zeros_like(given)}

    def _of_tokens(self, targets: Ragged) -> Arrays:
        # As the ids: one place to the right, with no class at the ends.
        given, _ = fill_rows(targets, [0], [0], self.setting.length, 0)
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
