"""Hugging Face is the oracle of encoder-decoders: same logits, loss and gradients; weights come back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.interop.huggingface import export_tensors, import_tensors
from shardwright.interop.model_config import read_config, write_config
from shardwright.model.count import num_parameters
from shardwright.model.encoder_decoder import EncoderDecoder
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import Inputs

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 101, "layers": 3, "width": 32, "heads": 4, "max_length": 64}
UNEVEN = {**SMALL, "layers": 1, "decoder_layers": 3, "mlp_width": 80}
NEWER = {"activation": "geglu_tanh", "tied": False, "scale_logits": False}
CASES: dict[str, dict[str, Any]] = {
    "t5": {"family": "t5", **SMALL},
    "t5-newer": {"family": "t5", **SMALL, **NEWER, "head_dim": 6},
    "t5-uneven": {"family": "t5", **UNEVEN, "relative_buckets": 8, "relative_distance": 20, "norm_eps": 1e-5},
    "t5-swiglu": {"family": "t5", **SMALL, **NEWER, "activation": "swiglu", "decoder_layers": 1},
    "bart": {"family": "bart", **SMALL},
    "bart-uneven": {"family": "bart", **UNEVEN, "activation": "relu", "scale_embedding": True},
    "bart-biased": {"family": "bart", **SMALL, "head_bias": True},
    "bart-tanh": {"family": "bart", **SMALL, "activation": "gelu_tanh"},
    "transformer": {"family": "transformer", **SMALL},
    "transformer-biased": {"family": "transformer", **UNEVEN, "head_bias": True, "activation": "silu"},
    "transformer-unscaled": {"family": "transformer", **SMALL, "scale_embedding": False},
}
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 0}


def build_ours(case: str, seed: int = 0) -> EncoderDecoder:
    """A model with random biases and norms as well, so that nothing is tested at zero or one."""
    fields = CASES[case]
    config = FAMILIES[fields["family"]].config.model_validate(fields)
    model = build_model(config)
    assert isinstance(model, EncoderDecoder)
    apply_init(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def to_theirs(model: EncoderDecoder) -> Any:
    """Their model of the same weights, loaded as they load it."""
    raw = write_config(model.config)
    config = transformers.AutoConfig.for_model(**{**raw, **IDS, "forced_eos_token_id": None})
    state = dict(export_tensors(model.config, {name: p.detach() for name, p in model.named_parameters()}))
    kind = getattr(transformers, raw["architectures"][0])
    theirs, report = kind.from_pretrained(
        None, config=config, state_dict=state, attn_implementation="eager", output_loading_info=True
    )
    assert not report["unexpected_keys"] and not report["mismatched_keys"]
    return theirs.eval()


def random_ids(rows: int, length: int, seed: int) -> Tensor:
    """Token ids without those of IDS."""
    return torch.randint(3, 101, (rows, length), generator=torch.Generator().manual_seed(seed))


def make_batch(source: int, target: int, padding: str) -> dict[str, Tensor]:
    """Three pairs in Hugging Face's names; `padding` of up to 4 and 3 tokens on a side, other rows by other amounts."""
    ids, shifted, labels = random_ids(3, source, 1), random_ids(3, target, 2), random_ids(3, target, 3)
    masks = [torch.ones_like(ids), torch.ones_like(shifted)]
    for mask, sizes in zip(masks, ((0, 4, 1), (3, 0, 2)), strict=True):
        for row, size in zip(mask, sizes, strict=True):
            if size and padding != "none":
                row[: size if padding == "left" else None][-size:] = 0
    batch = {"input_ids": ids * masks[0], "decoder_input_ids": shifted * masks[1]}
    batch["labels"] = labels.where(masks[1].bool(), -100)
    if padding == "none":
        return batch
    return {**batch, "attention_mask": masks[0], "decoder_attention_mask": masks[1]}


def check_logits(found: Tensor, expected: Tensor) -> None:
    """Within 1e-5 of the largest."""
    torch.testing.assert_close(found, expected, atol=1e-5 * max(1.0, float(expected.detach().abs().max())), rtol=0)


