"""The cells of the equivalence matrix: shapes, layouts and settings, and what a cell's run is held to.

A cell is `shape/layout/setting`: a small model, how it is spread over processes, and what else is turned on (several
settings joined by +). The tests here run each layout once, tests/equivalence/matrix.py runs any cell, and
benchmarks/equivalence.py runs all of them. A cell is held against one process with the same meaning.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from shardwright.checkpoint import find_newest
from shardwright.checkpoint import load as load_checkpoint
from shardwright.checkpoint.integrity import DTYPES, read_manifest
from shardwright.train.settings import read_config

STEPS = 20
LOSS, NORM, WEIGHTS = 1e-5, 1e-4, 1e-5

#: What largest differences from one process in the same format are held to. Those of bf16 and fp16 are three times what
#: reordering alone gives: the largest difference between one process that takes one sequence at a time and the same
#: process that takes 2, 4 or 8 (the cells `*/one/bf16+micro*`), with one digit.
BOUNDS: dict[str, dict[str, float]] = {
    "fp32": {"loss": LOSS, "norm": NORM, "weights": WEIGHTS, "validation": LOSS},
    "fp16": {"loss": 5e-4, "norm": 2e-2, "weights": 5e-3, "validation": 5e-4},
    "bf16": {"loss": 4e-3, "norm": 0.1, "weights": 2e-2, "validation": 4e-3},
    # Where something is drawn (ELECTRA), a difference in the last bit may draw another token: float64 leaves no room.
    "fp64": {"loss": 1e-9, "norm": 1e-8, "weights": 1e-9, "validation": 1e-9},
}

_SMALL = {"layers": 5, "width": 32, "heads": 4, "max_length": 64}
_GROUPED = {**_SMALL, "kv_heads": 2, "mlp_width": 96}
#: Every family, small, with all that it may have.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": _SMALL,
    "gpt3": _SMALL,
    "llama": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "neox": {**_SMALL, "rotary_share": 0.5},
    "bert": _SMALL,
    "roberta": _SMALL,
    "albert": {**_SMALL, "embed_width": 16},
    "crammed": _SMALL,
    "deberta": {**_SMALL, "relative_span": 20},
    "deberta_v2": {**_SMALL, "buckets": 16, "convolution": 3},
    "modernbert": {**_SMALL, "mlp_width": 48, "window": 16},
    "electra": {**_SMALL, "embed_width": 24, "generator_width": 16, "generator_heads": 4, "generator_layers": 2},
    "xlnet": _SMALL,
    "t5": {
        **_SMALL, "layers": 2, "decoder_layers": 3, "mlp_width": 96, "activation": "geglu_tanh", "tied": False,
        "scale_logits": False,
    },
    "bart": {**_SMALL, "layers": 2, "decoder_layers": 3},
    "transformer": {**_SMALL, "layers": 3, "decoder_layers": 2},
}  # fmt: skip
FAMILIES = {name: {"family": name, **choices} for name, choices in FAMILIES.items()}
#: Families whose blocks are of a kind of their own, and those whose stages hold more than one stack or stream.
OWN_KINDS = ("albert", "crammed", "deberta", "deberta_v2", "modernbert")
TWOFOLD = ("electra", "xlnet", "t5", "bart", "transformer")

_MASKED, _INFILL = {"name": "masked"}, {"name": "denoise", "damage": ["infill"]}
OBJECTIVES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("roberta", "crammed", "deberta", "deberta_v2", "modernbert"), _MASKED),
    "bert": {**_MASKED, "sentence": "next"}, "albert": {**_MASKED, "sentence": "order"},
    "electra": {"name": "replaced"}, "xlnet": {"name": "permuted"}, "bart": _INFILL, "transformer": _INFILL,
    "t5": {"name": "span"},
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "gpt2_free": {**FAMILIES["gpt2"], "tied": False},
    "llama_tied": {**FAMILIES["llama"], "tied": True},
    # What other families and recipes turn on: norms of single heads, gates, biases of the head, norms after the block.
    "modern": {**FAMILIES["llama"], "tied": True, "qk_norm": True, "activation": "geglu", "logit_softcap": 15.0},
    "post": {
        **FAMILIES["gpt2"], "tied": False, "norm_placement": "post", "embed_norm": True, "head_bias": True,
        "positions": "sinusoidal", "scale_embedding": True,
    },
}  # fmt: skip

SCHEDULES = ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")


class Layout(NamedTuple):
    """How a run is spread. `meaning` is what the run has to be for it to fit, and so is the one process beside it."""

    processes: int
    settings: tuple[str, ...] = ()
    sequences: int = 8  # of a step, so that every data rank has 4 micro-batches or more
    meaning: tuple[str, ...] = ()


def _pipelines(degree: int, processes: int, *settings: str, **options: Any) -> Iterator[tuple[str, Layout]]:
    """One layout for each schedule, by its name."""
    for schedule in SCHEDULES:
        # Two stages a rank: 8 cannot be cut from the 7 parts that 5 blocks make.
        deep = ("model.layers=7",) if degree == 4 and schedule not in ("gpipe", "1f1b") else ()
        asked = (f"parallel.pipeline={degree}", f"parallel.schedule={schedule}", *settings)
        yield schedule, Layout(processes, asked, meaning=deep, **options)


def _named(prefix: str, layouts: Iterable[tuple[str, Layout]], only: Sequence[str] = SCHEDULES) -> dict[str, Layout]:
    return {f"{prefix}_{name}": layout for name, layout in layouts if name in only}


ZERO = {stage: f"parallel.zero={stage}" for stage in range(4)}
TENSOR, WHOLE, CONTEXT = "parallel.tensor=2", "parallel.sequence=false", "parallel.context=2"
HYBRID = "parallel.shard=2"

LAYOUTS: dict[str, Layout] = {
    "one": Layout(1),
    "data2": Layout(2, (ZERO[0],)),
    "zero1": Layout(2, (ZERO[1],)),
    "zero2": Layout(2, (ZERO[2],)),
    "zero3": Layout(2, (ZERO[3],)),
    "data4": Layout(4, (ZERO[0],), 16),
    "data4_zero1": Layout(4, (ZERO[1],), 16),
    "data4_zero3": Layout(4, (ZERO[3],), 16),
    "data8_zero2": Layout(8, (ZERO[2],), 32),
    "hybrid1": Layout(4, (ZERO[1], HYBRID), 16),
    "hybrid2": Layout(4, (ZERO[2], HYBRID), 16),
    "hybrid3": Layout(4, (ZERO[3], HYBRID), 16),
    "tensor2": Layout(2, (TENSOR,)),
    "tensor2_whole": Layout(2, (TENSOR, WHOLE)),
    "tensor4": Layout(4, ("parallel.tensor=4",)),
    "tensor4_whole": Layout(4, ("parallel.tensor=4", WHOLE)),
    "context2": Layout(2, (CONTEXT,)),
    "context4": Layout(4, ("parallel.context=4",)),
    **_named("pipeline2", _pipelines(2, 2)),
    "pipeline2_interleaved_1f1b_3": Layout(
        2, ("parallel.pipeline=2", "parallel.schedule=interleaved_1f1b", "parallel.stages=3")
    ),
    **_named("pipeline4", _pipelines(4, 4)),
    "zero0_tensor2": Layout(4, (TENSOR, ZERO[0])),
    "data2_tensor2": Layout(4, (TENSOR, ZERO[1])),
    "zero2_tensor2": Layout(4, (TENSOR, ZERO[2])),
    "zero3_tensor2": Layout(4, (TENSOR, ZERO[3])),
    "zero3_tensor2_whole": Layout(4, (TENSOR, WHOLE, ZERO[3])),
    **_named("data2_pipeline2", _pipelines(2, 4, ZERO[1])),
    **_named("zero0_pipeline2", _pipelines(2, 4, ZERO[0])),
    **_named("zero3_pipeline2", _pipelines(2, 4, ZERO[3]), only=SCHEDULES[:3]),
    **_named("tensor2_pipeline2", _pipelines(2, 4, TENSOR)),
    "data2_context2": Layout(4, (CONTEXT, ZERO[1])),
    "zero0_context2": Layout(4, (CONTEXT, ZERO[0])),
    "zero2_context2": Layout(4, (CONTEXT, ZERO[2])),
    "zero3_context2": Layout(4, (CONTEXT, ZERO[3])),
    "tensor2_context2": Layout(4, (TENSOR, CONTEXT)),
    "tensor2_whole_context2": Layout(4, (TENSOR, WHOLE, CONTEXT)),
    **_named("context2_pipeline2", _pipelines(2, 4, CONTEXT), only=("1f1b", "zbv")),
    **_named("data2_tensor2_pipeline2", _pipelines(2, 8, TENSOR)),
    "zero3_tensor2_pipeline2": Layout(8, (TENSOR, ZERO[3], "parallel.pipeline=2")),
    "zero0_tensor2_pipeline2": Layout(8, (TENSOR, ZERO[0], "parallel.pipeline=2")),
    "hybrid3_tensor2": Layout(8, (TENSOR, ZERO[3], HYBRID), 16),
    "hybrid1_pipeline2": Layout(8, (HYBRID, "parallel.pipeline=2"), 16),
    "data2_tensor2_context2": Layout(8, (TENSOR, CONTEXT)),
    "data2_context2_pipeline2": Layout(8, (CONTEXT, "parallel.pipeline=2")),
    "tensor2_context2_pipeline2": Layout(8, (TENSOR, CONTEXT, "parallel.pipeline=2")),
    "data2_pipeline4": Layout(8, ("parallel.pipeline=4",)),
    "tensor2_pipeline4": Layout(8, (TENSOR, "parallel.pipeline=4")),
}


class Setting(NamedTuple):
    """What is turned on. `meaning` holds for the one process as well, `free` must change nothing."""

    meaning: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    precision: str = "fp32"
    missing: int = 0  # sequences of a step that are left out, so that the data axis does not divide it


def _optimizer(name: str, *settings: str) -> Setting:
    return Setting((f"optimizer.name={name}", *settings))


_LOSS_SCALE = ("precision.loss_scale.initial=4096.0", "precision.loss_scale.window=8")
SETTINGS: dict[str, Setting] = {
    "plain": Setting(),
    "adam": _optimizer("adam"),
    "sgd": _optimizer("sgd", "optimizer.lr=0.1"),
    "adafactor": _optimizer("adafactor", "optimizer.lr=0.01"),
    "adafactor_relative": _optimizer("adafactor", "optimizer.relative_step=true"),
    "lamb": _optimizer("lamb", "optimizer.lr=0.01"),
    "muon": _optimizer("muon", "optimizer.matmul=fp32"),
    # In fp16 the last rank alone spoils its gradients of one step, and every rank has to skip it.
    "fp16": Setting(("precision.compute=fp16", *_LOSS_SCALE), precision="fp16"),
    "bf16": Setting(("precision.compute=bf16",), precision="bf16"),
    "fp64": Setting(("precision.compute=fp64",), precision="fp64"),
    "dropout": Setting(("model.residual_dropout=0.1", "model.embed_dropout=0.1")),
    "recompute_full": Setting(free=("train.recompute=full",)),
    "recompute_selective": Setting(free=("train.recompute=selective",)),
    "recompute_2": Setting(free=("train.recompute=2",)),
    "compile": Setting(free=("train.compile=true",)),
    "ramp": Setting(("batch.ramp={start: 4, increment: 2, sequences: 40}",)),
    "padded": Setting(missing=1),
    "padded3": Setting(missing=3),
    "vocabulary": Setting(("model.vocab_size=517",)),
    "offload": Setting(free=("parallel.offload=true",)),
    "offload_activations": Setting(free=("train.offload_activations=true",)),
    "one_document": Setting(("data.mask_documents=false", "data.reset_positions=false")),
    "micro2": Setting(free=("batch.micro=2",)),
    "micro4": Setting(free=("batch.micro=4",)),
    "micro8": Setting(free=("batch.micro=8",)),
    "unclipped": Setting(("train.clip=null",)),
    "layers3": Setting(("model.layers=3",)),
    "layers6": Setting(("model.layers=6",)),
    "evaluate": Setting(("evaluate.every=5", "evaluate.max_tokens=1024")),
}
CLIP = "train.clip=0.2"  # under every norm of these runs, so that clipping acts in every step


class Cell(NamedTuple):
    """One comparison."""

    shape: str
    layout: str
    setting: str = "plain"

    @property
    def name(self) -> str:
        """As it is asked for and reported."""
        return "/".join(self)

    @property
    def settings(self) -> list[Setting]:
        """Those that + joins."""
        return [SETTINGS[name] for name in self.setting.split("+")]

    @property
    def precision(self) -> str:
        """The number format of the passes."""
        return next((s.precision for s in self.settings if s.precision != "fp32"), "fp32")

    @property
    def processes(self) -> int:
        """Ranks."""
        return LAYOUTS[self.layout].processes

    @property
    def meaning(self) -> list[str]:
        """Overrides that the one process has too."""
        layout = LAYOUTS[self.layout]
        sequences = layout.sequences - sum(s.missing for s in self.settings)
        return [
            CLIP, *layout.meaning, *(o for s in self.settings for o in s.meaning), f"batch.sequences={sequences}"
        ]  # fmt: skip

    @property
    def free(self) -> list[str]:
        """Overrides that the one process does without."""
        return [*LAYOUTS[self.layout].settings, *(o for s in self.settings for o in s.free)]


CORE = (
    "data2", "zero3", "hybrid2", "tensor2", "tensor2_whole", "context2", "pipeline2_1f1b", "pipeline2_interleaved_1f1b",
    "pipeline2_interleaved_zero_bubble", "pipeline2_zbv", "pipeline2_dualpipev", "pipeline4_1f1b", "data2_tensor2",
    "zero3_pipeline2_1f1b", "tensor2_pipeline2_1f1b", "data2_tensor2_pipeline2_1f1b",
)  # fmt: skip
ZEROS = ("zero1", "zero2", "zero3")
EIGHT = "data2_tensor2_pipeline2_1f1b"

#: Settings on the layouts where they could matter; `plain` is on all of them.
CHOSEN: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("sgd", "adafactor", "lamb", "muon"),
        (*ZEROS, "tensor2", "hybrid2", "zero3_tensor2", "pipeline2_1f1b", "pipeline2_zbv", "zero2_context2", EIGHT),
    ),
    "adam": ("zero2", "tensor2"),
    "adafactor_relative": ("zero2", "tensor2"),
    **{f"{name}+vocabulary": ("data4_zero3", "zero3_tensor2") for name in ("adafactor", "lamb", "muon")},
    "fp16": (
        *ZEROS, "hybrid1", "tensor2", "tensor2_whole", "context2", "pipeline2_gpipe", "pipeline2_interleaved_1f1b",
        "pipeline2_zbv", "pipeline4_1f1b", EIGHT,
    ),
    "bf16": (
        "data2", *ZEROS, "tensor2", "tensor2_whole", "context2", "pipeline2_1f1b", "pipeline2_interleaved_zero_bubble",
        "pipeline2_zbv", "pipeline2_dualpipev", "pipeline4_1f1b", EIGHT,
    ),
    **{f"{precision}+micro{n}": ("one",) for precision in ("fp16", "bf16") for n in (2, 4, 8)},
    "dropout": (
        "one", "data2", *ZEROS, "tensor2", "tensor2_whole", "context2", "tensor2_context2", "pipeline2_1f1b",
        "pipeline2_interleaved_1f1b", "pipeline2_zbv", EIGHT,
    ),
    "dropout+recompute_full": ("zero3", "tensor2", "context2", "pipeline2_1f1b", "pipeline2_zbv"),
    "dropout+recompute_selective": ("zero3", "tensor2_pipeline2_1f1b"),
    "recompute_full": (
        "one", "zero3", "tensor2", "tensor2_whole", "context2", "pipeline2_gpipe", "pipeline2_interleaved_zero_bubble",
        "pipeline2_zbv", EIGHT,
    ),
    "recompute_selective": ("one", "zero1", "zero3", "tensor2", "context2", "pipeline2_1f1b"),
    "recompute_2": ("zero3", "context2", "tensor2_pipeline2_1f1b", "pipeline2_dualpipev"),
    "compile": ("one", "zero1", "zero3", "tensor2", "context2", "pipeline2_1f1b"),
    "compile+recompute_full": ("zero3",),
    "compile+recompute_selective": ("tensor2",),
    "ramp": ("zero1", "zero3", "hybrid2", "tensor2", "pipeline2_1f1b", "pipeline2_zbv", "data2_pipeline2_gpipe"),
    "padded": (
        "data2", *ZEROS, "hybrid1", "data4_zero3", "data2_tensor2", "data2_context2", "data2_pipeline2_1f1b",
        "data2_pipeline2_zbv", EIGHT,
    ),
    "padded3": ("data4_zero1", "hybrid2", "data8_zero2"),
    "vocabulary": (
        "zero1", "zero3", "data4_zero3", "data8_zero2", "tensor2", "tensor2_whole", "data2_tensor2", "zero3_tensor2",
        "context2", "pipeline2_1f1b", "pipeline2_zbv", EIGHT,
    ),
    "offload": (*ZEROS, "data2", "tensor2", "context2", "pipeline2_1f1b", "zero3_tensor2"),
    "offload+muon": ("zero3",),
    "offload+fp16": ("zero2",),
    "offload_activations": ("one", "zero3", "tensor2", "context2", "pipeline2_1f1b", "pipeline2_zbv"),
    "offload_activations+recompute_full": ("zero3", "tensor2"),
    "one_document": ("zero1", "tensor2", "context2", "context4", "tensor2_context2", "pipeline2_1f1b"),
    "micro2": ("data4_zero1", "hybrid3", "tensor2", "context2", "pipeline2_gpipe"),
    "unclipped": ("zero2", "tensor2", "context2", "pipeline2_zbv"),
    "layers3": ("pipeline2_1f1b", "pipeline4_1f1b", "pipeline2_zbv", "tensor2_pipeline2_gpipe"),
    "layers6": ("pipeline2_1f1b", "pipeline4_gpipe", "pipeline2_dualpipev"),
    "evaluate": (
        "zero1", "zero2", "zero3", "tensor2", "context2", "pipeline2_1f1b", "pipeline2_interleaved_zero_bubble",
        "pipeline2_dualpipev", EIGHT,
    ),
}  # fmt: skip

#: More of them on Llama, whose heads are grouped and whose head is free.
CHOSEN_LLAMA: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("sgd", "adafactor", "lamb", "muon"), ("zero3", "tensor2")),
    "fp16": ("zero2", "tensor2", "pipeline2_1f1b"),
    "bf16": ("zero3", "tensor2", "context2", "pipeline2_dualpipev"),
    "bf16+micro2": ("one",),
    "bf16+micro8": ("one",),
    "fp16+micro8": ("one",),
    "vocabulary": ("data4_zero3", "tensor2", "zero3_tensor2", EIGHT),
    "recompute_full": ("pipeline2_zbv", "tensor2"),
    "recompute_selective": ("zero3", "tensor2"),
    "one_document": ("context2", "tensor2_context2"),
    "padded": ("zero2", "data2_pipeline2_1f1b"),
    "compile": ("tensor2",),
}

#: On families of their own kinds: what a kind of block could get wrong.
CHOSEN_KINDS: dict[str, tuple[str, ...]] = {
    "muon": ("zero3", "tensor2"),
    "bf16": ("zero3", "tensor2", "context2"),
    "bf16+micro8": ("one",),
    "dropout": ("tensor2", "context2", "pipeline2_1f1b"),
    "recompute_full": ("zero3", "tensor2"),
    "recompute_selective": ("zero3",),
    "compile": ("zero3",),
    "one_document": ("context2",),
}


#: On families whose stages hold more than one stack or stream.
CHOSEN_TWOFOLD: dict[str, tuple[str, ...]] = {
    "fp64": CORE,
    "dropout": ("zero3", "tensor2", "context2", "pipeline2_1f1b"),
    "recompute_full": ("zero3", "tensor2", "context2", "pipeline2_zbv"),
    "padded": ("zero2", "data2_pipeline2_1f1b"),
    "one_document": ("context2", "tensor2_context2"),
    "evaluate": ("zero1", "tensor2", "context2", "pipeline2_1f1b", "pipeline2_dualpipev", EIGHT),
}


@cache
def matrix() -> tuple[Cell, ...]:
    """Every cell, each once: every family under every layout that it may have, and settings where they could matter."""
    cells = [Cell(shape, layout) for shape in FAMILIES for layout in LAYOUTS if layout != "one"]
    cells += [Cell(shape, layout) for shape in ("gpt2_free", "llama_tied") for layout in CORE]
    cells += [Cell(shape, layout) for shape in ("modern", "post") for layout in (*CORE[1:6], *CORE[9:10], EIGHT)]
    for shapes, chosen in (
        (("gpt2",), CHOSEN),
        (("llama",), CHOSEN_LLAMA),
        (OWN_KINDS, CHOSEN_KINDS),
        (TWOFOLD, CHOSEN_TWOFOLD),
    ):
        every = [(setting, layout) for setting, layouts in chosen.items() for layout in layouts]
        cells += [Cell(shape, layout, setting) for shape in shapes for setting, layout in every]
    cells += [Cell("gpt2", "tensor4", "vocabulary"), Cell("llama_tied", "tensor2", "vocabulary")]
    return tuple(dict.fromkeys(cell for cell in cells if fits(cell.shape, cell.layout)))


def fits(shape: str, layout: str) -> bool:
    """Whether a family may have a layout; docs/families.md says why where not.

    Ranks of a tensor axis share key heads, of which the Llama shapes have 2; ALBERT makes 3 parts of a pipeline, and
    DeBERTa's table is not for schedules that split the backward pass.
    """
    if shape.startswith("deberta") and layout.endswith(("zero_bubble", "zbv", "dualpipev")):
        return False
    few = ("pipeline2", "pipeline2_gpipe", "pipeline2_1f1b")
    if shape == "albert" and "pipeline" in layout and not layout.endswith(few):
        return False
    return not layout.startswith("tensor4") or SHAPES[shape].get("kv_heads", 4) % 4 == 0


def sample(seed: int) -> list[Cell]:
    """All cells in an order of the seed's own, so that its beginning is a sample of any size."""
    cells = list(matrix())
    random.Random(seed).shuffle(cells)
    return cells


