"""The assembled model: packing, options, compilation, recomputation, and what a pipeline or a cache relies on."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from shardwright.model.attention import Cache
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import Inputs, LanguageModel, TransformerConfig

V = 61
OPTIONS: dict[str, dict[str, object]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "kv_heads": 2},
    "sinusoidal post": {
        "family": "gpt2",
        "positions": "sinusoidal",
        "norm_placement": "post",
        "scale_embedding": True,
        "embed_norm": True,
        "activation": "relu",
        "head_bias": True,
    },
    "no positions, no norm weights": {"family": "llama", "positions": "none", "norm_weight": False, "tied": True},
    "modern": {"family": "llama", "qk_norm": True, "kv_heads": 1, "activation": "relu2", "logit_softcap": 15.0},
    "no biases": {"family": "gpt2", "norm_bias": False, "qkv_bias": False, "out_bias": False, "mlp_bias": False},
}


def make(option: str = "gpt2", **fields: object) -> LanguageModel:
    """A small model with weights large enough that everything matters."""
    small = {"vocab_size": V, "layers": 3, "width": 32, "heads": 4, "max_length": 40, "init": "fan_in"}
    raw = {**small, **OPTIONS[option], **fields}
    model = build_model(FAMILIES[str(raw["family"])].config.model_validate(raw))
    apply_init(model, model.config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(seed))


def pack(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Document numbers and restarting positions [1, T]."""
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return documents.unsqueeze(0), positions.unsqueeze(0)


@pytest.mark.parametrize("option", OPTIONS)
def test_packed_documents_equal_documents_apart(option: str) -> None:
    model, lengths = make(option), [5, 1, 9, 3]
    ids = tokens(1, sum(lengths))
    documents, positions = pack(lengths)
    together = model(ids, documents=documents, position_ids=positions)["logits"]
    apart = torch.cat([model(part)["logits"] for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_no_gradient_crosses_documents(option: str) -> None:
    """The loss of document 2 has no gradient to what document 1 alone holds."""
    model, lengths = make(option), [6, 6]
    ids = torch.cat([torch.arange(6), torch.arange(6) + 20]).unsqueeze(0)
    documents, positions = pack(lengths)
    hidden = model.hidden(Inputs(ids, positions, documents))
    hidden[:, 6:].square().sum().backward()
    assert model.embed is not None
    gradient = model.embed.tokens.weight.grad
    assert gradient is not None
    assert not gradient[:6].any()
    assert gradient[20:26].any()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 7), min_size=2, max_size=5), st.integers(0, 1000))
def test_changing_a_document_moves_no_other(lengths: list[int], seed: int) -> None:
    model = make("llama")
    ids = tokens(1, sum(lengths), seed)
    documents, positions = pack(lengths)
    changed = ids.clone()
    changed[:, : lengths[0]] = (changed[:, : lengths[0]] + 1) % V
    before = model(ids, documents=documents, position_ids=positions)["logits"]
    after = model(changed, documents=documents, position_ids=positions)["logits"]
    assert torch.equal(before[:, lengths[0] :], after[:, lengths[0] :])
    assert not torch.equal(before[:, : lengths[0]], after[:, : lengths[0]])


