"""Lower precision under layouts: one overflow decision for the whole world, figures as near as the format allows."""

from typing import Any

import pytest

from tests.equivalence.cells import config, disagreement
from tests.equivalence.work import overflow, run

# Measured largest differences over 20 steps are a third of these or less; sums in another order are rounded otherwise.
BOUNDS = {"fp16": {"loss": 5e-4, "norm": 2e-2, "weights": 5e-3}, "bf16": {"loss": 4e-3, "norm": 0.1, "weights": 2e-2}}
LAYOUTS = {
    "zero1": (2, ["parallel.zero=1"]),
    "zero3": (2, ["parallel.zero=3"]),
    "tensor2": (2, ["parallel.tensor=2"]),
    "context2": (2, ["parallel.context=2"]),
    "pipeline2": (2, ["parallel.pipeline=2", "parallel.schedule=interleaved_1f1b"]),
}
FP16 = ["precision.compute=fp16", "precision.loss_scale.initial=4096.0", "precision.loss_scale.window=8"]
STEP = 4


def some(names: list[str], always: set[str]) -> list[Any]:
    """Cases of which some run always, and the others have their days."""
    return [pytest.param(name, marks=() if name in always else pytest.mark.in_turn) for name in names]


@pytest.fixture(scope="module")
def overflowed(prepared, tmp_path_factory):
    """One process whose gradients overflow at STEP."""
    folder = tmp_path_factory.mktemp("overflowed") / "run"
    return folder, overflow(config(prepared, folder), FP16, STEP, rank=0)


@pytest.mark.parametrize("name", some([*LAYOUTS], {"zero1", "pipeline2"}))
def test_an_overflow_on_one_rank_is_skipped_by_all(name, overflowed, ranks, prepared, tmp_path):
    size, settings = LAYOUTS[name]
    raw = config(prepared, tmp_path / "run")
    answers = ranks.run(size, "tests.equivalence.work:overflow", raw, [*FP16, *settings], STEP, size - 1)
    scales = [r["loss_scale"] for r in answers[0] if "loss_scale" in r]
    assert scales == [r["loss_scale"] for r in overflowed[1] if "loss_scale" in r]
    assert scales[STEP] == scales[STEP - 1] / 2 and max(scales[STEP:]) > scales[STEP]
    expected = [{**r, "grad_norm": 1.0} if r.get("grad_norm") is None else r for r in overflowed[1]]
    records = [{**r, "grad_norm": 1.0} if r.get("grad_norm") is None else r for r in answers[0]]
    found = disagreement(tmp_path / "run", records, overflowed[0], expected)
    assert all(found[k] < bound for k, bound in BOUNDS["fp16"].items()), found


@pytest.fixture(scope="module")
def rounded(prepared, tmp_path_factory):
    """One process in bf16."""
    folder = tmp_path_factory.mktemp("rounded") / "run"
    return folder, run(config(prepared, folder), ["precision.compute=bf16"])


@pytest.mark.parametrize("name", some(["zero3", "tensor2", "pipeline2"], {"zero3"}))
def test_bf16_stays_within_its_bound(name, rounded, ranks, prepared, tmp_path):
    size, settings = LAYOUTS[name]
    raw = config(prepared, tmp_path / "run")
    records = ranks.run(size, "tests.equivalence.work:run", raw, ["precision.compute=bf16", *settings])[0]
    found = disagreement(tmp_path / "run", records, *rounded)
    assert all(found[k] < bound for k, bound in BOUNDS["bf16"].items()), found
