"""ELECTRA's stages: what is drawn is of its place alone, and stages apart compute what one does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from shardwright.config import ConfigError
from shardwright.model.bert import BertConfig
from shardwright.model.dropout import uniform
from shardwright.model.electra import Electra, ElectraConfig
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import Inputs
from shardwright.objective.replaced import Replaced, ReplacedConfig
from shardwright.objective.setting import Setting
from shardwright.parallel.mesh import World
from shardwright.parallel.stages import keep_layers
from shardwright.train.draft import DraftModel, build_loss_model, place_keys
from shardwright.train.stages import Loop, Stages

LENGTH, PLACES, SEED = 24, 5, 3


def build(**fields: object) -> Electra:
    small = {"vocab_size": 61, "layers": 3, "width": 16, "heads": 2, "embed_width": 8, "generator_width": 8}
    config = ElectraConfig.model_validate({**small, "generator_heads": 2, "init_std": 0.2, **fields})
    model = build_model(config)
    apply_init(model, config, 0)
    assert isinstance(model, Electra)
    return model


def objective() -> Replaced:
    return Replaced(ReplacedConfig(name="replaced"), Setting(LENGTH, vocab_size=61, specials={"mask": 60}))


def batch(rows: int = 4) -> dict[str, Tensor]:
    """The last row ends in padding, and has two predictions fewer."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 60, (rows, LENGTH), generator=generator)
    places = torch.stack([torch.randperm(LENGTH - 4, generator=generator)[:PLACES] for _ in range(rows)])
    weights, real = torch.ones(rows, PLACES), torch.ones(rows, LENGTH)
    places[-1, 3:], weights[-1, 3:], real[-1, -4:] = 0, 0, 0
    return {
        "input_ids": text.scatter(1, places[:, :3], 60), "sequence": torch.arange(rows) + 7,
        "labels": text.gather(1, places), "places": places, "weights": weights, "replaced_weights": real,
        "documents": (real - 1).int(),
    }  # fmt: skip


def scales(stage: DraftModel, given: dict[str, Tensor]) -> dict[str, Tensor]:
    counts = stage.objective.count(given)
    return {term: weight / counts[term] for term, weight in stage.objective.terms.items()}


def test_numbers_are_of_their_place_alone() -> None:
    ids = torch.zeros(40, 250, dtype=torch.int64)
    everywhere = torch.arange(250).expand(40, -1)
    numbers = place_keys(Inputs(ids, sequence=torch.arange(40), seed=3, step=7), everywhere)
    # Another batch, another order of places.
    some, rows = torch.tensor([[17, 3], [249, 17]]), torch.tensor([39, 4])
    again = place_keys(Inputs(ids[:2], sequence=rows, seed=3, step=7), some)
    assert torch.equal(again, numbers[rows].gather(1, some))
    # A rank that has some tokens of each row counts places among them.
    part = Inputs(ids[:2, :100], sequence=rows, seed=3, step=7, row_index=torch.arange(100, 200).expand(2, -1))
    assert torch.equal(place_keys(part, some % 100), numbers[rows].gather(1, some % 100 + 100))
    for changed in ({"seed": 4}, {"step": 8}, {"sequence": torch.arange(1, 41)}):
        other = Inputs(ids, sequence=torch.arange(40), seed=3, step=7)._replace(**changed)  # type: ignore[arg-type]
        assert (place_keys(other, everywhere) == numbers).float().mean() < 0.01


def test_the_first_step_of_seed_0_draws_as_any_other() -> None:
    """Zeros are what a hash may leave as they are: a place must not favour the token of its own number."""
    inputs = Inputs(torch.zeros(4, 100, dtype=torch.int64), sequence=torch.arange(4))
    keys = place_keys(inputs, torch.arange(100).expand(4, -1))
    winners = uniform(keys.flatten(), torch.arange(100), torch.float32).argmin(-1).view(4, 100)
    assert (winners == torch.arange(100)).sum() < 20


