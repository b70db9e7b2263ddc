"""Frozen parameters and adapters under data parallelism and ZeRO: as in one process, resumed to the bit."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.equivalence.cells import BOUNDS, config, disagreement, weights
from tests.equivalence.work import run
from tests.ranks import Ranks

STEPS = ["train.steps=6", "checkpoint.every=3", "checkpoint.keep_last=9", "optimizer.lr=0.01"]
SHORT = "data.sequence_length=48"
ADAPTERS: dict[str, list[str]] = {
    "freeze": ["adapt.freeze=['embed.*', 'blocks.0.*', 'blocks.2.*', '*.bias']"],
    "freeze all but the head's norm": ["adapt.freeze=['*']", "adapt.train=['final_norm.*']"],
    "lora": ["adapt.method=lora", "adapt.rank=3", "adapt.targets=[q,v,up]"],
    "lora dropout": ["adapt.method=lora", "adapt.rank=3", "adapt.dropout=0.1"],
    "prompt": ["adapt.method=prompt", "adapt.tokens=4", SHORT],
    "p_tuning": ["adapt.method=p_tuning", "adapt.tokens=4", SHORT],
    "prefix": ["adapt.method=prefix", "adapt.tokens=4", "adapt.projection=16", SHORT],
}
CASES = [
    *((name, zero, "fp32") for name in ("freeze", "lora") for zero in range(4)),
    *((name, 3, "fp32") for name in ("freeze all but the head's norm", "lora dropout", "prompt", "p_tuning", "prefix")),
    ("prompt", 1, "fp32"),
    ("freeze", 2, "bf16"),
    ("lora", 3, "bf16"),
]
LLAMA = ("lora", "prefix")


def raw_of(prepared: Path, place: Path, name: str) -> dict[str, Any]:
    return config(prepared, place, "llama" if name in LLAMA else "gpt2")


@pytest.mark.in_turn
@pytest.mark.parametrize(("name", "zero", "precision"), CASES)
def test_two_ranks_are_one(ranks: Ranks, prepared: Path, tmp_path: Path, name: str, zero: int, precision: str) -> None:
    settings = [*STEPS, *ADAPTERS[name], f"precision.compute={precision}", "batch.micro=1"]
    expected = run(raw_of(prepared, tmp_path / "one", name), settings)
    raw = raw_of(prepared, tmp_path / "two", name)
    records = ranks.run(2, "tests.equivalence.work:run", raw, [*settings, f"parallel.zero={zero}"])[0]
    found = disagreement(tmp_path / "two", records, tmp_path / "one", expected)
    bounds = BOUNDS[precision]
    assert found["loss"] < bounds["loss"] and found["norm"] < bounds["norm"], found
    assert found["weights"] < bounds["weights"], found


@pytest.mark.in_turn
@pytest.mark.parametrize("name", ["freeze", "lora dropout", "prefix"])
def test_resumes_under_another_stage(ranks: Ranks, prepared: Path, tmp_path: Path, name: str) -> None:
    """What is frozen keeps its bits throughout; what is trained goes on to the bit under the same layout."""
    settings, raw = [*STEPS, *ADAPTERS[name]], raw_of(prepared, tmp_path / "run", name)
    ranks.run(2, "tests.equivalence.work:run", raw, [*settings, "parallel.zero=3"])
    first = weights(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    (tmp_path / "run/checkpoints/latest").unlink(missing_ok=True)
    ranks.run(2, "tests.equivalence.work:run", raw, [*settings, "parallel.zero=3"])
    again = weights(tmp_path / "run")
    assert all(torch.equal(first[key], again[key]) for key in first)
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    (tmp_path / "run/checkpoints/latest").unlink(missing_ok=True)
    run(raw, settings)
    alone = weights(tmp_path / "run")
    assert all(torch.allclose(first[key], alone[key], atol=1e-5) for key in first)
