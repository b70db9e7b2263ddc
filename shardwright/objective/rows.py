"""Rows of text with special tokens around it, before anything is corrupted: `[CLS] text [SEP]`, `text [SEP] [CLS]`.

RoBERTa's FULL-SENTENCES (Liu et al. 2019): a row is filled with consecutive text, over the ends of documents, where
the tokenizer's end-of-document token stands between them. With `mask_documents` attention stays inside a document all
the same. Rows of sentence pairs are made in pairing.py.
Shapes: B batch, T tokens of a row, R raw tokens (T - 2).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from shardwright.objective.raw import Arrays, Marks, Raw
from shardwright.objective.segments import number_documents, restart_positions
from shardwright.objective.setting import Setting


@dataclass
class Rows:
    """Rows of tokens and what is known of each place."""

    ids: np.ndarray  # int64 [B,T]
    text: np.ndarray  # bool [B,T]: neither special token nor padding nor end of document
    begins: np.ndarray | None  # bool [B,T]: a word begins here; None where words are not known
    documents: np.ndarray  # int32 [B,T], -1 for padding
    apart: bool = False  # whether attention and positions keep to a document whatever the setting says
    extra: Arrays = field(default_factory=dict)  # further arrays of the batch, such as token_types

    @property
    def real(self) -> np.ndarray:
        """What is no padding, bool [B,T]."""
        return self.documents >= 0


def full_rows(raw: Raw, setting: Setting, *, cls_first: bool = True) -> Rows:
    """`[CLS] text [SEP]`, or XLNet's `text [SEP] [CLS]`; a short text is followed by padding."""
    specials = setting.specials
    batch, length = raw.tokens.shape[0], raw.tokens.shape[1] + 2
    lengths, every = raw.lengths, np.arange(batch)
    shift = 1 if cls_first else 0
    ids = np.full((batch, length), specials["pad"], np.int64)
    inside = np.arange(length) - shift
    inside = (inside >= 0) & (inside < lengths[:, None])
    ids[:, shift : shift + raw.tokens.shape[1]] = raw.tokens
    ids[~inside] = specials["pad"]
    text = inside & (ids != specials["end"])
    ends = (0, lengths + 1) if cls_first else (lengths + 1, lengths)
    ids[every, ends[0]], ids[every, ends[1]] = specials["cls"], specials["sep"]
    begins = (raw.rows * length + raw.starts + shift)[raw.starts > 0]
    numbers = number_documents(begins, batch, length)  # a special token is of the document beside it
    numbers[np.arange(length) >= (lengths + 2)[:, None]] = -1
    numbers[raw.numbers < 0] = -1
    return Rows(ids, text, _marked(raw.words, shift, text), numbers)


def _marked(words: Marks | None, shift: int, text: np.ndarray) -> np.ndarray | None:
    if words is None:
        return None
    begins = np.zeros_like(text)
    begins[words.rows, words.starts + shift] = True
    return begins


def common_arrays(rows: Rows, raw: Raw, setting: Setting) -> Arrays:
    """What every batch has beside ids and labels.

    Without `mask_documents` there are no `documents` in training, where no row is filled up: attention needs no mask.
    """
    masked = setting.mask_documents or rows.apart
    arrays = {
        "position_ids": restart_positions(rows.documents, setting.reset_positions or rows.apart),
        "sequence": raw.numbers[: len(rows.ids)],
        **rows.extra,
    }
    if masked or setting.evaluation:
        arrays["documents"] = rows.documents if masked else np.minimum(rows.documents, 0)
    return arrays
