"""Pipeline parallelism: rules of stages, and real ranks that compute what one process does under every schedule."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.pipelining._utils import generate_rank_to_stage_mapping

from shardwright.parallel import pipeline, stages
from shardwright.parallel.stages import SCHEDULES, check_micro_batches, keep_layers, layer_costs, split_layers
from tests.parallel.work_pipeline import EVALUATED, Case, build_model, one_process
from tests.ranks import Ranks

WORK = "tests.parallel.work_pipeline"
SINGLE = [name for name, schedule in SCHEDULES.items() if schedule.placement == "single"]
SPLITTING = [name for name, schedule in SCHEDULES.items() if schedule.splits_backward]


def virtual(schedule: str) -> int:
    return 1 if schedule in SINGLE else 2


# ------------------------------------------------------------------------------------------------------------- stages


def best_bound(costs: Sequence[float], num_stages: int) -> float:
    """The cheapest costliest stage, by trying all cuts."""
    ends = combinations(range(1, len(costs)), num_stages - 1)
    return min(max(sum(costs[a:b]) for a, b in zip((0, *cut), (*cut, len(costs)), strict=True)) for cut in ends)


@given(st.data())
def test_the_costliest_stage_is_as_cheap_as_possible(data: st.DataObject) -> None:
    costs = data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=9))
    count = data.draw(st.integers(1, len(costs)))
    parts = split_layers(costs, count)
    assert [n for part in parts for n in part] == list(range(len(costs)))
    assert len(parts) == count and all(parts)
    found = max(sum(costs[n] for n in part) for part in parts)
    assert found == pytest.approx(best_bound(costs, count), rel=1e-9)


def test_equal_layers_leave_early_stages_short() -> None:
    assert [len(part) for part in split_layers([0.1] * 5, 4)] == [1, 1, 1, 2]
    assert [len(part) for part in split_layers([1 / 3] * 14, 4)] == [3, 3, 4, 4]


def test_among_equal_bounds_the_rest_is_even() -> None:
    assert split_layers([9, 1, 1, 1, 1], 3) == [range(0, 1), range(1, 3), range(3, 5)]


@pytest.mark.parametrize("count", [0, 6])
def test_stages_without_layers_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="5 layers"):
        split_layers([1.0] * 5, count)


def test_a_tied_head_costs_the_last_layer_its_flops() -> None:
    assert layer_costs([0, 10, 0], [5, 1, 1], head_flops=7, update_flops=2) == [10, 12, 9]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_stages_of_a_rank_are_where_torch_has_them(schedule: str, size: int) -> None:
    count = virtual(schedule)
    style = "v" if SCHEDULES[schedule].placement == "v" else "loop"
    expected = generate_rank_to_stage_mapping(size, size * count, style)
    assert {rank: stages.stage_indices(schedule, rank, size, count) for rank in range(size)} == expected


@pytest.mark.parametrize(("schedule", "count"), [("1f1b", 2), ("zbv", 1), ("dualpipev", 3), ("interleaved_1f1b", 0)])
def test_wrong_numbers_of_stages_are_refused(schedule: str, count: int) -> None:
    with pytest.raises(ValueError, match="a rank"):
        stages.stage_indices(schedule, 0, 2, count)


def torch_takes(schedule: str, size: int, count: int, micro_batches: int) -> bool:
    """Whether torch's own schedule can be made."""
    parts = [
        SimpleNamespace(num_stages=size * count, group_size=size, group_rank=0, stage_index=n * size, submod=None)
        for n in range(count)
    ]
    try:
        pipeline._TRAINING[schedule](parts[0] if schedule in SINGLE else parts, micro_batches, loss_fn=torch.add)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_numbers_of_micro_batches_are_those_that_torch_takes(schedule: str) -> None:
    for size in (1, 2, 3, 4):
        for count in (1, 2, 3) if SCHEDULES[schedule].placement == "loop" else (virtual(schedule),):
            for micro_batches in range(1, 14):
                reason = check_micro_batches(schedule, size, count, micro_batches)
                assert (reason is None) == torch_takes(schedule, size, count, micro_batches), (size, count, reason)
    assert check_micro_batches(schedule, 2, virtual(schedule), 0) is not None


