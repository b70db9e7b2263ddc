"""Every layout trains as one process does: 20 AdamW steps on real packed text, in real processes."""

import pytest

from tests.equivalence.cells import LOSS, NORM, WEIGHTS, config, disagreement
from tests.equivalence.work import run

LAYOUTS = {
    "data2": (2, ["parallel.zero=0"]),
    "zero1": (2, ["parallel.zero=1"]),
    "zero2": (2, ["parallel.zero=2"]),
    "zero3": (2, ["parallel.zero=3"]),
    "tensor2": (2, ["parallel.tensor=2"]),
    "tensor2_whole": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "context2": (2, ["parallel.context=2"]),
    "pipeline2_gpipe": (2, ["parallel.pipeline=2", "parallel.schedule=gpipe"]),
    "pipeline2_1f1b": (2, ["parallel.pipeline=2"]),
    "pipeline2_interleaved": (2, ["parallel.pipeline=2", "parallel.schedule=interleaved_1f1b"]),
    "pipeline2_zero_bubble": (2, ["parallel.pipeline=2", "parallel.schedule=interleaved_zero_bubble"]),
    "pipeline2_zbv": (2, ["parallel.pipeline=2", "parallel.schedule=zbv"]),
    "pipeline2_dualpipev": (2, ["parallel.pipeline=2", "parallel.schedule=dualpipev"]),
    "data2_tensor2": (4, ["parallel.tensor=2"]),
    "zero3_tensor2": (4, ["parallel.tensor=2", "parallel.zero=3"]),
    "data2_context2": (4, ["parallel.context=2"]),
    "replicate2_context2": (4, ["parallel.context=2", "parallel.zero=0"]),
    "data2_pipeline2": (4, ["parallel.pipeline=2"]),
    "tensor2_pipeline2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "pipeline4_1f1b": (4, ["parallel.pipeline=4"]),
    "data2_tensor2_pipeline2": (8, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
#: One of each axis, stage and kind of schedule, and a product; the others have their days.
ALWAYS = {
    "data2", "zero1", "zero2", "zero3", "tensor2", "context2", "pipeline2_1f1b", "pipeline2_interleaved",
    "pipeline2_zbv", "pipeline4_1f1b", "data2_tensor2", "data2_tensor2_pipeline2",
}  # fmt: skip
CASES = [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.in_turn) for name in LAYOUTS]


@pytest.fixture(scope="module")
def oracle(prepared, tmp_path_factory):
    """One process."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    return folder, run(config(prepared, folder), [])


@pytest.mark.parametrize("name", CASES)
def test_a_layout_changes_nothing(name, oracle, ranks, prepared, tmp_path):
    size, settings = LAYOUTS[name]
    raw = config(prepared, tmp_path / "run")
    records = ranks.run(size, "tests.equivalence.work:run", raw, settings)[0]
    found = disagreement(tmp_path / "run", records, *oracle)
    assert found["loss"] < LOSS and found["norm"] < NORM and found["weights"] < WEIGHTS, found
