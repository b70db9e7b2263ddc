"""Where the tables of families and objectives meet the config schema.

The config layer knows neither; this is the one place that hands them to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.config import Config, build_schema, load_config
from shardwright.model.families import FAMILIES
from shardwright.model.transformer import TransformerConfig
from shardwright.objective.table import OBJECTIVES

SCHEMA = build_schema(
    {name: family.config for name, family in FAMILIES.items()},
    {name: config for name, (config, _) in OBJECTIVES.items()},
)


def usual_objective(model: TransformerConfig) -> Mapping[str, Any]:
    """The objective that a family is pre-trained by: its own choice, or the first that trains models of its kind."""
    family = FAMILIES[model.family]
    if family.objective is not None:
        return family.objective(model)
    return {"name": next(name for name, (_, kind) in OBJECTIVES.items() if family.kind in kind.trains)}


def read_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A complete config from a file, a shipped name or a mapping, with ``key=value`` overrides."""
    config = load_config(source, overrides, schema=SCHEMA)
    config.check_batch()
    if config.run is None:
        name = Path(source).stem if isinstance(source, str | Path) else "run"
        config.run = str(Path("runs") / name)
    return config
