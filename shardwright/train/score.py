"""`shardwright eval`: the validation figures of what a run has learned so far."""

from __future__ import annotations

from pathlib import Path

from shardwright.data.manifest import Manifest
from shardwright.parallel.mesh import World
from shardwright.train.build import build_objective, build_validation
from shardwright.train.evaluate import evaluate, split_text, xz_bits_per_byte
from shardwright.train.load import load
from shardwright.train.step import LossModel


def evaluate_run(path: str | Path, data: str | None = None) -> dict[str, float]:
    """Loss, perplexity and bits per byte of a run or checkpoint on its own validation split, or that of `data`.

    In float32 and uncompiled. Beside them what xz needs for the same text, where it is one local source.
    """
    loaded = load(path)
    config = loaded.config
    if data is not None:
        config.data.path, config.data.sources = data, []
    device = next(loaded.model.parameters()).device
    validation = build_validation(config, World(0, 1, device))
    model = LossModel(loaded.model, build_objective(config), config.train.seed)
    answer = evaluate(model, validation)
    assert answer is not None  # nobody asked it to stop
    text = split_text([Manifest.load(source.path) for source in config.data.mixture()], loaded.tokenizer)
    return answer if text is None else {**answer, "xz_bits_per_byte": xz_bits_per_byte(text)}
