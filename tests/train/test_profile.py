"""The profiler trace: the steps asked for, all of their operators, a file that other tools open."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from shardwright.config import ConfigError
from shardwright.train.profile import StepProfiler


def train(profiler: StepProfiler, steps: int) -> None:
    """A tiny real loop."""
    layer = torch.nn.Linear(16, 16)
    for step in range(1, steps + 1):
        with profiler.step(step):
            layer(torch.ones(4, 16)).sum().backward()


def events(trace: Path) -> list[str]:
    """Names of a trace's events."""
    with gzip.open(trace, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"]]


def test_the_chosen_steps_are_in_the_trace_and_no_others(tmp_path: Path) -> None:
    train(StepProfiler(tmp_path, [2, 3]), steps=5)
    trace = tmp_path / "profile" / "steps_00002-00003.rank0.json.gz"
    names = events(trace)
    assert {n for n in names if n.startswith("step ")} == {"step 2", "step 3"}
    assert names.count("aten::addmm") == 2
    assert "aten::addmm" in trace.with_name("steps_00002-00003.rank0.txt").read_text()


def test_a_run_that_ends_early_keeps_what_it_has(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, [2, 9])
    train(profiler, steps=3)
    trace = profiler.close()
    assert trace is not None
    assert trace.name == "steps_00002-00003.rank0.json.gz"
    assert "step 3" in events(trace)
    assert profiler.close() is None


def test_without_steps_nothing_happens(tmp_path: Path) -> None:
    profiler = StepProfiler(tmp_path, None)
    train(profiler, steps=2)
    assert profiler.close() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("steps", [[3, 2], [0, 4]])
def test_steps_out_of_order_are_refused(tmp_path: Path, steps: list[int]) -> None:
    with pytest.raises(ConfigError, match=r"log.profile=.*first and the last step"):
        StepProfiler(tmp_path, steps)
