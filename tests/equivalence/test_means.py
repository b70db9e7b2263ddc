"""What saves memory changes nothing either, under layouts; nor does what does not divide. The matrix has more."""

import pytest

from tests.equivalence.cells import LOSS, NORM, WEIGHTS, config, disagreement
from tests.equivalence.work import run

CASES = {
    "recompute_full": (2, ["train.recompute=full", "parallel.zero=3"], []),
    "activation_offload": (2, ["train.offload_activations=true", "parallel.context=2"], []),
    "hybrid": (4, ["parallel.shard=2"], []),
    "dropout": (
        4,
        ["parallel.tensor=2", "parallel.pipeline=2"],
        ["model.residual_dropout=0.1", "model.embed_dropout=0.1"],
    ),
    "padding": (2, ["batch.micro=1"], ["batch.sequences=7"]),
    "odd_vocabulary": (2, ["parallel.tensor=2"], ["model.vocab_size=517"]),
}


@pytest.mark.in_turn
@pytest.mark.parametrize("name", CASES)
def test_a_means_changes_nothing(name, ranks, prepared, tmp_path):
    size, settings, meaning = CASES[name]
    expected = run(config(prepared, tmp_path / "oracle"), meaning)
    raw = config(prepared, tmp_path / "run")
    records = ranks.run(size, "tests.equivalence.work:run", raw, [*meaning, *settings])[0]
    found = disagreement(tmp_path / "run", records, tmp_path / "oracle", expected)
    assert found["loss"] < LOSS and found["norm"] < NORM and found["weights"] < WEIGHTS, found
