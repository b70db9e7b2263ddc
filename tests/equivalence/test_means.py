"""What saves memory changes nothing either, under layouts; nor do odd batches, vocabularies and layer counts."""

import pytest

from tests.equivalence.cells import LOSS, NORM, WEIGHTS, config, disagreement
from tests.equivalence.work import run

CASES = {
    "recompute_full": (2, ["train.recompute=full", "parallel.zero=3"], []),
    "recompute_selective": (4, ["train.recompute=selective", "parallel.tensor=2", "parallel.pipeline=2"], []),
    "activation_offload": (2, ["train.offload_activations=true", "parallel.context=2"], []),
    "offload": (2, ["parallel.offload=true"], []),
    "hybrid": (4, ["parallel.shard=2"], []),
    "dropout": (
        4,
        ["parallel.tensor=2", "parallel.pipeline=2"],
        ["model.residual_dropout=0.1", "model.embed_dropout=0.1"],
    ),
    "padding": (2, ["batch.micro=1"], ["batch.sequences=7"]),
    "ramp": (2, ["parallel.pipeline=2"], ["batch.ramp={start: 4, increment: 2, sequences: 40}"]),
    "odd_vocabulary": (2, ["parallel.tensor=2"], ["model.vocab_size=517"]),
    "free_head": (4, ["parallel.tensor=2", "parallel.pipeline=2"], ["model.tied=false"]),
}


@pytest.mark.parametrize("name", CASES)
def test_a_means_changes_nothing(name, ranks, prepared, tmp_path):
    size, settings, meaning = CASES[name]
    expected = run(config(prepared, tmp_path / "oracle"), meaning)
    raw = config(prepared, tmp_path / "run")
    records = ranks.run(size, "tests.equivalence.work:run", raw, [*meaning, *settings])[0]
    found = disagreement(tmp_path / "run", records, tmp_path / "oracle", expected)
    assert found["loss"] < LOSS and found["norm"] < NORM and found["weights"] < WEIGHTS, found
