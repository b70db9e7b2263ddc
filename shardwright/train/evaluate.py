"""Validation: loss, perplexity and bits per byte over a split, and what xz needs for the same text.

Bits per byte compare models of any tokenizer: the nats of all tokens, in bits, over the UTF-8 bytes of the text.
"""

from __future__ import annotations

import lzma
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from shardwright.data.loader import Loader
from shardwright.data.manifest import Manifest
from shardwright.data.order import Plan
from shardwright.data.pack import Packing
from shardwright.data.remote import is_remote
from shardwright.data.shards import Shard
from shardwright.data.stream import ValidationStream
from shardwright.data.tokenizers import Tokenizer
from shardwright.train.step import Batch, LossModel

XZ_LIMIT = 64 << 20  # bytes of text: above this, compressing it takes minutes


class Validation:
    """A validation split as batches of a fixed shape, the same at every evaluation."""

    def __init__(
        self, stream: ValidationStream, packing: Packing, *, length: int, batch: int, device: torch.device
    ) -> None:
        self.stream, self.packing, self.length, self.batch, self.device = stream, packing, length, batch, device

    def batches(self, most: int | None = None) -> Iterator[Batch]:
        """Batches until the split ends or `most` tokens were read."""
        plan = Plan(global_batch=self.batch, micro_batch=self.batch, lanes=1)
        tokens = 0
        with Loader(self.stream, plan, self.packing, workers="thread", device=self.device) as loader:
            for step in loader.start():
                yield from step.micro_batches
                tokens += step.count * self.length
                if most is not None and tokens >= most:
                    return

    def text_bytes(self, targets: float) -> float:
        """UTF-8 bytes of the text behind `targets` predicted tokens: the split's own, or its share of them."""
        return self.stream.text_bytes * targets / self.stream.num_tokens


def evaluate(
    model: LossModel, validation: Validation, most: int | None = None, stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """`val_loss`, `val_perplexity` and `val_bits_per_byte`; the host reads the device once, at the end.

    None where `stop`, asked before each batch, says to leave.
    """
    training = model.training
    model.eval()
    step = torch.zeros((), dtype=torch.int64, device=validation.device)
    total = torch.zeros(2, dtype=torch.float64, device=validation.device)
    with torch.no_grad():
        for batch in validation.batches(most):
            if stop():
                break
            sums, counts = model(batch, step), model.objective.count(batch)
            total += torch.stack([_sum(sums), _sum(counts)])
    model.train(training)
    if stop():
        return None
    nats, targets = total.tolist()
    return figures(nats, targets, validation.text_bytes(targets))


def _sum(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([t.double() for t in terms.values()]).sum()


def figures(nats: float, targets: float, text_bytes: float) -> dict[str, float]:
    """The three numbers of an evaluation, from its sums."""
    loss = nats / max(targets, 1)
    return {
        "val_loss": loss,
        "val_perplexity": math.exp(min(loss, 700)),
        "val_bits_per_byte": nats / math.log(2) / max(text_bytes, 1),
    }


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
    return 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / max(len(text), 1)
