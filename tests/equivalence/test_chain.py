"""A run that changes its layout every five steps is the run of one process that never stopped."""

from collections import Counter

from tests.equivalence.cells import LOSS, NORM, WEIGHTS, config, disagreement
from tests.equivalence.work import leg, run

LEGS = [
    (1, []),
    (2, ["parallel.zero=3"]),
    (4, ["parallel.tensor=2", "parallel.zero=2"]),
    (2, ["parallel.pipeline=2", "parallel.schedule=zbv"]),
    (4, ["parallel.context=2", "parallel.pipeline=2"]),
    (1, []),
    (8, ["parallel.tensor=2", "parallel.pipeline=2"]),
]
EVERY = 5


def test_any_layout_goes_on_from_any_other(ranks, prepared, tmp_path):
    steps = ["checkpoint.every=5", f"train.steps={EVERY * len(LEGS)}"]
    raw, expected_raw = config(prepared, tmp_path / "chain"), config(prepared, tmp_path / "oracle")
    expected_numbers: dict[int, Counter[int]] = {}
    for step, taken in leg(config(prepared, tmp_path / "numbers"), steps, EVERY * len(LEGS)).items():
        expected_numbers[step] = Counter(taken)
    expected = run(expected_raw, steps)
    for number, (size, layout) in enumerate(LEGS[:-1], 1):
        until, settings = number * EVERY, [*steps, *layout]
        if size == 1:
            seen = [leg(raw, settings, until)]
        else:
            seen = ranks.run(size, "tests.equivalence.work:leg", raw, settings, until)
        for step in range(until - EVERY + 1, until + 1):
            taken = Counter(i for one in {tuple(s[step]) for s in seen} for i in one)
            assert taken == expected_numbers[step], f"step {step} under {layout}"
    records = ranks.run(LEGS[-1][0], "tests.equivalence.work:run", raw, [*steps, *LEGS[-1][1]])[0]
    found = disagreement(tmp_path / "chain", records, tmp_path / "oracle", expected)
    assert found["loss"] < LOSS and found["norm"] < NORM and found["weights"] < WEIGHTS, found
