"""The memory formula against peak bytes of tensors, measured on real ranks over steps of four micro-batches."""

import math
from typing import Any

import pytest
import torch

from benchmarks.counting import Memory
from shardwright.config import ConfigError, ParallelConfig
from shardwright.estimate.memory import step_memory, zero_paper_bytes
from shardwright.estimate.share import Layout, Place, Work, rank_share
from shardwright.model.count import num_parameters, parameter_shapes
from shardwright.model.families import FAMILIES
from tests.estimate.work_memory import track
from tests.ranks import Ranks

# Wide enough for parameters to matter most.
WIDE: dict[str, Any] = {"layers": 6, "width": 128, "vocab_size": 512}
MORE = "data.sequence_length=64 batch.micro=4"
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "alone": (1, "", {}),
    "alone, bf16, many tokens": (1, f"precision.compute=bf16 {MORE}", {}),
    "zero 0": (2, "parallel.zero=0", {}),
    "zero 1": (2, "parallel.zero=1", {}),
    "zero 2": (2, "parallel.zero=2", {}),
    "zero 3": (2, "parallel.zero=3", {}),
    "zero 0, bf16": (2, "parallel.zero=0 precision.compute=bf16", {}),
    "zero 1, bf16": (2, "parallel.zero=1 precision.compute=bf16", {}),
    "zero 2, bf16": (2, "parallel.zero=2 precision.compute=bf16", {}),
    "zero 3, bf16": (2, "parallel.zero=3 precision.compute=bf16", {}),
    "zero 3 on 4": (4, "parallel.zero=3", {"tied": False}),
    "hybrid zero 2": (4, "parallel.zero=2 parallel.shard=2", {}),
    "sgd": (2, "optimizer.name=sgd", {}),
    "lamb": (2, "optimizer.name=lamb", {}),
    "recomputed": (2, f"train.recompute=full {MORE}", {}),
    "tensor": (2, f"parallel.tensor=2 {MORE}", {}),
    "tensor, no sequence": (2, f"parallel.tensor=2 parallel.sequence=false {MORE}", {}),
    "context": (2, f"parallel.context=2 {MORE}", {}),
    "pipeline": (2, "parallel.pipeline=2", {}),
    "data x tensor, zero 3": (4, "parallel.tensor=2 parallel.zero=3", {}),
}


def make_model(family: str, **fields: Any) -> Any:
    """The config of a small model."""
    small = {"vocab_size": 61, "width": 64, "heads": 4, "max_length": 16}
    return FAMILIES[family].config.model_validate({"family": family, **small, **fields})


@pytest.mark.parametrize("case", CASES)
def test_the_formula_is_what_a_rank_holds(ranks: Ranks, case: str) -> None:
    """Masters and moments are exact but for padding; the peak is within 5 %."""
    size, overrides, model = CASES[case]
    arguments = (overrides.split(), {**WIDE, **model})
    for rank, (peak, parts, expected) in enumerate(ranks.run(size, "tests.estimate.work_memory:measure", *arguments)):
        where = f"rank {rank}: {parts} for {expected}"
        assert parts["masters"] == pytest.approx(expected["masters"], rel=1e-3), where
        assert parts["optimizer"] == pytest.approx(expected["optimizer"], rel=1e-3), where
        assert expected["total"] == pytest.approx(peak, rel=0.05), where


def test_the_tracker_sees_memory_come_and_go() -> None:
    """Views count once, what is resized and what is dropped is given back."""
    assert track(1000) == [4000, 8000, 4000, 0, 8000]


def test_the_tracker_sorts_what_it_sees() -> None:
    """A name, then what was being made; a weak name replaces none."""
    tracker = Memory()
    with tracker:
        tracker.making = "activations"
        a, b, c = (torch.zeros(size) for size in (1, 2, 4))
        tracker.name("masters", [a])
        tracker.name("buffers", [a, b], weak=True)
        tracker.making = "logits"
        d = torch.zeros(8)
    assert tracker.at_peak() == {"masters": 4, "buffers": 8, "activations": 16, "logits": 32}
    del c, d
    assert tracker.live == 12


def test_paper_figures() -> None:
    """Figure 1 of the ZeRO paper: 7.5 B parameters on 64 ranks take 120, 31.4, 16.6 and 1.9 GB."""
    found = [round(7.5 * zero_paper_bytes(stage, 64, 2), 1) for stage in range(4)]
    assert found == [120.0, 31.4, 16.6, 1.9]
    assert [zero_paper_bytes(stage, 2, 4) for stage in range(4)] == [16.0, 12.0, 10.0, 8.0]


def test_the_paper_is_a_lower_bound() -> None:
    """What this engine needs is never less: it accumulates in float32, and gathers beside the shards."""
    model = make_model("gpt2", vocab_size=50257, layers=12, width=768)
    total = num_parameters(model)["total"]
    for value in (2, 4):
        work = Work(length=1, micro_batch=1, micro_batches=4, value_bytes=value)
        for stage in range(4):
            layout = Layout(zero=stage, replicate=8 if stage == 0 else 1, shard=1 if stage == 0 else 8)
            found = step_memory(model, work, optimizer="adamw", layout=layout)["total"]
            assert found > 0.99 * total * zero_paper_bytes(stage, 8, value)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "adafactor", "lamb", "muon"])
def test_every_optimizer_has_moments(optimizer: str) -> None:
    """And the categories add up."""
    model = make_model("llama", layers=2)
    memory = step_memory(model, Work(length=64, micro_batch=1), optimizer=optimizer)
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    assert (memory["optimizer"] > 0) == (optimizer != "adafactor")


def test_offloading_takes_masters_away() -> None:
    """Masters, moments and reduced gradients are in host memory; gathered copies are not."""
    model = make_model("gpt2")
    work, layout = Work(length=8, micro_batch=1, micro_batches=4, value_bytes=2), Layout(zero=2, shard=4)
    here, away = (
        step_memory(model, work, optimizer="adamw", layout=layout, offload=offload) for offload in (False, True)
    )
    assert away["masters"] == away["optimizer"] == away["gradients"] == 0
    assert away["gathered"] == here["gathered"] > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "deberta_v2", "albert", "crammed", "modernbert"])
def test_shapes_are_those_of_the_model(family: str) -> None:
    """Every parameter is in one group of one rank's share, and tensor ranks have all of it between them."""
    model = make_model(family, layers=3)
    total = num_parameters(model)["total"]
    assert list(parameter_shapes(model))[:1] == ["embed.tokens.weight"]
    (share,) = rank_share(model, Layout())
    assert sum(group.size for group in share.groups) == total
    assert len(share.blocks) == (1 if family == "albert" else 3)
    cut = [rank_share(model, Layout(tensor=2), Place(tensor=index))[0] for index in range(2)]
    whole = parameter_shapes(model)
    alike = {name for group in cut[0].groups for name, shape in group.shapes.items() if shape == whole[name]}
    assert alike >= {name for group in cut[0].groups for name in group.partial} > set()
    doubled = sum(math.prod(whole[name]) for name in alike)
    assert sum(group.size for share in cut for group in share.groups) == total + doubled


def test_layout_of_a_config() -> None:
    """Data ranks are what is left; degrees that do not multiply are refused."""
    layout = Layout.of(ParallelConfig(zero=2, shard=2, tensor=2, context=2), 16)
    assert (layout.replicate, layout.shard, layout.spread, layout.slices, layout.world) == (2, 2, 4, 2, 16)
    with pytest.raises(ConfigError):
        Layout.of(ParallelConfig(tensor=3), 4)