@pytest.mark.parametrize("option", OPTIONS)
def test_no_token_sees_a_later_one(option: str) -> None:
    model, ids = make(option), tokens(1, 12)
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % V
    before, after = model(ids)["logits"], model(changed)["logits"]
    torch.testing.assert_close(before[:, :7], after[:, :7], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(before[:, 7:], after[:, 7:])


@pytest.mark.parametrize("option", OPTIONS)
def test_cache_equals_no_cache(option: str) -> None:
    model, ids = make(option).eval(), tokens(2, 20)
    whole = model(ids)["logits"]
    cache, start = Cache(3, 32), 0
    for stop in (6, 7, 8, 15, 20):
        part = model(ids[:, start:stop], cache=cache)["logits"]
        torch.testing.assert_close(part, whole[:, start:stop], atol=1e-5, rtol=1e-5)
        start = stop


@pytest.mark.parametrize("option", OPTIONS)
def test_slices_of_layers_are_the_model(option: str) -> None:
    """A pipeline stage has the modules of its slice and None elsewhere; dropout keys stay those of the whole."""
    stages = [make(option, residual_dropout=0.2, embed_dropout=0.2, layers=4) for _ in range(3)]
    whole = make(option, residual_dropout=0.2, embed_dropout=0.2, layers=4)
    held = [("embed", "blocks.0"), ("blocks.1", "blocks.2"), ("blocks.3", "final_norm", "head")]
    assert [n for names in held for n in names if n in dict(whole.layers())] == [n for n, _ in whole.layers()]
    inputs = Inputs(tokens(2, 10), sequence=torch.tensor([7, 3]), step=5, seed=2)
    x = None
    for stage, names in zip(stages, held, strict=True):
        for name, _ in stage.layers():
            if name not in names:
                parent, _, child = name.rpartition(".")
                if parent:
                    del stage.blocks[child]
                else:
                    setattr(stage, name, None)
        assert [n for n, _ in stage.layers()] == [n for n in names if n in dict(whole.layers())]
        x = stage.hidden(inputs, x)
    assert torch.equal(x, whole.hidden(inputs))


def test_dropout_does_not_depend_on_the_batch_around() -> None:
    model = make("gpt2", residual_dropout=0.3, embed_dropout=0.3)
    ids, sequence = tokens(4, 10), torch.tensor([11, 4, 9, 0])
    whole = model.hidden(Inputs(ids, sequence=sequence, step=1, seed=3))
    for row in range(4):
        alone = model.hidden(Inputs(ids[row : row + 1], sequence=sequence[row : row + 1], step=1, seed=3))
        torch.testing.assert_close(whole[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    again = model.hidden(Inputs(ids, sequence=sequence, step=torch.tensor(1), seed=3))
    other = model.hidden(Inputs(ids, sequence=sequence, step=2, seed=3))
    assert torch.equal(whole, again)
    assert not torch.allclose(whole, other)
    model.eval()
    assert torch.equal(model.hidden(Inputs(ids)), model.hidden(Inputs(ids, step=9)))


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("option", OPTIONS)
def test_tokens_may_stand_in_any_order(option: str, packed: bool) -> None:
    """Told where queries and keys stand, the model gives each token what it has in its own place."""
    model = make(option, residual_dropout=0.2, embed_dropout=0.1)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    documents, positions = (x.expand(2, 20) for x in pack([10, 3, 7]))
    inputs = Inputs(tokens(2, 20), sequence=torch.tensor([7, 3]), step=3)
    places = order.expand(2, 20)
    mixed = inputs._replace(input_ids=inputs.input_ids[:, order], row_index=places, key_index=places)
    if packed:
        inputs = inputs._replace(documents=documents, position_ids=positions)
        there = documents[:, order]
        mixed = mixed._replace(documents=there, key_documents=there, position_ids=positions[:, order])
    torch.testing.assert_close(model.hidden(mixed), model.hidden(inputs)[:, order], atol=1e-5, rtol=1e-5)


def test_what_places_of_keys_need_is_said() -> None:
    model, ids = make("gpt2"), tokens(1, 6)
    places = torch.arange(6).unsqueeze(0)
    documents, _ = pack([2, 4])
    lacking = {
        "needs row_index": Inputs(ids, key_index=places),
        "documents of queries": Inputs(ids, row_index=places, key_index=places, documents=documents),
        "padding": Inputs(ids, row_index=places, key_index=places, attention_mask=torch.ones(1, 6)),
    }
    for message, inputs in lacking.items():
        with pytest.raises(AssertionError, match=message):
            model.hidden(inputs)


@pytest.mark.parametrize("option", ["gpt2", "llama"])
def test_recomputation_changes_no_bit(option: str) -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        model = make(option, residual_dropout=0.2, embed_dropout=0.1)
        if recompute:
            for block in model.blocks.values():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        documents, positions = pack([10, 3, 7])
        inputs = Inputs(tokens(2, 20), positions.expand(2, 20), documents.expand(2, 20), step=3)
        model.logits(model.hidden(inputs)).square().mean().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(list(make(option).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def compile_blocks(model: LanguageModel, counter: CompileCounterWithBackend) -> None:
    torch._dynamo.reset()
    for block in model.blocks.values():
        block.forward = torch.compile(block.forward, fullgraph=True, backend=counter)


@pytest.mark.parametrize(
    ("option", "packed", "dtype"),
    [
        *((option, True, torch.float32) for option in OPTIONS),
        *((option, False, torch.float32) for option in ("gpt2", "llama")),
        *((option, packed, torch.bfloat16) for option in ("gpt2", "llama") for packed in (True, False)),
    ],
)
def test_all_blocks_and_steps_are_one_graph(option: str, packed: bool, dtype: torch.dtype) -> None:
    dropout = {"residual_dropout": 0.1, "embed_dropout": 0.1}
    model, eager = make(option, **dropout).to(dtype), make(option, **dropout).to(dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, counter)
    documents, positions = pack([10, 3, 7])
    for step in range(3):
        inputs = Inputs(tokens(2, 20, step), sequence=torch.tensor([step, 50]), step=torch.tensor(step), seed=step)
        if packed:
            inputs = inputs._replace(documents=documents.expand(2, 20), position_ids=positions.expand(2, 20))
        for m in (model, eager):
            m.hidden(inputs).float().square().mean().backward()
    assert counter.frame_count == 1
    found, expected = (
        torch.cat([p.grad.double().flatten() for p in m.parameters() if p.grad is not None]) for m in (model, eager)
    )
    assert (found - expected).norm() < expected.norm() * (1e-6 if dtype == torch.float32 else 0.02)


def test_no_host_read_in_a_forward_pass() -> None:
    """On the meta device a read of a value raises; so does one under a compiled graph."""
    with torch.device("meta"):
        for option in OPTIONS:
            model = make_meta(option)
            ids = torch.zeros(2, 10, dtype=torch.int64)
            inputs = Inputs(ids, ids, ids.int(), sequence=ids[:, 0], step=ids[0, 0], seed=1)
            model.hidden(inputs).sum().backward()


def make_meta(option: str) -> LanguageModel:
    small = {"vocab_size": V, "layers": 2, "width": 32, "heads": 4, "max_length": 40, "residual_dropout": 0.1}
    raw = {**small, **OPTIONS[option]}
    return build_model(FAMILIES[str(raw["family"])].config.model_validate(raw))


@pytest.mark.parametrize("option", OPTIONS)
def test_parameters_are_of_one_dtype_and_activations_follow(option: str) -> None:
    model = make(option).to(torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not list(model.buffers())
    documents, positions = pack([4, 4])
    assert model.hidden(Inputs(tokens(1, 8), positions, documents)).dtype == torch.bfloat16


def test_soft_cap_and_head() -> None:
    model, plain = make("modern"), make("modern", logit_softcap=None)
    ids = tokens(1, 5)
    torch.testing.assert_close(model(ids)["logits"], 15 * torch.tanh(plain(ids)["logits"] / 15))
    assert make("gpt2").head is None
    biased = make("sinusoidal post")
    assert biased.head_bias is not None
    assert biased.embed is not None
    assert biased.head_weight is biased.embed.tokens.weight


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"width": 33}, "heads=4 does not divide width=33"),
        ({"kv_heads": 3}, "kv_heads=3 does not divide heads=4"),
        ({"positions": "rotary", "head_dim": 5}, "even number of channels, not 5"),
        ({"positions": "sinusoidal", "width": 35, "heads": 5}, "even width, not 35"),
        ({"size": "2B"}, "size '2B': expected one of 124M"),
    ],
)
def test_impossible_shapes_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("gpt2", **fields)


def test_a_vocabulary_must_be_known() -> None:
    config: TransformerConfig = FAMILIES["gpt2"].config.model_validate({"layers": 1})
    with pytest.raises(ValueError, match="model.vocab_size=0"):
        build_model(config)
