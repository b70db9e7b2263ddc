"""ModernBERT against Hugging Face: the same weights give the same logits, losses and gradients, windows included."""

from __future__ import annotations

import pytest
import torch

from shardwright.interop.huggingface import read_config, write_config
from shardwright.model.families import FAMILIES, build_model
from tests.interop.masked import (
    build_ours,
    build_theirs,
    check_equal,
    check_packing,
    check_padding,
    check_round_trip,
    ids,
)

transformers = pytest.importorskip("transformers")

MODERN = {"family": "modernbert", "layers": 4, "window": 6, "mlp_width": 48}
CASES = {
    "modern": MODERN,
    "biased": {
        **MODERN, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True, "transform_bias": True,
        "rope_theta": 1000.0, "local_theta": 100.0,
    },
    "all-local": {**MODERN, "layers": 2, "layer_types": ["sliding_attention"] * 2, "tied": False, "head_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [33, 1])
def test_logits_loss_and_gradients_equal(case: str, length: int) -> None:
    ours = build_ours(CASES[case])
    check_equal(ours, build_theirs(ours), input_ids=ids(3, length))


@pytest.mark.parametrize("case", CASES)
def test_padding_packing_and_back(case: str) -> None:
    ours = build_ours(CASES[case])
    theirs = build_theirs(ours)
    check_padding(ours, theirs)
    check_packing(ours)
    check_round_trip(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_config_there_and_back(case: str) -> None:
    config = build_ours(CASES[case]).config
    theirs = transformers.AutoConfig.for_model(**write_config(config)).to_dict()
    assert write_config(read_config(theirs)) == write_config(config)


def test_published_config_is_read() -> None:
    """As answerdotai/ModernBERT-base says it, with names of before."""
    raw = {
        "model_type": "modernbert", "attention_bias": False, "attention_dropout": 0.0, "classifier_activation": "gelu",
        "classifier_bias": False, "decoder_bias": True, "embedding_dropout": 0.0, "global_attn_every_n_layers": 3,
        "global_rope_theta": 160000.0, "hidden_activation": "gelu", "hidden_size": 768, "initializer_range": 0.02,
        "intermediate_size": 1152, "layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0,
        "max_position_embeddings": 8192, "mlp_bias": False, "mlp_dropout": 0.0, "norm_bias": False, "norm_eps": 1e-05,
        "num_attention_heads": 12, "num_hidden_layers": 22, "vocab_size": 50368,
    }  # fmt: skip
    expected = FAMILIES["modernbert"].config.model_validate({"size": "base", "vocab_size": 50368})
    assert write_config(read_config(raw)) == write_config(expected)
    with pytest.raises(ValueError, match="global_attn_every_n_layers=2 is not supported"):
        read_config({**raw, "global_attn_every_n_layers": 2})


@pytest.mark.parametrize("size", FAMILIES["modernbert"].config.SIZES)
def test_published_sizes(size: str) -> None:
    config = FAMILIES["modernbert"].config.model_validate({"family": "modernbert", "size": size, "vocab_size": 50368})
    raw = write_config(config)
    with torch.device("meta"):
        ours = build_model(config)
        theirs = transformers.ModernBertForMaskedLM._from_config(transformers.AutoConfig.for_model(**raw))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
