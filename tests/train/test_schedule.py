"""Schedules against closed forms and Hugging Face's, progress and its recorded trace, the batch ramp against a loop."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.config import BatchConfig, ConfigError, RampConfig, ScheduleConfig, TrainConfig
from shardwright.train.course import Course
from shardwright.train.position import Position
from shardwright.train.schedule import build_progress, build_ramp, build_schedule, resolve_warmup
from shardwright.train.settings import read_config

ROOT = math.sqrt(0.5)
TABLE = [
    # config, {progress: factor}
    (
        {"name": "cosine", "warmup": 0.2, "floor": 0.1},
        {0: 0, 0.05: 0.25, 0.2: 1, 0.4: 0.1 + 0.45 * (1 + ROOT), 0.6: 0.55, 1: 0.1, 1.5: 0.1},
    ),
    ({"name": "linear", "warmup": 0.2, "floor": 0.0}, {0: 0, 0.1: 0.5, 0.2: 1, 0.6: 0.5, 0.9: 0.125, 1: 0}),
    ({"name": "linear", "warmup": 0.0, "floor": 0.5}, {0: 1, 0.5: 0.75, 1: 0.5}),
    # One cycle: up from a quarter, and down in the last quarter (Geiping & Goldstein 2023).
    (
        {"name": "linear", "warmup": 0.75, "start": 0.25, "floor": 0.0},
        {0: 0.25, 0.25: 0.5, 0.5: 0.75, 0.75: 1, 0.875: 0.5, 1: 0},
    ),
    ({"name": "linear", "warmup": 0.2, "end": 0.6, "floor": 0.0}, {0.2: 1, 0.4: 0.5, 0.6: 0, 0.8: 0, 1: 0}),
    ({"name": "cosine", "warmup": 0.0, "end": 0.5, "floor": 0.1}, {0.25: 0.55, 0.5: 0.1, 0.75: 0.1, 1: 0.1}),
    ({"name": "inverse_sqrt", "warmup": 0.04, "floor": 0.0}, {0.02: 0.5, 0.04: 1, 0.16: 0.5, 0.64: 0.25, 1: 0.2}),
    ({"name": "inverse_sqrt", "warmup": 0.04, "floor": 0.4}, {0.16: 0.5, 0.25: 0.4, 1: 0.4}),
    ({"name": "constant", "warmup": 0.1, "floor": 0.1}, {0: 0, 0.05: 0.5, 0.1: 1, 1: 1}),
    (
        {"name": "wsd", "warmup": 0.1, "decay": 0.4, "floor": 0.2},
        {0.05: 0.5, 0.1: 1, 0.6: 1, 0.7: 0.8, 0.8: 0.6, 1: 0.2},
    ),
    (
        {"name": "wsd", "decay": 0.4, "floor": 0.0, "decay_shape": "cosine"},
        {0.6: 1, 0.7: (1 + ROOT) / 2, 0.8: 0.5, 1: 0},
    ),
    ({"name": "wsd", "decay": 0.4, "floor": 0.0, "decay_shape": "sqrt"}, {0.6: 1, 0.7: 0.5, 0.8: 1 - ROOT, 1: 0}),
    ({"name": "wsd", "warmup": 0.5, "decay": 0.5, "floor": 0.0}, {0.25: 0.5, 0.5: 1, 0.75: 0.5, 1: 0}),
]


@pytest.mark.parametrize(("options", "points"), TABLE, ids=lambda x: x.get("name", "") if isinstance(x, dict) else "")
def test_closed_forms(options: dict, points: dict) -> None:
    schedule = build_schedule(ScheduleConfig(**options))
    for progress, factor in points.items():
        assert schedule(progress) == pytest.approx(factor, abs=1e-12), progress


def test_same_as_hugging_face() -> None:
    """Their step s of n is our progress s/n: a warm-up of 20 in 200 steps."""
    transformers = pytest.importorskip("transformers", reason="pip install 'shardwright[hf]' for this comparison")
    import torch

    def theirs(build, **options):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = build(optimizer, num_warmup_steps=20, **options)
        for _ in range(200):
            yield scheduler.get_last_lr()[0]
            optimizer.step()
            scheduler.step()

    cases = [
        ("cosine", transformers.get_cosine_schedule_with_warmup, {"num_training_steps": 200}),
        ("linear", transformers.get_linear_schedule_with_warmup, {"num_training_steps": 200}),
        ("inverse_sqrt", transformers.get_inverse_sqrt_schedule, {}),
        ("constant", transformers.get_constant_schedule_with_warmup, {}),
    ]
    for name, build, options in cases:
        ours = build_schedule(ScheduleConfig(name=name, warmup=0.1, floor=0.0))
        assert [ours(s / 200) for s in range(200)] == pytest.approx(list(theirs(build, **options)), abs=1e-9), name


@settings(deadline=None)
@given(
    name=st.sampled_from(["cosine", "linear", "inverse_sqrt", "wsd", "constant"]),
    warmup=st.floats(0.001, 0.5),
    floor=st.floats(0, 1),
    decay=st.floats(0.01, 0.5),
    shape=st.sampled_from(["linear", "cosine", "sqrt"]),
)
def test_rises_to_the_peak_then_never_rises_nor_leaves_its_range(name, warmup, floor, decay, shape) -> None:
    config = ScheduleConfig(name=name, warmup=warmup, floor=floor, decay=decay, decay_shape=shape)
    schedule = build_schedule(config)
    after = [schedule(warmup + (1 - warmup) * k / 50) for k in range(51)]
    assert schedule(warmup) == pytest.approx(1.0)
    assert schedule(warmup / 2) == pytest.approx(0.5)
    assert all(a >= b - 1e-12 for a, b in zip(after, after[1:], strict=False))
    assert min(after) >= floor - 1e-12
    if name in ("cosine", "linear", "wsd"):
        assert after[-1] == pytest.approx(floor, abs=1e-12)


@pytest.mark.parametrize(
    ("options", "warmup", "said"),
    [
        ({"name": "inverse_sqrt", "warmup": 0.0}, None, "warmup=0"),
        ({"name": "wsd", "warmup": 0.3, "decay": 0.8}, None, "at most 0.7"),
        ({"name": "cosine", "warmup": 0.3, "end": 0.3}, None, "end=0.3"),
        ({"name": "cosine"}, 1.5, "1.5 of the run"),
    ],
)
def test_wrong_settings_get_one_line(options: dict, warmup: float | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        build_schedule(ScheduleConfig(**options), warmup)
    assert "\n" not in str(caught.value)


def test_warmup_in_steps_or_tokens() -> None:
    ramp = build_ramp(BatchConfig(sequences=8), 8)

    def resolve(schedule: dict, train: dict) -> float:
        return resolve_warmup(ScheduleConfig(**schedule), build_progress(TrainConfig(**train)), ramp, 64)

    assert resolve({"warmup": 0.3}, {"budget": "1h"}) == 0.3
    assert resolve({"warmup_steps": 25}, {"steps": 100}) == 0.25
    # GPT-3: 375 million of 300 billion tokens
    assert resolve({"warmup_tokens": 375_000_000}, {"tokens": 300_000_000_000}) == pytest.approx(0.00125)
    assert resolve({"warmup_steps": 25}, {"tokens": 100 * 8 * 64}) == 0.25
    assert resolve({"warmup_tokens": 25 * 8 * 64 + 256}, {"steps": 100}) == 0.255, "in part of a step"
    for schedule, train, said in [
        ({"warmup_steps": 25}, {"budget": "1h"}, "use schedule.warmup"),
        ({"warmup_steps": 25}, {"steps": 20}, "longer than the run of 20 steps"),
        ({"warmup_tokens": 20 * 8 * 64 + 1}, {"steps": 20}, "longer than the run of 20 steps"),
        ({"warmup_steps": 25, "warmup_tokens": 5}, {"steps": 100}, "one of them"),
    ]:
        with pytest.raises(ConfigError, match=said):
            resolve(schedule, train)


@pytest.mark.parametrize("schedule", [{"warmup_steps": 6}, {"warmup_tokens": 16 * 64}])
@pytest.mark.parametrize("train", [{"steps": 40}, {"tokens": 300 * 64}])
def test_a_warmup_under_a_ramp_ends_where_it_says(schedule: dict, train: dict) -> None:
    """Steps of 2, 2, 2, 2, 4, 4 sequences make the first 16: whatever the run's length is given in."""
    settings = {
        "model": {"family": "gpt2"},
        "objective": {"name": "causal"},
        "data": {"sequence_length": 64},
        "batch": {"sequences": 8, "micro": 2, "ramp": {"start": 2, "increment": 2, "sequences": 24}},
    }
    course = Course(read_config({**settings, "train": train, "schedule": schedule}))
    position, factors = Position(), []
    for _ in range(9):
        count = course.ramp.batch_at(position.drawn)
        factors.append(course.factor(position, count, 0.0))
        position.step, position.drawn = position.step + 1, position.drawn + count
    assert factors[5] < 1.0 and factors[5] > 0.8, "the sixth step is the last of the warm-up"
    assert factors == sorted(factors[:6]) + sorted(factors[6:], reverse=True)


