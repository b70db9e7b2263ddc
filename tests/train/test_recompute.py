"""Recomputation of a compiled block in bf16 and fp16, with dropout: the bits of a block that keeps everything."""

import pytest
import torch
from torch import Tensor

from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import Inputs
from shardwright.parallel.mesh import World
from shardwright.parallel.precision import FORMATS
from shardwright.train.layout import apply_blocks
from shardwright.train.settings import read_config

LENGTH, VOCABULARY = 32, 64


def _grads(mode: str, compute: str) -> tuple[Tensor, list[Tensor]]:
    """Output [B, T, D] and every gradient of one compiled block, from the same weights and tokens each time."""
    config = read_config(
        {
            "model": {"family": "gpt2", "layers": 1, "width": 32, "heads": 2, "vocab_size": VOCABULARY},
            "objective": {"name": "causal"},
            "data": {"sequence_length": LENGTH},
            "batch": {"sequences": 2, "micro": 2},
            "train": {"steps": 1, "compile": True, "recompute": mode},
        },
        ["model.residual_dropout=0.2", "model.max_length=32"],
    )
    torch._dynamo.reset()
    model = build_model(config.model)  # type: ignore[arg-type]
    apply_init(model, config.model, 0)  # type: ignore[arg-type]
    apply_blocks(model.to(FORMATS[compute]).train(), config, World())
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden = model.hidden(Inputs(tokens))
    hidden.backward(torch.linspace(-1, 1, hidden.numel()).view_as(hidden).to(hidden.dtype))
    return hidden.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.in_turn
@pytest.mark.parametrize("compute", ["bf16", "fp16"])
def test_selective_recomputation_rounds_where_none_does(compute: str) -> None:
    """What a compiled graph recomputes is fused with other operations than when it was first computed."""
    kept, grads = _grads("none", compute)
    again, others = _grads("selective", compute)
    assert torch.equal(again, kept)
    assert len(grads) == len(others) > 10
    assert all(torch.equal(a, b) for a, b in zip(grads, others, strict=True))
