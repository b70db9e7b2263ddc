"""Validation: loss, perplexity and bits per byte over a split, and what xz needs for the same text.

Bits per byte compare models of any tokenizer: the nats of all tokens, in bits, over the UTF-8 bytes of the text.
"""

from __future__ import annotations

import lzma
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from shardwright.data.examples import ValidationExamples
from shardwright.data.loader import Loader
from shardwright.data.manifest import Manifest
from shardwright.data.order import Plan
from shardwright.data.remote import is_remote
from shardwright.data.shards import Shard
from shardwright.data.stream import ValidationStream
from shardwright.data.tokenizers import Tokenizer
from shardwright.log import Bar, progress
from shardwright.objective.objective import Objective
from shardwright.parallel.mesh import World
from shardwright.train.stages import Batch, Stages

XZ_LIMIT = 64 << 20  # bytes of text: above this, compressing it takes minutes
XZ_CHUNK = 1 << 20
BAR_SECONDS = 2.0


class Validation:
    """A validation split as batches of a fixed shape, the same at every evaluation."""

    def __init__(
        self,
        stream: ValidationStream | ValidationExamples,
        objective: Objective,
        *,
        length: int,
        batch: int,
        world: World,
    ) -> None:
        self.stream, self.objective, self.length, self.batch, self.world = stream, objective, length, batch, world

    def batches(self, most: int | None = None, at_once: int = 1) -> Iterator[list[Batch]]:
        """This rank's batches, `at_once` at a time, until the split ends or one sequence more exceeds `most` tokens.

        All ranks together take the same sequences under every layout, each of them the same number of batches; the
        last ones are filled up with rows of weight zero.
        """
        ranks, index = self.world.degree("data"), self.world.index("data")
        size = self.batch * at_once * ranks
        end = self.stream.num_sequences if most is None else min(self.stream.num_sequences, max(most // self.length, 1))
        plan = Plan(
            global_batch=lambda _step, drawn: min(size, max(end - drawn, 1)),
            micro_batch=self.batch,
            lanes=1,
            data_rank=index,
            data_size=ranks,
        )
        bar = late_progress(end * self.length, "tokens", "evaluate")
        loader = Loader(self.stream, plan, self.objective, workers="thread", device=self.world.device)
        with loader, bar as advance:
            for step in loader.start():
                yield fill_up(step.micro_batches, at_once)
                advance(step.count * self.length)
                if step.drawn + step.count >= end:
                    return

    def text_bytes(self, targets: float) -> float:
        """UTF-8 bytes of the text behind `targets` predicted tokens: the split's own, or its share of them."""
        return self.stream.text_bytes * targets / self.stream.num_tokens


@contextmanager
def late_progress(total: float, unit: str, description: str) -> Iterator[Callable[[float], None]]:
    """A bar that shows once the job has taken BAR_SECONDS: most evaluations are over before. Gives its `advance`."""
    begin, done = time.monotonic(), 0.0
    bar: Bar | None = None
    with ExitStack() as stack:

        def advance(count: float) -> None:
            nonlocal bar, done
            count = min(count, total - done)
            done += count
            if bar is not None:
                bar.advance(count)
            elif time.monotonic() - begin > BAR_SECONDS:
                bar = stack.enter_context(progress(total, unit, description, completed=done))

        yield advance


def fill_up(batches: Sequence[Batch], size: int) -> list[Batch]:
    """`size` batches: those given, then the last of them again with weights of zero."""
    empty = {n: torch.zeros_like(t) if n.endswith("weights") else t for n, t in batches[-1].items()}
    return [*batches, *[empty] * (size - len(batches))]


def evaluate(
    stages: Stages, validation: Validation, most: int | None = None, stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """`val_loss` and `val_perplexity`, the loss of each term where there are several, and `val_bits_per_byte` where the
    objective predicts every token; the host reads the device once, at the end.

    None where `stop`, asked before each batch and the same on every rank, says to leave.
    """
    world, device = stages.world, stages.world.device
    stages.train(False)
    stages.begin(torch.zeros((), dtype=torch.int64, device=device))
    nats = torch.zeros(len(stages.objective.terms), dtype=torch.float64, device=device)
    targets = torch.zeros_like(nats)
    stopped = False
    for batches in validation.batches(most, stages.passes.at_once):
        stopped = stop()
        if stopped:
            break
        batches = [stages.cut(batch) for batch in batches]
        nats += stages.evaluate(batches).double()
        targets += stages.counts(batches)
    stages.train(True)
    if stopped:
        return None
    nats = world.sum(nats) / world.loss_copies
    sums, counts = torch.stack([nats, targets]).tolist()
    return _figures(sums, counts, validation)


def _figures(nats: Sequence[float], targets: Sequence[float], validation: Validation) -> dict[str, float]:
    """The numbers of an evaluation, from the sums of each term; perplexity is of the first."""
    terms = validation.objective.terms
    losses = {term: n / max(t, 1) for term, n, t in zip(terms, nats, targets, strict=True)}
    first = next(iter(losses.values()))
    figures = {
        "val_loss": sum(weight * losses[term] for term, weight in terms.items()),
        "val_perplexity": math.exp(min(first, 700)),
    }
    if len(losses) > 1:
        figures |= {f"val_{term}_loss": loss for term, loss in losses.items()}
    if validation.objective.every_token:
        figures["val_bits_per_byte"] = nats[0] / math.log(2) / max(validation.text_bytes(targets[0]), 1)
    return figures


def split_text(manifests: Sequence[Manifest], tokenizer: Tokenizer) -> bytes | None:
    """The validation text as UTF-8, decoded from its tokens, documents one after the other.

    None where it is of several sources, lies elsewhere, or is so long that xz would take minutes.
    """
    manifest, split = manifests[0], "validation"
    if len(manifests) > 1 or is_remote(manifest.root) or manifest.split(split).text_bytes > XZ_LIMIT:
        return None
    pieces = []
    for info in manifest.split(split).shards:
        shard = Shard(f"{manifest.root}/{info.path}", f"{manifest.root}/{info.index}")
        bounds = shard.document_offsets.tolist()
        for start, stop in zip(bounds, bounds[1:], strict=False):
            pieces.append(tokenizer.decode(shard.tokens(start, stop - 1)).encode())
    return b"".join(pieces)


def xz_bits_per_byte(text: bytes) -> float:
    """Bits that `xz -9e` needs for a byte of this text: the figure a language model has to beat."""
    compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
    size = 0
    with late_progress(len(text), "bytes", "compress with xz") as advance:
        for start in range(0, len(text), XZ_CHUNK):
            chunk = text[start : start + XZ_CHUNK]
            size += len(compressor.compress(chunk))
            advance(len(chunk))
    return 8 * (size + len(compressor.flush())) / max(len(text), 1)