def test_steps_and_tokens_are_placed_at_the_middle_of_a_step() -> None:
    steps = build_progress(TrainConfig(steps=10))
    assert [steps.at_step(s) for s in (0, 9, 30)] == [0.05, 0.95, 1.0]
    assert not steps.is_done(9) and steps.is_done(10)
    tokens = build_progress(TrainConfig(tokens=1000))
    assert (tokens.at_tokens(0, 100), tokens.at_tokens(600, 200)) == (0.05, 0.7)
    assert not tokens.is_done(999) and tokens.is_done(1000)


def test_a_budget_ends_with_the_budget_and_its_trace_replays() -> None:
    durations = [1.7 + 0.3 * math.sin(i) for i in range(100)]
    live = build_progress(TrainConfig(budget="2m"))
    positions, clock, step = [], 0.0, 0
    while not live.is_done(clock, durations[step]):
        positions.append(live.at_clock(step, clock, durations[step]))
        clock, step = clock + durations[step], step + 1
    assert abs(clock - 120) <= max(durations) / 2
    assert positions == sorted(positions)
    assert 0.98 < positions[-1] <= 1.0

    replayed = build_progress(TrainConfig(budget="2m"))
    replayed.load_state(json.loads(json.dumps(live.state())))
    again = [replayed.at_clock(s, None) for s in range(len(positions))]
    assert again == positions, "a replay is bit for bit and needs no clock"
    # A clock that says something else is not asked about recorded steps.
    assert replayed.at_clock(3, 999.0) == positions[3]
    with pytest.raises(ValueError, match="no position of"):
        replayed.at_clock(len(positions), None)


