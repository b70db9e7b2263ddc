"""The run folder: its config, its lock on meaning, and where its parts lie."""

from __future__ import annotations

import os
from pathlib import Path

from shardwright.checkpoint import find_newest
from shardwright.config import Config, ConfigError, RunError, differences, to_yaml
from shardwright.log import get_logger
from shardwright.train.metrics import METRICS
from shardwright.train.settings import read_config

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"


def open_run_folder(config: Config) -> tuple[Path, Path | None]:
    """Make or enter the run folder; returns it and the newest whole checkpoint to go on from.

    ConfigError where the folder holds the run of another config, RunError where it cannot be written.
    """
    folder = Path(config.run or "")
    checkpoint, skipped = find_newest(folder / CHECKPOINTS)
    for path, reason in skipped:
        get_logger().warning("checkpoint %s is passed over: %s", path, reason)
    begun = checkpoint is not None or bool(skipped) or (folder / METRICS).is_file()
    if begun and (folder / CONFIG).is_file():
        _check_meaning(folder, config)
    write_config(folder, config)
    return folder, checkpoint


def write_config(folder: Path, config: Config) -> None:
    """Write the fully resolved config into the run folder, whole or not at all."""
    path = folder / CONFIG
    fresh = path.with_name(f".{CONFIG}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh.write_text(to_yaml(config), encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise RunError(
            f"{folder}: cannot be written: {error.strerror}; choose another with run=PATH or mend its permissions"
        ) from None


def _check_meaning(folder: Path, config: Config) -> None:
    changed = differences(read_config(folder / CONFIG), config)
    if changed:
        key, there, here = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise ConfigError(
            f"{folder}: holds the run of another config: {key} is {there} there and {here} here{more}; "
            "start a new run with run=PATH, or go on with the settings it began with"
        )