def config(prepared: str | Path, run: str | Path, shape: str = "gpt2", steps: int = STEPS) -> dict[str, Any]:
    """A run on real packed text, 8 sequences a step in 8 micro-batches of one process."""
    return {
        "run": str(run),
        "model": SHAPES[shape],
        "objective": OBJECTIVES.get(shape, {"name": "causal"}),
        "data": {"path": str(prepared), "sequence_length": 64, "workers": 0},
        "batch": {"sequences": 8, "micro": 1},
        "train": {"steps": steps, "compile": False, "threads": 1, "seed": 5},
        "optimizer": {"lr": 1e-3},
        # Without warm-up Adam's first step is lr x the sign of each gradient, also of those that are but rounding.
        "schedule": {"warmup_steps": 5},
        "log": {"every": 1, "tensorboard": False},
        "checkpoint": {"asynchronous": False},
    }


def weights(run: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor of the run's newest checkpoint, whole."""
    path, _ = find_newest(Path(run) / "checkpoints")
    assert path is not None
    infos = read_manifest(path).tensors
    tensors = {name: torch.empty(info.shape, dtype=DTYPES[info.dtype][0]) for name, info in infos.items()}
    load_checkpoint(path, tensors, alone=True)
    return tensors


def relative(found: float | None, expected: float | None) -> float:
    """Relative difference of two figures; what is not finite, and logged as null, is alike or infinitely far."""
    if found is None or expected is None:
        return 0.0 if found is expected else math.inf
    difference = abs(found - expected) / max(abs(expected), 1e-12)
    return difference if math.isfinite(difference) else math.inf


def disagreement(
    run: str | Path, records: list[dict[str, Any]], oracle: str | Path, expected: list[dict[str, Any]]
) -> dict[str, float]:
    """Largest relative differences over all steps of loss and gradient norm, of final weights, of validation losses."""
    steps = [(a, b) for a, b in zip(records, expected, strict=True) if "loss" in b]
    evaluations = [(a, b) for a, b in zip(records, expected, strict=True) if "val_loss" in b]
    mine, theirs = weights(run), weights(oracle)
    assert mine.keys() == theirs.keys()
    left = unseen(oracle)
    seen = {name: tensor for name, tensor in theirs.items() if name.startswith("model.") and not name.endswith(left)}
    return {
        "loss": max(relative(a["loss"], b["loss"]) for a, b in steps),
        "norm": max(relative(a["grad_norm"], b["grad_norm"]) for a, b in steps),
        "weights": distance(mine, seen),
        "validation": max(relative(a["val_loss"], b["val_loss"]) for a, b in evaluations),
    }


def unseen(run: str | Path) -> tuple[str, ...]:
    """Endings of the weights that the softmax does not see: key biases add one number to all scores of a query.

    So they start at 0, have no gradient but rounding, and are what Adam makes of that. Scores of rotary positions and
    of DeBERTa's distances do see them.
    """
    model = read_config(Path(run) / "config.yaml").model
    seen = model.positions == "rotary" or model.family.startswith("deberta")  # type: ignore[attr-defined]
    return () if seen else (".k.bias",)


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all that is expected: the larger of the greatest difference and the relative one of all in the 2-norm."""
    differences = [(found[name].double() - expected[name].double()) for name in expected]
    total = torch.stack([d.square().sum() for d in differences]).sum().sqrt()
    size = torch.stack([tensor.double().square().sum() for tensor in expected.values()]).sum().sqrt()
    return max(float(total / size), *(float(d.abs().max()) for d in differences))
