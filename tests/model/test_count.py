"""Counts against real modules, published sizes, torch's FLOP counter and what autograd really saves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from shardwright.model.count import activation_bytes, num_flops, num_parameters
from shardwright.model.electra import Electra
from shardwright.model.encoder_decoder import EncoderDecoderConfig
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.t5 import T5Config
from shardwright.model.transformer import Context, Inputs, LanguageModel, TransformerConfig, suit_kernel
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


SMALL = {"vocab_size": 101, "layers": 3, "width": 64, "heads": 4, "max_length": 64}
#: What a family has no room for, as its config says; the others take every variant.
REFUSED = {
    "deberta": ("kv_heads", "qk_norm", "sinusoidal"),
    "deberta_v2": ("kv_heads", "qk_norm", "sinusoidal"),
    "modernbert": ("sinusoidal",),
    "neox": ("post",),
    "xlnet": ("kv_heads", "qk_norm", "sinusoidal", "qkv_bias"),
}
#: What a family has beyond the others.
OWN: dict[str, list[dict[str, object]]] = {
    "albert": [{"embed_width": 24}],
    "deberta": [{"mask_decoder": False, "relative_span": 10}],
    "deberta_v2": [{"convolution": 3, "buckets": 16}, {"shared_projections": False}],
    "modernbert": [{"window": 10}],
    "electra": [{"embed_width": 24, "generator_width": 48}, {"generator_layers": 0}],
}
EVERY = [(family, fields) for family in FAMILIES for fields in [*VARIANTS, *OWN.get(family, [])]]


def fits(family: str, fields: Mapping[str, object]) -> bool:
    """Whether a family has room for these choices."""
    words = [*fields, *(value for value in fields.values() if isinstance(value, str))]
    return not set(words) & set(REFUSED.get(family, ()))


CASES = [(family, fields) for family, fields in EVERY if fits(family, fields)]


def make(family: str, **fields: object) -> TransformerConfig:
    return FAMILIES[family].config.model_validate({"family": family, **SMALL, **fields})


#: What a block keeps for its backward pass may depend on.
CHANGED: tuple[dict[str, object], ...] = ({"kv_heads": 2}, {"residual_dropout": 0.1}, {"qk_norm": True})


@pytest.mark.parametrize(("family", "fields"), [case for case in EVERY if not fits(*case)])
def test_what_a_family_has_no_room_for_is_refused(family: str, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected one of|a key head for each|Input should be|alone"):
        make(family, **fields)


def outputs(model: LanguageModel, ids: torch.Tensor, **streams: torch.Tensor) -> list[torch.Tensor]:
    """All that a model computes of tokens in training."""
    drafts = isinstance(model, Electra) and model.config.generator.layers
    return [*model(ids, **streams).values(), *([model.draft_logits(ids)] if drafts else [])]


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


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_parameters_by_part(family: str, fields: dict[str, object]) -> None:
    config = make(family, **fields)
    model, parts = build_model(config), num_parameters(config)

    def total(*words: str) -> int:
        return sum(p.numel() for n, p in model.named_parameters() if any(w in n for w in words))

    norms = total("norm")
    assert parts["total"] == sum(p.numel() for p in model.parameters())
    assert parts["norms"] == norms
    assert parts["attention"] == total(".attention.", ".cross.") - total("q_norm", "k_norm")
    assert parts["mlp"] == total(".mlp.", ".convolution.")
    vectors = total("embed.", "relative.", ".positions.")
    vectors -= sum(p.numel() for n, p in model.named_parameters() if ".generator." in n and ".projection." not in n)
    vectors -= total("embed.norm", "embed.encoder.norm", "embed.decoder.norm", "relative.norm")
    assert parts["tokens"] + parts["positions"] == vectors
    assert parts["head"] == total("head.") - total("head.transform.norm")


@pytest.mark.parametrize(("family", "fields"), CASES)
def test_flops_equal_the_counter(family: str, fields: dict[str, object]) -> None:
    config = make(family, **fields)
    model, length, target = build_model(config), 48, 30
    ids = torch.randint(0, 101, (2, length))
    streams = {"decoder_input_ids": ids[:, :target]} if isinstance(config, EncoderDecoderConfig) else {}

    def measure(backward: bool) -> int:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            loss = torch.stack([x.sum() for x in outputs(model, ids, **streams)]).sum()
            if backward:
                loss.backward()
        return counter.get_total_flops()

    flops = num_flops(config, length, causal=False, target=target, rows=2)
    assert measure(backward=False) == pytest.approx(flops.forward * ids.numel(), rel=1e-12)
    assert measure(backward=True) == pytest.approx(flops.model * ids.numel(), rel=1e-12)


def test_flops_of_two_streams_equal_the_counter() -> None:
    config, length, predicted = make("xlnet"), 48, 16
    model, ids = build_model(config), torch.randint(0, 101, (2, length))
    places = torch.arange(predicted).expand(2, -1) * 3
    order = torch.zeros_like(ids).scatter_(1, places, 1 + places)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, order=order, places=places)
    flops = num_flops(config, length, predicted=predicted / length, rows=2)
    assert counter.get_total_flops() == pytest.approx(flops.forward * ids.numel(), rel=1e-12)


def test_flops_formula() -> None:
    config = FAMILIES["gpt2"].config.model_validate({"size": "124M", "vocab_size": 50257})
    parts, length = num_parameters(config), 1024
    weights = 12 * 12 * 768**2 + parts["tokens"]
    assert num_flops(config, length, causal=False).model == 6 * weights + 12 * 12 * 768 * length
    assert num_flops(config, length).model == 6 * weights + 12 * 12 * 768 * (length + 1) / 2
    once = num_flops(config, length, recomputed=12)
    assert once.recompute == once.forward - 2 * parts["tokens"]
    assert once.hardware == once.model + once.recompute


@pytest.mark.parametrize(("family", "fields"), [(f, c) for f in FAMILIES for c in ({}, *CHANGED) if fits(f, c)])
def test_activation_bytes_are_what_autograd_saves(family: str, fields: dict[str, object]) -> None:
    config = make(family, **fields)
    model, tokens = build_model(config), 2 * 64
    inputs = torch.randn(2, 64, 64, requires_grad=True)
    ids = torch.zeros(2, 64, dtype=torch.int64)
    context = model.context(Inputs(ids, encoder_ids=ids))
    context = context._replace(local_mask=suit_kernel(context.local_mask, inputs))
    key = None if context.layer_keys is None else context.layer_keys[1]
    context = context._replace(layer_keys=None)
    usual = max(config.runs, key=len)[0]  # the first block or the last may be of a kind of its own
    saved = saved_bytes(model.blocks[str(usual)], (inputs,), context.encoder or context, key)
    assert saved == activation_bytes(config, tokens, value_bytes=4) + unfused_bytes(config, inputs, norms=2)
    assert activation_bytes(config, tokens, value_bytes=4, recomputed=True) == inputs.nbytes
    if context.encoder is not None:
        memory, context = torch.randn(2, 48, 64, requires_grad=True), context._replace(encoder=None)
        saved = saved_bytes(model.blocks[str(config.layers)], (inputs, memory), context, key) - memory.nbytes
        expected = activation_bytes(config, tokens, value_bytes=4, memory=2 * 48)
        assert saved == expected + unfused_bytes(config, inputs, norms=3, memory=2 * 48)


def unfused_bytes(config: TransformerConfig, inputs: torch.Tensor, norms: int, memory: int = 0) -> int:
    """What a CPU keeps beside, for want of kernels that GPUs have.

    RMSNorm keeps its normed input, those of queries and keys too (`memory`: tokens of a source with keys of their own).
    Attention whose mask has a gradient (T5's) goes by single products: it keeps the probabilities in place of a
    statistic, and keys and values once for each query head.
    """
    rows, length, _ = inputs.shape
    heads = (norms - 1) * config.heads * rows * length + config.num_kv_heads * (rows * length + memory)
    normed = norms * inputs.numel() + config.qk_norm * heads * config.head_width
    kept = normed if config.norm == "rms" else 0
    if isinstance(config, T5Config):
        kept += rows * config.heads * length * (length - 1)
        kept += 2 * rows * length * (config.heads - config.num_kv_heads) * config.head_width
    return kept * 4


def saved_bytes(
    block: torch.nn.Module, streams: tuple[torch.Tensor, ...], context: Context, key: torch.Tensor | None
) -> int:
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
        y = block(*streams, context, key)
    assert y.shape == streams[0].shape
    return sum(kept.values())
