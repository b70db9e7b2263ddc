"""Hugging Face is the oracle: the same weights give the same logits, loss and gradients, in both directions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from shardwright.interop.huggingface import export_tensors, import_tensors
from shardwright.interop.model_config import read_config, write_config
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.transformer import TransformerConfig
from tests.interop.models import CASES, SMALL, build_ours, to_theirs

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [33, 1, 63])
def test_logits_loss_and_gradients_equal(case: str, length: int) -> None:
    ours = build_ours(case)
    theirs = to_theirs(ours)
    ids = torch.randint(0, 101, (3, length + 1), generator=torch.Generator().manual_seed(1))

    logits = ours(ids[:, :-1])["logits"]
    expected = theirs(ids[:, :-1]).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)

    loss, target = (F.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten()) for x in (logits, expected))
    torch.testing.assert_close(loss, target, atol=1e-6, rtol=1e-6)
    loss.backward()
    target.backward()
    their_gradients = {n: p.grad for n, p in theirs.named_parameters() if p.grad is not None}
    for name, gradient in import_tensors(ours.config, their_gradients):
        mine = ours.get_parameter(name).grad
        assert mine is not None
        # Some (key biases of one token) are exactly zero: compare at the scale of the whole gradient.
        torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(case: str) -> None:
    ours = build_ours(case)
    theirs = to_theirs(ours)
    back = dict(import_tensors(ours.config, theirs.state_dict()))
    assert set(back) == {n for n, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(back[name], parameter), name


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case: str) -> None:
    fields = CASES[case]
    config = FAMILIES[fields["family"]].config.model_validate(fields)
    theirs = transformers.AutoConfig.for_model(**write_config(config)).to_dict()
    again = read_config(theirs)
    assert write_config(again) == write_config(config)
    shape = ("layers", "width", "num_kv_heads", "head_width", "hidden_width", "activation", "rope_theta", "tied")
    assert [getattr(again, f) for f in shape] == [getattr(config, f) for f in shape]


@pytest.mark.parametrize(
    "theirs",
    [
        transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, bos_token_id=0, eos_token_id=0),
        transformers.LlamaConfig(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
                                 intermediate_size=40, vocab_size=50, tie_word_embeddings=True),
        transformers.Qwen3Config(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32,
                                 intermediate_size=40, vocab_size=50, head_dim=16),
    ],
)  # fmt: skip
def test_their_model_imports(theirs: transformers.PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(theirs).eval()
    ours = build_model(read_config(theirs.to_dict())).eval()
    ours.load_state_dict(dict(import_tensors(ours.config, model.state_dict())))
    ids = torch.randint(0, 50, (2, 9))
    torch.testing.assert_close(ours(ids)["logits"], model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("given", [{}, {"vocab_size": 99, "max_position_embeddings": 77, "n_positions": 77}])
def test_what_a_config_json_leaves_out_is_as_they_have_it(model_type: str, given: dict[str, int]) -> None:
    theirs = transformers.AutoConfig.for_model(model_type, **given)
    assert write_config(read_config({"model_type": model_type, **given})) == write_config(read_config(theirs.to_dict()))


def test_a_bare_stack_without_prefix_imports() -> None:
    ours = build_ours("gpt2")
    bare = {n.removeprefix("transformer."): t for n, t in export_tensors(ours.config, dict(ours.named_parameters()))}
    bare["h.0.attn.bias"] = torch.ones(1)
    back = dict(import_tensors(ours.config, bare))
    assert all(torch.equal(back[n], p) for n, p in ours.named_parameters())


def expect(message: str, config: TransformerConfig, tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=message) as error:
        list(import_tensors(config, tensors))
    assert "\n" not in str(error.value)


def test_what_does_not_fit_is_named() -> None:
    ours = build_ours("gpt2")
    state = dict(export_tensors(ours.config, dict(ours.named_parameters())))
    name = "transformer.h.1.ln_1.bias"
    expect("1 missing .transformer.h.1.ln_1.bias", ours.config, {n: t for n, t in state.items() if n != name})
    expect("1 unexpected .surprise", ours.config, state | {"surprise": torch.zeros(1)})
    expect(r"ln_1.bias: has shape \(31,\)", ours.config, state | {name: torch.zeros(31)})
    expect("lm_head.weight differs", ours.config, state | {"lm_head.weight": torch.zeros(101, 32)})


def test_what_cannot_be_said_is_refused() -> None:
    def config(family: str, **fields: object) -> TransformerConfig:
        return FAMILIES[family].config.model_validate({"family": family, **SMALL, **fields})

    with pytest.raises(ValueError, match="qk_norm=True"):
        write_config(config("llama", qk_norm=True))
    with pytest.raises(ValueError, match="qk_norm=False"):
        write_config(config("qwen3", qk_norm=False))
    with pytest.raises(ValueError, match="use_sliding_window=True is not supported here; expected False"):
        read_config({"model_type": "qwen3", "use_sliding_window": True})
    with pytest.raises(ValueError, match="out_bias=False: shares attention_bias"):
        write_config(config("llama", qkv_bias=True))
    with pytest.raises(ValueError, match="activation='relu2'"):
        write_config(config("gpt2", activation="relu2"))
    with pytest.raises(ValueError, match="model_type='mamba'"):
        read_config({"model_type": "mamba"})
    with pytest.raises(ValueError, match="rope_type='yarn' is not supported here; expected default, linear or llama3"):
        read_config({"model_type": "llama", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}})
    with pytest.raises(ValueError, match="rope_type='llama3' needs low_freq_factor beside it"):
        read_config({"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}})
    with pytest.raises(ValueError, match="hidden_act='tanh'"):
        read_config({"model_type": "llama", "hidden_act": "tanh"})
