"""BERT and RoBERTa against Hugging Face: the same weights give the same logits of tokens and pairs, and gradients."""

from __future__ import annotations

import pytest
import torch

from shardwright.interop.huggingface import read_config, write_config
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

BERT = {"family": "bert", "sentence_head": True}
CASES = {
    "bert": BERT,
    "bert-masked": {"family": "bert", "sentence_head": False, "activation": "relu", "mlp_width": 80},
    "roberta": {"family": "roberta", "norm_eps": 1e-6},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [33, 1])
def test_logits_loss_and_gradients_equal(case: str, length: int) -> None:
    ours = build_ours(CASES[case])
    kinds = torch.arange(length).expand(3, -1) % ours.config.token_types  # type: ignore[attr-defined]
    check_equal(ours, build_theirs(ours), input_ids=ids(3, length), token_type_ids=kinds)


@pytest.mark.parametrize("case", CASES)
def test_padding_packing_and_back(case: str) -> None:
    ours = build_ours(CASES[case])
    theirs = build_theirs(ours)
    check_padding(ours, theirs)
    check_packing(ours)
    check_round_trip(ours, theirs)


def test_next_sentences() -> None:
    ours = build_ours(BERT)
    theirs, tokens = build_theirs(ours), ids(3, 9)
    found, expected = ours(tokens)["seq_relationship_logits"], theirs(tokens).seq_relationship_logits
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


def test_positions_of_roberta_begin_behind_its_padding() -> None:
    """Theirs number them from the padding's id on; another id is another model."""
    with pytest.raises(ValueError, match="pad_token_id=0 is not supported here; expected 1"):
        read_config({"model_type": "roberta", "pad_token_id": 0})


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_published_sizes(family: str) -> None:
    for size in FAMILIES[family].config.SIZES:
        config = FAMILIES[family].config.model_validate({"family": family, "size": size, "vocab_size": 30000})
        raw = write_config(config)
        with torch.device("meta"):
            ours = build_model(config)
            theirs = getattr(transformers, raw["architectures"][0])._from_config(
                transformers.AutoConfig.for_model(**raw)
            )
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()), size
