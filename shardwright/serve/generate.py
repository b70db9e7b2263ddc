"""Sampling from a language model, one token at a time, with a key-value cache.

Stands on the model and tokenizer rooms; the command line's `generate` prints what `stream_text` yields. Random
numbers come from a CPU generator of the sampling's own seed, so the same seed gives the same text on any device
on which the logits agree. An encoder-decoder reads the prompt as its source, once, and writes a target of its own.
Shapes: T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from shardwright.config import ConfigError, RunError
from shardwright.data.tokenizers import Frame, StreamDecoder
from shardwright.model.attention import Cache
from shardwright.model.encoder_decoder import EncoderDecoder
from shardwright.model.transformer import Inputs, LanguageModel


class TextCodec(Protocol):
    """What text needs of a tokenizer; `end_of_document` and `vocab_size` are used where it has them."""

    def encode(self, text: str) -> Any:
        """Token ids."""

    def decode(self, ids: list[int]) -> str:
        """Text."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 takes the likeliest; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: expected 0 (all tokens) or more")
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: expected a share from 0 to 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: expected 0 to {2**63 - 1}")


def check_prompt(prompt: str) -> None:
    """ValueError for text that no tokenizer takes: surrogates, which stand for bytes that are no UTF-8."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"prompt: character {error.start + 1} is no valid UTF-8; give the prompt as UTF-8") from None


def stream_text(
    model: LanguageModel,
    tokenizer: TextCodec,
    prompt: str = "",
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    max_new_tokens: int = 200,
    frame: Frame = Frame(),  # noqa: B008
) -> Iterator[str]:
    """Pieces of text that go on from `prompt`, each whole characters, until the document ends or the tokens do.

    A document is read as in training: after an end-of-document token, or what `frame` has in its place. An
    encoder-decoder reads it with that token behind. ValueError for an empty prompt where the tokenizer has none, and
    for what `check_prompt` refuses.
    """
    check_prompt(prompt)
    end = getattr(tokenizer, "end_of_document", None)
    ends, text = [] if end is None else [end], [int(i) for i in tokenizer.encode(prompt)]
    start, first = ends if frame.start is None else [frame.start], [] if frame.first is None else [frame.first]
    reads = isinstance(model, EncoderDecoder)
    ids, source = (start + first, first + text + ends) if reads else (start + text, None)
    known = getattr(tokenizer, "vocab_size", None)
    decoder = StreamDecoder(tokenizer.decode)
    limits: dict[str, Any] = {"max_new_tokens": max_new_tokens, "stop": end, "vocab_size": known}
    for token in stream_tokens(model, ids, sampling, source=source, **limits):
        if piece := decoder.push(token):
            yield piece
    if piece := decoder.finish():
        yield piece


def stream_tokens(
    model: LanguageModel,
    prompt: Sequence[int],
    sampling: Sampling = Sampling(),  # noqa: B008
    *,
    max_new_tokens: int,
    stop: int | None = None,
    vocab_size: int | None = None,
    source: Sequence[int] | None = None,
) -> Iterator[int]:
    """Token ids that follow `prompt`; `stop` ends them and is not given out; ids from `vocab_size` on never come.

    `source`: what an encoder-decoder reads; `prompt` is then the beginning of its target. Past the model's longest
    sequence it goes on from the last half of what it can hold. RunError where the model gives numbers that are not
    finite.
    """
    if model.config.classify != "none":
        raise ConfigError(f"model.classify={model.config.classify}: tells classes and cannot generate text")
    if model.config.kind not in ("decoder", "encoder-decoder"):
        raise ConfigError(f"model.family={model.config.family}: sees both sides of a token and cannot generate text")
    if not prompt:
        raise ValueError("prompt: is empty and the tokenizer has no end-of-document token; give at least one token")
    generator = torch.Generator().manual_seed(sampling.seed)
    longest = model.config.max_length
    if source is not None and not 0 < len(source) <= longest:
        raise ValueError(f"source: has {len(source)} tokens; expected 1 to {longest}, the model's longest")
    tokens, unread = list(prompt), list(prompt[-longest:])
    cache = _build_cache(model, len(unread) + max_new_tokens)
    for _ in range(max_new_tokens):
        if cache.length + len(unread) > cache.size:
            unread = tokens[-max(longest // 2, 1) :]
            cache = _build_cache(model, longest)
        logits = next_logits(model, unread, cache, source)[:vocab_size]
        if not logits.isfinite().all():
            raise RunError("the model gives numbers that are not finite: it diverged; take an earlier checkpoint")
        token = choose(logits, sampling, generator)
        if token == stop:
            return
        yield token
        tokens.append(token)
        unread = [token]


@torch.inference_mode()
def next_logits(
    model: LanguageModel, unread: Sequence[int], cache: Cache, source: Sequence[int] | None = None
) -> Tensor:
    """float32 logits [V] on the CPU of the token after `unread`, which joins what the cache holds.

    `source` is read where the cache is empty.
    """
    training = model.training
    model.eval()
    try:
        device = model.head_weight.device
        read = None if source is None or cache.length else torch.tensor([source], device=device)
        hidden = model.hidden(Inputs(torch.tensor([unread], device=device), encoder_ids=read), cache=cache)
        return model.logits(hidden[0, -1]).float().cpu()
    finally:
        model.train(training)


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token id drawn from logits [V]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    p = probabilities(logits, sampling)
    return int(torch.multinomial(p, 1, generator=generator))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """What tokens [V] are drawn with: temperature, then the top_k likeliest, then the likeliest that hold top_p.

    top_p keeps the fewest tokens whose probability reaches it, one at least (Holtzman et al. 2020).
    """
    # Far below any difference of two logits: smaller ones would overflow.
    temperature = max(sampling.temperature, 1e-30)
    order = torch.sort((logits - logits.max()) / temperature, descending=True, stable=True)
    p = order.values.softmax(-1)
    if sampling.top_k:
        p[sampling.top_k :] = 0
        p /= p.sum()
    before = p.cumsum(-1) - p  # what likelier tokens hold
    p[1:] = torch.where(before[1:] < sampling.top_p, p[1:], 0)
    return torch.zeros_like(p).scatter_(0, order.indices, p / p.sum())


def _build_cache(model: LanguageModel, tokens: int) -> Cache:
    return model.build_cache(min(tokens, model.config.max_length))
