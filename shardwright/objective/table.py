"""The table of objectives: name in the config -> (config class, class)."""

from __future__ import annotations

from typing import Any

from shardwright.config import ObjectiveConfig
from shardwright.objective.causal import Causal, CausalConfig
from shardwright.objective.classify import Classify, ClassifyConfig
from shardwright.objective.denoise import Denoise, DenoiseConfig
from shardwright.objective.masked import Masked, MaskedConfig
from shardwright.objective.objective import Objective
from shardwright.objective.pairs import PairsConfig, SupervisedPairs
from shardwright.objective.permuted import Permuted, PermutedConfig
from shardwright.objective.replaced import Replaced, ReplacedConfig
from shardwright.objective.span import Span, SpanConfig

OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], type[Objective[Any]]]] = {
    "causal": (CausalConfig, Causal),
    "masked": (MaskedConfig, Masked),
    "replaced": (ReplacedConfig, Replaced),
    "permuted": (PermutedConfig, Permuted),
    "span": (SpanConfig, Span),
    "denoise": (DenoiseConfig, Denoise),
    "pairs": (PairsConfig, SupervisedPairs),
    "classify": (ClassifyConfig, Classify),
}
