"""The family table: to add a family, write its file and add its line here."""

from __future__ import annotations

from shardwright.model import gpt2, gpt3, llama, qwen3
from shardwright.model.family import Family
from shardwright.model.transformer import LanguageModel, TransformerConfig

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2.FAMILY,
    "gpt3": gpt3.FAMILY,
    "llama": llama.FAMILY,
    "qwen3": qwen3.FAMILY,
}


def build_model(config: TransformerConfig) -> LanguageModel:
    """The model of a config, on torch's default device, with weights yet to be set by init.py or a checkpoint."""
    return FAMILIES[config.family].build(config)
