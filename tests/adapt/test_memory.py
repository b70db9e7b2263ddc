"""The estimate of an adapted run against what one process holds, and the counts that a dry run shows."""

import json
from collections.abc import Callable

import pytest
import torch

from shardwright.adapt import num_adapter
from shardwright.config import Config
from shardwright.parallel.mesh import World
from shardwright.train.build import build_corpus, build_step, fit_to_corpus
from shardwright.train.layout import build_facts
from shardwright.train.preview import preview, rank_memory
from tests.train.conftest import tiny

__all__ = ["tiny"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("adapter", ["adapt.method=lora", "adapt.freeze=['blocks.*']", "adapt.method=prefix"])
def test_what_is_frozen_has_no_states(tiny: Callable[..., Config], adapter: str, precision: str) -> None:
    config = tiny(adapter, f"precision.compute={precision}", "adapt.tokens=4", "data.sequence_length=60")
    fit_to_corpus(config, build_corpus(config))
    step = build_step(config, World(device=torch.device("cpu")))
    moments = [s for state in step.optimizer.state.values() for s in state.values() if s.dim()]
    held = sum(s.numel() * s.element_size() for s in moments)
    weights = sum(w.numel() * w.element_size() for w in step.masters.weights.values())
    expected = rank_memory(config, build_facts(config, 1))
    assert expected["optimizer"] == held
    assert expected["masters"] == weights
    counts = num_adapter(config.model, config.adapt)  # type: ignore[arg-type]
    assert expected["gradients"] * 2 == counts["trained"] * 8 == held


def test_a_dry_run_says_what_is_trained(tiny: Callable[..., Config]) -> None:
    config = tiny("adapt.method=lora", "adapt.rank=2")
    text = preview(config)
    added = 2 * 2 * 2 * (32 + 32)  # blocks, q and v, rank, in and out
    assert f"trained: {added}, of which the adapter adds {added}" in text
    assert json.loads(preview(tiny("adapt.method=lora"), as_json=True))["memory_bytes"]["total"] > 0
