"""Models of two streams under every kind of layout train as one process does, on packed pairs, with real ranks.

T5 has tables that all blocks share, a norm between the stacks and a free head; BART has norms after the blocks, learned
positions of each stream and an embedding that is head as well; the Transformer has dropout here.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shardwright.parallel.context import PairRows
from tests.parallel.work_streams import SOURCE, TARGET, VOCABULARY, pairs, train
from tests.ranks import Ranks

STEPS = 3
LOSS, NORM, WEIGHTS = 1e-5, 1e-4, 1e-5
_SMALL = {
    "layers": 2, "decoder_layers": 3, "width": 32, "heads": 4, "mlp_width": 48, "max_length": 32,
    "vocab_size": VOCABULARY,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "t5": {"family": "t5", **_SMALL, "activation": "geglu_tanh", "tied": False, "scale_logits": False},
    "t5_tied": {"family": "t5", **_SMALL, "relative_buckets": 8, "relative_distance": 20},
    "bart": {"family": "bart", **_SMALL, "head_bias": True, "kv_heads": 2},
    "transformer": {"family": "transformer", **_SMALL, "residual_dropout": 0.1, "embed_dropout": 0.1, "qk_norm": True},
}
TENSOR, CONTEXT = "parallel.tensor=2", "parallel.context=2"


def _pipeline(degree: int, schedule: str, *more: str) -> list[str]:
    return [f"parallel.pipeline={degree}", f"parallel.schedule={schedule}", *more]


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "data2": (2, ["parallel.zero=0"]),
    "zero2": (2, ["parallel.zero=2"]),
    "zero3": (2, ["parallel.zero=3"]),
    "tensor2": (2, [TENSOR]),
    "tensor2_whole": (2, [TENSOR, "parallel.sequence=false"]),
    "context2": (2, [CONTEXT]),
    "pipeline2_gpipe": (2, _pipeline(2, "gpipe")),
    "pipeline2_1f1b": (2, _pipeline(2, "1f1b")),
    "pipeline2_interleaved": (2, _pipeline(2, "interleaved_1f1b")),
    "pipeline2_zero_bubble": (2, _pipeline(2, "interleaved_zero_bubble")),
    "pipeline2_zbv": (2, _pipeline(2, "zbv")),
    "pipeline2_dualpipev": (2, _pipeline(2, "dualpipev")),
    "pipeline4_1f1b": (4, _pipeline(4, "1f1b")),
    "zero3_tensor2": (4, [TENSOR, "parallel.zero=3"]),
    "tensor2_context2": (4, [TENSOR, CONTEXT]),
    "tensor2_pipeline2": (4, _pipeline(2, "1f1b", TENSOR)),
    "context2_pipeline2": (4, _pipeline(2, "zbv", CONTEXT)),
    "data2_tensor2_pipeline2": (8, _pipeline(2, "1f1b", TENSOR)),
    "zero3_tensor2_context2": (8, [TENSOR, CONTEXT, "parallel.zero=3"]),
}
#: What each shape runs under in every test run; the others have their days.
ALWAYS = {
    ("t5", "zero3"), ("t5", "data2_tensor2_pipeline2"), ("bart", "zero3"), ("bart", "data2_tensor2_pipeline2"),
    ("transformer", "zero3"), ("transformer", "zero3_tensor2_context2"),
}  # fmt: skip
CELLS = [
    pytest.param(shape, layout, marks=() if (shape, layout) in ALWAYS else pytest.mark.in_turn)
    for shape in SHAPES
    for layout in LAYOUTS
]


def config(shape: str) -> dict[str, Any]:
    """A run of 8 sequences a step, one at a time, whose losses, norms and weights all depend on everything."""
    return {
        "model": {**SHAPES[shape], "init": "xavier"},
        "objective": {"name": "causal"},
        "data": {"sequence_length": SOURCE, "workers": 0},
        "batch": {"sequences": 8, "micro": 1},
        "train": {"steps": 10, "compile": False, "threads": 1, "seed": 5, "clip": 0.2, "device": "cpu"},
        "optimizer": {"lr": 1e-3, "eps": 1e-6},
    }


@pytest.fixture(scope="module")
def oracles() -> dict[str, dict[str, Any]]:
    """One process, by shape, as they are asked for."""
    return {}


def check(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Every rank within the bounds, its weights among those of one process, and all of these on some rank."""
    seen: set[str] = set()
    for answer in found:
        assert answer["losses"] == pytest.approx(expected["losses"], rel=LOSS)
        assert answer["norms"] == pytest.approx(expected["norms"], rel=NORM)
        assert answer["evaluation"] == pytest.approx(expected["evaluation"], rel=LOSS)
        assert not any(answer["tied"]), answer["tied"]
        for name, weight in answer["weights"].items():
            assert float((weight - expected["weights"][name]).abs().max()) < WEIGHTS, name
        seen |= answer["weights"].keys()
    assert seen == expected["weights"].keys()


