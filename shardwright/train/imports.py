"""A Hugging Face model as a folder like a run's: what `shardwright import` calls, and what opens their folders.

Stands on interop, which knows their files and names, and on the folder and settings of a run. One tensor is in memory
at a time. An imported model is a folder with config.yaml, one checkpoint that holds weights alone, and what came with
them; runs begin from it, and whatever opens a run opens it. exports.py is the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint import save_streamed
from shardwright.config import Config, ConfigError, parse, to_yaml
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.folder import (
    MODEL_CONFIG,
    copy_companions,
    find_folder,
    is_huggingface,
    read_json,
    whole_folder,
)
from shardwright.interop.huggingface import Imported, ImportedTogether
from shardwright.interop.model_config import may_be_beside, read_config
from shardwright.interop.tokenizer import load_tokenizer
from shardwright.interop.weights import WeightFiles
from shardwright.log import get_logger, progress
from shardwright.model.transformer import TransformerConfig
from shardwright.train.folder import CHECKPOINTS, CONFIG
from shardwright.train.settings import SCHEMA, usual_objective
from shardwright.train.writing import writing

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
QUIET_BYTES = 1 << 30  # less than this takes a second or two: no bar
LENGTH = 1024  # most tokens of a sequence that an imported model's config.yaml asks for
IMPORTED = "imported"  # key in the state of a checkpoint that holds an imported model, in place of a run's position


@dataclass(frozen=True)
class Opened:
    """A Hugging Face folder, read as far as its headers: `tensors` are ours, and come when they are asked for."""

    folder: Path
    model: TransformerConfig
    tensors: ImportedTogether
    tokenizer: Tokenizer | None

    def config(self) -> Config:
        """A run's config with this model; how to train it is left to whoever begins a run from it."""
        known = self.tokenizer
        length = min(self.model.max_length, LENGTH)
        data = {} if known is None else {"tokenizer": known.sha256, "end_of_document": known.end_of_document}
        raw = {
            "model": self.model.model_dump(),
            "objective": usual_objective(self.model),
            "data": {**data, "sequence_length": length},
            "batch": {"sequences": 8},
            "train": {"steps": 1000},
        }
        return parse(SCHEMA, raw, str(self.folder))


@dataclass(frozen=True)
class Import:
    """What an import has made."""

    output: str
    tensors: int
    bytes: int
    tokenizer: str | None  # its file

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def open_huggingface(name: str | Path, dtype: torch.dtype | None = None) -> Opened:
    """Config, tokenizer and (lazily) tensors of a Hugging Face folder or name; ConfigError where one does not fit."""
    folder = find_folder(str(name))
    with naming(folder):
        raw = read_json(folder / MODEL_CONFIG)
        beside = [part for part in may_be_beside(raw) if is_huggingface(folder / part)]
        model = read_config(raw, {part: read_json(folder / part / MODEL_CONFIG) for part in beside})
        parts = {part: _open_part(model, folder, part, dtype) for part in ("", *beside)}
        tensors = ImportedTogether(model, parts)
    return Opened(folder, model, tensors, load_tokenizer(folder, raw.get("eos_token_id")))


def _open_part(model: TransformerConfig, folder: Path, part: str, dtype: torch.dtype | None) -> Imported:
    """What the model in `part` of a folder holds of ours."""
    weights = WeightFiles(folder / part)
    found = Imported(model, weights, weights.meta, dtype, part)
    if found.spare:
        get_logger().warning("%s: passed over, of a head that the model has not: %s", folder, ", ".join(found.spare))
    return found


def import_model(name: str, output: Path, dtype: str | None = None) -> Import:
    """Write the model of a Hugging Face folder or hub name into the new folder `output`, its tensors in `dtype`."""
    opened = open_huggingface(name, number_format(dtype))
    meta = {f"model.{name}": tensor for name, tensor in opened.tensors.meta.items()}
    total = num_bytes(meta)
    with writing(output, "--output"), whole_folder(output) as place:
        with counted(total, "importing", lambda name: opened.tensors[name.removeprefix("model.")]) as read:
            save_streamed(place / CHECKPOINTS, meta, read, {IMPORTED: {"from": name}}, step=0)
        copy_companions(opened.folder, place)
        if opened.tokenizer is not None:
            opened.tokenizer.save(place)
        (place / CONFIG).write_text(to_yaml(opened.config()), "utf-8")
    return Import(str(output), len(meta), total, None if opened.tokenizer is None else opened.tokenizer.file)


def number_format(name: str | None) -> torch.dtype | None:
    """The format that --dtype names; None where it is not given."""
    if name is not None and name not in FORMATS:
        raise ConfigError(f"--dtype {name}: expected one of {', '.join(FORMATS)}")
    return None if name is None else FORMATS[name]


def num_bytes(meta: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in meta.values())


@contextmanager
def naming(place: Path) -> Iterator[None]:
    """Within, what does not fit between their config or tensors and ours names the folder."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error) if str(place) in str(error) else f"{place}: {error}") from None
    except ValueError as error:
        raise ConfigError(f"{place}: {error}") from None


@contextmanager
def counted(total: int, doing: str, read: Callable[[str], Tensor]) -> Iterator[Callable[[str], Tensor]]:
    """`read` under a bar of bytes."""
    with progress(total, "bytes", doing, quiet=True if total < QUIET_BYTES else None) as bar:

        def counted(name: str) -> Tensor:
            tensor = read(name)
            bar.advance(tensor.numel() * tensor.dtype.itemsize)
            return tensor

        yield counted
