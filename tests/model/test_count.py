"""Counts against real modules, published sizes, torch's FLOP counter and what autograd really saves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shardwright.model.count import activation_bytes, num_flops, num_parameters
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.transformer import Context, Inputs, TransformerConfig
from shardwright.train.settings import read_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

VARIANTS: list[dict[str, object]] = [
    {},
    {"kv_heads": 2, "qk_norm": True},
    {"head_dim": 24, "tied": False, "head_bias": True, "mlp_width": 100},
    {"positions": "sinusoidal", "norm_placement": "post", "embed_norm": True, "norm_bias": False},
    {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_weight": False, "activation": "relu2"},
    {"norm_weight": False, "qk_norm": True},
]


def make(family: str, **fields: object) -> TransformerConfig:
    small = {"vocab_size": 101, "layers": 3, "width": 64, "heads": 4, "max_length": 64}
    return FAMILIES[family].config.model_validate({"family": family, **small, **fields})


@pytest.mark.parametrize("size", FAMILIES["gpt3"].config.SIZES)
def test_gpt3_sizes(size: str) -> None:
    """The paper gives rounded names: each model has that many parameters, to their two digits or so."""
    config = FAMILIES["gpt3"].config.model_validate({"family": "gpt3", "size": size, "vocab_size": 50257})
    billions = float(size[:-1]) * (1e9 if size[-1] == "B" else 1e6)
    assert num_parameters(config)["total"] == pytest.approx(billions, rel=0.03)


def test_size_can_be_changed_by_field_and_is_checked() -> None:
    config = make("gpt2", size="124M", layers=2)
    assert (config.layers, config.width) == (2, 64)
    assert FAMILIES["gpt2"].config.model_validate({"size": "355M"}).width == 1024
    with pytest.raises(ValueError, match="size '125M': expected one of 124M"):
        make("gpt2", size="125M")


@pytest.mark.parametrize(
    "path", sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "hardware"), ids=lambda p: p.stem
)
def test_shipped_configs(path: Path) -> None:
    config = read_config(path, ["model.vocab_size=1000"]).model
    with torch.device("meta"):
        model = build_model(config)  # type: ignore[arg-type]
    assert num_parameters(config)["total"] == sum(p.numel() for p in model.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", VARIANTS)
def test_parameters_by_part(family: str, fields: dict[str, object]) -> None:
    config = make(family, **fields)
    model, parts = build_model(config), num_parameters(config)

    def total(*words: str) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if any(w in n for w in words))

    norms = total("norm")
    assert parts["total"] == sum(p.numel() for p in model.parameters())
    assert parts["norms"] == norms
    assert parts["attention"] == total(".attention.") - total("q_norm", "k_norm")
    assert parts["mlp"] == total(".mlp.")
    assert parts["tokens"] + parts["positions"] == total("embed.") - total("embed.norm")
    assert parts["head"] == total("head.")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", VARIANTS)
def test_flops_equal_the_counter(family: str, fields: dict[str, object]) -> None:
    config = make(family, **fields)
    model, length = build_model(config), 48
    ids = torch.randint(0, 101, (2, length))

    def measure(backward: bool) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = model(ids)["logits"].sum()
            if backward:
                loss.backward()
        return counter.get_total_flops()

    flops = num_flops(config, length, causal=False)
    assert measure(backward=False) == flops.forward * ids.numel()
    assert measure(backward=True) == flops.model * ids.numel()


def test_flops_formula() -> None:
    config = FAMILIES["gpt2"].config.model_validate({"size": "124M", "vocab_size": 50257})
    parts, length = num_parameters(config), 1024
    weights = 12 * 12 * 768**2 + parts["tokens"]
    assert num_flops(config, length, causal=False).model == 6 * weights + 12 * 12 * 768 * length
    assert num_flops(config, length).model == 6 * weights + 12 * 12 * 768 * (length + 1) / 2
    once = num_flops(config, length, recomputed=12)
    assert once.recompute == once.forward - 2 * parts["tokens"]
    assert once.hardware == once.model + once.recompute


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("fields", [{}, {"kv_heads": 2}, {"residual_dropout": 0.1}, {"qk_norm": True}])
def test_activation_bytes_are_what_autograd_saves(family: str, fields: dict[str, object]) -> None:
    config = make(family, **fields)
    model, tokens = build_model(config), 2 * 64
    block = model.blocks["0"]
    inputs = torch.randn(2, 64, 64, requires_grad=True)
    context = model.context(Inputs(torch.zeros(2, 64, dtype=torch.int64)))
    key = None if context.layer_keys is None else context.layer_keys[1]
    saved = saved_bytes(block, inputs, context._replace(layer_keys=None), key)
    # torch's RMSNorm is fused on GPUs alone: on a CPU each of them keeps its normed input beside.
    heads = config.qk_norm * (config.heads + config.num_kv_heads) * config.head_width
    unfused = 2 * inputs.nbytes + 4 * tokens * heads if config.norm == "rms" else 0
    assert saved == activation_bytes(config, tokens, value_bytes=4) + unfused
    assert activation_bytes(config, tokens, value_bytes=4, recomputed=True) == inputs.nbytes


def saved_bytes(block: torch.nn.Module, x: torch.Tensor, context: Context, key: torch.Tensor | None) -> int:
    """Bytes of all that is kept for backward, each memory once, without parameters and what all blocks share."""
    shared = [*block.parameters(), *(t for t in context if isinstance(t, torch.Tensor))]
    apart = {t.untyped_storage().data_ptr() for t in shared}
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in apart:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = block(x, context, key)
    assert y.shape == x.shape
    return sum(kept.values())
