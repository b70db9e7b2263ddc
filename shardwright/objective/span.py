"""T5's objectives, all of its table 3 (Raffel et al. 2020): what the encoder reads and the decoder predicts.

| kind | paper | encoder | decoder |
|---|---|---|---|
| prefix | prefix language modelling | the text up to a place that is drawn | the rest |
| bert | BERT-style | 15 % of tokens hidden, 90 % by one <M>, 10 % by random ones | all of the text |
| deshuffle | deshuffling | the tokens in random order | all of the text |
| mass | MASS-style | 15 % of tokens hidden by <M> | all of the text |
| replace | i.i.d. noise, replace spans | runs of hidden tokens replaced by a sentinel | sentinels, each with its run |
| drop | i.i.d. noise, drop tokens | the text without them | the tokens that were left out |
| spans | random spans (mean length 3) | spans replaced by sentinels | sentinels, each with its span |

Each side ends with the end-of-document token, the decoder starts with padding, and <M> is the first sentinel. Where
text follows the last span, one more sentinel ends the decoder's, as in the paper's figure 2. Shares are exact in every
row, where T5 draws each token. `Span.raw_length` is the text that fills the encoder's row: exactly for *spans* and
*drop*; the other kinds are never longer than the row. The decoder's row has `target_length` tokens, enough for all and
filled up to a multiple of 8 by padding of weight 0: T5's 114 beside 512 are 120, which 8 ranks can cut.
Shapes: B batch, L tokens of a raw row.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from shardwright.config import ObjectiveConfig, meaning
from shardwright.objective import noise
from shardwright.objective.chance import Chance
from shardwright.objective.lay import Spans, in_rows, runs
from shardwright.objective.objective import Objective
from shardwright.objective.raw import Arrays, Empty, Raw
from shardwright.objective.segments import counting
from shardwright.objective.setting import Setting
from shardwright.objective.sides import Side, Text, fill_up, rest_of, two_sides, whole, without

Kind = Literal["prefix", "bert", "deshuffle", "mass", "replace", "drop", "spans"]

_FATE, _RANDOM = 41, 42  # purposes of random numbers
_BERT_MASKED = 0.9
_SENTINELS = 100  # of T5's vocabulary
_END = 0  # number of the end among the special tokens; sentinel k is number k + 1


class SpanConfig(ObjectiveConfig):
    """`objective: {name: span}`."""

    start: ClassVar[str] = "pad"  # what the decoder begins with
    name: Literal["span"] = meaning("span", "Predict what is hidden in the encoder's text")
    kind: Kind = meaning("spans", "Row of T5's table: what is hidden, and how")
    rate: float = meaning(0.15, "Share of the text that is hidden; not of prefix and deshuffle", gt=0, lt=1)
    mean: float = meaning(3.0, "Mean length of random spans", ge=1)

    def specials(self, length: int) -> tuple[str, ...]:
        """See the base class."""
        raw = raw_length(self, length)
        hidden = round(raw * self.rate)
        needed = {"spans": round(hidden / self.mean), "replace": hidden}.get(self.kind, 0) + 1
        return ("pad", f"sentinels:{max(_SENTINELS, needed)}")


def raw_length(config: SpanConfig, length: int) -> int:
    """Tokens of text for an encoder's row of `length`: the most that never exceed it (T5's `random_spans_helper`)."""
    if config.kind == "prefix":
        return length  # at least one of them is the decoder's
    longest = length - 1
    if config.kind in ("spans", "drop"):
        while encoder_length(config, longest + 1) <= length:
            longest += 1
    return longest


def encoder_length(config: SpanConfig, raw: int) -> int:
    """Tokens that the encoder reads of `raw` tokens, in kinds where that is a fixed number."""
    hidden, spans = _counts(config, np.array([raw]))
    return int(raw - hidden[0] + (spans[0] if config.kind == "spans" else 0)) + 1


def _counts(config: SpanConfig, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(hidden tokens, random spans) of texts of these lengths."""
    hidden = noise.num_noise(lengths, config.rate)
    return hidden, noise.num_spans(lengths, hidden, config.mean)