def their_gradients(theirs: Any) -> dict[str, Tensor]:
    """By name; the constant that they add to logits is a buffer, which is asked for a gradient as well."""
    return {n: p.grad for n, p in [*theirs.named_parameters(), *theirs.named_buffers()] if p.grad is not None}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("source", "target", "padding"),
    [(33, 17, "none"), (9, 21, "right"), (13, 8, "left"), (1, 1, "none"), (40, 5, "right")],
)
def test_logits_loss_and_gradients_equal(case: str, source: int, target: int, padding: str) -> None:
    ours = build_ours(case)
    theirs = to_theirs(ours)
    if ours.config.head_bias:
        theirs.final_logits_bias.requires_grad_()
    batch = make_batch(source, target, padding)
    labels = batch["labels"]
    found = ours(**{name: x for name, x in batch.items() if name != "labels"})["logits"]
    expected = theirs(**batch)
    seen = labels != -100
    check_logits(found[seen], expected.logits[seen])

    loss = F.cross_entropy(found.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected.loss, atol=1e-6, rtol=1e-6)
    loss.backward()
    expected.loss.backward()
    gradients = dict(import_tensors(ours.config, their_gradients(theirs)))
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in gradients.items():
        mine = ours.get_parameter(name).grad
        assert mine is not None
        torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_packed_pairs_are_those_of_single_ones(case: str) -> None:
    """Three pairs in a row and padding behind; an own source each, in another order than that of the targets."""
    ours = build_ours(case)
    theirs = to_theirs(ours)
    if ours.config.head_bias:
        theirs.final_logits_bias.requires_grad_()
    sources, targets = [random_ids(1, n, n) for n in (5, 9, 3)], [random_ids(1, n, 10 + n) for n in (4, 2, 7)]
    order = (2, 0, 1)
    packed = ours(
        input_ids=pack([sources[n] for n in order], 2),
        position_ids=places([sources[n] for n in order], 2),
        documents=numbers([sources[n] for n in order], order, 2),
        decoder_input_ids=pack(targets, 3),
        decoder_position_ids=places(targets, 3),
        decoder_documents=numbers(targets, (0, 1, 2), 3),
    )["logits"]
    assert packed.isfinite().all()
    pairs = zip(sources, targets, strict=True)
    alone = torch.cat([theirs(input_ids=source, decoder_input_ids=target).logits for source, target in pairs], dim=1)
    check_logits(packed[:, : alone.shape[1]], alone)
    packed[:, : alone.shape[1]].square().mean().backward()
    alone.square().mean().backward()
    for name, gradient in import_tensors(ours.config, their_gradients(theirs)):
        mine = ours.get_parameter(name).grad
        torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def pack(parts: list[Tensor], padding: int) -> Tensor:
    """One after the other, then padding."""
    return F.pad(torch.cat(parts, dim=1), (0, padding))


def places(parts: list[Tensor], padding: int) -> Tensor:
    """Positions that begin anew with each."""
    return F.pad(torch.cat([torch.arange(part.shape[1]) for part in parts]), (0, padding)).unsqueeze(0)


def numbers(parts: list[Tensor], order: tuple[int, ...], padding: int) -> Tensor:
    """The number of the pair that each token is of; -1 is padding."""
    found = [torch.full((part.shape[1],), n) for part, n in zip(parts, order, strict=True)]
    return F.pad(torch.cat(found), (0, padding), value=-1).unsqueeze(0)


def test_a_target_without_a_source_has_finite_logits_and_gradients() -> None:
    """Padding of targets beside sources that have none."""
    ours = build_ours("t5")
    documents, decoder_documents = torch.zeros(1, 5, dtype=torch.int64), torch.tensor([[0, 0, 0, -1, -1]])
    logits = ours(random_ids(1, 5, 1), decoder_input_ids=random_ids(1, 5, 2), documents=documents,
                  decoder_documents=decoder_documents)["logits"]  # fmt: skip
    logits[:, :3].sum().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("case", ["t5", "t5-swiglu", "bart-uneven", "transformer"])
def test_a_cache_gives_the_tokens_that_they_generate(case: str) -> None:
    """The encoder runs once: later passes do without the source. Padded sources, greedy choice.

    (transformers 5.23 makes T5's cache for as many layers as the encoder has, so its decoder must not have more.)
    """
    ours = build_ours(case)
    theirs = to_theirs(ours)
    ids, mask = random_ids(2, 11, 5), torch.ones(2, 11, dtype=torch.int64)
    mask[1, 7:] = 0
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "num_beams": 1}
    expected = theirs.generate(input_ids=ids, attention_mask=mask, **settings)
    cache, tokens = ours.build_cache(16), expected[:, :1]
    with torch.inference_mode():
        logits = ours(ids, mask, tokens, cache=cache)["logits"][:, -1]
        for _ in range(12):
            logits[:, IDS["eos_token_id"]] = float("-inf")  # as min_new_tokens does
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
            hidden = ours.hidden(Inputs(tokens[:, -1:], encoder_mask=mask), cache=cache)
            logits = ours.logits(hidden[:, -1])
    assert torch.equal(tokens, expected)


