"""What DeBERTa alone has: the mask decoder, which Hugging Face lacks, against the formula of the paper; its buckets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardwright.interop.huggingface import export_tensors, import_tensors
from shardwright.interop.model_config import read_config, write_config
from shardwright.model.deberta import Deberta
from shardwright.model.disentangled import log_buckets
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.transformer import Inputs
from tests.interop.masked import CLOSE, SMALL, build_ours, build_theirs, check_gradients, ids

transformers = pytest.importorskip("transformers")

V2 = {"family": "deberta_v2", "mask_decoder": False, "buckets": 8}


@pytest.mark.parametrize("buckets", [8, 32, 256])
def test_buckets_are_theirs(buckets: int) -> None:
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distances = torch.arange(-511, 512)
    assert torch.equal(log_buckets(distances, buckets, 512), make_log_bucket_position(distances, buckets, 512).long())


def their_second_pass(theirs: torch.nn.Module, tokens: Tensor) -> Tensor:
    """Logits of what Hugging Face has of the decoder, its `z_steps` of 2: code that fails on a tuple before its end."""
    stack = theirs.deberta.encoder
    states = theirs.deberta(tokens, output_hidden_states=True).hidden_states
    shared = {"relative_pos": stack.get_rel_pos(states[0]), "rel_embeddings": stack.get_rel_embedding()}
    mask = stack.get_attention_mask(torch.ones_like(tokens))
    answer, _ = stack.layer[-1](states[-2], mask, query_states=states[-1], **shared)
    return theirs.lm_predictions(answer, theirs.deberta.embeddings.word_embeddings)


@pytest.mark.parametrize("fields", [{"convolution": 3}, {"shared_projections": False}])
def test_the_mask_decoder_without_positions_is_what_they_have_of_it(fields: dict[str, object]) -> None:
    ours = build_ours({**V2, **fields, "mask_decoder": True})
    table = ours.get_parameter("blocks.2.positions.weight")
    with torch.no_grad():
        table.zero_()
    theirs, tokens = build_theirs(ours), ids(2, 21)
    found, expected = ours(tokens)["logits"], their_second_pass(theirs, tokens)
    torch.testing.assert_close(found, expected, **CLOSE)
    target = torch.cos(torch.arange(101.0))
    (found * target).mean().backward()
    (expected * target).mean().backward()
    assert table.grad is not None
    assert table.grad.abs().max() > 1e-4
    del ours.blocks["2"].positions
    ours.config = ours.config.model_copy(update={"mask_decoder": False})
    check_gradients(ours, theirs)


def plain_attention(block: torch.nn.Module, asked: Tensor, seen: Tensor, table: Tensor, heads: int) -> Tensor:
    """Section 3 of the paper, pair by pair: three terms over sqrt(3d), then softmax."""
    attention = block.attention
    q, k, v = attention.q(asked), attention.k(seen), attention.v(seen)
    to_k, to_q = attention.position_k(table), attention.position_q(table)
    size, d, reach = len(asked), q.shape[-1] // heads, len(table) // 2
    rows = []
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        scores = torch.empty(size, size)
        for i in range(size):
            for j in range(size):
                row = max(0, min(i - j + reach, 2 * reach - 1))
                scores[i, j] = q[i, part] @ k[j, part] + q[i, part] @ to_k[row, part] + k[j, part] @ to_q[row, part]
        rows.append(torch.softmax(scores / (3 * d) ** 0.5, -1) @ v[:, part])
    return attention.out(torch.cat(rows, -1))


def test_the_mask_decoder_is_the_papers() -> None:
    """Queries are the input plus absolute positions, then what came of them; keys and values are the input."""
    ours = build_ours({"family": "deberta", "layers": 1, "heads": 2, "relative_span": 3})
    assert isinstance(ours, Deberta)
    tokens = ids(1, 6)
    block, table = ours.blocks["0"], ours.relative()
    seen = ours.embed(tokens, ours.context(Inputs(tokens)))[0]
    asked = seen + block.positions.weight[:6]
    for _ in range(2):
        asked = block.attention_norm(asked + plain_attention(block, asked, seen, table, 2))
        asked = block.mlp_norm(asked + block.mlp(asked))
    torch.testing.assert_close(ours(tokens)["logits"][0], ours.logits(asked), **CLOSE)


def test_absolute_positions_matter_in_the_decoder_alone() -> None:
    with_decoder, without = build_ours({"family": "deberta"}), build_ours({"family": "deberta", "mask_decoder": False})
    tokens = ids(1, 9)
    moved = torch.arange(9).unsqueeze(0) + 7
    assert torch.equal(without(tokens)["logits"], without(tokens, position_ids=moved)["logits"])
    assert not torch.allclose(with_decoder(tokens)["logits"], with_decoder(tokens, position_ids=moved)["logits"])


def test_weights_of_the_decoder_go_there_and_back() -> None:
    """Under the name that the published checkpoints have; what lacks them is a model without that decoder."""
    ours = build_ours({**V2, "mask_decoder": True})
    state = dict(export_tensors(ours.config, dict(ours.named_parameters())))
    assert "deberta.embeddings.position_embeddings.weight" in state
    assert read_config(write_config(ours.config)) == read_config(write_config(ours.config))
    assert read_config(write_config(ours.config)).mask_decoder  # type: ignore[attr-defined]
    back = dict(import_tensors(ours.config, state))
    assert all(torch.equal(back[n], p) for n, p in ours.named_parameters())
    theirs = transformers.DebertaV2Config(relative_attention=True, pos_att_type=["c2p", "p2c"]).to_dict()
    assert not read_config(theirs).mask_decoder  # type: ignore[attr-defined]


def test_published_configs_and_names_of_old_are_read() -> None:
    """As microsoft/deberta-v3-base and deberta-base say it, and with the head as `legacy` names it."""
    v3 = {
        "model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu", "hidden_size": 768,
        "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-7,
        "max_position_embeddings": 512, "relative_attention": True, "position_buckets": 256, "vocab_size": 128100,
        "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": "p2c|c2p", "num_attention_heads": 12,
        "max_relative_positions": -1, "position_biased_input": False, "num_hidden_layers": 12, "type_vocab_size": 0,
    }  # fmt: skip
    fields = {"size": "v3-base", "vocab_size": 128100, "mask_decoder": False}
    expected = FAMILIES["deberta_v2"].config.model_validate(fields)
    said = {**dict.fromkeys(_DROPOUTS, 0.1), "conv_act": "tanh"}  # what it is where nothing is said, if there were one
    assert write_config(read_config(v3)) == {**write_config(expected), **said}
    v1 = {**v3, "model_type": "deberta", "pos_att_type": "c2p|p2c", "vocab_size": 50265}
    expected = FAMILIES["deberta"].config.model_validate({"size": "base", "vocab_size": 50265, "mask_decoder": False})
    assert write_config(read_config(v1)) == {**write_config(expected), **dict.fromkeys(_DROPOUTS, 0.1)}
    with pytest.raises(ValueError, match="pos_att_type"):
        read_config({**v3, "pos_att_type": "c2p"})

    theirs = transformers.DebertaV2ForMaskedLM._from_config(
        transformers.DebertaV2Config(**{k: v for k, v in write_config(build_ours(V2).config).items()
                                        if k not in ("model_type", "architectures", "legacy")}, legacy=True)
    ).eval()  # fmt: skip
    ours = build_model(read_config(theirs.config.to_dict())).eval()
    ours.load_state_dict(dict(import_tensors(ours.config, theirs.state_dict())))
    tokens = ids(2, 9)
    torch.testing.assert_close(ours(tokens)["logits"], theirs(tokens).logits, **CLOSE)


_DROPOUTS = ("attention_probs_dropout_prob", "hidden_dropout_prob")

#: (family, size, vocabulary) -> class of theirs that the published weights are for.


def test_what_cannot_be_is_refused() -> None:
    config = FAMILIES["deberta_v2"].config

    def expect(message: str, **fields: object) -> None:
        with pytest.raises(ValueError, match=message):
            config.model_validate({"family": "deberta_v2", **SMALL, **fields})

    expect("a key head for each query head", kv_heads=2)
    expect("norm_placement", norm_placement="pre")
    expect("positions=none", positions="learned")
    expect("convolution=4: has to be odd", convolution=4)
