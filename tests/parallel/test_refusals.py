"""The table of what cannot work: each row refuses what it names, nothing that fits is refused, and proposals fit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shardwright.config import ConfigError
from shardwright.parallel.proposals import (
    DEGREES,
    check_layout,
    describe,
    factorisations,
    fitting_layouts,
    nearest_layouts,
)
from shardwright.parallel.refusals import ROWS, Facts, is_fixed, layout_warnings, refusals, table
from shardwright.parallel.stages import SCHEDULES

GPT2 = Facts(
    world=1,
    layers=15,
    heads=12,
    kv_heads=12,
    mlp_width=3072,
    vocab_size=50257,
    length=1024,
    batches=(64,),
    micro=4,
)


def make(**changed: Any) -> Facts:
    """GPT-2 with these facts; the world is what the degrees make, unless given."""
    facts = replace(GPT2, **changed)
    if "world" in changed:
        return facts
    return replace(facts, world=math.prod(getattr(facts, axis) for axis in DEGREES))


BUBBLES = [name for name, schedule in SCHEDULES.items() if schedule.splits_backward]
V = ("zbv", "dualpipev")
RING = {"context": 2, "ring": True, "device": "cuda", "masked": False, "precision": "bf16"}

# One or more layouts that each row refuses, and the beginning of the reason.
REFUSED: dict[str, list[tuple[dict[str, Any], str]]] = {
    "world": [
        ({"world": 8, "data": 3}, "parallel: data=3 x pipeline=1 x context=1 x tensor=1 makes 3, not the world of 8"),
        ({"world": 2, "tensor": 4}, "parallel: data=1 .* makes 4, not the world of 2"),
    ],
    "shard": [({"data": 8, "shard": 3}, "parallel.shard=3: does not divide the 8 data ranks")],
    "zero 2 in a pipeline": [({"pipeline": 2, "zero": 2}, "parallel.zero=2: .* use parallel.zero=1")],
    "zero 3 in zero-bubble": [
        ({"pipeline": 2, "zero": 3, "schedule": name, "stages": 2}, f"parallel.zero=3: {name} ") for name in BUBBLES
    ],
    "compile in zero-bubble": [
        ({"pipeline": 2, "compile": True, "schedule": name, "stages": 2}, "train.compile: ") for name in BUBBLES
    ],
    "selective recomputation in zero-bubble": [
        ({"pipeline": 2, "recompute": "selective", "schedule": name, "stages": 2}, "train.recompute=selective: ")
        for name in BUBBLES
    ],
    "stages of a rank": [
        ({"pipeline": 2, "schedule": "gpipe", "stages": 2}, "parallel.stages=2: gpipe "),
        ({"pipeline": 2, "schedule": "1f1b", "stages": 3}, "parallel.stages=3: 1f1b "),
        *(({"pipeline": 2, "schedule": name, "stages": 1}, f"parallel.stages=1: {name} ") for name in V),
        *(({"pipeline": 2, "schedule": name, "stages": 4}, f"parallel.stages=4: {name} ") for name in V),
    ],
    "layers": [
        ({"pipeline": 16, "batches": (512,)}, "parallel.pipeline=16: 16 stages cannot be cut from 15 parts"),
        ({"pipeline": 8, "schedule": "zbv", "stages": 2}, "parallel.pipeline=8: 16 stages"),
    ],
    "projected tables in zero-bubble": [
        ({"pipeline": 2, "schedule": name, "stages": 2, "projects_tables": True}, f"parallel.schedule={name}: ")
        for name in BUBBLES
    ],
    "one block for all": [
        (
            {"pipeline": 4, "layers": 3, "shared_blocks": True},
            "parallel.pipeline=4: all blocks are one, which 4 stages",
        ),
    ],
    "micro-batches": [
        ({"pipeline": 4, "batches": (8,)}, "batch.micro=4: 1f1b .*: 4, not 2, .* 8 sequences .*; batch.micro=2 fits"),
        ({"pipeline": 4, "batches": (64, 8, 96)}, "batch.micro=4: .* step of 8 sequences"),
        ({"pipeline": 8, "batches": (4,), "micro": 1}, "batch.micro=1: .* over data=1(?!; batch)"),
        ({"pipeline": 4, "schedule": "dualpipev", "stages": 2, "batches": (28,)}, "batch.micro=4: .*: 8, not 7"),
        ({"pipeline": 4, "schedule": "interleaved_1f1b", "stages": 2, "batches": (36,)}, "batch.micro=4: .* 9 micro-b"),
    ],
    "query heads": [({"tensor": 8, "kv_heads": 8}, r"parallel.tensor=8: .*query .* \(model.heads=12\); 1, .*, 12 do")],
    "key heads": [({"tensor": 4, "kv_heads": 2}, r"parallel.tensor=4: .*key heads \(model.kv_heads=2\); 1, 2 do")],
    "feed-forward width": [({"tensor": 4, "mlp_width": 3070}, r"parallel.tensor=4: .*\(model.mlp_width=3070\)")],
    "generator": [
        (
            {"tensor": 4, "generator_heads": 2, "generator_mlp_width": 64},
            r"parallel.tensor=4: .*generator_heads=2\); 1, 2 ",
        ),
        ({"tensor": 4, "generator_heads": 4, "generator_mlp_width": 66}, r".*\(model.generator_mlp_width=66\)"),
    ],
    "vocabulary": [({"tensor": 4, "vocab_size": 5}, "parallel.tensor=4: a vocabulary of 5")],
    "sequence slices": [
        ({"tensor": 4, "length": 1022}, "data.sequence_length=1022: .* use parallel.sequence=false"),
        ({"tensor": 12, "context": 2, "length": 36}, "data.sequence_length=36: "),
        (
            {"tensor": 4, "target": 114},
            "data.sequence_length=1024: gives targets of 114 tokens, which do not divide into .* parallel.tensor=4 sl",
        ),
    ],
    "query stream": [
        (
            {"tensor": 3, "query_stream": 88, "length": 1020},
            "parallel.tensor=3: .* the 88 .* or use parallel.sequence=fa",
        ),
    ],
    "context chunks": [
        ({"context": 4, "length": 1020}, "data.sequence_length=1020: .* 8 equal chunks; 1024 is"),
        (
            {"context": 2, "target": 114},
            "data.sequence_length=1024: gives targets of 114 tokens, .* cannot cut into 4 equal",
        ),
    ],
    "ring": [
        ({**RING, "device": "cpu"}, "parallel.ring: .* GPU kernels alone; use parallel.ring=false"),
        ({**RING, "masked": True}, "parallel.ring: .* use data.mask_documents=false or"),
        ({**RING, "precision": "fp32"}, "parallel.ring: .* not fp32; use either or"),
        ({**RING, "compile": True}, "parallel.ring: .* use train.compile=false or"),
        ({**RING, "offload_activations": True}, "parallel.ring: .* use train.offload_activations=false or"),
        ({**RING, "pipeline": 2}, "parallel.ring: .* use parallel.pipeline=1 or"),
    ],
    "frozen parameters in a pipeline": [({"pipeline": 2, "frozen": True}, "parallel.pipeline=2: .* parallel.zero=3")],
    "adapters": [
        ({"tensor": 2, "adapter": "lora", "frozen": True}, "parallel.tensor=2: "),
        ({"context": 2, "adapter": "prompt", "frozen": True}, "parallel.context=2: "),
    ],
    "frozen parameters under an engine": [
        ({"engine": name, "frozen": True}, f"engine={name}: .*=native") for name in ("deepspeed", "accelerate")
    ],
    "engine": [
        ({"engine": "deepspeed", "tensor": 2}, "engine=deepspeed: .* not parallel.tensor=2"),
        ({"engine": "accelerate", "context": 2, "pipeline": 2}, "engine=acc.* not parallel.pipeline=2 and p"),
    ],
    "deepspeed fp16": [({"engine": "deepspeed", "precision": "fp16", "data": 2}, "precision.compute=fp16: ")],
    "engine's float64": [
        ({"engine": "deepspeed", "precision": "fp64", "data": 2}, "precision.compute=fp64: engine=deepspeed "),
        ({"engine": "accelerate", "precision": "fp64", "data": 2}, "precision.compute=fp64: engine=accelerate "),
    ],
    "engine's formats": [
        ({"engine": "deepspeed", "precision": "bf16", "data": 2, "zero": 0}, "parallel.zero=0: .* parallel.zero=1"),
        ({"engine": "accelerate", "precision": "bf16", "data": 2, "zero": 0}, "parallel.zero=0: .* parallel.zero=1"),
    ],
    "deepspeed optimizers": [({"engine": "deepspeed", "optimizer": "muon", "data": 2}, "optimizer.name=muon: ")],
    "engine's shards": [
        ({"engine": "deepspeed", "data": 4, "shard": 2}, "parallel.shard=2: engine=deepspeed "),
        ({"engine": "accelerate", "data": 4, "shard": 2}, "parallel.shard=2: engine=accelerate "),
    ],
    "deepspeed ZeRO 3 compiled": [
        ({"engine": "deepspeed", "data": 2, "zero": 3, "compile": True}, "train.compile: .* use train.compile=false")
    ],
    "deepspeed offload": [
        ({"engine": "deepspeed", "data": 2, "parameter_place": "cpu"}, "deepspeed.offload_parameters=cpu: .*zero=3"),
        ({"engine": "deepspeed", "data": 2, "optimizer_place": "nvme"}, "deepspeed.offload_optimizer=nvme: .*zero=3"),
        ({"engine": "deepspeed", "zero": 0, "optimizer_place": "cpu"}, "deepspeed.offload_optimizer=cpu: .*zero=1"),
    ],
    "teacher": [
        ({"distilled": True, "tensor": 2}, "distill: .* parallel.tensor=2 would part"),
        ({"distilled": True, "pipeline": 2, "context": 2}, "distill: .*pipeline=2 and parallel.context=2 would part"),
    ],
    "fake quantisation": [({"quantized": True, "tensor": 2}, "quantize: parallel.tensor=2 parts the rows")],
    "adapters rounded": [
        ({"quantized": True, "adapter": "lora", "frozen": True}, "quantize: torchao exchanges .* drop one of the two")
    ],
    "selective recomputation, rounded": [
        ({"quantized": True, "compile": True, "recompute": "selective"}, "train.recompute=selective: torchao notes")
    ],
    "rounded under an engine": [
        ({"quantized": True, "engine": "deepspeed", "data": 2}, "quantize: engine=deepspeed owns the modules")
    ],
    "float64 rounded": [({"quantized": True, "precision": "fp64"}, "quantize: torchao rounds no float64")],
    "kept zeros": [
        ({"keeps_zeros": True, "engine": "deepspeed", "data": 2}, "train.keep_zeros: engine=deepspeed owns"),
        ({"keeps_zeros": True, "adapter": "lora", "frozen": True}, "train.keep_zeros: what LoRA adds .*method=none"),
    ],
    "offload": [({"offload": True}, "parallel.offload: ")],
}

# Beside each rule, what is just within it.
ACCEPTED: list[dict[str, Any]] = [
    {},
    {"data": 8, "shard": 2},
    {"data": 6, "shard": 4, "zero": 0},
    {"data": 3, "batches": (7,), "micro": 5},
    {"data": 128},
    {"pipeline": 2, "zero": 3},
    {"pipeline": 2, "zero": 3, "schedule": "interleaved_1f1b", "stages": 2, "compile": True, "recompute": "selective"},
    *({"pipeline": 2, "zero": 1, "schedule": name, "stages": 2, "recompute": "full"} for name in BUBBLES),
    {"data": 2, "zero": 3, "schedule": "zbv", "stages": 7, "compile": True},
    {"pipeline": 15, "batches": (512,)},
    {"pipeline": 5, "schedule": "interleaved_1f1b", "stages": 3, "batches": (40,)},
    {"pipeline": 4, "batches": (16,)},
    {"pipeline": 4, "schedule": "gpipe", "batches": (1,)},
    {"pipeline": 4, "schedule": "zbv", "stages": 2, "batches": (1,)},
    {"pipeline": 4, "schedule": "dualpipev", "stages": 2, "batches": (32,)},
    {"pipeline": 4, "schedule": "interleaved_1f1b", "stages": 2, "batches": (40, 12, 16)},
    {"tensor": 12, "length": 1008, "vocab_size": 509},
    {"tensor": 4, "length": 1022, "sequence": False},
    {"tensor": 4, "vocab_size": 0},
    {"context": 4, "length": 1024, "tensor": 4},
    {"engine": "deepspeed", "data": 4, "zero": 3, "precision": "bf16"},
    {"engine": "deepspeed", "data": 4, "precision": "fp16", "device": "cuda"},
    {"engine": "deepspeed", "data": 4, "zero": 0, "shard": 2, "compile": True, "optimizer": "sgd"},
    {"engine": "deepspeed", "offload": True, "optimizer_place": "cpu"},
    {"engine": "deepspeed", "zero": 3, "optimizer_place": "nvme", "parameter_place": "nvme"},
    {"engine": "accelerate", "data": 4, "zero": 3, "precision": "bf16", "compile": True, "optimizer": "muon"},
    {"engine": "accelerate", "zero": 0, "precision": "bf16"},
    {"data": 2, "offload": True},
    {"data": 4, "zero": 3, "distilled": True},
    {"data": 2, "pipeline": 2, "context": 2, "quantized": True},
    {"data": 2, "quantized": True, "compile": True, "recompute": "full"},
    {"data": 2, "quantized": True, "adapter": "prompt", "frozen": True, "recompute": "selective"},
    {**RING, "data": 2, "tensor": 2, "zero": 3, "recompute": "selective", "offload": True, "device": "auto"},
    {"data": 2, "ring": True, "compile": True},
]


def test_every_row_is_tried() -> None:
    assert set(REFUSED) == {row.name for row in ROWS if not row.warns}
    assert [row.name for row in table()][-2:] == ["attention dropout", "settings without effect"]
    assert len({row.name for row in ROWS}) == len(ROWS) == len(table())


@pytest.mark.parametrize(
    ("name", "changed", "reason"), [(name, *case) for name, cases in REFUSED.items() for case in cases]
)
def test_a_row_refuses_what_it_names(name: str, changed: dict[str, Any], reason: str) -> None:
    facts = make(**changed)
    broken = {row.name: said for row in ROWS if (said := row.check(facts))}
    assert list(broken) == [name]
    proposes = "" if is_fixed(facts) else "; (nearest that fit: |no other layout)"
    with pytest.raises(ConfigError, match=f"^{reason}.*{proposes}") as error:
        check_layout(facts)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(broken[name])


@pytest.mark.parametrize("changed", ACCEPTED, ids=str)
def test_what_is_within_the_rules_is_not_refused(changed: dict[str, Any]) -> None:
    facts = make(**changed)
    check_layout(facts)
    assert refusals(facts) == []
    assert not [text for text in layout_warnings(facts) if "no effect" not in text]


def test_dropout_in_attention_only_warns() -> None:
    facts = make(tensor=2, attention_dropout=0.1)
    check_layout(facts)
    assert len(layout_warnings(facts)) == 1
    assert layout_warnings(facts)[0].startswith("model.attention_dropout=0.1: ")
    assert layout_warnings(make(attention_dropout=0.1)) == []


def test_dropout_in_attention_is_refused_in_a_ring() -> None:
    with pytest.raises(ConfigError, match="^parallel.ring: .* use model.attention_dropout=0 or .*=false; nearest"):
        check_layout(make(**RING, attention_dropout=0.1))
    assert "parallel.ring: has no effect without context ranks" in layout_warnings(make(data=2, ring=True))


def test_every_reason_is_given() -> None:
    with pytest.raises(ConfigError) as error:
        check_layout(make(world=16, tensor=5, context=3, pipeline=2, zero=2))
    for reason in ("makes 30, not the world of 16", "query heads", "key heads", "feed-forward", "parallel.zero=2"):
        assert reason in str(error.value)


@pytest.mark.parametrize(
    ("changed", "proposals"),
    [
        ({"world": 8, "data": 2, "tensor": 3}, ["data=2 tensor=4", "data=4 tensor=2"]),
        ({"data": 4, "pipeline": 2, "zero": 2}, ["data=4 pipeline=2 zero=1"]),
        (
            {"data": 4, "pipeline": 2, "zero": 3, "schedule": "zbv", "stages": 2},
            ["data=4 pipeline=2 zero=1", "data=4 pipeline=2 schedule=interleaved_1f1b"],
        ),
        ({"data": 2, "tensor": 4, "length": 1022}, ["data=2 tensor=4 sequence=false", "data=4 tensor=2"]),
        ({"pipeline": 2, "schedule": "1f1b", "stages": 2}, ["pipeline=2 stages=1"]),
        ({"data": 8, "tensor": 2, "engine": "deepspeed"}, ["data=16"]),
        ({"data": 8, "shard": 3}, ["data=8 shard=2"]),
        ({"world": 7, "tensor": 7}, ["data=7"]),
    ],
)
def test_proposals_are_near(changed: dict[str, Any], proposals: list[str]) -> None:
    facts = make(**changed)
    found = [describe(layout, facts) for layout in nearest_layouts(facts)]
    assert found[: len(proposals)] == proposals


def test_a_layout_that_fits_is_its_own_nearest() -> None:
    facts = make(data=2, tensor=2, pipeline=2)
    assert nearest_layouts(facts, limit=1) == [facts]


def test_where_nothing_fits_it_is_said() -> None:
    compiled = {"compile": True, "zero": 3, "parameter_place": "cpu"}
    with pytest.raises(ConfigError, match="; no other layout of a world of 1 fits$"):
        check_layout(make(engine="deepspeed", **compiled))


@pytest.mark.parametrize(
    "changed",
    [
        {"offload": True},
        {"engine": "accelerate", "precision": "fp64"},
        {"engine": "deepspeed", "precision": "fp16"},
        {"engine": "deepspeed", "optimizer": "lamb"},
        {"engine": "accelerate", "keeps_zeros": True},
        {"quantized": True, "precision": "fp64"},
    ],
    ids=str,
)
def test_no_layout_is_proposed_where_none_could_mend_it(changed: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="; use [^;]*$") as error:
        check_layout(make(**changed))
    assert "fit" not in str(error.value)
    assert nearest_layouts(make(**changed)) == []


def test_a_large_world_is_searched_in_time() -> None:
    assert len(nearest_layouts(make(world=6144, tensor=7, data=512))) == 3


@given(st.integers(1, 200), st.integers(1, 4))
def test_factorisations(number: int, count: int) -> None:
    found = factorisations(number, count)
    assert len(found) == len(set(found))
    assert all(math.prod(factors) == number for factors in found)
    ways = 1
    for prime in range(2, number + 1):
        power = 0
        while number % prime == 0:
            number, power = number // prime, power + 1
        ways *= math.comb(power + count - 1, power)
    assert len(found) == ways


degrees = st.sampled_from([1, 1, 1, 2, 3, 4, 8])


@st.composite
def any_facts(draw: st.DrawFn) -> Facts:
    """Anything a config may say; about half of the worlds are what the degrees make."""
    layout = {axis: draw(degrees) for axis in DEGREES}
    world = math.prod(layout.values())
    kv_heads = draw(st.sampled_from([1, 2, 4, 12]))
    return Facts(
        world=world if draw(st.booleans()) else draw(st.integers(1, 24)),
        **layout,
        shard=draw(st.none() | st.integers(1, 8)),
        zero=draw(st.integers(0, 3)),
        schedule=draw(st.sampled_from(list(SCHEDULES))),
        stages=draw(st.integers(1, 3)),
        sequence=draw(st.booleans()),
        layers=draw(st.integers(3, 16)),
        shared_blocks=draw(st.booleans()),
        projects_tables=draw(st.booleans()),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        kv_heads=kv_heads,
        mlp_width=draw(st.sampled_from([30, 32, 48, 96])),
        generator_heads=draw(st.sampled_from([0, 0, 2, 4])),
        generator_mlp_width=draw(st.sampled_from([0, 0, 30, 32])),
        query_stream=draw(st.sampled_from([0, 0, 15, 16])),
        vocab_size=draw(st.sampled_from([0, 5, 9, 509])),
        length=draw(st.sampled_from([6, 16, 36, 48, 64, 100])),
        batches=tuple(draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))),
        micro=draw(st.integers(1, 5)),
        precision=draw(st.sampled_from(["fp32", "fp16"])),
        compile=draw(st.booleans()),
        recompute=draw(st.sampled_from(["none", "full", "selective"])),
        offload=draw(st.booleans()),
        engine=draw(st.sampled_from(["native", "native", "deepspeed", "accelerate"])),
        optimizer=draw(st.sampled_from(["adamw", "muon"])),
        optimizer_place=draw(st.sampled_from(["none", "none", "cpu", "nvme"])),
        parameter_place=draw(st.sampled_from(["none", "none", "cpu"])),
    )


def fits(f: Facts) -> bool:
    """The rules once more, written as one expression of what each layout needs."""
    split = f.pipeline > 1 and f.schedule in ("interleaved_zero_bubble", "zbv", "dualpipev")
    whole = f.data * f.context * f.tensor * f.pipeline == f.world
    hybrid = f.zero == 0 or f.shard is None or f.data % f.shard == 0
    cut = (f.heads, f.kv_heads, f.mlp_width, f.generator_heads, f.generator_mlp_width)
    tensor = all(size % f.tensor == 0 for size in cut)
    rows = [range(r * -(-f.vocab_size // f.tensor), f.vocab_size)[:1] for r in range(f.tensor)]
    slices = f.tensor == 1 or not f.sequence or f.length % (f.context * f.tensor) == f.query_stream % f.tensor == 0
    chunks = f.context == 1 or f.length % (2 * f.context) == 0
    zero = not (f.pipeline > 1 and f.zero == 2) and not (split and f.zero == 3)
    graphs = not (split and (f.compile or f.recompute == "selective" or f.projects_tables))
    alone = f.tensor * f.context * f.pipeline == 1 and (f.zero == 0 or f.shard in (None, f.data))
    sharded = f.precision == "fp32" or f.world == 1 or f.zero > 0
    need = max({"none": 0, "cpu": 1, "nvme": 3}[f.optimizer_place], 0 if f.parameter_place == "none" else 3)
    deep = f.precision != "fp16" and f.optimizer != "muon" and not (f.zero == 3 and f.compile) and f.zero >= need
    engine = {"native": True, "accelerate": alone and sharded, "deepspeed": alone and deep}[f.engine]
    offload = not f.offload or f.world > 1 or f.engine == "deepspeed"
    passes = f.pipeline == 1 or all(runs(f, math.ceil(math.ceil(batch / f.data) / f.micro)) for batch in f.batches)
    vocabulary = f.vocab_size == 0 or all(len(row) for row in rows)
    return all((whole, hybrid, tensor, vocabulary, slices, chunks, zero, graphs, engine, offload, passes))


def runs(f: Facts, count: int) -> bool:
    """Whether a pipeline can be cut, and its schedule takes `count` micro-batches."""
    stages = {"gpipe": {1}, "1f1b": {1}, "zbv": {2}, "dualpipev": {2}}.get(f.schedule, {1, 2, 3})
    if f.stages not in stages or f.pipeline * f.stages > f.layers:
        return False
    if f.schedule == "1f1b":
        return count >= f.pipeline
    if f.schedule == "dualpipev":
        return count >= 2 * f.pipeline
    return not f.schedule.startswith("interleaved") or count < f.pipeline or count % (count // f.pipeline) == 0


@settings(max_examples=1000, deadline=None)
@given(any_facts())
def test_the_table_refuses_what_does_not_fit_and_nothing_else(facts: Facts) -> None:
    assert (not refusals(facts)) == fits(facts)


@settings(max_examples=80, deadline=None)
@given(any_facts())
def test_proposals_fit(facts: Facts) -> None:
    near = nearest_layouts(facts)
    for layout in near:
        check_layout(layout)
        assert fits(layout)
        assert layout.world == facts.world
    assert len({describe(layout, facts) for layout in near}) == len(near) <= 3
    assert bool(near) == bool(fitting_layouts(facts))
    if fits(facts):
        assert near[0] == facts


@settings(max_examples=40, deadline=None)
@given(any_facts())
def test_all_that_fits_is_listed(facts: Facts) -> None:
    listed = fitting_layouts(facts)
    assert len(set(listed)) == len(listed)
    assert all(fits(layout) for layout in listed)
    assume(facts.data * facts.context > 1)
    assert (facts in listed) == fits(facts)


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"zero": 0, "shard": 3}, "parallel.shard=3"),
        ({"schedule": "zbv", "stages": 5}, "parallel.schedule=zbv, parallel.stages=5"),
        ({"world": 1, "data": 1, "schedule": "zbv", "stages": 2}, ""),
        ({"pipeline": 4, "data": 1, "schedule": "zbv", "stages": 2}, ""),
    ],
)
def test_settings_without_effect_are_named(layout: dict[str, Any], words: str) -> None:
    found = layout_warnings(make(**{"world": 4, "data": 4, **layout}))
    assert (words in found[0]) if words else not found