def test_several_tokens_at_once_join_a_cache() -> None:
    ours = build_ours("t5-uneven")
    ids, target = random_ids(2, 7, 1), random_ids(2, 9, 2)
    whole = ours(ids, decoder_input_ids=target)["logits"]
    cache = ours.build_cache(9)
    parts = [ours(ids, decoder_input_ids=part, cache=cache)["logits"] for part in target.split((2, 4, 1, 2), dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


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
    if not config.tied:
        theirs["tie_word_embeddings"] = False  # T5's own class says that it is true, whatever the file has said
    again = read_config(theirs)
    assert write_config(again) == write_config(config)
    shape = ("layers", "num_decoder_layers", "width", "head_width", "hidden_width", "activation", "tied", "sinusoid")
    assert [getattr(again, f) for f in shape] == [getattr(config, f) for f in shape]


# Parameters of the published models, as Hugging Face counts them.
PUBLISHED = {
    ("t5", "small", 32128): 60_506_624,
    ("t5", "base", 32128): 222_903_552,
    ("t5", "large", 32128): 737_668_096,
    ("t5", "3B", 32128): 2_851_598_336,
    ("t5", "11B", 32128): 11_307_321_344,
    ("t5", "v1.1-small", 32128): 76_961_152,
    ("t5", "v1.1-base", 32128): 247_577_856,
    ("t5", "v1.1-large", 32128): 783_150_080,
    ("t5", "v1.1-XL", 32128): 2_849_757_184,
    ("t5", "v1.1-XXL", 32128): 11_135_332_352,
    ("bart", "base", 50265): 139_420_416,
    ("bart", "large", 50265): 406_291_456,
}


@pytest.mark.parametrize(("family", "size", "vocab"), PUBLISHED)
def test_published_sizes(family: str, size: str, vocab: int) -> None:
    config = FAMILIES[family].config.model_validate({"family": family, "size": size, "vocab_size": vocab})
    count = count_theirs(config)
    assert num_parameters(config)["total"] == count == PUBLISHED[family, size, vocab]
    with torch.device("meta"):
        assert sum(p.numel() for p in build_model(config).parameters()) == count


@pytest.mark.parametrize(("size", "millions"), [("base", 65), ("big", 213)])
def test_sizes_of_the_paper(size: str, millions: int) -> None:
    """Table 3 of Vaswani et al. 2017, with about 37,000 tokens; Marian's frozen sinusoids are no parameters."""
    config = FAMILIES["transformer"].config.model_validate({"size": size, "vocab_size": 37000})
    assert num_parameters(config)["total"] == count_theirs(config) == pytest.approx(millions * 1e6, rel=0.04)


def count_theirs(config: Any) -> int:
    """What their model trains; a free head of T5 is one in files alone, so here it is added."""
    raw = write_config(config)
    with torch.device("meta"):
        theirs = getattr(transformers, raw["architectures"][0])(
            transformers.AutoConfig.for_model(**{**raw, **IDS, "forced_eos_token_id": None})
        )
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    shared = theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    return count + (0 if config.tied or not shared else config.vocab_size * config.width)


def test_what_does_not_fit_is_named() -> None:
    ours = build_ours("bart")
    state = dict(export_tensors(ours.config, dict(ours.named_parameters())))

    def expect(message: str, tensors: dict[str, Tensor]) -> None:
        with pytest.raises(ValueError, match=message) as error:
            list(import_tensors(ours.config, tensors))
        assert "\n" not in str(error.value)

    name = "model.decoder.layers.1.encoder_attn.k_proj.bias"
    expect(f"1 missing .{name}", {n: t for n, t in state.items() if n != name})
    expect("is not zero, and the config has no place for it; set model.head_bias=true",
           state | {"final_logits_bias": torch.ones(1, 101)})  # fmt: skip
    expect("encoder.embed_tokens.weight differs from model.shared.weight",
           state | {"model.encoder.embed_tokens.weight": torch.zeros(101, 32)})  # fmt: skip
    assert dict(import_tensors(ours.config, state | {"final_logits_bias": torch.zeros(1, 101)}))
    bare = {n.removeprefix("model."): t for n, t in state.items()} | {"final_logits_bias": torch.zeros(1, 101)}
    assert len(dict(import_tensors(ours.config, bare))) == len(dict(ours.named_parameters()))


def test_what_cannot_be_said_is_refused() -> None:
    def config(family: str, **fields: object) -> Any:
        return FAMILIES[family].config.model_validate({"family": family, **SMALL, **fields})

    with pytest.raises(ValueError, match="sinusoid='interleaved': MarianMTModel has 'halves'"):
        write_config(config("transformer", sinusoid="interleaved"))
    with pytest.raises(ValueError, match="scale_logits=True: shares tie_word_embeddings"):
        write_config(config("t5", tied=False))
    with pytest.raises(ValueError, match="encoder_ffn_dim=8, decoder_ffn_dim=9: are not supported here"):
        read_config({"model_type": "bart", "encoder_ffn_dim": 8, "decoder_ffn_dim": 9})
    with pytest.raises(ValueError, match="tie_word_embeddings=False is not supported"):
        read_config({"model_type": "bart", "tie_word_embeddings": False})
    with pytest.raises(ValueError, match="share_encoder_decoder_embeddings=False is not supported"):
        read_config({"model_type": "marian", "share_encoder_decoder_embeddings": False})
    with pytest.raises(ValueError, match="decoder_input_ids: is missing"):
        build_ours("t5")(random_ids(1, 3, 0))


@pytest.mark.parametrize("model_type", ["t5", "bart", "marian"])
def test_what_a_config_json_leaves_out_is_as_they_have_it(model_type: str) -> None:
    theirs = transformers.AutoConfig.for_model(model_type)
    assert write_config(read_config({"model_type": model_type})) == write_config(read_config(theirs.to_dict()))
