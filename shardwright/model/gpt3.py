"""GPT-3 (Brown et al. 2020): GPT-2's blocks with a context of 2,048 and the sizes of its table 2.1.

A line of families.py. Two departures, which all public reproductions share: every layer attends densely (the
paper alternates with a banded pattern that it does not specify), and the 1.3B model has 16 heads of 128 (the
table's 24 x 128 is not its width). The 13B width is 5,120, the product of the table's own heads and head width.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from shardwright.config import meaning
from shardwright.model import gpt2
from shardwright.model.family import Family
from shardwright.model.transformer import LanguageModel, TransformerConfig


class GPT3Config(TransformerConfig):
    """GPT-2's choices over twice its context."""

    SIZES: ClassVar[dict[str, dict[str, Any]]] = {
        "125M": {"layers": 12, "width": 768, "heads": 12},
        "350M": {"layers": 24, "width": 1024, "heads": 16},
        "760M": {"layers": 24, "width": 1536, "heads": 16},
        "1.3B": {"layers": 24, "width": 2048, "heads": 16},
        "2.7B": {"layers": 32, "width": 2560, "heads": 32},
        "6.7B": {"layers": 32, "width": 4096, "heads": 32},
        "13B": {"layers": 40, "width": 5120, "heads": 40},
        "175B": {"layers": 96, "width": 12288, "heads": 96},
    }

    family: Literal["gpt3"] = meaning("gpt3", "Model family")
    max_length: int = meaning(2048, "Longest sequence", ge=1)


# The blocks are GPT-2's, so that is what Hugging Face reads it as.
FAMILY = Family(GPT3Config, LanguageModel, gpt2.HUGGINGFACE)
