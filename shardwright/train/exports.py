"""A model of ours as a Hugging Face folder, proven by opening it: what `shardwright export` calls.

The way back of imports.py, and as it one tensor at a time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.checkpoint import StoredTensors
from shardwright.config import ConfigError, RunError
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.check import Verdict, check_export, check_tokenizer
from shardwright.interop.folder import (
    GENERATION,
    MODEL_CONFIG,
    SPECIAL_IDS,
    copy_companions,
    is_huggingface,
    read_json,
    whole_folder,
    write_json,
)
from shardwright.interop.huggingface import Exported, folders_beside, write_config
from shardwright.interop.tokenizer import special_ids, write_tokenizer
from shardwright.interop.weights import write_weights
from shardwright.model.transformer import TransformerConfig
from shardwright.train.folder import CONFIG
from shardwright.train.imports import counted, naming, num_bytes, number_format
from shardwright.train.load import load_known_tokenizer, locate
from shardwright.train.settings import read_config
from shardwright.train.writing import writing

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


@dataclass(frozen=True)
class Export:
    """What an export has made, and what a check of it found."""

    output: str
    tensors: int
    bytes: int
    files: int
    verdict: Verdict | None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def export_model(
    path: str | Path, output: Path, *, dtype: str | None = None, shard: str = "5GB", check: bool = True
) -> Export:
    """Write the model of a run folder, checkpoint or imported model into the new Hugging Face folder `output`.

    What was written is opened again and held against ours, unless `check` is False: RunError where it differs, and
    nothing is left of it. ConfigError where Hugging Face's format cannot say what the model is.
    """
    folder, checkpoint = locate(path)
    config = read_config(folder / CONFIG)
    model: TransformerConfig = config.model  # type: ignore[assignment]
    tokenizer = load_known_tokenizer(folder, config)
    stored = StoredTensors(checkpoint, within="model.")
    with naming(folder):
        parts = {
            inside: (write_config(model, inside), Exported(model, stored, stored.meta, number_format(dtype), inside))
            for inside in ["", *folders_beside(model)]
        }
    files, verdict = 0, None
    with writing(output, "--output"), whole_folder(output) as place:
        for inside, (raw, tensors) in parts.items():
            (place / inside).mkdir(exist_ok=True)
            with counted(num_bytes(tensors.meta), "exporting", tensors.__getitem__) as read:
                files += write_weights(place / inside, tensors.meta, read, shard_bytes(shard))
            _write_companions(place / inside, folder, {**raw, **_formats(tensors.meta)}, tokenizer, model.max_length)
            if check:
                verdict = _checked(check_export(place / inside, model, stored, tensors, inside), output)
        if check and tokenizer is not None:
            check_tokenizer(place, tokenizer)
    every = [tensors for _, tensors in parts.values()]
    return Export(str(output), sum(map(len, every)), sum(num_bytes(one.meta) for one in every), files, verdict)


def _checked(verdict: Verdict, output: Path) -> Verdict:
    if not verdict.passed:
        raise RunError(f"{output}: is not written: {verdict.text}; report this with the model section of {CONFIG}")
    return verdict


def shard_bytes(text: str) -> int:
    """Bytes in 5GB, 500MB or 1.5GB, as Hugging Face counts them: a GB is 10^9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def _write_companions(
    place: Path, folder: Path, raw: dict[str, Any], tokenizer: Tokenizer | None, longest: int
) -> None:
    """config.json, generation_config.json and the tokenizer's files; what came with an imported model is kept."""
    copy_companions(folder, place)
    known = read_json(place / MODEL_CONFIG) if is_huggingface(place) else {}
    ids = {key: known[key] for key in SPECIAL_IDS if known.get(key) is not None}
    if not ids and tokenizer is not None:
        ids = special_ids(tokenizer)
    none = {"bos_token_id": None, "eos_token_id": None}  # else transformers takes those of the published vocabulary
    write_json(place / MODEL_CONFIG, {**raw, **none, **ids})
    if not (place / GENERATION).is_file():
        write_json(place / GENERATION, ids)
    if tokenizer is not None:
        write_tokenizer(place, tokenizer, longest)


def _formats(meta: Mapping[str, Tensor]) -> dict[str, str]:
    """The number format of most of the values, by its key in config.json and by the one of transformers 4."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in meta.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    name = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}