@pytest.mark.parametrize(("shape", "layout"), CELLS)
def test_a_layout_changes_nothing(shape: str, layout: str, ranks: Ranks, oracles: dict[str, dict[str, Any]]) -> None:
    raw = config(shape)
    if shape not in oracles:
        oracles[shape] = train(raw, [], STEPS)
    size, settings = LAYOUTS[layout]
    check(ranks.run(size, "tests.parallel.work_streams:train", raw, settings, STEPS), oracles[shape])


@pytest.mark.parametrize("layout", ["context2", "tensor2", "pipeline2_1f1b"])
def test_rows_of_one_document_need_no_mask(layout: str, ranks: Ranks) -> None:
    """Attention to the source is then unmasked, and the decoder's own causal rule the kernel's."""
    raw, meaning = config("t5_tied"), ["data.mask_documents=false"]
    size, settings = LAYOUTS[layout]
    found = ranks.run(size, "tests.parallel.work_streams:train", raw, [*meaning, *settings], STEPS)
    check(found, train(raw, meaning, STEPS))


@pytest.mark.parametrize(
    ("shape", "layout", "settings"),
    [
        ("t5", "zero3", ["train.recompute=full"]),
        ("bart", "tensor2", ["train.recompute=selective"]),
        ("t5_tied", "pipeline2_1f1b", ["train.recompute=full"]),
        ("transformer", "context2", ["train.recompute=full"]),
        ("t5", "pipeline2_1f1b", ["optimizer.name=adafactor", "optimizer.lr=0.01"]),
    ],
)
@pytest.mark.in_turn
def test_a_setting_changes_nothing(shape: str, layout: str, settings: list[str], ranks: Ranks) -> None:
    raw, (size, layout_settings) = config(shape), LAYOUTS[layout]
    found = ranks.run(size, "tests.parallel.work_streams:train", raw, [*layout_settings, *settings], STEPS)
    check(found, train(raw, [s for s in settings if s.startswith("optimizer")], STEPS))


def test_the_batches_are_what_they_are_for() -> None:
    """Several documents, padding, targets whose source is another's or none, and other positions in each stream."""
    batch = pairs(0, 8, packed=True)
    assert {x.shape[1] for name, x in batch.items() if x.dim() > 1} == {SOURCE, TARGET}
    assert {-1, 0, 1, 2} <= set(batch["documents"].unique().tolist())
    streams = zip(batch["documents"].tolist(), batch["encoder_documents"].tolist(), strict=True)
    assert any(set(target) - set(source) for target, source in streams)


def test_each_stream_is_cut_by_itself() -> None:
    batch = pairs(0, 2, packed=True)
    held = [PairRows(2, n).slice(batch) for n in range(2)]
    for own in held:
        assert own["encoder_ids"].shape == (2, SOURCE // 2) and own["input_ids"].shape == (2, TARGET // 2)
        assert torch.equal(own["encoder_key_documents"], batch["encoder_documents"])
        assert torch.equal(own["key_documents"], batch["documents"])
        assert own["encoder_row_index"].shape == own["encoder_documents"].shape
        assert own["encoder_key_index"].tolist() == [list(range(SOURCE))] * 2
    whole = torch.cat([own["encoder_ids"].gather(1, own["encoder_row_index"].argsort(1)) for own in held], dim=1)
    assert sorted(whole[0].tolist()) == sorted(batch["encoder_ids"][0].tolist())
