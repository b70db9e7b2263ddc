"""Device memory of one training process at its fullest, by category, from config and layout alone.

This engine's own formula, for the moment of a step that needs most. One process holds float32 masters, gradients
(4 + 4 bytes a parameter) and copies in the compute format; a rank of a layout holds shards of the masters and what FSDP
gathers, accumulates and reduces beside them. Then the optimizer's moments, the activations that backward needs, and the
one chunk of logits that exists at a time. Not in it: attention masks, what a communication backend copies, the
allocator's fragmentation; compiled blocks keep less. tests/estimate/test_memory.py holds it within 5 % against real
ranks for GPT-2 with AdamW, under every ZeRO stage, tensor, context and 1F1B. Elsewhere it was seen further off: too low
by 20 % with Muon, whose update needs whole matrices, and by 10 % for Llama in bf16; too high by 8 to 16 % for schedules
that split the backward pass, by 12 % with selective recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from shardwright.estimate.communication import num_reductions
from shardwright.estimate.share import EMBEDDING, Adapter, Layout, Place, Stages, StageShare, Work, rank_share
from shardwright.model.count import activation_bytes, num_parameters, score_bias_bytes
from shardwright.model.encoder_decoder import EncoderDecoderConfig
from shardwright.model.transformer import TransformerConfig
from shardwright.objective.cross_entropy import CHUNK_ROWS
from shardwright.parallel.stages import SCHEDULES

# float32 moments a parameter. Muon keeps one for matrices of blocks and two for the rest; Adafactor a row and a column.
MOMENTS = {"adamw": 2.0, "adam": 2.0, "lamb": 2.0, "sgd": 1.0, "adafactor": 0.0}
LOOSE = 5.25  # float32 values a logit of the one chunk that exists, on the way to its gradient in an uncompiled loss


class Moment(NamedTuple):
    """Bytes that come and go in a step."""

    gathered: int = 0
    gradients: int = 0
    buffers: int = 0
    activations: int = 0
    logits: int = 0


def step_memory(
    model: TransformerConfig,
    work: Work,
    *,
    optimizer: str,
    layout: Layout | None = None,
    place: Place | None = None,
    stages: Stages | None = None,
    offload: bool = False,
    adapter: Adapter | None = None,
) -> dict[str, int]:
    """Bytes by category of the rank at `place` (one process without a layout), and their `total`.

    `stages` and `adapter` as of `share.rank_share`; `offload`: masters, reduced gradients and moments lie in host
    memory. What is frozen is in the compute format, and has neither gradients nor moments.
    """
    layout = layout or Layout(zero=0)
    own = rank_share(model, layout, place, stages, adapter)
    spread = layout.world > 1
    here = not (spread and offload)
    every = sum(group.padded(layout.spread) for stage in own for group in stage.groups) // layout.spread
    part = sum(group.trained.padded(layout.spread) for stage in own for group in stage.groups) // layout.spread
    moments = list(_spread(model, layout, work, own, place or Place(), here) if spread else _alone(model, work, own))
    fullest = max(moments, key=sum)
    memory = {
        "masters": here * (work.master_bytes * part + work.value_bytes * (every - part)),
        "optimizer": int(here * work.master_bytes * _moments(optimizer, num_parameters(model)) * part),
        **fullest._asdict(),
    }
    return {**memory, "total": sum(memory.values())}


def zero_paper_bytes(stage: int, ranks: int, value_bytes: int, moments: float = 2.0) -> float:
    """Bytes a parameter of model states, as the ZeRO paper counts them (Rajbhandari et al. 2020, figure 1).

    Parameters and gradients are in the compute format there, the optimizer holds float32 moments, and a float32 copy
    where the format is another: 2 + 2 + 12 in mixed precision.
    """
    optimizer = 4 * moments + (4 if value_bytes < 4 else 0)
    parameters = value_bytes / (ranks if stage >= 3 else 1)
    gradients = value_bytes / (ranks if stage >= 2 else 1)
    return parameters + gradients + optimizer / (ranks if stage >= 1 else 1)


def _alone(model: TransformerConfig, work: Work, own: Sequence[StageShare]) -> Iterator[Moment]:
    """One process: masters, gradients and copies in three buffers that are always there."""
    size = sum(group.trained.size for stage in own for group in stage.groups)
    copies = 0 if work.value_bytes == work.master_bytes else work.value_bytes * size
    kept, fewer, whole = _activations(model, Layout(zero=0), work, model.num_blocks * model.repeats, 1.0)
    chunk, head = _logits(own, work, work.micro_batch * work.predicting)
    whole += _gradients(model, Layout(zero=0), work)
    for activations, logits in ((kept, chunk), (kept, 2 * head), (fewer + whole, head)):
        yield Moment(copies, work.master_bytes * size, 0, activations, logits)


def _spread(
    model: TransformerConfig, layout: Layout, work: Work, own: Sequence[StageShare], place: Place, here: bool
) -> Iterator[Moment]:
    """The moments of the last micro-batches that may be the fullest: loss, its backward pass, a block's, the root's."""
    value, wide, ranks = work.value_bytes, work.master_bytes, layout.spread
    blocks = [group.padded(ranks) for stage in own for group in stage.blocks]
    root, block = sum(stage.root.padded(ranks) for stage in own), max(blocks, default=0)
    full = root + sum(blocks)
    own_blocks = [group.trained.padded(ranks) for stage in own for group in stage.blocks]
    own_root, own_block = sum(stage.root.trained.padded(ranks) for stage in own), max(own_blocks, default=0)
    own_full = own_root + sum(own_blocks)
    each = num_reductions(layout, work) == work.micro_batches
    lets_go = layout.zero == 3 and layout.pipeline == 1
    shards = here * wide * own_full // ranks
    earlier = work.micro_batches > 1  # micro-batches that left gradients behind
    summed = (shards if each else wide * own_full) * earlier
    held = value * (root if lets_go else full)
    tokens = work.micro_batch * work.predicting // layout.context
    inside = in_flight(layout, place.pipeline, work.micro_batches) / layout.virtual
    runs = len(blocks) * model.repeats
    kept, fewer, whole = _activations(model, layout, work, runs, inside)
    chunk, head = _logits(own, work, tokens)
    following = value * block * lets_go  # gathered ahead
    sent = wide * own_root * (each and earlier)  # FSDP keeps what it reduced last until it reduces again
    yield Moment(held + following, summed, sent, kept, chunk)
    yield Moment(held + following, summed, sent, kept, 2 * head)
    yield Moment(held + 2 * following, summed, sent, fewer + whole + _gradients(model, layout, work), head)
    if each:
        left = held if earlier and not lets_go else value * (root + block)  # the last backward pass lets go of all
        yield Moment(held + 2 * following, summed, _reducing(own_block, ranks, value, wide), fewer, head)
        yield Moment(left, shards, _reducing(own_block, ranks, value, wide), 0, head)
        yield Moment(left, shards, _reducing(own_root, ranks, value, wide), 0, 0)
    else:
        arrived = value * own_block if value != wide else 0
        yield Moment(held, summed, arrived, fewer, head)
        reduced = _reducing(own_block, ranks, wide, wide)
        yield Moment(held - value * block, summed - wide * own_block, reduced, fewer, head)
        yield Moment(0, wide * own_root + shards - here * wide * own_root // ranks, wide * own_root, 0, 0)


def _reducing(size: int, ranks: int, arrived: int, wide: int) -> int:
    """Bytes of a group's gradients while they are reduced: as they arrived, and one buffer of them.

    A group of one rank copies that buffer twice.
    """
    return max((arrived + wide) * size, wide * size + (wide * size // ranks) * (2 if ranks == 1 else 1))


def _moments(optimizer: str, parts: dict[str, int]) -> float:
    if optimizer == "muon":
        matrices = parts["attention"] + parts["mlp"]
        return 2 - matrices / parts["total"]
    return MOMENTS[optimizer]


def _logits(own: Sequence[StageShare], work: Work, tokens: int) -> tuple[int, int]:
    """Bytes at the loss: (those of one chunk of logits, those of the head's gradient)."""
    shapes = {name: shape for stage in own for name, shape in stage.root.shapes.items()}
    frozen = {name for stage in own for name in stage.root.frozen}
    drafts = any(name.startswith("embed.generator.head.") for name in shapes)
    if not (own[-1].last or drafts):
        return 0, 0
    table = next((name for name in ("head.weight", "embed.generator.head.weight", EMBEDDING) if name in shapes), None)
    if table is None:  # the last stage of a model whose first one has the head over the vocabulary
        return 0, 0
    rows, width = shapes[table]
    several = tokens > CHUNK_ROWS
    gradient = (table not in frozen) * (work.master_bytes if several else work.value_bytes) * rows * width
    value = 2 * work.value_bytes if work.compiled else work.value_bytes % work.master_bytes + LOOSE * work.master_bytes
    return int(value * min(tokens, CHUNK_ROWS) * rows) + several * gradient, gradient


def in_flight(layout: Layout, index: int, micro_batches: int) -> int:
    """Micro-batches times stages of a rank, the one at `index` of the pipeline, whose activations live at once.

    Narayanan et al. 2021 for GPipe, 1F1B and its interleaved form; for those that split the backward
    pass about what was measured, since they keep activations for its second half.
    """
    ranks, virtual = layout.pipeline, layout.virtual
    if ranks == 1:
        return 1
    most = micro_batches * virtual
    if layout.schedule == "gpipe":
        return most
    if layout.schedule == "1f1b":
        return min(most, ranks - index)
    if SCHEDULES[layout.schedule].splits_backward:
        return min(most, 3 * ranks)
    return min(most, (virtual - 1) * ranks + 2 * (ranks - index - 1) + 1)


def _activations(
    model: TransformerConfig, layout: Layout, work: Work, blocks: int, copies: float
) -> tuple[int, int, int]:
    """What `copies` micro-batches keep for their backward passes: (of all blocks, of all but one, of one, whole)."""
    repeated = 0 if work.recompute == "selective" else work.num_recomputed(blocks)
    whole, inputs = _block_activations(model, layout, work)
    one = inputs if repeated == blocks else whole  # the last block is whole unless all are recomputed
    kept = math.ceil(copies * ((blocks - repeated) * whole + repeated * inputs))
    kept, fewer = (0, 0) if work.offloaded else (kept, max(kept - one, 0))
    biases = math.ceil(copies * _score_biases(model, layout, work))
    return kept + biases, fewer + biases, whole


def _score_biases(model: TransformerConfig, layout: Layout, work: Work) -> int:
    """Bytes of one micro-batch's."""
    whole = score_bias_bytes(model, work.micro_batch, work.length, work.predicting, value_bytes=work.value_bytes)
    return whole // (layout.tensor * layout.context)


def _gradients(model: TransformerConfig, layout: Layout, work: Work) -> int:
    """Bytes of gradients of activations in the widest place of a block, and of biases that are summed over blocks."""
    tokens = work.micro_batch * work.length // layout.context
    widest = tokens * (model.width + model.hidden_width // layout.tensor) * work.value_bytes
    return widest + _score_biases(model, layout, work)


def _block_activations(model: TransformerConfig, layout: Layout, work: Work) -> tuple[int, int]:
    """(bytes that a block keeps, those of its input) of one micro-batch; of two stacks the mean of all blocks."""
    if not isinstance(model, EncoderDecoderConfig):
        return _of_block(model, layout, work, work.length, None)
    lengths = [(work.length, None), (work.predicting, work.length)]
    shares = [len(run) / model.num_blocks for run in model.runs]
    found = [_of_block(model, layout, work, *each) for each in lengths]
    kept, inputs = (sum(share * x for share, x in zip(shares, one, strict=True)) for one in zip(*found, strict=True))
    return int(kept), int(inputs)


def _of_block(model: TransformerConfig, layout: Layout, work: Work, length: int, source: int | None) -> tuple[int, int]:
    """`_block_activations` of a block on rows of `length` tokens, which attends to `source` tokens as well.

    A tensor rank has its heads and feed-forward channels, of all tokens; only what stands between regions is sliced.
    A context rank keeps the keys and values that each of its two chunks saw.
    """
    ranks = layout.tensor
    local = model.model_copy(
        update={
            "heads": model.heads // ranks,
            "kv_heads": model.num_kv_heads // ranks,
            "head_dim": model.head_width,
            "mlp_width": model.hidden_width // ranks,
        }
    )
    value, tokens = work.value_bytes, work.micro_batch * length // layout.context
    memory = None if source is None else work.micro_batch * source
    kept = activation_bytes(local, tokens, value_bytes=value, memory=memory, length=length)
    inputs = tokens * model.width * value
    kept -= (2 if source is None else 3) * (inputs - inputs // layout.slices)
    if layout.context > 1:
        seen = (2 * layout.context + 1) / 2 - 1
        kept += int(seen * 2 * tokens * local.num_kv_heads * model.head_width * value)
    return kept, inputs // layout.slices