@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_every_parameter_once_under_its_own_name(tied: bool) -> None:
    whole = dict(build_model(Case("1f1b", 1, tied=tied)).named_parameters())
    names = [name for name, _ in build_model(Case("1f1b", 1, tied=tied)).layers()]
    found: list[str] = []
    for part in split_layers([1.0] * len(names), 3):
        model = build_model(Case("1f1b", 1, tied=tied))
        keep_layers(model, {names[n] for n in part}, shared="embed.tokens" if tied else None)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, whole[name])
            found.append(name)
    assert sorted(found) == sorted([*whole, *(["embed.tokens.weight"] if tied else [])])


def test_unknown_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="no such layer: blocks.9"):
        keep_layers(build_model(Case("1f1b", 1)), {"blocks.9"})


# -------------------------------------------------------------------------------------------------------------- ranks


def distance(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Relative, where the norm of `expected` is not under `floor`."""
    return float((found - expected).norm() / max(float(expected.norm()), floor, 1e-30))


def measure(ranks: Ranks, case: Case) -> dict[str, float]:
    """The largest relative error of losses, evaluations, gradients and weights of a course, and what must be exact."""
    expected = one_process(case)
    answers: list[dict[str, Any]] = ranks.run(case.size * case.data, f"{WORK}:course", case)
    errors = {"loss": 0.0, "evaluation": 0.0, "gradient": 0.0, "weight": 0.0}
    for step in range(len(case.counts)):
        for what, key, copies in (("loss", "losses", 1), ("evaluation", "evaluations", case.data)):
            found = sum(answer[key][step] for answer in answers) / copies
            errors[what] = max(errors[what], abs(found / expected[key][step] - 1))
        gradients = expected["gradients"][step]
        # Of a key's bias, for one, the gradient is nothing but rounding.
        floor = 0.1 * float(torch.cat([g.flatten() for g in gradients.values()]).norm())
        pairs = [pair for answer in answers for pair in answer["gradients"][step]]
        assert {name for name, _ in pairs} == set(gradients)
        errors["gradient"] = max(errors["gradient"], *(distance(g, gradients[name], floor) for name, g in pairs))
    pairs = [pair for answer in answers for pair in answer["weights"]]
    errors["weight"] = max(distance(weight, expected["weights"][name]) for name, weight in pairs)
    assert all(difference == 0 for answer in answers for difference in answer["differences"])
    # No stage ran on made-up data.
    passes = sum(case.counts) + len(case.counts) * EVALUATED
    assert all(calls == passes for answer in answers for calls in answer["calls"])
    return errors


def check(ranks: Ranks, case: Case, bound: float = 1e-6) -> None:
    errors = measure(ranks, case)
    assert max(errors.values()) <= bound, errors


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "free"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_two_ranks_compute_what_one_does(ranks: Ranks, schedule: str, tied: bool) -> None:
    check(ranks, Case(schedule, 2, virtual(schedule), tied=tied, zero=1 if tied else None))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_four_ranks_compute_what_one_does(ranks: Ranks, schedule: str) -> None:
    layers = 5 if schedule in SINGLE else 7
    check(ranks, Case(schedule, 4, virtual(schedule), layers=layers, counts=(8, 12, 8)))


@pytest.mark.parametrize(
    ("schedule", "zero"), [(s, zero) for s in SCHEDULES for zero in (0, 1, 3) if zero < 3 or s not in SPLITTING]
)
def test_data_parallel_pipelines_compute_what_one_process_does(ranks: Ranks, schedule: str, zero: int) -> None:
    check(ranks, Case(schedule, 2, virtual(schedule), data=2, zero=zero))


@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "interleaved_zero_bubble"])
def test_more_stages_a_rank_than_are_gathered_at_once(ranks: Ranks, schedule: str) -> None:
    check(ranks, Case(schedule, 2, 4, layers=9, data=2, tied=False))


@pytest.mark.parametrize("counts", [(3, 8, 5), (2, 3, 4)])
def test_zbv_takes_few_micro_batches(ranks: Ranks, counts: tuple[int, ...]) -> None:
    check(ranks, Case("zbv", 2, 2, counts=counts))


@pytest.mark.parametrize(
    ("schedule", "recompute"),
    [*((s, "full") for s in ("1f1b", "zbv", "dualpipev")), *((s, "selective") for s in ("1f1b", "interleaved_1f1b"))],
)
def test_recomputation_with_dropout(ranks: Ranks, schedule: str, recompute: str) -> None:
    check(ranks, Case(schedule, 2, virtual(schedule), recompute=recompute, dropout=0.1))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize(("compute", "bound"), [("bfloat16", 5e-2), ("float16", 6e-3)])
def test_half_precision(ranks: Ranks, schedule: str, compute: str, bound: float) -> None:
    check(ranks, Case(schedule, 2, virtual(schedule), compute=compute, counts=(4, 16, 8)), bound)


def test_sequences_of_another_length(ranks: Ranks) -> None:
    for case in (Case("1f1b", 2), Case("zbv", 2, 2)):
        answers = ranks.run(2, f"{WORK}:lengths", case, (8, 5, 8))
        for steps in zip(*answers, strict=True):
            assert sum(found for found, _ in steps) == pytest.approx(steps[0][1], rel=1e-6)


def test_only_micro_batches_in_flight_have_buffers(ranks: Ranks) -> None:
    """As many as ranks in 1F1B; all of them in GPipe, which keeps every activation until its backward pass."""
    assert max(ranks.run(2, f"{WORK}:most_buffers", Case("1f1b", 2, counts=(8,)))) <= 2
    assert max(ranks.run(2, f"{WORK}:most_buffers", Case("gpipe", 2, counts=(8,)))) == 8


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("schedule", SPLITTING)
def test_zero_3_is_wrong_where_the_backward_pass_is_split(ranks: Ranks, schedule: str) -> None:
    """Why refusals.py has this row: torch says nothing. Where this fails, torch was mended."""
    errors = measure(ranks, Case(schedule, 2, 2, data=2, zero=3))
    assert errors["gradient"] > 0.1


def test_selective_recomputation_cannot_be_where_the_backward_pass_is_split(ranks: Ranks) -> None:
    """Why refusals.py has this row."""
    for schedule in ("interleaved_zero_bubble", "zbv"):  # on one rank dualpipev has nothing to split
        (message,) = ranks.run(1, f"{WORK}:attempt", Case(schedule, 1, 2, recompute="selective"))
        assert "backward an extra time" in message


def test_micro_batches_of_two_shapes_are_refused_before_anything_is_sent(ranks: Ranks) -> None:
    for message in ranks.run(2, f"{WORK}:mixed_shapes", Case("1f1b", 2)):
        assert "micro-batches of one shape" in message


def test_too_few_micro_batches_are_refused_before_anything_is_sent(ranks: Ranks) -> None:
    for message in ranks.run(2, f"{WORK}:attempt", Case("dualpipev", 2, 2, counts=(3,))):
        assert "as many micro-batches as stages: 4, not 3" in message


# --------------------------------------------------------------------------------------------------------- tied copies


@pytest.mark.parametrize(("schedule", "size"), [("1f1b", 2), ("1f1b", 3), ("zbv", 2)])
def test_tied_copies(ranks: Ranks, schedule: str, size: int) -> None:
    for answer in ranks.run(2 * size, f"{WORK}:tie", schedule, size):
        place = answer["place"]
        assert all(values == [12.0 + 2 * place] for values in answer["gradients"])
        assert all(values == [0.5 + place] for values in answer["weights"])
        assert answer["differences"] == ((0.25 if answer["weights"] else 0.0), 0.0, 0.0)
