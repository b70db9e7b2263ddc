"""The teacher of a run that distils: which one it is, whether it fits, and the frozen model on this rank.

Above load.py, which opens whatever holds a model; build.py hands the model to the objective (objective/distill.py).
Every rank has a whole copy of it, in the run's format, beside its own part of the model that is trained.
Shapes: B batch, T tokens, E width of the teacher.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint.integrity import MANIFEST, sha256
from shardwright.config import Config, ConfigError, DistillConfig
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.folder import MODEL_CONFIG, is_huggingface
from shardwright.model.families import FAMILIES
from shardwright.objective.distill import check_distills
from shardwright.objective.heads import Heads
from shardwright.objective.objective import Objective
from shardwright.parallel.mesh import World
from shardwright.parallel.precision import FORMATS
from shardwright.train.folder import CONFIG
from shardwright.train.imports import open_huggingface
from shardwright.train.load import load, load_known_tokenizer, locate
from shardwright.train.settings import read_config
from shardwright.train.specials import fit_special_tokens
from shardwright.train.stages import LossModel


class Teacher:
    """A frozen model that is asked what it makes of a batch. No part of the model that learns from it."""

    def __init__(self, model: LossModel) -> None:
        self.model = model.eval().requires_grad_(False)

    def __call__(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Heads]:
        """Hidden states [B, T, E] that its heads read, and these; without gradients."""
        inputs = self.model.inputs(batch)
        with torch.no_grad():
            hidden = self.model.model.hidden(inputs)
            return self.model.model.output(hidden, inputs), self.model.heads()


def open_teacher(distill: DistillConfig, config: Config, world: World, objective: Objective[Any]) -> Teacher:
    """The teacher on this rank's device, in the run's format."""
    model = load(distill.teacher, device="cpu").model
    dtype = FORMATS[config.precision.compute]
    for parameter in model.parameters():  # not buffers: a model keeps those in the format that it needs
        parameter.data = parameter.data.to(world.device, dtype)
    return Teacher(LossModel(model.to(world.device), objective, config.train.seed))


def fit_teacher(config: Config, tokenizer: Tokenizer) -> None:
    """Fill in what names the teacher; ConfigError where it is another one than given, or cannot teach this model.

    Call it when vocabulary and special tokens are settled.
    """
    distill = config.distill
    if distill is None:
        return
    check_distills(config.objective.name)
    path = Path(distill.teacher).resolve()
    theirs, known, found = _inspect(path)
    where = f"distill.teacher={distill.teacher}"
    _check_tokens(config, theirs, known, tokenizer, where)
    _check_model(config, theirs, where)
    if distill.sha256 not in (None, found):
        raise ConfigError(
            f"distill.sha256: names {str(distill.sha256)[:12]}..., the weights in {distill.teacher} are {found[:12]}"
            "...; restore that teacher or drop the key"
        )
    distill.teacher, distill.sha256 = str(path), found


def _inspect(path: Path) -> tuple[Config, Tokenizer | None, str]:
    """(config, tokenizer where there is one, sha256 of the weights) of a teacher, which is not loaded for it."""
    if is_huggingface(path) and not (path / CONFIG).is_file():
        opened = open_huggingface(path)
        return opened.config(), opened.tokenizer, _hash_files(path)
    folder, checkpoint = locate(path)
    config = read_config(folder / CONFIG)
    # The manifest has the checksums of all the rest.
    return config, load_known_tokenizer(folder, config), sha256((checkpoint / MANIFEST).read_bytes())


def _hash_files(folder: Path) -> str:
    """sha256 of a Hugging Face folder's config and weights."""
    total = hashlib.sha256()
    for file in [folder / MODEL_CONFIG, *sorted(folder.glob("*.safetensors"))]:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def _check_tokens(config: Config, theirs: Config, known: Tokenizer | None, tokenizer: Tokenizer, where: str) -> None:
    """ConfigError unless every id means the same to both."""
    if known is not None and known.sha256 != tokenizer.sha256:
        raise ConfigError(
            f"{where}: reads tokenizer {known.sha256[:12]}..., the corpus was prepared with "
            f"{tokenizer.sha256[:12]}...; prepare the text with the teacher's, or choose another teacher"
        )
    size, own = theirs.model.vocab_size, config.model.vocab_size
    if size != own:
        raise ConfigError(
            f"{where}: knows {size} tokens and the model {own}; both need the same, with model.vocab_size={size}"
        )
    if not theirs.objective.special_tokens and known is not None and theirs.objective.name == config.objective.name:
        fit_special_tokens(theirs, known)
    for use, number in theirs.objective.special_tokens.items():
        if config.objective.special_tokens.get(use, number) != number:
            raise ConfigError(
                f"{where}: has id {number} for the special token {use!r}, the run "
                f"{config.objective.special_tokens[use]}; set objective.special_tokens.{use}={number}"
            )


def _check_model(config: Config, theirs: Config, where: str) -> None:
    """ConfigError unless the teacher can read the run's batches."""
    kind, own = FAMILIES[theirs.model.family].kind, FAMILIES[config.model.family].kind
    if kind != own:
        raise ConfigError(f"{where}: is a {kind}, and model.family={config.model.family} a {own}; choose a {own}")
    length, longest = config.data.sequence_length, theirs.model.max_length  # type: ignore[attr-defined]
    if length > longest:
        raise ConfigError(
            f"data.sequence_length={length}: is longer than the teacher allows; lower it to {longest} or choose another"
        )
