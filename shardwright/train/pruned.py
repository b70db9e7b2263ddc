"""A model with zeros in its linear layers, as a folder like an imported one's: what `shardwright prune` calls.

Beside imports.py: a folder with config.yaml, one checkpoint of weights alone and what came with them, so runs begin
from it, with `train.keep_zeros` to leave the zeros, and an export takes it. One tensor is in memory at a time.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.adapt.prune import PATTERNS, choose, linear_weights, prune_2_of_4, prune_by_magnitude
from shardwright.checkpoint import StoredTensors, save_streamed
from shardwright.config import ConfigError, to_yaml
from shardwright.interop.folder import copy_companions, whole_folder
from shardwright.model.families import build_model
from shardwright.model.transformer import TransformerConfig
from shardwright.train.folder import CHECKPOINTS, CONFIG
from shardwright.train.imports import IMPORTED, counted, num_bytes
from shardwright.train.load import load_known_tokenizer, locate
from shardwright.train.settings import read_config
from shardwright.train.writing import writing


@dataclass(frozen=True)
class Pruned:
    """What pruning has made: `zeros` of `values` in the `tensors` that were pruned."""

    output: str
    tensors: int
    values: int
    zeros: int

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def prune_model(
    path: str | Path,
    output: Path,
    *,
    sparsity: float | None = None,
    pattern: str | None = None,
    include: str | None = None,
) -> Pruned:
    """Write the model of a run, checkpoint or imported model, pruned, into the new folder `output`.

    By magnitude with a share `sparsity` of zeros in each matrix, or by `pattern` 2:4; ConfigError unless one is given.
    """
    check_request(sparsity, pattern)
    folder, checkpoint = locate(path)
    config = read_config(folder / CONFIG)
    if config.adapt.method != "none":
        raise ConfigError(
            f"prune: {folder} has an adapter; take it in first: shardwright export {folder} --merge, then "
            "shardwright import"
        )
    tokenizer = load_known_tokenizer(folder, config)
    stored = StoredTensors(checkpoint, within="model.")
    chosen = set(choose(prunable(config.model), include))  # type: ignore[arg-type]
    counts = {"values": 0, "zeros": 0}

    def pruned(name: str) -> Tensor:
        name = name.removeprefix("model.")
        weight = stored[name]
        if name not in chosen:
            return weight
        weight = prune_2_of_4(weight, name) if sparsity is None else prune_by_magnitude(weight, sparsity)
        counts["values"] += weight.numel()
        counts["zeros"] += int((weight == 0).sum())
        return weight

    meta = {f"model.{name}": tensor for name, tensor in stored.meta.items()}
    with writing(output, "--output"), whole_folder(output) as place:
        with counted(num_bytes(meta), "pruning", pruned) as read:
            save_streamed(place / CHECKPOINTS, meta, read, {IMPORTED: {"from": str(path)}}, step=0)
        copy_companions(folder, place)
        if tokenizer is not None:
            tokenizer.save(place)
        alone = config.model_copy(update={"run": None, "begin": None, "distill": None})
        (place / CONFIG).write_text(to_yaml(alone), "utf-8")
    return Pruned(str(output), len(chosen), **counts)


def prunable(model: TransformerConfig) -> list[str]:
    """Names of the weights of the linear layers in all blocks."""
    with torch.device("meta"):
        return linear_weights((f"blocks.{n}", block) for n, block in build_model(model).blocks.items())


def check_request(sparsity: float | None, pattern: str | None) -> None:
    """ConfigError unless it is one of a share of zeros and a pattern."""
    if (sparsity is None) == (pattern is None):
        raise ConfigError("prune: give one of --sparsity 0.5 and --pattern 2:4")
    if sparsity is not None and not 0 < sparsity < 1:
        raise ConfigError(f"--sparsity {sparsity:g}: expected a share of zeros between 0 and 1")
    if pattern is not None and pattern not in PATTERNS:
        raise ConfigError(f"--pattern {pattern}: expected {' or '.join(PATTERNS)}")
