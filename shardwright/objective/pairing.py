"""Rows `[CLS] A [SEP] B [SEP]`: next sentence (Devlin et al. 2019) and sentence order (Lan et al. 2020).

How a window of the stream becomes pairs. A window is a little longer than what a row takes, so that a text may begin at
the first sentence of the window: the tokens before it were the last ones of the row before, which read on to the
window's end. Of each stretch of one document in the window a pair can be made; the `most` longest are, as far as they
fit, each with its own [CLS]: where documents are shorter than rows, several pairs share one, and attention and
positions keep to a pair. A pair's text is cut in two at one of its inner sentence starts, all equally likely. A row
whose text has no such start at all has one pair, cut in the middle, whose label has weight 0. What is lost are
stretches beyond `most`, and further ones of one sentence. (BERT's one row in ten of shorter text is left out: stretches
vary in length.)

*order*: in half of the pairs A and B change places. Both are whole sentences, as ALBERT's: one that the row would cut
is left out, since a half sentence before the first [SEP] would tell that they were changed; where it is one of two it
stays, and the label has weight 0. *next*: the last sentence is cut off where the row ends, and in half of the pairs B
is other text, as many tokens from a sentence start on, out of the longest stretch that the neighbour has of another
document, or else of the same one (as in a long book), which is some other place of it. The neighbour is a sequence that
the reader found by number, so what a row gets never depends on its batch.

Labels are those of Hugging Face: 0 as in the text, 1 for another document or changed places.
Shapes: B batch, T tokens of a row, R raw tokens, K pairs of a row, N pairs of the batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from shardwright.objective.chance import Chance
from shardwright.objective.lay import Laid, Spans, in_rows, lay
from shardwright.objective.raw import Pieces, Raw
from shardwright.objective.rows import Rows
from shardwright.objective.setting import Setting

Kind = Literal["next", "order"]

_SPLIT, _CHANGE, _FROM = 11, 12, 13  # purposes of random numbers
_SPECIALS = 3  # of a pair
_SENTENCES = 96  # tokens in which a sentence nearly always begins


class Texts(NamedTuple):
    """Stretches of text, each of one document, by row; places count through all raw rows."""

    rows: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    documents: np.ndarray

    def at(self, which: np.ndarray) -> Texts:
        """Some of them."""
        return Texts(*(column[which] for column in self))


class Pairs(NamedTuple):
    """What becomes A and B of each pair: places in the raw rows."""

    rows: np.ndarray
    numbers: np.ndarray  # of the pair in its row
    starts: np.ndarray  # [N, 2]
    sizes: np.ndarray  # [N, 2]
    changed: np.ndarray  # bool [N]


def slack(length: int) -> int:
    """Tokens by which windows are longer than their distance, for rows of `length`: some sentences."""
    return min(length // 2, _SENTENCES)


def pair_rows(raw: Raw, setting: Setting, kind: Kind, most: int) -> Rows:
    """Rows of the pairs, `raw` with its neighbours' rows for *next*.

    `extra` has `token_types` int64 [B,T] and `sentence_labels`, `sentence_places` int64 [B,K], `sentence_weights`
    float32 [B,K], K being `most`.
    """
    batch = len(raw.tokens) // (2 if kind == "next" else 1)
    chance = setting.chance(raw.numbers[:batch])
    assert raw.sentences is not None
    marks = raw.sentences.flat(raw.tokens.shape[1])
    found = _texts(raw, marks, setting)
    chosen, numbers = _fitting(found.at(found.rows < batch), marks, batch, setting.length, most)
    told = _inner(chosen, marks)[1] > 0
    if kind == "order":
        chosen, told = _whole(chosen, marks, raw.tokens.reshape(-1) == setting.specials["end"])
    pairs = _split(chance, chosen, numbers, marks)
    draw = chance.of(pairs.rows).uniform(_CHANGE, pairs.numbers[:, None])[:, 0] < 0.5
    if kind == "order":
        order = np.where(draw, 1, 0)[:, None] ^ np.array([0, 1])
        starts, sizes = (np.take_along_axis(column, order, 1) for column in (pairs.starts, pairs.sizes))
        pairs = Pairs(pairs.rows, pairs.numbers, starts, sizes, draw)
    else:
        pairs = _other_text(chance, pairs, draw, chosen, found, marks, batch)
    return _laid_out(raw, setting, pairs, told, batch, most)


def _texts(raw: Raw, marks: np.ndarray, setting: Setting) -> Texts:
    """All stretches: without the end of document, from the first sentence on where one begins soon."""
    tokens, length = raw.tokens.reshape(-1), raw.tokens.shape[1]
    pieces = raw.pieces or _pieces(raw)
    starts = pieces.rows * length + pieces.starts
    stops = np.minimum(np.append(starts[1:], tokens.size), pieces.rows * length + raw.lengths[pieces.rows])
    stops -= tokens[np.maximum(stops - 1, 0)] == setting.specials["end"]
    place = np.searchsorted(marks, starts)
    first = np.append(marks, tokens.size)[place]
    near = first <= np.minimum(starts + slack(setting.length), stops - 1)
    starts = np.where(near, first, starts)
    kept = stops - starts >= 2
    return Texts(pieces.rows, starts, stops, pieces.documents).at(kept)


def _pieces(raw: Raw) -> Pieces:
    """Stretches by their starts alone; the names of documents do not matter."""
    batch, length = raw.tokens.shape
    places = np.unique(np.concatenate([raw.rows * length + raw.starts, np.arange(batch) * length]))
    return Pieces(places // length, places % length, np.zeros_like(places))


def _fitting(texts: Texts, marks: np.ndarray, batch: int, length: int, most: int) -> tuple[Texts, np.ndarray]:
    """The `most` longest of each row, cut to what fits into rows of `length`, and the number of each in its row.

    One without an inner sentence start is taken alone, where the row has no other.
    """
    cut = _inner(texts, marks)[1] > 0
    order = np.lexsort((texts.starts, texts.starts - texts.stops, ~cut, texts.rows))
    place = in_rows(texts.rows[order], batch)
    texts = texts.at(np.sort(order[(place < most) & (cut[order] | (place == 0))]))
    taken = texts.stops - texts.starts + _SPECIALS
    before = np.cumsum(taken) - taken
    before -= np.append(before, 0)[np.searchsorted(texts.rows, np.arange(batch))][texts.rows]
    stops = np.minimum(texts.stops, texts.starts + length - before - _SPECIALS)
    texts = texts._replace(stops=stops)
    number = in_rows(texts.rows, batch)
    kept = (number == 0) | (_inner(texts, marks)[1] > 0)
    return texts.at(kept), number[kept]


def _inner(texts: Texts, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(number of the first sentence that begins inside each text, how many do)."""
    first = np.searchsorted(marks, texts.starts, "right")
    return first, np.maximum(np.searchsorted(marks, texts.stops, "left") - first, 0)


