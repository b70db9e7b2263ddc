"""shardwright: one system that trains every kind of dense Transformer language model.

`train` and `load` are what the commands call; importing the package itself is quick, torch comes with the first use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwright.train.load import Loaded
    from shardwright.train.result import Result

__version__ = "0.1.0"


def train(config: str | Path | Mapping[str, Any], **overrides: Any) -> Result:
    """Train as a config file, shipped name or mapping says; overrides as `train__steps=100`."""
    from shardwright.train.run import train as run
    from shardwright.train.settings import read_config

    settings = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    return run(read_config(config, settings))


def load(path: str | Path, *, device: str = "auto") -> Loaded:
    """Model, tokenizer and config of a run folder or checkpoint; `load(p).model(input_ids=...)["logits"]`."""
    from shardwright.train.load import load as open_

    return open_(path, device=device)
