"""Where the tables of families and objectives meet the config schema.

The config layer knows neither; this is the one place that hands them to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwright.config import Config, ConfigError, build_schema, load_config, parse
from shardwright.model.families import FAMILIES
from shardwright.model.transformer import TransformerConfig
from shardwright.objective.classify import FRAMES, ClassifyConfig
from shardwright.objective.table import OBJECTIVES

SCHEMA = build_schema(
    {name: family.config for name, family in FAMILIES.items()},
    {name: config for name, (config, _) in OBJECTIVES.items()},
)


def usual_objective(model: TransformerConfig) -> Mapping[str, Any]:
    """The objective that a family is pre-trained by: its own choice, or the first that trains models of its kind.

    Of a model that classifies, what trains it to.
    """
    family = FAMILIES[model.family]
    if model.classify != "none":
        return {"name": "classify", "of": model.classify, "classes": model.classes, "frame": class_frame(family.kind)}
    if family.objective is not None:
        return family.objective(model)
    return {"name": next(name for name, (_, kind) in OBJECTIVES.items() if family.kind in kind.trains)}


def class_frame(kind: str) -> str:
    """Which special tokens a model of this kind reads around a text: ELECTRA's is an encoder once it is trained."""
    return kind if kind in FRAMES else "encoder"


def fit_classes(config: Config) -> None:
    """Give the model the head that objective `classify` trains; ConfigError where one of them has other classes."""
    objective, model = config.objective, config.model
    said = getattr(model, "classify", "none")
    if not isinstance(objective, ClassifyConfig):
        if said != "none":
            raise ConfigError(f"model.classify={said}: is trained by objective.name=classify; use that or drop it")
        return
    kind, wanted = FAMILIES[model.family].kind, {"classify": objective.of, "classes": objective.classes}
    found = {field: getattr(model, field) for field in wanted}
    if said != "none" and found != wanted:
        raise ConfigError(f"objective: tells {wanted} and the model {found}; make them equal")
    objective.frame = objective.frame or class_frame(kind)  # type: ignore[assignment]
    config.model = parse(type(model), {**model.model_dump(), **wanted}, "model")


def read_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """A complete config from a file, a shipped name or a mapping, with ``key=value`` overrides."""
    config = load_config(source, overrides, schema=SCHEMA)
    config.check_batch()
    fit_classes(config)
    if config.run is None:
        name = Path(source).stem if isinstance(source, str | Path) else "run"
        config.run = str(Path("runs") / name)
    return config
