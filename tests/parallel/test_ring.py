"""torch's ring attention between context ranks computes what one process does, and nothing of it fails silently."""

from __future__ import annotations

import pytest
import torch

from shardwright.config import ConfigError
from shardwright.model.families import FAMILIES
from shardwright.parallel.context import ContextRows
from shardwright.parallel.ring import check_device
from tests.equivalence.cells import LOSS, NORM, WEIGHTS, config, disagreement
from tests.equivalence.work import run
from tests.parallel.work_context import LENGTH, SHAPES, Case
from tests.ranks import Ranks

WORK = "tests.parallel.work_ring"
DROPOUT = {"residual_dropout": 0.1, "embed_dropout": 0.1}
CAUSAL = [shape for shape, fields in SHAPES.items() if FAMILIES[fields["family"]].config.causal]


@pytest.mark.parametrize("n", [2, 4])
def test_torch_shares_rows_out_as_we_do(ranks: Ranks, n: int) -> None:
    for index, (rows, output, gradients) in enumerate(ranks.run(n, f"{WORK}:bare", True)):
        assert rows == ContextRows(n, index, LENGTH).rows.tolist()
        assert output < 1e-6 and gradients < 3e-6


def test_a_backward_pass_outside_is_wrong_in_torch_without_a_word(ranks: Ranks) -> None:
    """Why the context stands around whole passes; once this fails, it need not."""
    for _, output, gradients in ranks.run(2, f"{WORK}:bare", False):
        assert output < 1e-6 and gradients > 0.1


@pytest.mark.parametrize("shape", CAUSAL)
@pytest.mark.parametrize("n", [2, 4])
def test_loss_and_gradients_are_those_of_one_process(ranks: Ranks, n: int, shape: str) -> None:
    assert max(max(errors) for errors in ranks.run(n, f"{WORK}:compare", Case(shape, False, DROPOUT))) < 1e-6


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation(ranks: Ranks, recompute: str) -> None:
    case = Case("llama", False, DROPOUT, recompute=recompute)
    assert max(max(errors) for errors in ranks.run(2, f"{WORK}:compare", case)) < 1e-6


def test_evaluation(ranks: Ranks) -> None:
    assert max(ranks.run(4, f"{WORK}:evaluate", "llama")) < 1e-5


def test_misuse_is_told(ranks: Ranks) -> None:
    expected = (
        "a pass outside of Ring.open",
        "the ring takes no mask",
        "opened twice",
        "a pass outside of Ring.open",
        "documents need to know where keys stand",
        "",
        "shares rows out in another order than context ranks here: use parallel.ring=false",
    )
    for said in ranks.run(2, f"{WORK}:misuse"):
        assert len(said) == len(expected), said
        assert all(part in text for part, text in zip(expected, said, strict=True)), said


def test_gpus_alone() -> None:
    with pytest.raises(ConfigError, match="^parallel.ring: .* this is a cpu; use parallel.ring=false"):
        check_device(torch.device("cpu"))
    check_device(torch.device("cuda"))


# Whole runs, with data, ZeRO, tensor parallelism, recomputation and evaluation beside the ring.
MEANING = [
    "data.mask_documents=false",
    "data.reset_positions=false",
    "train.steps=4",
    "schedule.warmup_steps=1",
    "evaluate.every=2",
    "evaluate.max_tokens=1024",
]
LAYOUTS = {
    "context2": (2, []),
    "zero3_tensor2_context2": (4, ["parallel.zero=3", "parallel.tensor=2", "train.recompute=full"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_is_that_of_one_process(name, ranks, prepared, tmp_path) -> None:
    size, settings = LAYOUTS[name]
    oracle = tmp_path / "one"
    expected = run(config(prepared, oracle, "llama"), MEANING)
    raw = config(prepared, tmp_path / "run", "llama")
    asked = [*MEANING, "parallel.context=2", "parallel.ring=true", *settings]
    records = ranks.run(size, f"{WORK}:train", raw, asked, timeout=300.0)[0]
    found = disagreement(tmp_path / "run", records, oracle, expected)
    assert found["loss"] < LOSS and found["norm"] < NORM and found["weights"] < WEIGHTS, found
    assert found["validation"] < LOSS, found
