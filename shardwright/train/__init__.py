"""Training: the loop, the step and what they stand on.

The package itself can be called: `shardwright.train(config, ...)` is the contract, and a function of that name
would be replaced by this package as soon as one of its modules is imported.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardwright.train.result import Result


class _CallablePackage(ModuleType):
    def __call__(self, config: str | Path | Mapping[str, Any], **overrides: Any) -> Result:
        """Train as a config file, shipped name or mapping says; overrides as `train__steps=100`."""
        from shardwright.train.run import train
        from shardwright.train.settings import read_config

        settings = [f"{key.replace('__', '.')}={json.dumps(value, default=str)}" for key, value in overrides.items()]
        return train(read_config(config, settings))


sys.modules[__name__].__class__ = _CallablePackage
