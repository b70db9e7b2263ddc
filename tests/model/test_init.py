"""Initial values: each scheme's spread, and that a value depends on its name and the seed alone."""

from __future__ import annotations

import math

import pytest
import torch

from shardwright.model.electra import Electra
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import SCHEMES, apply_init, initial_value
from shardwright.model.transformer import TransformerConfig

D, F, L, V = 256, 1024, 6, 1000


def config(scheme: str, **fields: object) -> TransformerConfig:
    shape = {"vocab_size": V, "layers": L, "width": D, "heads": 4, "max_length": 300, "tied": False}
    return FAMILIES["gpt2"].config.model_validate({"family": "gpt2", "init": scheme, **shape, **fields})


# Standard deviation by scheme: token embedding, free head, q [D, D], up [F, D], down [D, F].
EXPECTED = {
    "gpt2": (0.02, 0.02, 0.02, 0.02, 0.02 / math.sqrt(2 * L)),
    "xavier": (D**-0.5, math.sqrt(2 / (V + D)), D**-0.5, math.sqrt(2 / (D + F)), math.sqrt(2 / (D + F))),
    "he": (D**-0.5, math.sqrt(2 / D), math.sqrt(2 / D), math.sqrt(2 / D), math.sqrt(2 / F)),
    "t5": (1.0, 1.0, D**-0.5, D**-0.5, F**-0.5),
    "small": (math.sqrt(0.4 / D),) * 4 + (2 / (L * math.sqrt(D)),),
    "fan_in": (0.02, 0.02, D**-0.5, D**-0.5, 0.0),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_spread_by_scheme(scheme: str) -> None:
    model = build_model(config(scheme))
    apply_init(model, model.config, seed=0)
    names = ("embed.tokens", "head", "blocks.3.attention.q", "blocks.3.mlp.up", "blocks.3.mlp.down")
    for name, expected in zip(names, EXPECTED[scheme], strict=True):
        weight = model.get_parameter(f"{name}.weight")
        assert weight.std().item() == pytest.approx(expected, rel=0.02, abs=1e-9), name
        assert weight.mean().item() == pytest.approx(0, abs=max(expected, 1e-9) * 0.02), name
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name


def test_every_scheme_can_be_configured() -> None:
    assert all(config(scheme).init == scheme for scheme in SCHEMES)


def test_xavier_is_uniform() -> None:
    value = initial_value(config("xavier"), "blocks.0.attention.q.weight", torch.Size([D, D]), 0)
    bound = math.sqrt(6 / (2 * D))
    assert value.abs().max() <= bound
    assert value.abs().max() > 0.99 * bound


def test_value_depends_on_name_and_seed_alone() -> None:
    first, second = build_model(config("gpt2")), build_model(config("gpt2", layers=8))
    apply_init(first, first.config, 3)
    torch.manual_seed(99)
    apply_init(second, first.config, 3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    q, k = first.get_parameter("blocks.0.attention.q.weight"), first.get_parameter("blocks.0.attention.k.weight")
    assert not torch.equal(q, k)
    apply_init(second, first.config, 4)
    assert not torch.equal(q, second.get_parameter("blocks.0.attention.q.weight"))


def test_a_model_made_on_meta_is_the_same() -> None:
    small = config("gpt2", width=32, layers=2)
    direct = build_model(small)
    apply_init(direct, small, 0)
    with torch.device("meta"):
        later = build_model(small)
    later = later.to_empty(device="cpu")
    apply_init(later, small, 0)
    ids = torch.randint(0, V, (1, 8))
    assert torch.equal(direct(ids)["logits"], later(ids)["logits"])


@pytest.mark.parametrize("family", FAMILIES)
def test_first_loss_is_near_uniform(family: str) -> None:
    fields = {"family": family, "vocab_size": V, "layers": 3, "width": 64, "heads": 4, "max_length": 64}
    model = build_model(FAMILIES[family].config.model_validate(fields))
    apply_init(model, model.config, 0)
    ids = torch.randint(0, V, (4, 65), generator=torch.Generator().manual_seed(0))
    tokens = model.draft_logits if isinstance(model, Electra) else lambda ids: model(ids)["logits"]
    loss = torch.nn.functional.cross_entropy(tokens(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(V), rel=0.03)
