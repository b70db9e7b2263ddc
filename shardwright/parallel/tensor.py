"""Tensor parallelism (Shoeybi et al. 2019) and sequence parallelism (Korthikanti et al. 2022) as one plan of data.

`PLAN` says which module of the shared blocks is spread in which style; it holds for every family. `apply_tensor`
turns parameters into DTensors on the tensor axis (before `fully_shard`), while activations stay plain tensors: each
module's own forward runs on what this rank holds of its parameters, so the model's code stays that of one device.
Activations travel where a region of whole heads or feed-forward channels is entered (`enter`) and left (`leave`), by
collectives.py; a gradient that is Partial, when FSDP or the caller brings it to its parameter's placement.
Shapes: B batch, T tokens, D width, V vocabulary; t ranks on the axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

from shardwright.parallel.collectives import gather, scatter_sum, share_gradient, sum_gradients, sum_parts

_TOKENS = 1  # the dim of [B, T, D] that sequence parallelism cuts


def enter(x: Tensor, mesh: DeviceMesh, sequence: bool) -> Tensor:
    """The residual stream as a region needs it of which every rank computes a part: [B, T/t or T, D] -> [B, T, D].

    Gathers tokens and reduce-scatters gradients; without sequence parallelism all-reduces gradients alone.
    """
    group = mesh.get_group()
    return gather(x, _TOKENS, group) if sequence else sum_gradients(x, group)


def leave(x: Tensor, mesh: DeviceMesh, sequence: bool) -> Tensor:
    """The sum of what the ranks computed: [B, T, D] -> [B, T/t or T, D].

    Reduce-scatters over tokens and gathers gradients; without sequence parallelism all-reduces alone.
    """
    group = mesh.get_group()
    return scatter_sum(x, _TOKENS, group) if sequence else sum_parts(x, group)


class Axis(NamedTuple):
    """What a spread module knows of the tensor axis."""

    mesh: DeviceMesh
    sequence: bool


class Part:
    """A module as its own forward sees it: all that it is, but of its parameters what this rank holds."""

    def __init__(self, module: nn.Module, held: Mapping[str, Tensor | None]) -> None:
        self._module = module
        for name, tensor in held.items():
            setattr(self, name, tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Style(nn.Module):
    """How a module is spread: a class that is put before the module's own (as `fully_shard` does with its own).

    It is a class since blocks are compiled: one compiled graph serves modules of one class, while a function bound to
    each module would make a graph of its own for each block.
    """

    #: The dim that each parameter is cut along; the others are replicated.
    dims: ClassVar[Mapping[str, int]] = {}
    #: Parameters that the module must have.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Whether the parts must be equal.
    even: ClassVar[bool] = False
    #: Whether gradients of replicated parameters are partial sums: always, never, or under sequence parallelism.
    partial: ClassVar[bool | None] = None
    #: The module's own class.
    base: ClassVar[type[nn.Module]]
    axis: Axis

    @classmethod
    def placement(cls, name: str) -> Placement:
        """Where parameter `name` lies."""
        return Shard(cls.dims[name]) if name in cls.dims else Replicate()

    @classmethod
    def is_partial(cls, name: str, sequence: bool) -> bool:
        """Whether the gradient of parameter `name` comes as a partial sum over the axis."""
        return name not in cls.dims and (sequence if cls.partial is None else cls.partial)

    def held(self) -> dict[str, Tensor | None]:
        """The local parts of the module's parameters; their gradients go back as DTensors."""
        parts: dict[str, Tensor | None] = {}
        for name, parameter in self._parameters.items():
            gradient = Partial() if self.is_partial(name, self.axis.sequence) else self.placement(name)
            assert parameter is None or isinstance(parameter, DTensor)
            parts[name] = None if parameter is None else parameter.to_local(grad_placements=[gradient])
        return parts

    def forward(self, *args: Any) -> Any:
        """The module's own forward pass on the local parts."""
        return self.base.forward(Part(self, self.held()), *args)


