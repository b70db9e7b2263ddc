"""The cells of the equivalence matrix: shapes, layouts and settings, and what a cell's run is held to.

Used by the tests here (each layout once) and by benchmarks/equivalence.py (all of them).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shardwright.checkpoint import find_newest
from shardwright.checkpoint import load as load_checkpoint
from shardwright.checkpoint.integrity import DTYPES, read_manifest

STEPS = 20
LOSS, NORM, WEIGHTS = 1e-5, 1e-4, 1e-5

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2", "layers": 5, "width": 32, "heads": 4, "max_length": 64},
    "llama": {
        "family": "llama", "layers": 5, "width": 32, "heads": 4, "kv_heads": 2, "max_length": 64, "mlp_width": 96,
    },
}  # fmt: skip


def config(prepared: str | Path, run: str | Path, shape: str = "gpt2") -> dict[str, Any]:
    """A run of 20 steps on real packed text, 8 sequences a step in 8 micro-batches of one process."""
    return {
        "run": str(run),
        "model": SHAPES[shape],
        "objective": {"name": "causal"},
        "data": {"path": str(prepared), "sequence_length": 64, "workers": 0},
        "batch": {"sequences": 8, "micro": 1},
        "train": {"steps": STEPS, "compile": False, "threads": 1, "seed": 5},
        "optimizer": {"lr": 1e-3},
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


def relative(found: float, expected: float) -> float:
    """Relative difference of two figures."""
    return abs(found - expected) / max(abs(expected), 1e-12)


def disagreement(run: str | Path, records: list[dict[str, Any]], oracle: str | Path, expected: list[dict[str, Any]]):
    """Largest relative differences of loss and gradient norm over all steps, and of final weights."""
    steps = [(a, b) for a, b in zip(records, expected, strict=True) if "loss" in b]
    mine, theirs = weights(run), weights(oracle)
    assert mine.keys() == theirs.keys()
    return {
        "loss": max(relative(a["loss"], b["loss"]) for a, b in steps),
        "norm": max(relative(a["grad_norm"], b["grad_norm"]) for a, b in steps),
        "weights": distance(mine, theirs),
    }


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Of all weights: the larger of the greatest difference and the relative one in the 2-norm.

    No relative one of single tensors: the softmax does not see key biases, so that they start at 0, have no gradient
    but rounding, and are what Adam makes of noise.
    """
    names = [name for name in expected if name.startswith("model.")]
    differences = [(found[name].double() - expected[name].double()) for name in names]
    total = torch.stack([d.square().sum() for d in differences]).sum().sqrt()
    size = torch.stack([expected[name].double().square().sum() for name in names]).sum().sqrt()
    return max(float(total / size), *(float(d.abs().max()) for d in differences))
