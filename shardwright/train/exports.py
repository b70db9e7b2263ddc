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
from shardwright.config import Config, ConfigError, RunError
from shardwright.data.tokenizers import Tokenizer
from shardwright.interop.check import Verdict, check_export, check_tokenizer
from shardwright.interop.folder import (
    GENERATION,
    GENERATION_IDS,
    MODEL_CONFIG,
    SPECIAL_IDS,
    copy_companions,
    is_huggingface,
    read_json,
    whole_folder,
    write_json,
)
from shardwright.interop.huggingface import Exported
from shardwright.interop.model_config import folders_beside, write_config
from shardwright.interop.peft import write_adapter
from shardwright.interop.tokenizer import special_ids, write_tokenizer
from shardwright.interop.weights import write_weights
from shardwright.log import get_logger
from shardwright.model.transformer import TransformerConfig
from shardwright.train.adapters import adapter_files, check_adapter_files
from shardwright.train.adapters import merge as merge_adapter
from shardwright.train.folder import CONFIG
from shardwright.train.imports import counted, naming, num_bytes, number_format
from shardwright.train.load import load_known_tokenizer, locate
from shardwright.train.settings import read_config
from shardwright.train.specials import trained_ids
from shardwright.train.writing import writing

#: Else transformers takes those of the published vocabulary.
NONE = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
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
    path: str | Path,
    output: Path,
    *,
    dtype: str | None = None,
    shard: str = "5GB",
    check: bool = True,
    merge: bool = False,
) -> Export:
    """Write the model of a run folder, checkpoint or imported model into the new Hugging Face folder `output`.

    What was written is opened again and held against ours, unless `check` is False: RunError where it differs, and
    nothing is left of it. Of an adapted run it is a folder of peft's with the adapter alone, or, with `merge`, the
    model with the adapter in its matrices. ConfigError where Hugging Face's format cannot say what the model is.
    """
    folder, checkpoint = locate(path)
    config = read_config(folder / CONFIG)
    model: TransformerConfig = config.model  # type: ignore[assignment]
    tokenizer = load_known_tokenizer(folder, config)
    whole = StoredTensors(checkpoint, within="model.")
    if merge and config.adapt.method == "none":
        raise ConfigError(f"--merge: {folder} has no adapter; export it without")
    if config.adapt.method != "none" and not merge:
        return _export_adapter(folder, output, config, whole, number_format(dtype), check)
    stored = merge_adapter(whole, config) if merge else whole
    with naming(folder):
        parts = ("", *folders_beside(model))
        raws = {part: write_config(model, part) for part in parts}
        tensors = {part: Exported(model, stored, stored.meta, number_format(dtype), part) for part in parts}
    files, most = 0, shard_bytes(shard)
    with writing(output, "--output"), whole_folder(output) as place:
        copy_companions(folder, place)
        ids = _special_ids(place, config, tokenizer)
        for part, its in tensors.items():
            (place / part).mkdir(exist_ok=True)
            with counted(num_bytes(its.meta), f"exporting {part}".strip(), its.__getitem__) as read:
                files += write_weights(place / part, its.meta, read, most)
            write_json(place / part / MODEL_CONFIG, {**NONE, **ids, **raws[part], **_formats(its.meta)})
        _warn_of_padding(raws[""].get("pad_token_id"), ids.get("pad_token_id"))
        _write_companions(place, ids, tokenizer, model.max_length)
        verdict = check_export(place, model, stored, tensors) if check else None
        if check and tokenizer is not None:
            check_tokenizer(place, tokenizer)
        _refuse(output, verdict)
    total = sum(num_bytes(its.meta) for its in tensors.values())
    return Export(str(output), sum(map(len, tensors.values())), total, files, verdict)


def _export_adapter(
    folder: Path, output: Path, config: Config, stored: StoredTensors, dtype: torch.dtype | None, check: bool
) -> Export:
    """The adapter alone, as peft has it."""
    with naming(folder):
        raw, tensors = adapter_files(config, stored)
        ids = _special_ids(folder, config, load_known_tokenizer(folder, config))
        beneath = {**NONE, **ids, **write_config(config.model)}  # type: ignore[arg-type]
    tensors = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    with writing(output, "--output"), whole_folder(output) as place:
        write_adapter(place, raw, tensors)
        verdict = check_adapter_files(place, config, stored, beneath, tensors, dtype) if check else None
        _refuse(output, verdict)
    return Export(str(output), len(tensors), num_bytes(tensors), 1, verdict)


def _refuse(output: Path, verdict: Verdict | None) -> None:
    """RunError where a check has failed."""
    if verdict is not None and not verdict.passed:
        raise RunError(f"{output}: is not written: {verdict.text}; report this with the model section of {CONFIG}")


def shard_bytes(text: str) -> int:
    """Bytes in 5GB, 500MB or 1.5GB, as Hugging Face counts them: a GB is 10^9."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]B)", text.strip().upper())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"--max-shard-size {text}: expected a size such as 5GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def _special_ids(place: Path, config: Config, tokenizer: Tokenizer | None) -> dict[str, int]:
    """What config.json says of special tokens: what came with an imported model, or what the run was trained with."""
    known = read_json(place / MODEL_CONFIG) if is_huggingface(place) else {}
    if ids := {key: known[key] for key in SPECIAL_IDS if known.get(key) is not None}:
        return ids
    return {**({} if tokenizer is None else special_ids(tokenizer)), **trained_ids(config)}


def _warn_of_padding(fixed: int | None, own: int | None) -> None:
    """Of a family whose architecture has an id for padding, which is another token here."""
    if fixed is not None and own not in (None, fixed):
        get_logger().warning(
            "export: transformers takes token %d for padding, and the run %d: a text that holds token %d has other "
            "positions there; to have none, train with a tokenizer whose <pad> is %d", fixed, own, fixed, fixed
        )  # fmt: skip


def _write_companions(place: Path, ids: dict[str, int], tokenizer: Tokenizer | None, longest: int) -> None:
    """generation_config.json and the tokenizer's files; what came with an imported model is kept."""
    if not (place / GENERATION).is_file():
        write_json(place / GENERATION, {key: ids[key] for key in GENERATION_IDS if key in ids})
    if tokenizer is not None:
        write_tokenizer(place, tokenizer, longest)


def _formats(meta: Mapping[str, Tensor]) -> dict[str, str]:
    """The number format of most of the values, by its key in config.json and by the one of transformers 4."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in meta.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    name = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
    return {"dtype": name, "torch_dtype": name}
