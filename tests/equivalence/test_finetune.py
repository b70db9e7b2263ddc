"""Fine-tuning under layouts: classes of texts and of tokens, and pairs, are learned as one process learns them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardwright.data.examples import write_examples
from shardwright.data.tokenizers import Tokenizer
from tests.equivalence.cells import EIGHT, LAYOUTS, LOSS, NORM, WEIGHTS, disagreement
from tests.equivalence.work import run
from tests.ranks import Ranks

CLASSES, STEPS = 3, 8
_CLASSIFY = {"name": "classify", "classes": CLASSES}
#: name: (model, objective).
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts by gpt2": ({"family": "gpt2"}, {**_CLASSIFY, "of": "text"}),
    "texts by bert": ({"family": "bert"}, {**_CLASSIFY, "of": "text"}),
    "tokens by modernbert": ({"family": "modernbert"}, {**_CLASSIFY, "of": "tokens"}),
    "texts by bart": ({"family": "bart"}, {**_CLASSIFY, "of": "text", "begin": True, "start": "end"}),
    "pairs by t5": ({"family": "t5"}, {"name": "pairs"}),
}
CHOSEN = ("zero3", "tensor2", "context2", "pipeline2_1f1b", EIGHT)
#: Those of every run of the suite; the others have their days.
ALWAYS = {("texts by bert", "tensor2"), ("tokens by modernbert", "context2"), ("texts by bart", "pipeline2_1f1b"),
          ("pairs by t5", "zero3")}  # fmt: skip
CELLS = [
    pytest.param(case, layout, marks=() if (case, layout) in ALWAYS else pytest.mark.in_turn)
    for case in CASES
    for layout in CHOSEN
]


def examples(of: str, seed: int, count: int) -> Iterator[tuple[list[int], list[int]]]:
    """Random tokens with what is to be told of them: 1 + a class, one of every token, or the tokens backwards."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ids = rng.integers(60, 90, rng.integers(5, 20)).tolist()
        told = {"text": [1 + ids[0] % CLASSES], "tokens": [1 + n % CLASSES for n in ids], "pairs": ids[::-1]}
        yield ids, told[of]


@pytest.fixture(scope="module")
def folders(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Examples of each kind."""
    tokenizer, found = Tokenizer.load(prepared), {}
    for of in ("text", "tokens", "pairs"):
        found[of] = tmp_path_factory.mktemp(of)
        splits = {"train": examples(of, 1, 200), "validation": examples(of, 2, 20)}
        write_examples(found[of], splits, tokenizer)
    return found


@pytest.fixture(scope="module")
def oracles() -> dict[str, tuple[Path, list[dict[str, Any]]]]:
    """What one process did, by case."""
    return {}


@pytest.mark.parametrize(("case", "layout"), CELLS)
def test_a_layout_changes_nothing(
    case: str,
    layout: str,
    folders: dict[str, Path],
    oracles: dict[str, tuple[Path, list[dict[str, Any]]]],
    ranks: Ranks,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    model, objective = CASES[case]
    folder = tmp_path_factory.mktemp("runs")
    raw: dict[str, Any] = {
        "model": {**model, "layers": 3, "width": 32, "heads": 4, "max_length": 32},
        "objective": objective,
        "data": {"path": str(folders[objective.get("of", "pairs")]), "sequence_length": 24, "lanes": 4, "workers": 0},
        "batch": {"sequences": 16, "micro": 2},
        "train": {"steps": STEPS, "compile": False, "threads": 1, "clip": 0.2, "seed": 5},
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_steps": 3},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"asynchronous": False},
    }
    if case not in oracles:
        oracles[case] = folder / "one", run({**raw, "run": str(folder / "one")}, [])
    spread = LAYOUTS[layout]
    given = {**raw, "run": str(folder / "run")}
    records = ranks.run(spread.processes, "tests.equivalence.work:run", given, list(spread.settings))[0]
    found = disagreement(folder / "run", records, *oracles[case])
    assert found["loss"] < LOSS and found["norm"] < NORM and found["weights"] < WEIGHTS, found
    assert found["validation"] < LOSS, found