class Span(Objective[Raw]):
    """One term: the decoder's targets."""

    trains = ("encoder-decoder",)

    def __init__(self, config: SpanConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        self.config = config
        self._target = self.target_length(setting.length)

    def stride(self, length: int) -> int:
        """What fills the encoder's row; see the file."""
        return raw_length(self.config, length)

    def target_length(self, length: int) -> int:
        """Tokens of the decoder's row beside an encoder's row of `length`, padding included."""
        return fill_up(self.most_targets(length))

    def most_targets(self, length: int) -> int:
        """The most that the decoder predicts of a row: T5's `random_spans_helper` has it for *spans*."""
        raw = self.stride(length)
        hidden, spans = (int(count[0]) for count in _counts(self.config, np.array([raw])))
        if self.config.kind == "prefix":
            return raw  # all but one token, and the end
        return {"spans": hidden + spans + 1, "replace": 2 * hidden + 2, "drop": hidden + 1}.get(
            self.config.kind, raw + 1
        )

    def corrupt(self, raw: Raw, empty: Empty = np.empty) -> Arrays:
        """Arrays of encoder and decoder; see objective.py."""
        setting = self.setting
        specials = [setting.specials["end"], *setting.sentinels()]
        text = Text.of(raw, specials, setting.specials["pad"])
        encoder, decoder = self._sides(setting.chance(raw.numbers), text)
        return two_sides(raw, setting, encoder, decoder, start=setting.specials[self.config.start])

    def _sides(self, chance: Chance, text: Text) -> tuple[Side, Side]:
        length, target = self.setting.length, self._target
        if self.config.kind in ("bert", "mass", "deshuffle"):
            read = text._replace(tokens=self._altered(chance, text))
            return whole(read, [], [_END], length), whole(text, [], [_END], target)
        hidden = self._hidden(chance, text)
        number = in_rows(hidden.rows, len(text.tokens)) + 1
        named = number if self.config.kind in ("spans", "replace") else None
        return without(text, hidden, named, [], [_END], length), _alone(text, hidden, named, target)

    def _altered(self, chance: Chance, text: Text) -> np.ndarray:
        """What the encoder reads, token by token."""
        setting = self.setting
        if self.config.kind == "deshuffle":
            return np.take_along_axis(text.tokens, self._order(chance, text), 1)
        places = counting(text.tokens.shape[1])
        hidden = noise.random_tokens(chance, self._candidates(text), _counts(self.config, text.lengths)[0])
        instead = np.full_like(text.tokens, setting.sentinels()[0])
        if self.config.kind == "bert":
            other = chance.below(_RANDOM, places, setting.vocab_size)
            instead = np.where(chance.uniform(_FATE, places) < _BERT_MASKED, instead, other)
        return np.where(hidden, instead, text.tokens)

    def _order(self, chance: Chance, text: Text) -> np.ndarray:
        """A random order of each document, or of the row where documents are not kept apart."""
        documents, fixed = text.kept_apart(self.setting)
        return noise.shuffled(chance, counting(text.tokens.shape[1]), documents, fixed)

    def _candidates(self, text: Text) -> np.ndarray:
        return counting(text.tokens.shape[1]) < text.lengths[:, None]

    def _hidden(self, chance: Chance, text: Text) -> Spans:
        """What the decoder is to predict of the text."""
        config, length = self.config, text.tokens.shape[1]
        if config.kind == "prefix":
            return noise.suffixes(chance, text.kept_apart(self.setting)[0], text.lengths)
        hidden, spans = _counts(config, text.lengths)
        if config.kind == "spans":
            return noise.random_spans(chance, text.lengths, hidden, spans, length)
        return runs(noise.random_tokens(chance, self._candidates(text), hidden))


def _alone(text: Text, hidden: Spans, named: np.ndarray | None, length: int) -> Side:
    """The hidden spans, behind their sentinels where these are named, and the end."""
    batch, raw = text.tokens.shape
    rows, one = np.arange(batch), np.ones(batch, np.int64)
    sentinels = named if named is not None else np.zeros_like(hidden.rows)
    parts = np.stack([text.special(sentinels), hidden.starts], 1)
    sizes = np.stack([np.full_like(hidden.rows, named is not None), hidden.sizes], 1)
    # Text after the last span has the next sentinel.
    last = text.special(np.bincount(hidden.rows, minlength=batch) + 1)
    follows = (rows * raw + text.lengths > rest_of(text, hidden)) & (named is not None) & (text.lengths > 0)
    tails = np.stack([last, text.special(one * _END)], 1)
    spans, order = Spans.merged(
        (hidden.rows, parts, sizes), (rows, tails, np.stack([follows, one], 1).astype(np.int64))
    )
    near = np.concatenate([np.repeat(hidden.starts, 2), np.repeat(text.ends(), 2)])
    return text.side(spans, near[order], length)