def _whole(texts: Texts, marks: np.ndarray, ends: np.ndarray) -> tuple[Texts, np.ndarray]:
    """Without a last sentence that is cut, where two are left, and bool [N]: whether all are whole.

    `ends` bool: places of an end of document.
    """
    first, count = _inner(texts, marks)
    closed = np.append(ends, False)[texts.stops] | np.isin(texts.stops, marks)
    last = np.append(marks, 0)[np.minimum(first + count - 1, len(marks))]
    stops = np.where((count > 1) & ~closed, last, texts.stops)
    return texts._replace(stops=stops), (count > 1) | (closed & (count > 0))


def _split(chance: Chance, texts: Texts, numbers: np.ndarray, marks: np.ndarray) -> Pairs:
    """Each text cut in two at a sentence start."""
    first, count = _inner(texts, marks)
    drawn = chance.of(texts.rows).below(_SPLIT, numbers[:, None], count[:, None])[:, 0]
    middle = (texts.starts + texts.stops) // 2
    cuts = np.where(count > 0, np.append(marks, 0)[np.minimum(first + drawn, len(marks))], middle)
    starts = np.stack([texts.starts, cuts], 1)
    sizes = np.stack([cuts, texts.stops], 1) - starts
    return Pairs(texts.rows, numbers, starts, sizes, np.zeros(len(cuts), bool))