def test_a_budget_gives_a_place_to_steps_before_there_is_one_to_go_by() -> None:
    """The first step starts at 0; the second has the first behind it, which built and compiled and tells nothing."""
    live = build_progress(TrainConfig(budget="2m"))
    positions = [live.at_clock(0, 0.0), live.at_clock(1, 30.0, startup=30.0)]
    assert all(0 < position < 0.001 for position in positions)
    assert live.at_clock(2, 40.0, 10.0, startup=30.0) == pytest.approx(15 / 90)


def test_a_budget_resumed_or_rolled_back_goes_on_from_the_clock() -> None:
    progress = build_progress(TrainConfig(budget="100s"), trace=[0.1, 0.2, 0.3])
    assert progress.at_clock(3, 40.0) == 0.4
    # A clock set back never moves the schedule back.
    assert progress.at_clock(4, 35.0) == 0.4
    progress.rewind(2)
    assert progress.trace == [0.1, 0.2]
    assert progress.at_clock(2, 60.0) == 0.6
    with pytest.raises(ValueError, match="no position of 9"):
        progress.at_clock(9, 61.0)
    with pytest.raises(ValueError, match="100 seconds long, this one 10 steps"):
        build_progress(TrainConfig(steps=10)).load_state(progress.state())


def ramp_config(start: int, increment: int, sequences: int, full: int) -> BatchConfig:
    return BatchConfig(sequences=full, ramp=RampConfig(start=start, increment=increment, sequences=sequences))


def test_ramp_without_a_ramp_is_the_full_batch() -> None:
    ramp = build_ramp(BatchConfig(sequences=64), 64)
    assert (ramp.batch_at(0), ramp.batch_at(10**12), ramp.drawn_after(7), ramp.step_of(448)) == (64, 64, 448, 7)


def test_ramp_table() -> None:
    """From 2 to 8 by 2 over 24 sequences: a rise is due at 8, 16 and 24."""
    ramp = build_ramp(ramp_config(2, 2, 24, 8), 8)
    assert (ramp.steps, ramp.drawn, ramp.sizes) == ((0, 4, 6, 8), (0, 8, 16, 28), (2, 4, 6, 8))
    assert ramp.steps_to(9) == 5
    with pytest.raises(ValueError, match="no step ends after 9"):
        ramp.step_of(9)
    with pytest.raises(ConfigError, match="above the global batch of 8"):
        build_ramp(ramp_config(9, 1, 24, 8), 8)


@settings(max_examples=200, deadline=None)
@given(
    start=st.integers(1, 40),
    increment=st.integers(1, 20),
    sequences=st.integers(1, 3000),
    more=st.integers(0, 100),
)
def test_ramp_is_the_loop_and_its_own_inverse(start: int, increment: int, sequences: int, more: int) -> None:
    full = start + more
    ramp = build_ramp(ramp_config(start, increment, sequences, full), full)
    rises = -(-more // increment)
    drawn = 0
    for step in range(200):
        due = sum(rise * sequences <= drawn * rises for rise in range(1, rises + 1))
        assert ramp.batch_at(drawn) == min(start + due * increment, full)
        assert ramp.drawn_after(step) == drawn
        assert ramp.step_of(drawn) == step
        assert ramp.steps_to(drawn + 1) == step + 1
        drawn += ramp.batch_at(drawn)


def test_ramp_far_into_a_run_is_a_search() -> None:
    ramp = build_ramp(ramp_config(16, 16, 6_000_000, 1600), 1600)
    assert len(ramp.sizes) == 100
    steps = ramp.steps_to(10**13)
    assert ramp.drawn_after(steps - 1) < 10**13 <= ramp.drawn_after(steps)
