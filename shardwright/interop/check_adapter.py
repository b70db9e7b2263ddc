"""Proof of an adapter's export: peft puts what was written on transformers' model, and it gives what ours gives.

Beside check.py, which proves whole models, and as it: logits of random tokens within one bound. The model beneath is
written for that into a folder inside the adapter's, which is gone afterwards; what the adapter's files hold of it
besides (a classifier's head) is zero there, so that it cannot come from anywhere else.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.config import AdaptConfig
from shardwright.interop.check import (
    Verdict,
    answer,
    end_rows,
    judge,
    named_as_ours,
    open_theirs,
    quiet,
    random_inputs,
    taken,
    what_lacks,
)
from shardwright.interop.folder import MODEL_CONFIG, write_json
from shardwright.interop.huggingface import Exported
from shardwright.interop.model_config import as_they_compute
from shardwright.interop.weights import write_weights
from shardwright.log import get_logger
from shardwright.model.transformer import LanguageModel, TransformerConfig

BASE = "beneath"
SHARD_BYTES = 5 * 10**9


def check_adapter(
    folder: Path,
    raw: Mapping[str, Any],
    base: Exported,
    config: TransformerConfig,
    adapt: AdaptConfig,
    build: Callable[[TransformerConfig], LanguageModel],
) -> Verdict | None:
    """Whether the adapter in `folder` makes of transformers' model what ours is, which `build` makes.

    `raw`, `base`: config.json and tensors of the model beneath; `config`: ours of it, `adapt` what it is adapted by.
    None, and a warning, where it cannot be tried.
    """
    lacking = what_lacks(base, "peft")
    if lacking is not None:
        get_logger().warning("export: logits are not compared: %s", lacking)
        return None
    name, inputs = raw["architectures"][0], _inputs(config, adapt, raw)
    expected = answer(build(as_they_compute(config)).eval(), inputs)
    length = inputs["input_ids"].shape[1]
    of_tokens = {head for head, logits in expected.items() if logits.shape[1] == length}  # [B, T, V], ELECTRA's [B, T]
    if adapt.method in ("prompt", "p_tuning"):  # a head of texts reads the first token, which is a virtual one there
        expected = {head: logits for head, logits in expected.items() if head in of_tokens}

    def read() -> dict[str, Tensor]:
        found = named_as_ours(_their_logits(folder, raw, base, inputs), expected)
        return {head: logits[:, -length:] if head in of_tokens else logits for head, logits in found.items()}

    return judge(f"{name} with this adapter by peft", expected, read)


def _inputs(config: TransformerConfig, adapt: AdaptConfig, raw: Mapping[str, Any]) -> dict[str, Tensor]:
    """Random tokens that leave room for virtual ones, beside which peft passes over segments."""
    shorter = config.model_copy(update={"max_length": config.max_length - adapt.virtual})
    inputs = random_inputs(shorter, raw.get("pad_token_id"))
    if config.classify == "text" and config.kind == "encoder-decoder":
        end_rows(inputs["input_ids"], raw.get("eos_token_id"))
    return {"input_ids": inputs["input_ids"]} if adapt.virtual else inputs


@torch.no_grad()
def _their_logits(
    folder: Path, raw: Mapping[str, Any], base: Exported, inputs: dict[str, Tensor]
) -> Mapping[str, Tensor]:
    """Of transformers' model with the adapter in `folder`."""
    with quiet():
        from peft import PeftModel

    with _beneath(folder, raw, base) as place:
        theirs = open_theirs(place, raw["architectures"][0])
    given = taken(theirs, inputs)
    with quiet(), warnings.catch_warnings(action="ignore"):
        model = PeftModel.from_pretrained(theirs, str(folder)).eval()
        found: Mapping[str, Tensor] = model(**given)
    return found


@contextmanager
def _beneath(folder: Path, raw: Mapping[str, Any], base: Exported) -> Iterator[Path]:
    """The model beneath as a folder inside the adapter's, for a while."""
    place = folder / BASE
    place.mkdir()
    try:
        write_weights(place, base.meta, base.__getitem__, SHARD_BYTES)
        write_json(place / MODEL_CONFIG, raw)
        yield place
    finally:
        shutil.rmtree(place)
