"""shardwright: one system that trains every kind of dense Transformer language model.

`shardwright.train(config, ...)` and `shardwright.load(path)` are what the commands call. Importing the package is
quick: torch comes with the first use.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shardwright import train

if TYPE_CHECKING:
    from shardwright.train.load import Loaded

__all__ = ["__version__", "load", "train"]

__version__ = "0.1.0"


def load(path: str | Path, *, device: str = "auto") -> Loaded:
    """Model, tokenizer and config of a run folder, a checkpoint, an imported model or a Hugging Face folder;
    `load(p)(input_ids=...)["logits"]`."""
    from shardwright.train.load import load as open_

    return open_(path, device=device)
