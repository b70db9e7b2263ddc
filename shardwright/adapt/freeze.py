"""Which parameters of a model are trained, by patterns of their logical names.

Lowest file of the room. A pattern is a glob over the whole name (`*` crosses dots): `blocks.0.*`, `*.bias`, `embed.*`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from torch import nn

from shardwright.config import ConfigError

#: Heads that a published model lacks: what fine-tuning trains even where nothing is said of it.
NEW_HEADS = ("head.label.*", "label.*", "*.label_head.*", "label_head.*")


def choose_trained(
    names: Collection[str], freeze: Iterable[str], train: Iterable[str], always: Iterable[str] = ()
) -> set[str]:
    """Of `names` those that are trained: all but what `freeze` names, and of that what `train` names all the same.

    `always` are trained whatever is said. ConfigError where a pattern names nothing, or nothing is left.
    """
    frozen = set().union(*(_matching("freeze", pattern, names) for pattern in freeze))
    spared = set().union(*(_matching("train", pattern, names) for pattern in train))
    new = {name for name in names for pattern in NEW_HEADS if fnmatchcase(name, pattern)}
    trained = (set(names) - frozen) | spared | new | set(always)
    if not trained:
        raise ConfigError("adapt.freeze: freezes every parameter; leave some, or name them with adapt.train")
    return trained


def _matching(key: str, pattern: str, names: Collection[str]) -> set[str]:
    found = {name for name in names if fnmatchcase(name, pattern)}
    if not found:
        parts = sorted({name.split(".")[0] for name in names})
        raise ConfigError(
            f"adapt.{key}: {pattern!r} names no parameter of this model; expected a pattern of names such as "
            f"{sorted(names)[0]} (they begin with {', '.join(parts)})"
        )
    return found


def apply_freeze(model: nn.Module, trained: Collection[str]) -> None:
    """Of a model, or a part of it, only these parameters get gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
