"""The end of a run: the figures it concludes with, made once whatever was killed, and what the user is told."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwright.log import get_logger
from shardwright.parallel.mesh import World
from shardwright.train.build import Corpus
from shardwright.train.evaluate import split_text, xz_bits_per_byte
from shardwright.train.metrics import read_metrics
from shardwright.train.result import Result, read_result, write_result


class Ending:
    """What is known of the end of the run in `folder`, and how it is concluded."""

    def __init__(self, folder: Path, corpus: Corpus, world: World) -> None:
        self.folder, self.corpus, self.world = folder, corpus, world

    def known(self, step: int, tokens: int) -> Result | None:
        """What a start before this one concluded; a run killed after its last evaluation has the figures already."""
        found = read_result(self.folder, step)
        if found is not None:
            return found
        record = self.evaluated(step)
        return None if record is None else self.conclude(step, tokens, record)

    def evaluated(self, step: int) -> dict[str, Any] | None:
        """The newest evaluation that was logged at this step."""
        records = [r for r in read_metrics(self.folder) if r["step"] == step and "val_loss" in r]
        return records[-1] if records else None

    def conclude(self, step: int, tokens: int, figures: Mapping[str, Any]) -> Result:
        """The result by the figures of the last evaluation (none where nothing was kept back); rank 0 writes it."""
        bits = figures.get("val_bits_per_byte")
        compared = bits is not None and self.world.leads
        text = split_text(self.corpus.manifests, self.corpus.tokenizer) if compared else None
        result = Result(
            run=str(self.folder),
            step=step,
            tokens=tokens,
            stopped=False,
            val_loss=figures.get("val_loss"),
            val_bits_per_byte=bits,
            xz_bits_per_byte=xz_bits_per_byte(text) if text else None,
        )
        if self.world.leads:
            write_result(self.folder, result)
        return result


def tell(result: Result) -> None:
    """Log how a finished run ended."""
    log = get_logger()
    log.info("done: %s, %d steps, %s tokens", result.run, result.step, f"{result.tokens:,}")
    if result.xz_bits_per_byte is not None:
        log.info("xz -9e: %.3f bits per byte", result.xz_bits_per_byte)
    if result.val_bits_per_byte is not None:
        log.info("shardwright: %.3f bits per byte on the same validation text", result.val_bits_per_byte)
