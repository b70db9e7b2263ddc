"""The two sides of an encoder-decoder batch: what the encoder reads, and the text that the decoder predicts.

Used by span.py, denoise.py and pairs.py. The decoder's input is its target moved right by one, behind a start token;
an input belongs to the document of its target.

Every query of the decoder needs a key in the encoder. So a document of which noise has left the encoder nothing is made
one with its neighbour, and padding of the decoder, which comes after all that counts, goes on with the last document.

Shapes: B batch, S tokens of the encoder, T tokens of the decoder, L tokens of a raw row, N spans.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from shardwright.objective.lay import Laid, Spans, in_rows, lay
from shardwright.objective.raw import Arrays, Raw
from shardwright.objective.segments import number_documents, restart_positions
from shardwright.objective.setting import Setting

MULTIPLE = 8  # of a decoder's row where its length is the objective's: ranks can cut it, and matrix products like it


class Side(NamedTuple):
    """Rows of one side."""

    ids: np.ndarray  # int64
    documents: np.ndarray  # int32, -1 for padding


class Text(NamedTuple):
    """Raw rows as both sides see them, with the special tokens that may stand among them."""

    tokens: np.ndarray  # int64 [B,L]
    documents: np.ndarray  # int32 [B,L], number of the document in the row
    lengths: np.ndarray  # int64 [B]
    specials: np.ndarray  # int64 [M], what `special(m)` refers to
    pad: int

    @classmethod
    def of(cls, raw: Raw, specials: list[int], pad: int) -> Text:
        """The text of raw rows."""
        batch, length = raw.tokens.shape
        begins = (raw.rows * length + raw.starts)[raw.starts > 0]
        documents = number_documents(begins, batch, length)
        return cls(raw.tokens.astype(np.int64), documents, raw.lengths, np.array(specials, np.int64), pad)

    def special(self, number: np.ndarray | int) -> np.ndarray:
        """Where in the source special tokens lie."""
        return np.asarray(number) + self.tokens.size

    def side(self, spans: Spans, near: np.ndarray, length: int) -> Side:
        """The spans laid out in rows of `length`; a special token is of the document of the token at `near` [N]."""
        size, batch = self.tokens.size, len(self.tokens)
        source = np.concatenate([self.tokens.reshape(-1), self.specials, [self.pad]])
        laid = lay(spans, batch, length, len(source) - 1)
        documents = self._documents(laid, near, size)
        return Side(source[laid.source], documents)

    def _documents(self, laid: Laid, near: np.ndarray, size: int) -> np.ndarray:
        if not size or not len(near):
            return np.full(laid.span.shape, -1, np.int32)
        places = np.where(laid.source < size, laid.source, near[np.maximum(laid.span, 0)])
        numbers = self.documents.reshape(-1)[places]
        return np.where(laid.span < 0, -1, numbers).astype(np.int32)

    def kept_apart(self, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
        """(what noise treats as documents, int [B,L], what stays at the end of each, bool [B,L]).

        One document a row where attention crosses them anyway; what is beyond a row's length is another.
        """
        beyond = np.arange(self.tokens.shape[1]) >= self.lengths[:, None]
        apart = setting.mask_documents
        documents = self.documents if apart else np.zeros_like(self.documents)
        fixed = apart & (self.tokens == setting.specials["end"]) & ~beyond
        return np.where(beyond, documents.max(initial=0) + 1, documents), fixed

    def ends(self) -> np.ndarray:
        """Place of the last token of each row, or of the first where it has none."""
        batch, length = self.tokens.shape
        return np.arange(batch) * length + np.maximum(self.lengths - 1, 0)


def whole(text: Text, before: list[int], after: list[int], length: int) -> Side:
    """All of the text, with special tokens (numbers of `Text.specials`) before and after it."""
    batch, raw = text.tokens.shape
    rows, one = np.arange(batch), np.ones(batch, np.int64)
    starts = [text.special(one * n) for n in before] + [rows * raw] + [text.special(one * n) for n in after]
    sizes = [*[one] * len(before), text.lengths, *[one] * len(after)]
    spans, _ = Spans.merged((rows, np.stack(starts, 1), np.stack(sizes, 1)))
    near = np.stack([*[rows * raw] * (len(before) + 1), *[text.ends()] * len(after)], 1)
    return text.side(spans, near.reshape(-1), length)


def without(
    text: Text, noise: Spans, marks: np.ndarray | None, before: list[int], after: list[int], length: int
) -> Side:
    """The text without the noise, and `marks` (a special token's number for each span of noise) in the place of it."""
    batch, raw = text.tokens.shape
    rows, one = np.arange(batch), np.ones(batch, np.int64)
    number = in_rows(noise.rows, batch)
    ends = noise.starts + noise.sizes
    previous = np.where(number == 0, noise.rows * raw, np.append(0, ends)[: len(ends)])
    mark = text.special(np.zeros_like(number) if marks is None else marks)
    gaps = np.stack([previous, mark], 1)
    sizes = np.stack([noise.starts - previous, np.full_like(number, marks is not None)], 1)
    tail = rest_of(text, noise)
    heads = np.stack([text.special(one * n) for n in before], 1) if before else np.empty((batch, 0), np.int64)
    tails = np.stack([tail, *(text.special(one * n) for n in after)], 1)
    tail_sizes = np.stack([rows * raw + text.lengths - tail, *[one] * len(after)], 1)
    spans, order = Spans.merged(
        (rows, heads, np.ones_like(heads)), (noise.rows, gaps, sizes), (rows, tails, tail_sizes)
    )
    at = np.minimum(noise.starts, text.ends()[noise.rows])
    near = np.concatenate(
        [np.repeat(rows * raw, len(before)), np.repeat(at, 2), np.repeat(text.ends(), 1 + len(after))]
    )
    return text.side(spans, near[order], length)


def fill_up(length: int) -> int:
    """The next multiple of 8."""
    return -(-length // MULTIPLE) * MULTIPLE


def rest_of(text: Text, noise: Spans) -> np.ndarray:
    """Where the text after a row's last span of noise begins, int64 [B]."""
    batch, raw = text.tokens.shape
    begin = np.arange(batch) * raw
    last = np.searchsorted(noise.rows, np.arange(batch), "right") - 1
    found = np.append(noise.starts + noise.sizes, 0)[last]
    return np.where((last >= 0) & (np.append(noise.rows, -1)[last] == np.arange(batch)), found, begin)


def two_sides(raw: Raw, setting: Setting, encoder: Side, decoder: Side, start: int) -> Arrays:
    """The arrays of a batch: see objective.py."""
    nobody = raw.numbers < 0
    encoder_documents = np.where(nobody[:, None], np.int32(-1), encoder.documents)
    documents = np.where(nobody[:, None], np.int32(-1), decoder.documents)
    weights = (documents >= 0).astype(np.float32)
    if not setting.mask_documents:
        encoder_documents, documents = np.minimum(encoder_documents, 0), np.minimum(documents, 0)
    documents = _adopted(np.maximum.accumulate(documents, axis=1), encoder_documents)
    input_ids = np.empty_like(decoder.ids)
    input_ids[:, 0], input_ids[:, 1:] = start, decoder.ids[:, :-1]
    return {
        "encoder_ids": encoder.ids,
        "encoder_positions": restart_positions(encoder_documents, setting.reset_positions),
        "encoder_documents": encoder_documents,
        "input_ids": input_ids,
        "position_ids": restart_positions(documents, setting.reset_positions),
        "documents": documents,
        "labels": decoder.ids,
        "weights": weights,
        "sequence": raw.numbers,
    }


def _adopted(documents: np.ndarray, encoder: np.ndarray) -> np.ndarray:
    """The decoder's documents, with the nearest before or else after for one that the encoder lacks."""
    batch, most = len(documents), int(max(documents.max(initial=0), encoder.max(initial=0))) + 1
    present = np.zeros((batch, most), bool)
    rows, columns = np.nonzero(encoder >= 0)
    present[rows, encoder[rows, columns]] = True
    number = np.arange(most)
    before = np.maximum.accumulate(np.where(present, number, -1), axis=1)
    after = np.minimum.accumulate(np.where(present, number, most)[:, ::-1], axis=1)[:, ::-1]
    heirs = np.where(before >= 0, before, after)
    found = np.take_along_axis(heirs, np.maximum(documents, 0), 1)
    return np.where((documents < 0) | (found == most), -1, found).astype(np.int32)
