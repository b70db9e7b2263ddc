"""What ranks run for test_streams.py: steps of a model of two streams, on pairs made here, with the real step.

The loader and the objectives of pairs stay out: batches are a function of their number, targets are the next tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shardwright.parallel.mesh import join_world
from shardwright.parallel.refusals import refusals
from shardwright.parallel.zero import ShardedMasters
from shardwright.train.build import build_step
from shardwright.train.layout import build_facts
from shardwright.train.settings import read_config
from shardwright.train.step import Outcome, Step

VOCABULARY, SOURCE, TARGET = 61, 32, 16
EVALUATED = 8  # rows, which every pipeline here fills evenly


def train(raw: dict[str, Any], overrides: list[str], steps: int) -> dict[str, Any]:
    """Losses and gradient norms of `steps` steps, the loss of an evaluation, and all weights in the end."""
    torch.set_num_threads(1)
    config = read_config(raw, overrides)
    with join_world("cpu", 1, config.parallel) as world:
        assert refusals(build_facts(config, world.size)) == []
        step = build_step(config, world)
        each, data = config.global_batch() // world.degree("data"), world.index("data")
        answer: dict[str, Any] = {"losses": [], "norms": []}
        for number in range(steps):
            rows = pairs(number, config.global_batch(), packed=config.data.mask_documents)
            own = {name: x[data * each : (data + 1) * each] for name, x in rows.items()}
            step.accumulate(cut(own, config.batch.micro), torch.tensor(number))
            outcome = Outcome.read(step.update(1.0).tolist())
            answer["losses"].append(outcome.loss)
            answer["norms"].append(outcome.grad_norm)
        answer["evaluation"] = evaluate(step, cut(pairs(99, EVALUATED, packed=True), 1))
        answer["tied"] = [float(weight.difference()) for weight in getattr(step.masters, "tied", ())]
        return {**answer, "weights": weights(step)}


def evaluate(step: Step, batches: list[dict[str, Tensor]]) -> float:
    """The sum over all batches and ranks of what the last stage gives; every data rank has the same ones."""
    stages, world, total = step.stages, step.stages.world, torch.zeros((), dtype=torch.float64)
    own, size = [stages.cut(batch) for batch in batches], stages.passes.at_once
    stages.train(False)
    stages.begin(torch.tensor(0))
    for start in range(0, len(own), size):
        total += stages.passes.evaluate(own[start : start + size]).double().sum()
    stages.train(True)
    return float(world.sum(total) / world.loss_copies / world.degree("data"))


def weights(step: Step) -> dict[str, Tensor]:
    """What this rank has a part of, whole."""
    if not isinstance(step.masters, ShardedMasters):
        return {name: x.detach().clone() for name, x in step.masters.weights.items()}
    logical = step.masters.logical
    return {name: logical[name].gather(part.detach()).clone() for name, part in step.masters.parts.items()}


def cut(rows: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """Micro-batches."""
    count = len(rows["input_ids"])
    return [{name: x[n : n + size] for name, x in rows.items()} for n in range(0, count, size)]


def pairs(number: int, rows: int, *, packed: bool) -> dict[str, Tensor]:
    """Batch `number` of sources and targets; `packed` rows hold several documents, and padding behind them."""
    random = torch.Generator().manual_seed(number)

    def ids(length: int) -> Tensor:
        return torch.randint(0, VOCABULARY, (rows, length), generator=random)

    target = ids(TARGET + 1)
    batch = {
        "encoder_ids": ids(SOURCE),
        "input_ids": target[:, :-1].contiguous(),
        "labels": target[:, 1:].contiguous(),
        "weights": torch.rand(rows, TARGET, generator=random).round(decimals=2),
        "sequence": torch.arange(rows) + rows * number,
    }
    if not packed:
        return batch
    batch["encoder_documents"], batch["encoder_positions"] = documents(rows, SOURCE, random)
    batch["documents"], batch["position_ids"] = documents(rows, TARGET, random)
    batch["weights"] *= batch["documents"] >= 0
    return batch


def documents(rows: int, length: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Numbers of documents 0, 1 and 2 and -1 for padding, with bounds anywhere, and positions in each."""
    bounds = torch.randint(1, length, (rows, 3), generator=random).sort(dim=1).values
    index = torch.arange(length).expand(rows, length)
    number = (index.unsqueeze(-1) >= bounds.unsqueeze(1)).sum(-1)
    starts = torch.cat([torch.zeros(rows, 1, dtype=torch.int64), bounds], dim=1)
    positions = index - starts.gather(1, number)
    return number.where(number < 3, -1).int(), positions
