"""Two-stream attention: distances as views and by index, own rows of a rank, dropout that depends on nothing else."""

from __future__ import annotations

import pytest
import torch

from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.model.position import relative_sinusoidal
from shardwright.model.transformer import Inputs
from shardwright.model.two_stream import pick, shift
from shardwright.model.xlnet import XLNet, XLNetConfig, distance_rows

LENGTH, PLACES = 16, 8


def build(**fields: object) -> XLNet:
    small = {"vocab_size": 61, "layers": 2, "width": 16, "heads": 2, "init_std": 0.2}
    config = XLNetConfig.model_validate({**small, **fields})
    model = build_model(config)
    apply_init(model, config, 0)
    assert isinstance(model, XLNet)
    return model


def rows() -> Inputs:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 61, (3, LENGTH), generator=generator)
    places = torch.stack([torch.randperm(LENGTH, generator=generator)[:PLACES] for _ in range(3)])
    order = torch.zeros_like(ids).scatter_(1, places, torch.arange(1, PLACES + 1).expand(3, -1))
    types, documents = torch.zeros_like(ids), torch.zeros_like(ids)
    types[:, 5:], documents[:, 9:] = 1, 1
    return Inputs(ids, documents=documents, token_types=types, order=order, places=places, sequence=torch.arange(3))


@pytest.mark.parametrize("length", [1, 2, 7, 16])
def test_shifted_views_are_what_an_index_picks(length: int) -> None:
    scores = torch.randn(2, 3, length, 2 * length - 1, requires_grad=True)
    index = torch.arange(length).unsqueeze(0)
    shifted, picked = shift(scores), pick(scores, distance_rows(index, index))
    assert torch.equal(shifted, picked)
    out = torch.randn_like(shifted)
    gradients = [torch.autograd.grad(x, scores, out, retain_graph=True)[0] for x in (shifted, picked)]
    assert torch.equal(*gradients)


def test_vectors_of_distances() -> None:
    """Row L - 1 - (i - j) is of the distance i - j: sines, then cosines, of 10000^(-2n / D) times it."""
    table = relative_sinusoidal(5, 8, torch.device("cpu"))
    assert table.shape == (9, 8)
    frequencies = 10000 ** (-torch.arange(0, 8, 2) / 8)
    for distance in range(-4, 5):
        angles = distance * frequencies
        torch.testing.assert_close(table[4 - distance], torch.cat([angles.sin(), angles.cos()]))


def test_own_rows_of_a_rank_are_those_of_the_whole() -> None:
    """The context says of queries and keys where they stand: its bias of some rows is that of all, cut."""
    model, inputs = build(), rows()
    whole = model.context(inputs)
    own = torch.tensor([0, 1, 2, 3, 12, 13, 14, 15])
    everywhere = torch.arange(LENGTH).expand(3, -1)
    here = torch.full((LENGTH,), -1).index_copy_(0, own, torch.arange(8))[inputs.places]
    part = model.context(
        Inputs(
            inputs.input_ids[:, own], documents=inputs.documents[:, own], token_types=inputs.token_types[:, own],
            order=inputs.order[:, own], places=here.clamp(min=0), row_index=own.expand(3, -1), key_index=everywhere,
            key_documents=inputs.documents, key_order=inputs.order, key_token_types=inputs.token_types,
        )
    )  # fmt: skip
    terms = model.blocks["0"].attention.terms
    r = model.blocks["0"].attention.r(whole.relative)
    q = torch.randn(3, LENGTH + PLACES, 16)
    _, bias = terms(q, r, whole)
    _, cut = terms(torch.cat([q[:, own], q[:, LENGTH:]], dim=1), r, part)
    assert torch.equal(cut[:, :, :8], bias[:, :, own])
    found = here >= 0
    assert found.any() and not found.all()
    assert torch.equal(cut[:, :, 8:].transpose(1, 2)[found], bias[:, :, LENGTH:].transpose(1, 2)[found])


def test_dropout_is_of_the_sequence_and_place_alone() -> None:
    model, inputs = build(residual_dropout=0.3, embed_dropout=0.2).train(), rows()
    whole = model.hidden(inputs)
    assert not torch.equal(whole, model.hidden(inputs._replace(step=1)))
    one = Inputs(*(x[2:] if isinstance(x, torch.Tensor) else x for x in inputs))
    torch.testing.assert_close(model.hidden(one), whole[2:])


def test_the_second_stream_has_dropout_of_its_own() -> None:
    model, inputs = build(embed_dropout=0.5).train(), rows()
    context = model.context(inputs)
    assert context.layer_keys is not None and model.embed is not None
    x = model.embed(inputs.input_ids, context, context.layer_keys[0])
    content, query = x[:, :LENGTH].gather(1, inputs.places.unsqueeze(-1).expand(-1, -1, 16)) == 0, x[:, LENGTH:] == 0
    assert 0.4 < (content == query).float().mean() < 0.6