class Stream(Style):
    """What stands in the residual stream, norms and learned positions: replicated.

    Gradients are partial sums where the rank has a slice of the tokens.
    """


class PerHead(Style):
    """Norms of single heads, or what projections of single heads read: replicated, but each rank sees its own heads."""

    partial = True


class BeforeHead(Style):
    """Between the whole hidden states and a head of which each rank has some rows: replicated."""

    partial = True


class Alike(Style):
    """What every rank computes alike from the whole hidden states: replicated, with whole gradients."""

    partial = False


class Column(Style):
    """A linear layer of which each rank computes some outputs: whole input -> local heads or channels."""

    dims = {"weight": 0, "bias": 0}
    needs = ("weight",)
    even = True


class Row(Style):
    """A linear layer that takes each rank's own inputs; the products are summed, then the bias is added once."""

    dims = {"weight": 1}
    needs = ("weight",)
    even = True

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """[B, T, local inputs] -> [B, T/t or T, D]."""
        held = self.held()
        y = leave(self.base.forward(Part(self, {**held, "bias": None}), x, *rest), *self.axis)
        bias = held.get("bias")
        return y if bias is None else y + bias


class Channels(Row):
    """A convolution over tokens, of which each rank takes its own channels of all of them."""

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        """[B, T/t or T, D] -> [B, T/t or T, D]."""
        mesh = self.axis.mesh
        return super().forward(enter(x, *self.axis).chunk(mesh.size(), dim=-1)[mesh.get_local_rank()], *rest)


class Tokens(Style):
    """Token vectors by vocabulary: each rank looks up the tokens whose rows it holds, zeros for the others.

    The vocabulary need not divide by the ranks: the last one holds fewer rows.
    """

    dims = {"weight": 0}
    needs = ("weight",)

    def forward(self, x: Tensor) -> Tensor:
        """ids [B, T] -> [B, T/t or T, D]."""
        whole, weight = self._parameters["weight"], self.held()["weight"]
        assert whole is not None and weight is not None
        places = x - first_row(whole.shape[0], self.axis.mesh)
        here = (places >= 0) & (places < weight.shape[0])
        vectors = self.base.forward(Part(self, {"weight": weight}), places.where(here, 0))
        return leave(vectors.where(here.unsqueeze(-1), 0.0), *self.axis)


class HeadRows(Style):
    """The head's own weight and bias by vocabulary; the loss is computed from the rows held (`localize_heads`)."""

    dims = {"weight": 0, "bias": 0}


class HeadVectors(Style):
    """Vectors of each head's own that scores are made with (Transformer-XL's): each rank has those of its heads."""

    dims = {"content": 0, "position": 0, "segment": 0, "segments": 1}
    needs = tuple(dims)
    even = True


class Region(Style):
    """Attention or feed-forward layer as a whole: its input is made whole for all its projections at once.

    Of several streams each is cut and made whole by itself.
    """

    def forward(self, *streams: Tensor | None, **rest: Any) -> Any:
        """Each [B, T/t or T, D] -> [B, T/t or T, D]."""
        whole = (x if x is None else enter(x, *self.axis) for x in streams)
        return self.base.forward(self, *whole, **rest)


class Whole(Style):
    """Where several regions begin that all take the same input: it is made whole once for all of them."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, T/t or T, D] -> [B, T, D]."""
        return self.base.forward(self, enter(x, *self.axis))


class HeadColumns(Style):
    """A table with a column for each head; a rank looks up those of its own heads."""

    dims = {"weight": 1}
    needs = ("weight",)
    even = True


class Rule(NamedTuple):
    """Modules by logical name (`*` is any layer) and their style; families that have no such module pass it over."""

    pattern: str
    style: type[Style]


