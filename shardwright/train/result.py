"""How a run ended: what `train` returns and the run folder keeps in result.json."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shardwright.train.writing import writing

RESULT = "result.json"


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    run: str
    step: int
    tokens: int
    stopped: bool  # by a signal, with all saved
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    xz_bits_per_byte: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def write_result(folder: Path, result: Result) -> None:
    """Keep the result of a finished run in its folder."""
    fresh = folder / f".{RESULT}"
    with writing(folder / RESULT):
        fresh.write_text(json.dumps(result.as_dict(), indent=1) + "\n", encoding="utf-8")
        fresh.replace(folder / RESULT)


def read_result(folder: Path, step: int) -> Result | None:
    """What `write_result` kept of a run that ended at `step`; one that is not of this end is removed."""
    path = folder / RESULT
    if not path.is_file():
        return None
    with suppress(ValueError, TypeError):  # emptied by a power cut, or of another version: it is made anew
        result = Result(**json.loads(path.read_text(encoding="utf-8")))
        if result.step == step:
            return result
    path.unlink()
    return None
