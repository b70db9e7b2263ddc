"""A small run that learns, and a smaller one to be taught."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shardwright.config import Config
from shardwright.train.settings import read_config


@pytest.fixture(scope="session")
def tiny(prepared: Path) -> Callable[..., Config]:
    """`tiny(folder, "train.steps=3", ...)`: a config of a two-layer GPT-2 on `prepared`, into `folder`."""

    def build(run: Path, *overrides: str, **model: Any) -> Config:
        raw: dict[str, Any] = {
            "run": str(run),
            "model": {"family": "gpt2", "layers": 2, "width": 32, "heads": 2, "max_length": 64, **model},
            "objective": {"name": "causal"},
            "data": {"path": str(prepared), "sequence_length": 64, "lanes": 4, "workers": 0},
            "batch": {"sequences": 4, "micro": 2},
            "train": {"steps": 6, "compile": False, "device": "cpu", "threads": 1},
            "optimizer": {"lr": 3e-3},
            "checkpoint": {"every": 2, "asynchronous": False},
            "log": {"every": 1, "tensorboard": False},
        }
        return read_config(raw, overrides)

    return build