def test_the_batch_around_a_sequence_does_not_matter() -> None:
    stage, given = DraftModel(build(), objective(), SEED), batch()
    whole, _, _ = stage._draft(stage.inputs(given), given)
    for row in range(4):
        one = {name: x[row : row + 1] for name, x in given.items()}
        alone, _, _ = stage._draft(stage.inputs(one), one)
        assert torch.equal(alone, whole[row : row + 1])


def test_only_predicted_places_are_filled_and_labels_say_where_the_text_is_another() -> None:
    stage, given = DraftModel(build(), objective(), SEED), batch()
    text = given["input_ids"].scatter(1, given["places"][:, :3], given["labels"][:, :3])
    filled, replaced, _ = stage._draft(stage.inputs(given), given)
    active = torch.zeros_like(filled, dtype=torch.bool).scatter_add_(1, given["places"], given["weights"] > 0)
    assert torch.equal(filled[~active], given["input_ids"][~active])
    assert torch.equal(replaced.bool(), filled != text)
    assert replaced.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cuts", [(1,), (2, 4)])
def test_stages_apart_compute_what_one_does(cuts: tuple[int, ...], dtype: torch.dtype) -> None:
    whole, given = DraftModel(build().to(dtype), objective(), SEED), batch()
    whole.begin(torch.tensor(2), scales(whole, given))
    expected = whole(given["input_ids"], **given)
    expected.sum().backward()
    assert whole.early is not None

    names, x = [name for name, _ in whole.model.layers()], given["input_ids"]
    edges = [0, *cuts, len(names)]
    stages = []
    for start, stop in zip(edges, edges[1:], strict=False):
        part = copy.deepcopy(whole.model)
        part.zero_grad()
        keep_layers(part, names[start:stop])
        stages.append(DraftModel(part, whole.objective, SEED, first=start == 0, last=stop == len(names)))
        stages[-1].begin(torch.tensor(2), scales(whole, given))
        x = stages[-1](x, **given)
        if stop < len(names):
            assert x.shape == stages[-1].border({name: tensor.shape for name, tensor in given.items()})
    assert torch.equal(x, expected)
    x.sum().backward()
    assert torch.equal(stages[0].early, whole.early)  # type: ignore[arg-type]
    assert all(stage.early is None for stage in stages[1:])
    found = {name: p for stage in stages for name, p in stage.model.named_parameters()}
    for name, parameter in whole.model.named_parameters():
        assert torch.equal(found[name].grad, parameter.grad), name  # type: ignore[arg-type]


def test_sums_of_both_terms_come_together() -> None:
    """Also where a step has several micro-batches, and in an evaluation, which leaves nothing behind."""
    only, given = DraftModel(build(), objective(), SEED), batch()
    stages = Stages({0: only}, Loop(only), World())
    halves = [{name: x[part] for name, x in given.items()} for part in (slice(0, 2), slice(2, 4))]
    stages.begin(torch.tensor(2), scales(only, given))
    once = stages.run([given])
    stages.begin(torch.tensor(2), scales(only, given))
    torch.testing.assert_close(stages.run(halves), once)
    stages.begin(torch.tensor(2))
    sums, again = stages.evaluate(halves), stages.evaluate(halves)
    assert torch.equal(sums, again)
    counts = torch.stack(list(only.objective.count(given).values()))
    torch.testing.assert_close((sums / counts * torch.tensor([1.0, 50.0])).sum(), once)


@pytest.mark.parametrize("config", [BertConfig(vocab_size=61), ElectraConfig(vocab_size=61, generator_layers=0)])
def test_replaced_tokens_need_a_generator(config: ElectraConfig) -> None:
    with torch.device("meta"):
        model = build_model(config)
    with pytest.raises(ConfigError, match="needs a generator"):
        build_loss_model(model, objective(), SEED)