def _other_text(
    chance: Chance, pairs: Pairs, draw: np.ndarray, own: Texts, found: Texts, marks: np.ndarray, batch: int
) -> Pairs:
    """With B of other text where `draw` says so and the neighbour has some, of another document if it can be."""
    others = found.at(found.rows >= batch)
    order = np.lexsort((others.starts, others.starts - others.stops, others.rows))
    others = others.at(order)  # the longest of each row first
    first = np.searchsorted(others.rows, pairs.rows + batch)
    count = np.searchsorted(others.rows, pairs.rows + batch, "right") - first
    if not len(others.rows):
        return pairs
    last = len(others.rows) - 1
    passed = (others.documents[np.minimum(first, last)] == own.documents) & (count > 1)
    changed = draw & (count > 0)
    other = others.at(np.minimum(first + passed, last))
    starts, sizes = pairs.starts.copy(), pairs.sizes.copy()
    low = np.searchsorted(marks, other.starts)
    choices = np.searchsorted(marks, other.stops - sizes[:, 1], "right") - low
    drawn = chance.of(pairs.rows).below(_FROM, pairs.numbers[:, None], np.maximum(choices, 0)[:, None])[:, 0]
    begins = np.where(choices > 0, np.append(marks, 0)[np.minimum(low + drawn, len(marks))], other.starts)
    starts[changed, 1] = begins[changed]
    sizes[changed, 1] = np.minimum(sizes[:, 1], other.stops - begins)[changed]
    return Pairs(pairs.rows, pairs.numbers, starts, sizes, changed)


def _laid_out(raw: Raw, setting: Setting, pairs: Pairs, told: np.ndarray, batch: int, most: int) -> Rows:
    specials, size = setting.specials, raw.tokens.size
    source = np.append(raw.tokens.reshape(-1).astype(np.int64), [specials[use] for use in ("cls", "sep", "pad")])
    cls, sep, pad = (np.full(len(pairs.rows), size + n) for n in range(3))
    one = np.ones_like(cls)
    starts = np.stack([cls, pairs.starts[:, 0], sep, pairs.starts[:, 1], sep], 1)
    sizes = np.stack([one, pairs.sizes[:, 0], one, pairs.sizes[:, 1], one], 1)
    spans, _ = Spans.merged((pairs.rows, starts, sizes))
    laid = lay(spans, batch, setting.length, size + 2)
    pair = np.append(pairs.numbers, -1)[np.where(laid.span < 0, len(pairs.rows), laid.span // 5)]
    return Rows(
        ids=source[laid.source],
        text=laid.source < size,
        begins=_carried(raw, laid, size),
        documents=pair.astype(np.int32),
        apart=True,
        extra={"token_types": (laid.span % 5 // 3 * (laid.span >= 0)), **_labels(pairs, told, laid, batch, most)},
    )


def _carried(raw: Raw, laid: Laid, size: int) -> np.ndarray | None:
    """Where words begin, moved along with the text."""
    if raw.words is None:
        return None
    flags = np.zeros(size + 3, bool)
    flags[raw.words.flat(raw.tokens.shape[1])] = True
    return flags[laid.source]


def _labels(pairs: Pairs, told: np.ndarray, laid: Laid, batch: int, most: int) -> dict[str, np.ndarray]:
    """Of each pair, at its [CLS]; of weight 0 where half a sentence would give the label away."""
    shape, where = (batch, most), (pairs.rows, pairs.numbers)
    labels, places = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    weights = np.zeros(shape, np.float32)
    labels[where], places[where], weights[where] = pairs.changed, laid.columns[::5], told
    return {"sentence_labels": labels, "sentence_places": places, "sentence_weights": weights}
