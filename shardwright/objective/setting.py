"""What an objective is built for: the shape of its rows, the seed, special tokens, and the treatment of documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from shardwright.objective.chance import Chance


@dataclass(frozen=True)
class Setting:
    """See the file. `specials`: use -> id, as `mask`; `end` is the tokenizer's end-of-document token."""

    length: int  # positions of a row; of an encoder's row where there are two
    seed: int = 0
    vocab_size: int = 0  # tokens of the tokenizer: what a random token is drawn from
    specials: Mapping[str, int] = field(default_factory=dict)
    mask_documents: bool = True
    reset_positions: bool = True
    cross_document_targets: bool = True
    evaluation: bool = False  # rows of the validation split: another random stream, and every target counts

    def chance(self, numbers: np.ndarray) -> Chance:
        """The random numbers of these sequences."""
        return Chance(self.seed, numbers, self.evaluation)

    def sentinels(self) -> np.ndarray:
        """Ids of the sentinels in the order of their use, int64."""
        first, last = self.specials["first_sentinel"], self.specials["last_sentinel"]
        step = 1 if last >= first else -1
        return np.arange(first, last + step, step)
