"""What sections of the config are made of: strict models, fields with a role, durations.

Every field says whether it belongs to the run's *meaning* (a run folder goes on only where all of these match) or is
*free* (layout, workers, paths, logs).
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ConfigError(ValueError):
    """A user's mistake in a config, a path or an argument: one line, exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on for a reason the user should read: one line, exit code 1."""


class Strict(BaseModel):
    """Base of every section: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, validate_assignment=True, allow_inf_nan=False
    )


def meaning(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes what the run computes."""
    return Field(default, description=description, json_schema_extra={"role": "meaning"}, **limits)


def free(default: Any, description: str, **limits: Any) -> Any:
    """A field that may change between one start and the next of the same run."""
    return Field(default, description=description, json_schema_extra={"role": "free"}, **limits)


def parse_duration(text: str) -> float:
    """Seconds in 90s, 10m, 24h or 3d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a duration such as 90s, 10m, 24h or 3d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]
