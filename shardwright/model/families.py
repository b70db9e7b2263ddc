"""The family table: to add a family, write its file and add its line here."""

from __future__ import annotations

from shardwright.model import (
    albert,
    bart,
    bert,
    crammed,
    deberta,
    electra,
    gpt2,
    gpt3,
    llama,
    modernbert,
    neox,
    qwen3,
    roberta,
    t5,
    transformer_2017,
    xlnet,
)
from shardwright.model.family import Family
from shardwright.model.transformer import LanguageModel, TransformerConfig

FAMILIES: dict[str, Family] = {
    "gpt2": gpt2.FAMILY,
    "gpt3": gpt3.FAMILY,
    "llama": llama.FAMILY,
    "qwen3": qwen3.FAMILY,
    "neox": neox.FAMILY,
    "bert": bert.FAMILY,
    "roberta": roberta.FAMILY,
    "albert": albert.FAMILY,
    "deberta": deberta.FAMILY,
    "deberta_v2": deberta.FAMILY_V2,
    "crammed": crammed.FAMILY,
    "modernbert": modernbert.FAMILY,
    "electra": electra.FAMILY,
    "xlnet": xlnet.FAMILY,
    "t5": t5.FAMILY,
    "bart": bart.FAMILY,
    "transformer": transformer_2017.FAMILY,
}


def build_model(config: TransformerConfig) -> LanguageModel:
    """The model of a config, on torch's default device, with weights yet to be set by init.py or a checkpoint."""
    return FAMILIES[config.family].build(config)
