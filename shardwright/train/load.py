"""Opening what holds a model: a run folder or one of its checkpoints, an imported model, a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from shardwright.adapt import apply_adapter
from shardwright.checkpoint import find_newest, read_manifest
from shardwright.checkpoint import load as load_checkpoint
from shardwright.config import Config, ConfigError
from shardwright.data.tokenizers import Frame, Tokenizer
from shardwright.interop.folder import is_huggingface, read_ids
from shardwright.interop.tokenizer import load_tokenizer
from shardwright.model.families import build_model
from shardwright.model.transformer import LanguageModel
from shardwright.parallel.mesh import choose_device
from shardwright.train.folder import CHECKPOINTS, CONFIG
from shardwright.train.imports import IMPORTED, open_huggingface
from shardwright.train.settings import read_config


@dataclass
class Loaded:
    """A model ready to be called, with what belongs to it."""

    model: LanguageModel
    config: Config
    folder: Path
    checkpoint: Path  # the folder itself where it is Hugging Face's
    known_tokenizer: Tokenizer | None
    imported_ids: Mapping[str, int] = field(default_factory=dict)  # special tokens by Hugging Face's files

    @property
    def frame(self) -> Frame:
        """The special tokens around a text: those of the run, or what Hugging Face's files say of an imported model."""
        objective, theirs = self.config.objective, self.imported_ids
        use, known = "pad" if objective.name == "span" else getattr(objective, "start", "end"), objective.special_tokens
        start = theirs.get("bos" if self.model.config.kind == "decoder" else "decoder_start")
        begins = objective.name == "denoise" or getattr(objective, "begin", False)
        return Frame(known.get(use, start), known.get("bos", theirs.get("bos")) if begins else None)

    def __call__(self, **inputs: Any) -> Mapping[str, Any]:
        """Call the model by Hugging Face's names: `loaded(input_ids=...)["logits"]`; without gradients."""
        with torch.no_grad():
            return self.model(**inputs)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; ConfigError where the folder of an imported model has none."""
        if self.known_tokenizer is None:
            raise ConfigError(f"{self.folder}: holds no tokenizer; put the model's tokenizer.json there")
        return self.known_tokenizer


def load(path: str | Path, *, device: str = "auto") -> Loaded:
    """The float32 model of a run folder (its newest whole checkpoint), of one checkpoint, of an imported model or of a
    Hugging Face folder, in evaluation mode.

    ConfigError where nothing whole lies there, its tokenizer is another than in training, or Hugging Face's model is
    none that is known here; CheckpointError where the checkpoint's model is not the config's.
    """
    if is_huggingface(Path(path)) and not (Path(path) / CONFIG).is_file():
        return _load_huggingface(Path(path), device)
    folder, checkpoint = locate(path)
    config = read_config(folder / CONFIG)
    tokenizer = load_known_tokenizer(folder, config)
    model = build_model(config.model)  # type: ignore[arg-type]
    apply_adapter(model, config.adapt)
    weights = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    load_checkpoint(checkpoint, weights, within="model.", cast=True)  # masters may be float64, imported ones bfloat16
    ids = read_ids(folder) if IMPORTED in read_manifest(checkpoint).state else {}
    return Loaded(model.to(choose_device(device)).eval(), config, folder, checkpoint, tokenizer, ids)


def _load_huggingface(folder: Path, device: str) -> Loaded:
    opened = open_huggingface(folder)
    model = build_model(opened.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(opened.tensors[name])
    ids = read_ids(folder)
    return Loaded(model.to(choose_device(device)).eval(), opened.config(), folder, folder, opened.tokenizer, ids)


def load_known_tokenizer(folder: Path, config: Config) -> Tokenizer | None:
    """The tokenizer of a run folder or imported model; None where the latter came without one.

    ConfigError where it is not the one that the model was trained with.
    """
    expected = config.data.tokenizer
    if expected is None and load_tokenizer(folder) is None:
        return None
    tokenizer = Tokenizer.load(folder, end_of_document=config.data.end_of_document)
    if expected not in (None, tokenizer.sha256):
        raise ConfigError(
            f"{folder / tokenizer.file}: is not the tokenizer of the training (sha256 {tokenizer.sha256[:12]}..., "
            f"{CONFIG} says {expected[:12]}...); restore it, for example from the prepared folder"
        )
    return tokenizer


def locate(given: str | Path) -> tuple[Path, Path]:
    """(folder, checkpoint) of a run, of an imported model, or of one checkpoint of either."""
    path = Path(given)
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
