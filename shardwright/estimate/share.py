"""What one rank of a layout has of a model: the shapes of its parameters, in the groups that FSDP gathers together.

Below memory.py and communication.py, which say what that takes and costs. Shapes come from the real modules, on the
meta device, and are cut by the real tensor plan; nothing here needs a process group.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from shardwright.config import Config, ParallelConfig
from shardwright.model.count import parameter_shapes
from shardwright.model.transformer import TransformerConfig
from shardwright.parallel.mesh import mesh_shape
from shardwright.parallel.precision import FORMATS
from shardwright.parallel.stages import stage_indices
from shardwright.parallel.tensor import PLAN, Style

Shapes = dict[str, tuple[int, ...]]  # by logical name
Stages = Sequence[Collection[str]]  # layer names of every pipeline stage

EMBEDDING = "embed.tokens.weight"  # which is the head's weight as well, where the model is tied


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The degrees of a layout, and what decides who has which part when."""

    zero: int = 1
    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: bool = True
    schedule: str = "1f1b"
    virtual: int = 1  # pipeline stages of a rank

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int, virtual: int = 1) -> Layout:
        """That of a config in a world of so many processes; ConfigError where it does not fit."""
        pipeline, replicate, shard, context, tensor = mesh_shape(parallel, world)
        return cls(
            zero=parallel.zero,
            replicate=replicate,
            shard=shard,
            context=context,
            tensor=tensor,
            pipeline=pipeline,
            sequence=parallel.sequence,
            schedule=parallel.schedule,
            virtual=virtual,
        )

    @property
    def world(self) -> int:
        """Processes."""
        return self.spread * self.replicate * self.tensor * self.pipeline

    @property
    def spread(self) -> int:
        """Ranks that parameters are sharded over: data ranks of one copy, and all that share their sequences."""
        return self.shard * self.context

    @property
    def slices(self) -> int:
        """Parts that the tokens between the blocks are in."""
        return self.tensor if self.sequence else 1


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step of one data rank. `value_bytes` of the compute format; masters are float32, or float64 where it is.

    An encoder-decoder's rows have `length` tokens of a source, and `target` tokens, by default as many.
    """

    length: int
    micro_batch: int
    micro_batches: int = 1
    value_bytes: int = 4
    recompute: str | int = "none"
    compiled: bool = False
    offloaded: bool = False  # what the backward pass needs lies in host memory
    target: int | None = None

    @classmethod
    def of(cls, config: Config, micro_batches: int, *, compiled: bool = False, target: int | None = None) -> Work:
        """That of a config, in a step of so many micro-batches."""
        return cls(
            length=config.data.sequence_length,
            micro_batch=config.batch.micro,
            micro_batches=micro_batches,
            value_bytes=FORMATS[config.precision.compute].itemsize,
            recompute=config.train.recompute,
            compiled=compiled,
            offloaded=config.train.offload_activations,
            target=target,
        )

    @property
    def predicting(self) -> int:
        """Tokens of the row that the loss is of."""
        return self.length if self.target is None else self.target

    @property
    def master_bytes(self) -> int:
        """Of a value of masters, gradients and reductions."""
        return max(4, self.value_bytes)

    def num_recomputed(self, blocks: int) -> int:
        """Blocks whose forward pass runs twice, whole or in part."""
        every = self.recompute if isinstance(self.recompute, int) else 1
        return 0 if self.recompute == "none" else -(-blocks // every)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A rank's place on the axes whose ranks have parts of other sizes; the first ones have the most."""

    pipeline: int = 0
    spread: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Group:
    """Parameters that are gathered and reduced together: a block, or what a stage has beside its blocks."""

    shapes: Shapes  # of this tensor rank's parts, whole over the ranks that share them
    partial: frozenset[str]  # whose gradients are partial sums over the tensor axis
    frozen: frozenset[str] = frozenset()  # which are not trained

    @property
    def size(self) -> int:
        """Parameters."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def trained(self) -> Group:
        """The same without what is frozen."""
        return Group({n: s for n, s in self.shapes.items() if n not in self.frozen}, self.partial - self.frozen)

    def padded(self, ranks: int) -> int:
        """Parameters with what FSDP adds so that each first dim divides by the ranks."""
        return sum(-(-shape[0] // ranks) * ranks * math.prod(shape[1:]) for shape in self.shapes.values())

    def part(self, ranks: int, index: int) -> int:
        """Parameters of which one of the ranks is the owner."""
        return sum(split(shape[0], ranks, index) * math.prod(shape[1:]) for shape in self.shapes.values())


@dataclass(frozen=True)
class StageShare:
    """What a rank has of one pipeline stage. `tables`: parameters that every stage has a copy of."""

    index: int
    first: bool
    last: bool
    root: Group
    blocks: tuple[Group, ...]
    tables: tuple[str, ...] = ()

    @property
    def groups(self) -> tuple[Group, ...]:
        """All groups that have parameters."""
        return (*((self.root,) if self.root.shapes else ()), *self.blocks)


def split(size: int, ranks: int, index: int) -> int:
    """What torch.chunk gives to part `index`."""
    each = -(-size // ranks)
    return min(each, max(size - index * each, 0))


@dataclass(frozen=True)
class Adapter:
    """What an adapter adds to a model, and all that is not trained then, by logical name."""

    shapes: Shapes
    frozen: frozenset[str]


def rank_share(
    model: TransformerConfig,
    layout: Layout,
    place: Place | None = None,
    stages: Stages | None = None,
    adapter: Adapter | None = None,
) -> list[StageShare]:
    """The stages of the rank at `place`; `stages` are all stages of the pipeline, needed where there are several."""
    place = place or Place()
    shapes = parameter_shapes(model) | (adapter.shapes if adapter else {})
    if stages is None:
        assert layout.pipeline == 1, "which layers a stage has is not known here"
        stages = [{layer_of(name) for name in shapes}]
    everywhere = {layer_of(name) for name in shapes}.difference(*stages)  # tables that all blocks share
    own = stage_indices(layout.schedule, place.pipeline, layout.pipeline, layout.virtual) if len(stages) > 1 else [0]
    found = []
    for index in own:
        last = index == len(stages) - 1
        also = EMBEDDING if last and model.ties_stages else ""
        layers = {*stages[index], *everywhere}
        here = {name: shape for name, shape in shapes.items() if layer_of(name) in layers or name == also}
        root, *blocks = (_group(group, layout, place) for group in _by_group(here))
        if adapter is not None:
            root, *blocks = (replace(group, frozen=adapter.frozen & group.shapes.keys()) for group in (root, *blocks))
        tables = tuple(name for name in here if layer_of(name) in everywhere)
        found.append(StageShare(index, index == 0, last, root, tuple(blocks), tables))
    return found


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: embed, blocks.3, final_norm, head."""
    first, second, *_ = name.split(".")
    return f"{first}.{second}" if first == "blocks" else first


def _by_group(shapes: Shapes) -> list[Shapes]:
    """What is in no block, then each block."""
    groups: dict[str, Shapes] = {"": {}}
    for name, shape in shapes.items():
        layer = layer_of(name)
        groups.setdefault(layer if layer.startswith("blocks.") else "", {})[name] = shape
    return list(groups.values())


def _group(shapes: Shapes, layout: Layout, place: Place) -> Group:
    """What the tensor plan leaves a rank of these parameters."""
    if layout.tensor == 1:
        return Group(shapes, frozenset())
    local: Shapes = {}
    partial = set()
    for name, shape in shapes.items():
        style, leaf = _style(name)
        if (dim := style.dims.get(leaf)) is not None:
            shape = (*shape[:dim], split(shape[dim], layout.tensor, place.tensor), *shape[dim + 1 :])
        elif style.is_partial(leaf, layout.sequence):
            partial.add(name)
        local[name] = shape
    return Group(local, frozenset(partial))


def _style(name: str) -> tuple[type[Style], str]:
    module, _, leaf = name.rpartition(".")
    return next(rule.style for rule in PLAN if fnmatchcase(module, rule.pattern)), leaf
