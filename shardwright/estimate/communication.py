"""What one rank sends in a training step, in closed form: calls and bytes of every collective, by mesh axis.

Bytes are those of whole tensors (gathered, unscattered, reduced, sent); `leaving` says what of it leaves a rank. The
formulas are those of this engine with an optimizer that treats every element by itself (AdamW, Adam, SGD); others sum
over whole tensors besides. tests/parallel/test_communication.py holds them, call by call, against steps of real ranks.
Papers: ZeRO (Rajbhandari et al. 2020, section 7), tensor and sequence parallelism (Korthikanti et al. 2022, section 4),
context parallelism (Grattafiori et al. 2024, section 3.3.2). Symbols: B rows of a micro-batch, T tokens, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from shardwright.estimate.share import EMBEDDING, Group, Layout, Place, Stages, StageShare, Work, rank_share, split
from shardwright.model.encoder_decoder import EncoderDecoderConfig
from shardwright.model.transformer import TransformerConfig
from shardwright.objective.cross_entropy import CHUNK_ROWS
from shardwright.parallel.stages import SCHEDULES


class Amount(NamedTuple):
    """Calls of a collective, and the bytes of their whole tensors together."""

    calls: int
    size: int


#: By axis and collective. `world` is all ranks; `shard` all that share one copy of the masters, context ranks too.
Amounts = dict[tuple[str, str], Amount]


def plus(amounts: Amounts, axis: str, collective: str, calls: int, size: int) -> None:
    """Add calls, of `size` bytes together, in place."""
    before = amounts.get((axis, collective), Amount(0, 0))
    amounts[axis, collective] = Amount(before.calls + calls, before.size + size)


def leaving(collective: str, size: int, ranks: int) -> float:
    """Bytes that leave a rank for a tensor of `size` bytes, by the best algorithms known (rings; Patarasuk 2009)."""
    if collective == "receive":
        return 0.0
    return {"send": 1.0, "all-reduce": 2 * (ranks - 1) / ranks}.get(collective, (ranks - 1) / ranks) * size


def step_communication(
    model: TransformerConfig,
    layout: Layout,
    work: Work,
    *,
    place: Place | None = None,
    stages: Stages | None = None,
    terms: int = 1,
) -> Amounts:
    """What the rank at `place` sends in a step; `stages` as of `share.rank_share`, `terms` those of the loss.

    ValueError for ZeRO 3 under an interleaved schedule, where it depends on the order of the passes.
    """
    if layout.zero == 3 and layout.virtual > 1:
        raise ValueError("how often ZeRO 3 gathers a stage's parameters under an interleaved schedule has no formula")
    place = place or Place()
    amounts: Amounts = {}
    own = rank_share(model, layout, place, stages)
    if layout.pipeline > 1:
        _add_tables(amounts, own[0], layout, work, place)
    if layout.world > 1:  # counts of the loss, then norm, loss and whether to stop
        plus(amounts, "world", "all-reduce", 2, 8 * terms + 3 * work.master_bytes)
    for stage in own:
        _add_sharding(amounts, stage, layout, work)
        if layout.tensor > 1:
            _add_tensor(amounts, stage, model, layout, work)
        if layout.context > 1:
            _add_context(amounts, stage, model, layout, work)
        if layout.pipeline > 1:
            _add_pipeline(amounts, stage, {other.index for other in own}, model, layout, work)
            _add_tied(amounts, stage, model, layout, work, place)
    return amounts


def _add_sharding(amounts: Amounts, stage: StageShare, layout: Layout, work: Work) -> None:
    """FSDP: parameters gathered in the compute format, gradients reduced in that of masters, group by group."""
    reductions = num_reductions(layout, work)
    for group in stage.groups:
        gathers = _num_gathers(layout, work) if group is not stage.root else 1
        size = group.padded(layout.spread)
        if layout.spread > 1:
            plus(amounts, "shard", "all-gather", gathers, gathers * work.value_bytes * size)
            plus(amounts, "shard", "reduce-scatter", reductions, reductions * work.master_bytes * size)
        if layout.replicate > 1:
            plus(amounts, "replicate", "all-reduce", 1, work.master_bytes * size // layout.spread)


def num_reductions(layout: Layout, work: Work) -> int:
    """Times a step that gradients are reduced; a pipeline reduces them at its end, whatever the stage."""
    return work.micro_batches if layout.zero >= 2 and layout.pipeline == 1 else 1


def _num_gathers(layout: Layout, work: Work) -> int:
    """Times a step that a block's parameters are gathered.

    ZeRO 3 lets go of them after every forward pass, a pipeline not after backward passes: what follows one has them.
    """
    if layout.zero < 3:
        return 1
    return 2 * work.micro_batches if layout.pipeline == 1 else work.micro_batches + 1


def _add_tensor(amounts: Amounts, stage: StageShare, model: TransformerConfig, layout: Layout, work: Work) -> None:
    """Regions entered and left (parallel/tensor.py), the loss over a cut vocabulary, gradients of what is replicated.

    A recomputed block repeats its forward pass up to the last value that the backward pass needs, which the output of
    the last region is only where a norm or dropout follows it inside the block.
    """
    for stream in _streams(stage, model, work):
        size = work.micro_batch * stream.length // layout.context * model.width * work.value_bytes
        again = work.num_recomputed(stream.blocks)
        follows = model.norm_placement == "post" or bool(model.residual_dropout)
        repeated = stream.regions if follows else stream.regions - 1
        inside = stream.regions * stream.blocks
        enters, leaves = inside + stream.entered, inside + stage.first
        entered, left = enters + stream.regions * again, leaves + repeated * again  # in forward passes
        if layout.sequence:
            for collective, calls in (("all-gather", entered + leaves), ("reduce-scatter", left + enters)):
                plus(amounts, "tensor", collective, work.micro_batches * calls, work.micro_batches * calls * size)
        else:
            calls = work.micro_batches * (left + enters)
            plus(amounts, "tensor", "all-reduce", calls, calls * size)
    if stage.last:  # each chunk's maxima, then its two sums
        tokens = work.micro_batch * work.predicting // layout.context
        calls = work.micro_batches * 2 * math.ceil(tokens / CHUNK_ROWS)
        plus(amounts, "tensor", "all-reduce", calls, work.micro_batches * 3 * tokens * work.master_bytes)
    _add_partial(amounts, stage.groups, layout, work)


def _add_partial(amounts: Amounts, groups: tuple[Group, ...], layout: Layout, work: Work) -> None:
    """Gradients that are partial sums, tensor by tensor; what one backward pass gave is in the compute format still."""
    reductions = num_reductions(layout, work)
    at_once = reductions == work.micro_batches and layout.pipeline == 1
    value = work.value_bytes if at_once else work.master_bytes
    sizes = [math.prod(group.shapes[name]) for group in groups for name in group.partial]
    if sizes:
        plus(amounts, "tensor", "all-reduce", reductions * len(sizes), reductions * value * sum(sizes))


def _add_context(amounts: Amounts, stage: StageShare, model: TransformerConfig, layout: Layout, work: Work) -> None:
    """Keys and values of whole sequences, and their gradients back."""
    heads = model.num_kv_heads // layout.tensor
    token = 2 * work.micro_batch * heads * model.head_width * work.value_bytes
    for stream in _streams(stage, model, work):
        lengths = [stream.length, *([work.length] if stream.regions == 3 else [])]  # a decoder sees the source as well
        for length in lengths if stream.blocks else ():
            backward = work.micro_batches * stream.blocks
            forward = backward + work.micro_batches * work.num_recomputed(stream.blocks)
            plus(amounts, "context", "all-gather", forward, forward * token * length)
            plus(amounts, "context", "reduce-scatter", backward, backward * token * length)


def _add_pipeline(
    amounts: Amounts, stage: StageShare, own: set[int], model: TransformerConfig, layout: Layout, work: Work
) -> None:
    """Activations to the stage after and gradients to the one before, where another rank has it."""
    length = work.length + (work.predicting if isinstance(model, EncoderDecoderConfig) else 0)
    tokens = work.micro_batch * length // (layout.context * layout.slices)
    size = work.micro_batches * tokens * model.width * work.value_bytes
    before = not stage.first and stage.index - 1 not in own
    after = not stage.last and stage.index + 1 not in own
    for _ in range(before + after):
        plus(amounts, "pipeline", "send", work.micro_batches, size)
        plus(amounts, "pipeline", "receive", work.micro_batches, size)


class Stream(NamedTuple):
    """Tokens that blocks of one stack compute on, in a stage."""

    length: int  # of a row
    blocks: int
    regions: int  # of a block
    entered: int  # regions beside the blocks: the head, and where the source is brought together


def _streams(stage: StageShare, model: TransformerConfig, work: Work) -> list[Stream]:
    """One, or source and target of an encoder-decoder."""
    if not isinstance(model, EncoderDecoderConfig):
        return [Stream(work.length, len(stage.blocks), 2, stage.last)]
    decoders = sum(any(".cross." in name for name in group.shapes) for group in stage.blocks)
    source = Stream(work.length, len(stage.blocks) - decoders, 2, decoders > 0)
    return [source, Stream(work.predicting, decoders, 3, stage.last)]


def _add_tables(amounts: Amounts, stage: StageShare, layout: Layout, work: Work, place: Place) -> None:
    """Gradients of the tables that every stage has, summed over the pipeline; once for all stages of a rank."""
    for name in stage.tables:
        rows, *rest = stage.root.shapes[name]
        if part := split(rows, layout.spread, place.spread) * math.prod(rest):
            plus(amounts, "pipeline", "all-reduce", 1, part * work.master_bytes)


def _add_tied(
    amounts: Amounts, stage: StageShare, model: TransformerConfig, layout: Layout, work: Work, place: Place
) -> None:
    """The gradient of a weight that the first rank of the pipeline and the last one both have."""
    if model.ties_stages and (stage.first or stage.last) and SCHEDULES[layout.schedule].placement != "v":
        rows, width = stage.root.shapes[EMBEDDING]
        if part := split(rows, layout.spread, place.spread) * width:
            plus(amounts, "pipeline", "all-reduce", 1, part * work.master_bytes)
