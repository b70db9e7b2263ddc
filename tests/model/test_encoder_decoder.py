"""Encoder-decoders by themselves: parts of a model are the model, streams are apart, distances have their buckets."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwright.model.encoder_decoder import EncoderDecoder
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init, initial_value
from shardwright.model.position import distance_bucket, sinusoidal
from shardwright.model.transformer import Inputs
from shardwright.parallel.stages import keep_layers

SMALL = {"vocab_size": 61, "layers": 2, "decoder_layers": 3, "width": 32, "heads": 4, "max_length": 32}
DROPOUT = {"residual_dropout": 0.2, "embed_dropout": 0.2}


def make(family: str, **fields: Any) -> EncoderDecoder:
    """A small model with weights large enough that everything matters."""
    config = FAMILIES[family].config.model_validate({"family": family, **SMALL, "init": "fan_in", **fields})
    model = build_model(config)
    assert isinstance(model, EncoderDecoder)
    apply_init(model, config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def make_inputs(source: int = 12, target: int = 7) -> Inputs:
    """Two rows of two documents, in both streams."""
    generator = torch.Generator().manual_seed(2)
    ids, encoder_ids = (torch.randint(0, 61, (2, n), generator=generator) for n in (target, source))
    return Inputs(
        ids,
        documents=(torch.arange(target) >= target // 2).int().expand(2, -1),
        encoder_ids=encoder_ids,
        encoder_documents=(torch.arange(source) >= source // 3).int().expand(2, -1),
        step=3,
        seed=11,
    )


@pytest.mark.parametrize("family", ["t5", "bart", "transformer"])
@pytest.mark.parametrize("cuts", [(1,), (2, 4), (1, 2, 3, 4, 5), (3, 5), (4,), (-1,)])
def test_parts_of_a_model_are_the_model(family: str, cuts: tuple[int, ...]) -> None:
    """Wherever it is cut; each part's output is the next one's input, of both streams, and dropout is the same."""
    model, inputs = make(family, **DROPOUT).train(), make_inputs()
    expected = model.hidden(inputs)
    names = [name for name, _ in model.layers()]
    bounds = [0, *(cut % len(names) for cut in cuts), len(names)]
    x: Tensor | None = None
    for start, stop in zip(bounds, bounds[1:], strict=False):
        part = deepcopy(model)
        keep_layers(part, names[start:stop], shared="embed.tokens")
        if x is not None:
            shapes = {"encoder_ids": torch.Size((2, 12)), "input_ids": torch.Size((2, 7))}
            assert x.shape == (2, part.border(shapes), 32)
        x = part.hidden(inputs, x)
    assert x is not None and torch.equal(x, expected)


def test_the_norm_between_the_stacks_is_a_layer() -> None:
    names = [name for name, _ in make("t5", tied=False).layers()]
    blocks = [f"blocks.{n}" for n in range(5)]
    assert names == ["embed", *blocks[:2], "encoder_norm", *blocks[2:], "final_norm", "head"]
    assert [name for name, _ in make("bart").layers()] == ["embed", *blocks]


@pytest.mark.parametrize("family", ["t5", "bart", "transformer"])
def test_streams_are_apart(family: str) -> None:
    """No later token of the target, no other document's token of either stream, changes anything."""
    model, inputs = make(family).eval(), make_inputs()
    assert inputs.encoder_ids is not None
    expected = model.hidden(inputs)
    later, other, source = inputs.input_ids.clone(), inputs.input_ids.clone(), inputs.encoder_ids.clone()
    later[:, -1] += 1
    other[:, :3] += 1
    source[:, :4] += 1
    torch.testing.assert_close(model.hidden(inputs._replace(input_ids=later % 61))[:, :-1], expected[:, :-1])
    torch.testing.assert_close(model.hidden(inputs._replace(input_ids=other % 61))[:, 3:], expected[:, 3:])
    found = model.hidden(inputs._replace(encoder_ids=source % 61))
    torch.testing.assert_close(found[:, 3:], expected[:, 3:])
    assert float((found - expected).detach()[:, :3].abs().amax(-1).min()) > 1e-3


def test_dropout_differs_between_streams_and_sites() -> None:
    """Equal tokens of both streams at one place get masks of their own."""
    model = make("bart", embed_dropout=0.5, embed_norm=False, positions="none").train()
    ids = torch.zeros(1, 8, dtype=torch.int64)
    inputs = Inputs(ids, encoder_ids=ids)
    context = model.context(inputs)
    embed: Any = model.embed
    assert context.encoder is not None and context.layer_keys is not None
    target = embed.target(ids, context, context.layer_keys[0])
    source = embed.source(ids, context.encoder, context.layer_keys[0])
    assert not torch.equal(target == 0, source == 0)


def test_every_distance_has_its_bucket() -> None:
    """T5's 32 buckets by hand: 16 a direction, 8 of one distance each, the last from 128 on."""
    offsets = torch.arange(-200, 201)
    both = dict(zip(offsets.tolist(), distance_bucket(offsets, 32, 128, bidirectional=True).tolist(), strict=True))
    assert [both[-n] for n in range(9)] == list(range(9)) and [both[n] for n in (1, 7, 8)] == [17, 23, 24]
    assert [both[-n] for n in (11, 12, 15, 16, 127, 128, 200)] == [8, 9, 9, 10, 15, 15, 15]
    back = dict(zip(offsets.tolist(), distance_bucket(offsets, 32, 128, bidirectional=False).tolist(), strict=True))
    assert [back[n] for n in (0, 1, 200)] == [0, 0, 0]
    assert [back[-n] for n in (1, 15, 16, 19, 127, 128)] == [1, 15, 16, 17, 31, 31]
    assert sorted(set(both.values())) == [n for n in range(32) if n != 16]  # the query itself is no later key


def test_halves_are_the_same_sinusoids_in_another_order() -> None:
    positions = torch.arange(9).unsqueeze(0)
    turns, halves = sinusoidal(positions, 16), sinusoidal(positions, 16, halves=True)
    assert torch.equal(halves, torch.cat([turns[..., 0::2], turns[..., 1::2]], dim=-1))


def test_t5_starts_as_in_mesh_tensorflow() -> None:
    """q over the root of the width of a head, since scores are not; BART and the others have it in the scores."""
    config = FAMILIES["t5"].config.model_validate({"size": "small", "vocab_size": 64})

    def std(name: str, *shape: int) -> float:
        return float(initial_value(config, name, torch.Size(shape), 0).std())

    assert std("blocks.0.attention.q.weight", 512, 512) == pytest.approx((512 * 64) ** -0.5, rel=0.02)
    assert std("blocks.7.cross.k.weight", 512, 512) == pytest.approx(512**-0.5, rel=0.02)
    assert std("encoder_relative.weight", 32, 8) == pytest.approx(512**-0.5, rel=0.2)
    assert std("embed.tokens.weight", 64, 512) == pytest.approx(1.0, rel=0.02)
    assert std("blocks.0.mlp.down.weight", 512, 2048) == pytest.approx(2048**-0.5, rel=0.02)
