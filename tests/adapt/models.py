"""Tiny models of theirs and ours with the same weights, and adapters with random ones. No test of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shardwright.adapt import apply_adapter
from shardwright.config import AdaptConfig
from shardwright.interop.huggingface import Imported
from shardwright.interop.model_config import read_config
from shardwright.model.families import build_model
from tests.interop.test_every_family import CASES, make_theirs

ROWS, LENGTH = 2, 12


def pair(architecture: str, adapt: AdaptConfig) -> tuple[Any, Any]:
    """(their model, ours with the adapter), in evaluation mode; all of the adapter's parameters are random."""
    theirs = make_theirs(architecture, CASES[architecture][2]).eval()
    raw = {**theirs.config.to_dict(), "architectures": [architecture]}
    absent: dict[str, Any] = {}
    config = read_config(raw, absent)
    model = build_model(config)
    state = dict(theirs.state_dict())
    with torch.no_grad():
        for name, tensor in Imported(config, state).items():
            model.get_parameter(name).copy_(tensor)
    own = {name for name, _ in model.named_parameters()}
    apply_adapter(model, adapt)
    shake(model, own)
    return theirs, model.eval()


@torch.no_grad()
def shake(model: nn.Module, but: set[str]) -> None:
    """Random values in all parameters that are not `but` these."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name not in but:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def inputs_of(model: Any, *, padded: bool = True) -> dict[str, Tensor]:
    """Random tokens but for what is padding, the second row shorter."""
    generator = torch.Generator().manual_seed(3)
    vocabulary = model.config.vocab_size
    given = {"input_ids": torch.randint(5, vocabulary, (ROWS, LENGTH), generator=generator)}
    if padded:
        given["attention_mask"] = torch.ones(ROWS, LENGTH, dtype=torch.int64)
        given["attention_mask"][1, LENGTH - 3 :] = 0
    if model.config.kind == "encoder-decoder":
        given["decoder_input_ids"] = torch.randint(5, vocabulary, (ROWS, LENGTH - 2), generator=generator)
    return given


def logits(model: Any, given: dict[str, Tensor]) -> Tensor:
    """Of tokens; without gradients."""
    with torch.no_grad():
        answer = model(**given)
    return answer["logits"] if "logits" in answer else answer["prediction_logits"]


def difference(found: Tensor, expected: Tensor, given: dict[str, Tensor]) -> float:
    """Largest difference at tokens that are no padding, relative to the largest value."""
    mask = given.get("attention_mask")
    if mask is not None and mask.shape[1] == expected.shape[1]:
        found, expected = found[mask.bool()], expected[mask.bool()]
    return float((found - expected).abs().max() / expected.abs().max())
