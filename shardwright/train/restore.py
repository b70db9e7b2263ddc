"""Going back to a checkpoint: which one, as all ranks are told, and what is in it into a step that is built.

Under run.py, above position.py.
"""

from __future__ import annotations

from pathlib import Path

from shardwright.checkpoint import DamagedError, find_newest, load
from shardwright.checkpoint.ranks import Ranks
from shardwright.log import get_logger
from shardwright.train.folder import CHECKPOINTS
from shardwright.train.position import Position, apply_tensors, checkpoint_tensors
from shardwright.train.step import Step


def newest_checkpoint(run: Path, ranks: Ranks, *, deep: bool = False) -> Path | None:
    """The newest whole checkpoint of a run, as rank 0 finds it; every rank has to call it."""

    def find() -> str:
        return str(find_newest(run / CHECKPOINTS, deep=deep)[0] or "")

    mine = ranks.together("looking for a checkpoint", find if ranks.rank == 0 else None)
    found = ranks.share(mine or "")
    return Path(found) if found else None


def restore(step: Step, checkpoint: Path, run: Path, ranks: Ranks) -> Position:
    """Fill `step` from a checkpoint, or from an older one where it is damaged; where the run stood then."""
    log, tensors = get_logger(), checkpoint_tensors(step)
    try:
        state = load(checkpoint, tensors)
    except DamagedError as error:
        older = newest_checkpoint(run, ranks, deep=True)
        if older is None:
            raise
        log.warning("%s; going on from %s instead", error, older)
        checkpoint, state = older, load(older, tensors)
    apply_tensors(step, tensors)
    position = Position.of(state["position"])
    log.info("resuming after step %d from %s", position.step, checkpoint)
    return position
