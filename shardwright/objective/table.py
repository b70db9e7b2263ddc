"""The table of objectives: name in the config -> (config class, class)."""

from __future__ import annotations

from shardwright.config import ObjectiveConfig
from shardwright.objective.causal import Causal, CausalConfig

OBJECTIVES: dict[str, tuple[type[ObjectiveConfig], type[Causal]]] = {"causal": (CausalConfig, Causal)}
