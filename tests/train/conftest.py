"""A tiny run that every test of the loop starts from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.config import Config
from shardwright.train.settings import read_config


@pytest.fixture
def tiny(prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    """`tiny("train.steps=3", ...)`: a config of a two-layer GPT-2 on `prepared`, into a folder of this test."""

    def build(*overrides: str, family: str = "gpt2") -> Config:
        raw: dict[str, Any] = {
            "run": str(tmp_path / "run"),
            "model": {"family": family, "layers": 2, "width": 32, "heads": 2, "max_length": 64},
            "objective": {"name": "causal"},
            "data": {"path": str(prepared), "sequence_length": 64, "lanes": 4, "workers": 0},
            "batch": {"sequences": 4, "micro": 2},
            "train": {"steps": 6, "compile": False, "device": "cpu"},
            "optimizer": {"lr": 3e-3},
            "checkpoint": {"every": 2},
            "log": {"every": 1, "tensorboard": False},
        }
        return read_config(raw, overrides)

    return build