def _block_rules(block: str) -> tuple[Rule, ...]:
    """Those of the blocks that a pattern names."""
    return (
        Rule(f"{block}.attention_norm", Stream),
        Rule(f"{block}.attention", Region),
        Rule(f"{block}.attention.q", Column),
        Rule(f"{block}.attention.k", Column),
        Rule(f"{block}.attention.v", Column),
        Rule(f"{block}.attention.r", Column),
        Rule(f"{block}.attention.terms", HeadVectors),
        Rule(f"{block}.attention.position_q", Column),
        Rule(f"{block}.attention.position_k", Column),
        Rule(f"{block}.attention.q_norm", PerHead),
        Rule(f"{block}.attention.k_norm", PerHead),
        Rule(f"{block}.attention.out", Row),
        Rule(f"{block}.cross_norm", Stream),
        Rule(f"{block}.cross", Region),
        Rule(f"{block}.cross.q", Column),
        Rule(f"{block}.cross.k", Column),
        Rule(f"{block}.cross.v", Column),
        Rule(f"{block}.cross.q_norm", PerHead),
        Rule(f"{block}.cross.k_norm", PerHead),
        Rule(f"{block}.cross.out", Row),
        Rule(f"{block}.mlp_norm", Stream),
        Rule(f"{block}.mlp", Region),
        Rule(f"{block}.mlp.up", Column),
        Rule(f"{block}.mlp.gate", Column),
        Rule(f"{block}.mlp.down", Row),
        Rule(f"{block}.memory", Whole),
        Rule(f"{block}.positions", Stream),
        Rule(f"{block}.convolution", Channels),
        Rule(f"{block}.convolution_norm", Stream),
    )


PLAN: tuple[Rule, ...] = (
    Rule("embed.tokens", Tokens),
    Rule("embed.positions", Stream),
    Rule("embed.token_types", Stream),
    Rule("embed.norm", Stream),
    Rule("embed.projection", Stream),
    Rule("embed.query", Stream),
    Rule("embed.generator.projection", Stream),
    *_block_rules("embed.generator.blocks.*"),
    Rule("embed.generator.final_norm", Stream),
    Rule("embed.generator.head", HeadRows),
    Rule("embed.generator.head.transform.dense", BeforeHead),
    Rule("embed.generator.head.transform.norm", BeforeHead),
    Rule("embed.encoder.positions", Stream),
    Rule("embed.encoder.norm", Stream),
    Rule("embed.decoder.positions", Stream),
    Rule("embed.decoder.norm", Stream),
    Rule("encoder_relative", HeadColumns),
    Rule("decoder_relative", HeadColumns),
    Rule("relative.table", PerHead),
    Rule("relative.norm", PerHead),
    *_block_rules("blocks.*"),
    Rule("encoder_norm", Stream),
    Rule("memory", Whole),
    Rule("final_norm", Stream),
    Rule("head", HeadRows),
    Rule("head.transform.dense", BeforeHead),
    Rule("head.transform.norm", BeforeHead),
    Rule("head.sentence.pooler", Alike),
    Rule("head.sentence.classifier", Alike),
    Rule("head.label.pooler.dense", Alike),
    Rule("head.label.pooler.norm", Alike),
    Rule("head.label.classifier", Alike),
    Rule("head.replaced.dense", Alike),
    Rule("head.replaced.classifier", Alike),
)


def apply_tensor(model: nn.Module, mesh: DeviceMesh, *, sequence: bool) -> None:
    """Spread a LanguageModel, or the part of it that a pipeline stage has, over the 1-D tensor mesh, in place.

    Parameters may be on the meta device. With `sequence`, activations between the blocks are [B, T/t, D].
    ValueError where the sizes do not fit, or a parameter stays out of the plan; the model is then unchanged.
    """
    assert mesh.ndim == 1, "the tensor axis alone"
    reasons = check_tensor(model.config, mesh.size())
    if reasons:
        raise ValueError("; ".join(reasons))
    styles = {path: rule.style for rule in PLAN for path in _matches(model, rule.pattern)}
    _check_plan(model, styles, mesh.size())
    for path, style in styles.items():
        _spread(model.get_submodule(path), style, Axis(mesh, sequence))
    if sequence:
        build: Any = model.context
        model.context = partial(_own_context, build, mesh)  # type: ignore[assignment]


