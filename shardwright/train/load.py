"""Opening what a run left: model, tokenizer and config from a run folder or one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from shardwright.checkpoint import find_newest
from shardwright.checkpoint import load as load_checkpoint
from shardwright.config import Config, ConfigError
from shardwright.data.tokenizers import Tokenizer
from shardwright.model.families import build_model
from shardwright.model.transformer import LanguageModel
from shardwright.parallel.mesh import choose_device
from shardwright.train.folder import CHECKPOINTS, CONFIG
from shardwright.train.settings import read_config


@dataclass
class Loaded:
    """A model ready to be called, with what belongs to it."""

    model: LanguageModel
    tokenizer: Tokenizer
    config: Config
    checkpoint: Path

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Call the model by Hugging Face's names: `loaded(input_ids=...)["logits"]`; without gradients."""
        with torch.no_grad():
            return self.model(**inputs)


def load(path: str | Path, *, device: str = "auto") -> Loaded:
    """The float32 model of a run folder (its newest whole checkpoint) or of one checkpoint, in evaluation mode.

    ConfigError where nothing whole lies there or its tokenizer is another than in training, CheckpointError where the
    checkpoint's model is not the config's.
    """
    folder, checkpoint = _locate(Path(path))
    config = read_config(folder / CONFIG)
    tokenizer = _load_tokenizer(folder, config)
    model = build_model(config.model)  # type: ignore[arg-type]
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    load_checkpoint(checkpoint, weights, within="model.", cast=True)  # the masters of an fp64 run are float64
    return Loaded(model.to(choose_device(device)).eval(), tokenizer, config, checkpoint)


def _load_tokenizer(folder: Path, config: Config) -> Tokenizer:
    tokenizer = Tokenizer.load(folder, end_of_document=config.data.end_of_document)
    expected = config.data.tokenizer
    if expected not in (None, tokenizer.sha256):
        raise ConfigError(
            f"{folder / tokenizer.file}: is not the tokenizer of the training (sha256 {tokenizer.sha256[:12]}..., "
            f"{CONFIG} says {expected[:12]}...); restore it, for example from the prepared folder"
        )
    return tokenizer


def _locate(path: Path) -> tuple[Path, Path]:
    """(run folder, checkpoint)."""
    if (path / CONFIG).is_file():
        checkpoint, skipped = find_newest(path / CHECKPOINTS)
        if checkpoint is not None:
            return path, checkpoint
        why = f": {skipped[0][1]}" if skipped else "; train it first"
        raise ConfigError(f"{path}: holds no whole checkpoint{why}")
    run = path.parent.parent
    if path.parent.name == CHECKPOINTS and (run / CONFIG).is_file():
        return run, path
    raise ConfigError(f"{path}: is neither a run folder nor a checkpoint of one; expected {CONFIG} in it")
