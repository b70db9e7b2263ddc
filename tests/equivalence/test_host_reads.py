"""No step waits for its device: under no layout is a value of the device read on the host, but to set up a pipeline."""

import pytest

from tests.equivalence.cells import config

LAYOUTS = {
    "zero1": (2, ["parallel.zero=1"]),
    "zero3": (2, ["parallel.zero=3", "optimizer.name=lamb"]),
    "tensor2": (2, ["parallel.tensor=2", "optimizer.name=muon"]),
    "context2": (2, ["parallel.context=2", "precision.compute=fp16", "precision.loss_scale.initial=512.0"]),
    "pipeline2": (2, ["parallel.pipeline=2", "guard.spike=skip"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_step_reads_nothing_on_the_host(name, ranks, prepared, tmp_path):
    size, settings = LAYOUTS[name]
    raw = config(prepared, tmp_path / "run")
    raw["train"] |= {"steps": 4}
    raw["schedule"] = {}
    for counts in ranks.run(size, "tests.equivalence.work:host_reads", raw, settings):
        assert counts[1:] == [0, 0, 0], counts
        assert counts[0] == 0 or "pipeline" in name, counts