def _spread(module: nn.Module, style: type[Style], axis: Axis) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        # Every rank has the same whole value (or none yet, on the meta device), so nothing is sent.
        spread = distribute_tensor(parameter.data, axis.mesh, [style.placement(name)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(spread, requires_grad=parameter.requires_grad))
    module.__class__ = _spread_class(style, type(module))  # type: ignore[arg-type]
    module.axis = axis  # type: ignore[assignment]
    if style is Region:
        module.fused = False  # type: ignore[assignment]  # the projections have to be called as modules


@cache
def _spread_class(style: type[Style], base: type[nn.Module]) -> type[nn.Module]:
    return type(f"{style.__name__}{base.__name__}", (style, base), {"base": base})


def _matches(parent: nn.Module, pattern: str, path: str = "") -> Iterator[str]:
    """Paths of the modules under `parent` that `pattern` names; what a model does not have is passed over."""
    first, _, rest = pattern.partition(".")
    for name in [child for child, _ in parent.named_children()] if first == "*" else [first]:
        child = getattr(parent, name, None)
        if child is None:
            continue
        if rest:
            yield from _matches(child, rest, f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _check_plan(model: nn.Module, styles: Mapping[str, type[Style]], degree: int) -> None:
    """ValueError where a style cannot do to its module what it says, or a parameter has no style."""
    left = dict(model.named_parameters())
    spread = [name for name, parameter in left.items() if isinstance(parameter, DTensor)]
    if spread:
        raise ValueError(f"tensor plan: {spread[0]} is spread already; apply the plan once, and before fully_shard")
    for path, style in styles.items():
        own = dict(model.get_submodule(path).named_parameters(recurse=False))
        missing = [name for name in style.needs if name not in own]
        if missing:
            raise ValueError(f"tensor plan: {path} has no parameter {missing[0]!r} to shard ({style.__name__})")
        for name, parameter in own.items():
            left.pop(f"{path}.{name}")
            if style.even and name in style.dims and parameter.shape[style.dims[name]] % degree:
                raise ValueError(f"tensor plan: {path}.{name} {list(parameter.shape)} does not divide by {degree}")
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(f"tensor plan: no rule covers {', '.join(list(left)[:3])}{more}; add one to PLAN")


def _own_context(build: Callable[..., Any], mesh: DeviceMesh, *args: Any, **kwargs: Any) -> Any:
    """The model's context, with what belongs to tokens of the residual stream cut to this rank's.

    Attention sees all tokens: its mask and rotary angles stay whole.
    """
    return _own_stream(build(*args, **kwargs), mesh)


def _own_stream(context: Any, mesh: DeviceMesh) -> Any:
    """The context of a stream, and of the encoder's beside it; each is cut by itself."""
    own = {name: x if x is None else own_tokens(x, mesh) for name, x in context.of_tokens.items()}
    encoder = None if context.encoder is None else _own_stream(context.encoder, mesh)
    return context._replace(**own, encoder=encoder)


def own_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[B, T] -> [B, T/t]."""
    length, degree = x.shape[1], mesh.size()
    if length % degree:
        raise ValueError(f"{length} tokens do not divide by tensor={degree}; change their number or set sequence off")
    return x.chunk(degree, dim=1)[mesh.get_local_rank()]


def first_row(rows: int, mesh: DeviceMesh) -> int:
    """The first of the rows that this rank holds of a vocabulary sharded along dim 0."""
    return int(Shard.local_shard_size_and_offset(rows, mesh.size(), mesh.get_local_rank())[1])


def all_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """[B, T/t] -> [B, T]; gradients do not pass."""
    return gather(x.detach(), _TOKENS, mesh.get_group())


class Vocabulary:
    """What the ranks that hold a head's rows agree on, for the loss."""

    def __init__(self, start: int, mesh: DeviceMesh) -> None:
        self.start, self._group = start, mesh.get_group()

    def max(self, x: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, in place."""
        return self._reduce(x, dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over the ranks, in place."""
        return self._reduce(x, dist.ReduceOp.SUM)

    def _reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, op, group=self._group)
        return x


def localize_heads(hidden: Tensor, heads: Any, mesh: DeviceMesh, sequence: bool) -> tuple[Tensor, Any]:
    """What this rank computes the loss with: hidden [B, T/t or T, D] whole, and its own rows of the vocabulary's head.

    `heads` is a NamedTuple: `vocabulary`, None or a NamedTuple with weight [V, D] and bias [V] or None (DTensors) and a
    field `vocabulary`, which is set; `transform`, which stands before it; `others`, by name, which all ranks compute
    alike.
    The loss is then the same on every rank; the partial gradients of hidden that it returns are summed here.
    """
    own = None if heads.vocabulary is None else _own_rows(heads.vocabulary, mesh)
    others = {name: partial(_alike, other, mesh.size()) for name, other in heads.others.items()}
    return enter(hidden, mesh, sequence), heads._replace(vocabulary=own, others=others)


def _own_rows(head: Any, mesh: DeviceMesh) -> Any:
    """Of the vocabulary's head what this rank holds."""
    weight, bias = head.weight, head.bias
    assert isinstance(weight, DTensor), "the head is not spread: call apply_tensor first"
    rows = {
        "weight": weight.to_local(grad_placements=[Shard(0)]),
        "bias": None if bias is None else bias.to_local(grad_placements=[Shard(0)]),
    }
    return head._replace(**rows, vocabulary=Vocabulary(first_row(weight.shape[0], mesh), mesh))


def _alike(head: Callable[[Tensor], Tensor], ranks: int, hidden: Tensor) -> Tensor:
    """What `head` makes of whole hidden states on each of `ranks`, whose gradients are going to be summed."""
    return head(share_gradient(hidden, ranks))


def check_tensor(config: Any, degree: int, length: int | None = None) -> list[str]:
    """Reasons why a model does not fit `degree` tensor ranks, each one line with the nearest degree that fits all.

    config: a model config with heads, num_kv_heads, hidden_width and vocab_size (0 where it is not known yet). length:
    tokens of a sequence on these ranks, where sequence parallelism is on.
    """
    reasons = _misfits(config, degree, length)
    if not reasons:
        return []
    nearest = min(
        (d for d in range(1, config.num_kv_heads + 1) if not _misfits(config, d, length)),
        key=lambda d: (abs(d - degree), -d),
    )
    return [f"tensor={degree}: {reason}; nearest that fits: tensor={nearest}" for reason in reasons]


def _misfits(config: Any, degree: int, length: int | None) -> list[str]:
    shared = {"query heads": config.heads}
    if config.num_kv_heads != config.heads:
        shared["key heads"] = config.num_kv_heads
    shared["feed-forward channels"] = config.hidden_width
    inner = getattr(config, "generator", None)
    if inner is not None and inner.layers:
        shared |= {"heads of the generator": inner.heads, "its feed-forward channels": inner.hidden_width}
    if length is not None:
        shared["tokens of a sequence"] = length
    reasons = [
        f"{size} {what} " + ("are fewer than the ranks" if size < degree else f"do not divide by {degree}")
        for what, size in shared.items()
        if size % degree
    ]
    rows = config.vocab_size
    if rows and (degree - 1) * -(-rows // degree) >= rows:
        reasons.append(f"a vocabulary of {rows} leaves a rank without a row")
    return reasons
