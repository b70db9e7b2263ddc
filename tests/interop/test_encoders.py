"""Encoders against Hugging Face: the same weights give the same logits, losses and gradients, and come back to the bit.

What only one family has is tested in a file of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwright.interop.model_config import read_config, write_config
from shardwright.model.families import FAMILIES, build_model
from tests.interop.masked import (
    CLOSE,
    build_ours,
    build_theirs,
    check_equal,
    check_gradients,
    check_packing,
    check_padding,
    check_round_trip,
    ids,
)

transformers = pytest.importorskip("transformers")

ALBERT = {"family": "albert", "embed_width": 12}
MODERN = {"family": "modernbert", "layers": 4, "window": 6, "mlp_width": 48}
V1 = {"family": "deberta", "mask_decoder": False}
V2 = {"family": "deberta_v2", "mask_decoder": False, "buckets": 8}
CASES: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert", "sentence_head": True},
    "bert-masked": {"family": "bert", "sentence_head": False, "activation": "relu", "mlp_width": 80},
    "roberta": {"family": "roberta", "norm_eps": 1e-6},
    "albert": ALBERT,
    "albert-masked": {**ALBERT, "sentence_head": False, "activation": "gelu", "mlp_width": 80},
    "albert-wide": {**ALBERT, "embed_width": 48, "layers": 1, "norm_eps": 1e-6},
    "modernbert": MODERN,
    "modernbert-biased": {
        **MODERN, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "norm_bias": True, "transform_bias": True,
        "rope_theta": 1000.0, "local_theta": 100.0,
    },
    "modernbert-local": {
        **MODERN, "layers": 2, "layer_types": ["sliding_attention"] * 2, "tied": False, "head_bias": False,
    },
    "deberta-v1": V1,
    "deberta-v1-near": {**V1, "relative_span": 6, "positions": "learned", "token_types": 2, "activation": "relu"},
    "deberta-v3": V2,
    "deberta-v3-far": {**V2, "buckets": 16, "max_length": 40, "relative_span": 20, "norm_eps": 1e-6},
    "deberta-v2": {**V2, "convolution": 3},
    "deberta-v2-wide": {**V2, "convolution": 5, "convolution_activation": "tanh", "mlp_width": 80},
    "deberta-v2-apart": {
        **V2, "shared_projections": False, "relative_norm": False, "buckets": -1, "positions": "learned",
    },
}  # fmt: skip
#: Heads that tell pairs of sentences, by what theirs calls their logits.
PAIRS = {"bert": "seq_relationship_logits", "albert": "sop_logits"}
SIZES = [(name, size) for name, family in FAMILIES.items() if family.kind == "encoder" for size in family.config.SIZES]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [33, 1])
def test_logits_loss_and_gradients_equal(case: str, length: int) -> None:
    ours = build_ours(CASES[case])
    given = {"input_ids": ids(3, length)}
    if kinds := ours.config.token_types:  # type: ignore[attr-defined]
        given["token_type_ids"] = torch.arange(length).expand(3, -1) % kinds
    check_equal(ours, build_theirs(ours), **given)


@pytest.mark.parametrize("case", CASES)
def test_padding_packing_and_back(case: str) -> None:
    ours = build_ours(CASES[case])
    theirs = build_theirs(ours)
    check_padding(ours, theirs, "right")
    check_padding(ours, theirs, "left")
    check_packing(ours, theirs)
    check_round_trip(ours, theirs)


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_of_sentences(case: str) -> None:
    ours = build_ours(CASES[case])
    theirs, tokens = build_theirs(ours), ids(3, 9)
    found, expected = (model(tokens)[PAIRS[case]] for model in (ours, theirs))
    torch.testing.assert_close(found, expected, **CLOSE)
    (found[:, 1] - found[:, 0]).mean().backward()
    (expected[:, 1] - expected[:, 0]).mean().backward()
    check_gradients(ours, theirs)


@pytest.mark.parametrize("case", CASES)
def test_config_there_and_back(case: str) -> None:
    config = build_ours(CASES[case]).config
    theirs = transformers.AutoConfig.for_model(**write_config(config)).to_dict()
    theirs["architectures"] = write_config(config)["architectures"]
    assert write_config(read_config(theirs)) == write_config(config)
    derived = {"mlp_width", "head_dim", "kv_heads", "size", "layer_types"}
    assert read_config(theirs).model_dump(exclude=derived) == config.model_dump(exclude=derived)


@pytest.mark.parametrize(("family", "size"), [pair for pair in SIZES if FAMILIES[pair[0]].huggingface])
def test_published_sizes(family: str, size: str) -> None:
    fields = {"size": size, "vocab_size": 30000, **({"mask_decoder": False} if family.startswith("deberta") else {})}
    config = FAMILIES[family].config.model_validate(fields)
    raw = write_config(config)
    with torch.device("meta"):
        ours = build_model(config)
        theirs = getattr(transformers, raw["architectures"][0])._from_config(transformers.AutoConfig.for_model(**raw))
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_positions_of_roberta_begin_behind_its_padding() -> None:
    """Theirs number them from the padding's id on; another id is another model."""
    with pytest.raises(ValueError, match="pad_token_id=0 is not supported here; expected 1"):
        read_config({"model_type": "roberta", "pad_token_id": 0})


@pytest.mark.parametrize("family", ["bert", "roberta", "albert", "deberta"])
def test_a_free_head_is_refused(family: str) -> None:
    """Theirs would add a bias of the head that tied models lack."""
    with pytest.raises(ValueError, match="tie_word_embeddings=False is not supported here; expected True"):
        read_config({"model_type": family, "tie_word_embeddings": False})


def test_blocks_of_their_own_are_refused_to_albert() -> None:
    with pytest.raises(ValueError, match="num_hidden_groups=2 is not supported here; expected 1"):
        read_config({"model_type": "albert", "num_hidden_groups": 2})


def test_published_config_of_modernbert_is_read() -> None:
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
