"""One step: gradients against plain autograd in float64, no host reads, one graph a block."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.parallel.mesh import World
from shardwright.train.build import build_step
from shardwright.train.settings import read_config

WORLD = World(0, 1, torch.device("cpu"))


def _config(*overrides, family="gpt2"):
    raw = {
        "model": {"family": family, "layers": 2, "width": 32, "heads": 2, "max_length": 64, "vocab_size": 97},
        "objective": {"name": "causal"},
        "data": {"sequence_length": 48},
        "batch": {"sequences": 4, "micro": 2},
        "train": {"steps": 6, "compile": False},
    }
    return read_config(raw, overrides)


def _batch(seed: int, rows: int = 2, length: int = 48):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (rows, length + 1), generator=generator)
    documents = (torch.rand(rows, length, generator=generator) < 0.1).cumsum(1).int()
    return {
        "input_ids": ids[:, :-1],
        "labels": ids[:, 1:],
        "weights": (torch.rand(rows, length, generator=generator) < 0.8).float(),
        "documents": documents,
        "sequence": torch.arange(rows) + 10 * seed,
    }


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gradients_are_those_of_the_mean_over_all_micro_batches(family):
    step = build_step(_config(family=family), WORLD)
    batches = [_batch(seed) for seed in range(3)]
    model = copy.deepcopy(step.stages.models[0].model).double()
    step.accumulate(batches, torch.tensor(0))
    total = sum(_plain_loss(model, b) for b in batches) / sum(b["weights"].sum() for b in batches)
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(step.masters.weights[name].grad.double(), parameter.grad, rtol=1e-4, atol=1e-6)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    outcome = step.update(1.0)
    assert outcome[0].item() == pytest.approx(total.item(), rel=1e-5)
    assert outcome[1].item() == pytest.approx(norm.item(), rel=1e-5)


def _plain_loss(model, batch):
    logits = model(batch["input_ids"], documents=batch["documents"])["logits"]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
    return (losses * batch["weights"].flatten()).sum()


class HostReads(TorchDispatchMode):
    """Counts the operations that bring a device value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        reads = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += function in reads
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compute", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor", "lamb", "muon"])
def test_a_step_reads_nothing_on_the_host(compute, optimizer):
    settings = ("guard.spike=skip", f"precision.compute={compute}", f"optimizer.name={optimizer}")
    step = build_step(_config(*settings, "model.residual_dropout=0.1"), WORLD)
    batches = [_batch(seed) for seed in range(2)]
    number = torch.tensor(0)
    with HostReads() as reads:
        step.accumulate(batches, number)
        step.update(0.5)
    assert reads.count == 0


def test_clipping_scales_to_the_given_norm():
    free, clipped = (build_step(_config(f"train.clip={clip}", "optimizer.name=sgd", "optimizer.momentum=0.0",
                                        "optimizer.nesterov=false", "optimizer.weight_decay=0.0"), WORLD)
                     for clip in ("null", "0.05"))  # fmt: skip
    moves = []
    for step in (free, clipped):
        before = {n: w.clone() for n, w in step.masters.weights.items()}
        step.accumulate([_batch(0)], torch.tensor(0))
        norm = step.update(1.0)[1].item()
        moves.append(torch.cat([(w - before[n]).flatten() for n, w in step.masters.weights.items()]))
    torch.testing.assert_close(moves[1], moves[0] * 0.05 / norm, rtol=1e-3, atol=1.2e-7)


def test_fp16_gradients_do_not_depend_on_the_scale():
    norms = []
    for scale in ("256.0", "65536.0"):
        step = build_step(_config("precision.compute=fp16", f"precision.loss_scale.initial={scale}"), WORLD)
        step.accumulate([_batch(0)], torch.tensor(0))
        norms.append(step.update(1.0)[1].item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)


def test_blocks_compile_as_one_graph_for_all_of_them():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    step = build_step(_config("train.compile=true", "model.layers=3", "model.residual_dropout=0.1"), WORLD)
    for number in range(3):
        step.accumulate([_batch(number)], torch.tensor(number))
        step.update(0.5)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2  # a block and the loss
