"""What to do about a step whose loss or gradient was unusable, as the config says; pure, and the same on every rank."""

from __future__ import annotations

from enum import Enum

from shardwright.config import Config, RunError
from shardwright.train.step import Outcome


class Verdict(Enum):
    """What becomes of an unusable step; its update has changed nothing already."""

    NORMAL = "skipped, as fp16 does now and then while its scale settles"
    SKIP = "skipped, and counted"
    ROLL_BACK = "back to the newest checkpoint, without its sequences"


def judge(outcome: Outcome, config: Config, *, interventions: int, what: str) -> Verdict:
    """The verdict on a step that overflowed or spiked; `interventions`: skips and roll-backs before it.

    RunError, beginning with `what`, where the run cannot or may not go on.
    """
    guard, floor = config.guard, config.precision.loss_scale.floor
    if outcome.overflow and config.precision.compute == "fp16":
        if outcome.loss_scale > floor * (1 + 1e-6):  # the scale is a float32
            return Verdict.NORMAL
        raise RunError(
            f"{what}, at the smallest loss scale {floor:g}: the model diverges or a layer leaves fp16's range; "
            "lower optimizer.lr, lengthen the warm-up, or train with precision.compute=bf16"
        )
    policy = guard.nonfinite if outcome.overflow else guard.spike
    if policy == "stop":
        raise RunError(f"{what}: stopped, as guard.{'nonfinite' if outcome.overflow else 'spike'}=stop asks")
    if interventions >= guard.most:
        raise RunError(f"{what}: the run was set right guard.most={guard.most} times; lower optimizer.lr")
    return Verdict.ROLL_BACK if policy == "rollback" else Verdict.SKIP
