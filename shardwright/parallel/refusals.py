"""What cannot work, in one table: each row a rule with its reason, held before any process builds anything.

Rows are pure functions of `Facts`; nothing here looks at a device or a group. Some of what is refused torch 2.13 would
run and get silently wrong, and a refusal is all that stands between a user and that. proposals.py looks for layouts
that no row refuses. Printed by `shardwright layouts`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from shardwright.parallel.context import fits_context, nearest_length
from shardwright.parallel.stages import SCHEDULES, check_micro_batches, check_virtual


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Everything that decides whether a run can work: its layout by config key, its model, its batches, its means."""

    # The layout. `data` is what is left of the world where the config leaves it out.
    world: int
    data: int = 1
    shard: int | None = None  # data ranks that share one sharded copy; None is all
    context: int = 1
    ring: bool = False
    tensor: int = 1
    pipeline: int = 1
    zero: int = 1
    schedule: str = "1f1b"
    stages: int = 1  # of a rank
    sequence: bool = True
    # The model. `layers` are what a pipeline can cut apart: embedding, blocks, final norm, head.
    layers: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab_size: int  # 0 where it is not known yet
    attention_dropout: float = 0.0
    generator_heads: int = 0  # of ELECTRA's generator
    generator_mlp_width: int = 0
    query_stream: int = 0  # tokens of XLNet's query stream
    causal: bool = True
    shared_blocks: bool = False  # all blocks are one, which counts once among `layers`
    projects_tables: bool = False  # blocks project a table that all of them share
    adapter: str = "none"  # what is put into it and trained: lora, prompt, prefix, p_tuning
    frozen: bool = False  # some parameters are not trained
    # The batches. `batches` holds the sequences of a step at every level of a ramp.
    length: int
    target: int | None = None  # tokens of a decoder's row beside an encoder's of `length`; None or the same without one
    batches: tuple[int, ...]
    micro: int
    masked: bool = True  # attention does not cross documents
    distilled: bool = False  # a teacher is asked beside the model
    quantized: bool = False  # linear layers compute with rounded weights
    keeps_zeros: bool = False  # of pruned weights
    # The means.
    precision: str = "fp32"
    compile: bool = False
    recompute: str | int = "none"
    offload: bool = False
    offload_activations: bool = False
    device: str = "cpu"
    optimizer: str = "adamw"
    # The engine, and where DeepSpeed keeps its optimizer and parameters: none, cpu or nvme.
    engine: str = "native"
    optimizer_place: str = "none"
    parameter_place: str = "none"

    def num_micro_batches(self, batch: int, micro: int | None = None) -> int:
        """Micro-batches of each data rank in a step of `batch` sequences; the last ones may be padding."""
        return math.ceil(math.ceil(batch / self.data) / (micro or self.micro))

    @property
    def is_offloaded(self) -> bool:
        """Whether DeepSpeed keeps optimizer or parameters elsewhere."""
        return self.engine == "deepspeed" and (self.optimizer_place, self.parameter_place) != ("none", "none")

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights are taken later than those of activations: the zero-bubble schedules."""
        return self.pipeline > 1 and SCHEDULES[self.schedule].splits_backward


class Row(NamedTuple):
    """One rule: `check` gives the reason in one line where it is broken, else None."""

    name: str
    rule: str
    check: Callable[[Facts], str | None]
    warns: bool = False  # the run works, but a user should know
    fixed: bool = False  # no other layout of the same world mends it


def _world(f: Facts) -> str | None:
    found = f.data * f.pipeline * f.context * f.tensor
    if found == f.world:
        return None
    return (
        f"parallel: data={f.data} x pipeline={f.pipeline} x context={f.context} x tensor={f.tensor} makes {found}, "
        f"not the world of {f.world}; start {found} processes (torchrun --nproc-per-node {found} -m shardwright ...)"
    )


def shards_fit(f: Facts) -> bool:
    """Whether the ranks that share one sharded copy divide the data ranks."""
    return f.zero == 0 or f.shard is None or f.data % f.shard == 0


def _shard(f: Facts) -> str | None:
    if shards_fit(f):
        return None
    return f"parallel.shard={f.shard}: does not divide the {f.data} data ranks"


def _zero_2(f: Facts) -> str | None:
    if f.zero != 2 or f.pipeline == 1:
        return None
    return "parallel.zero=2: a pipeline reduces gradients once a step, so stage 2 would be stage 1; use parallel.zero=1"


def _zero_3(f: Facts) -> str | None:
    if f.zero != 3 or not f.splits_backward:
        return None
    return (
        f"parallel.zero=3: {f.schedule} takes gradients in two passes, parameters are let go between them, and torch "
        "computes wrong ones without a word; use parallel.zero=1 or another schedule"
    )


def _compile(f: Facts) -> str | None:
    if not f.compile or not f.splits_backward:
        return None
    return f"train.compile: torch does not carry compiled stages under {f.schedule}; use train.compile=false"


def _recompute(f: Facts) -> str | None:
    if f.recompute != "selective" or not f.splits_backward:
        return None
    return (
        f"train.recompute=selective: {f.schedule} goes back through a block twice, selective recomputation allows one "
        "pass; use train.recompute=full"
    )


def _stages(f: Facts) -> str | None:
    reason = check_virtual(f.schedule, f.stages) if f.pipeline > 1 else None
    return reason and f"parallel.stages={f.stages}: {reason}"


def _layers(f: Facts) -> str | None:
    stages = f.pipeline * f.stages
    if f.pipeline == 1 or stages <= f.layers or f.shared_blocks:
        return None
    return (
        f"parallel.pipeline={f.pipeline}: {stages} stages cannot be cut from {f.layers} parts (embedding, blocks, "
        "final norm, head)"
    )


def _tables(f: Facts) -> str | None:
    if not f.projects_tables or not f.splits_backward:
        return None
    return (
        f"parallel.schedule={f.schedule}: torch takes gradients of weights in groups, and goes more than once back "
        "through a table that blocks share and project; use 1f1b, interleaved_1f1b or gpipe"
    )


def _shared_blocks(f: Facts) -> str | None:
    stages = f.pipeline * f.stages
    if f.pipeline == 1 or stages <= f.layers or not f.shared_blocks:
        return None
    return (
        f"parallel.pipeline={f.pipeline}: all blocks are one, which {stages} stages would part: each would need all of "
        "its parameters for some of the layers; use parallel.tensor, parallel.context or more data ranks"
    )


def _micro_batches(f: Facts) -> str | None:
    if f.pipeline == 1 or check_virtual(f.schedule, f.stages):
        return None
    for batch in f.batches:
        reason = _misfit(f, batch, f.micro)
        if reason:
            fitting = next((m for m in range(f.micro - 1, 0, -1) if not any(_misfit(f, b, m) for b in f.batches)), None)
            remedy = f"; batch.micro={fitting} fits" if fitting else ""
            return f"batch.micro={f.micro}: {reason}, in a step of {batch} sequences over data={f.data}{remedy}"
    return None


def _misfit(f: Facts, batch: int, micro: int) -> str | None:
    return check_micro_batches(f.schedule, f.pipeline, f.stages, f.num_micro_batches(batch, micro))


def _divides(what: str, key: str, size: int, degree: int) -> str | None:
    if size % degree == 0:
        return None
    fitting = [str(d) for d in range(1, min(size, 2 * degree) + 1) if size % d == 0]
    return f"parallel.tensor={degree}: does not divide {what} ({key}={size}); {', '.join(fitting)} do"


def _heads(f: Facts) -> str | None:
    return _divides("the query heads", "model.heads", f.heads, f.tensor)


def _kv_heads(f: Facts) -> str | None:
    return _divides("the key heads", "model.kv_heads", f.kv_heads, f.tensor)


def _mlp(f: Facts) -> str | None:
    return _divides("the feed-forward width", "model.mlp_width", f.mlp_width, f.tensor)


def _generator(f: Facts) -> str | None:
    return _divides("the generator's heads", "model.generator_heads", f.generator_heads, f.tensor) or _divides(
        "the generator's feed-forward width", "model.generator_mlp_width", f.generator_mlp_width, f.tensor
    )


def _vocabulary(f: Facts) -> str | None:
    rows, degree = f.vocab_size, f.tensor
    if not rows or (degree - 1) * math.ceil(rows / degree) < rows:
        return None
    return f"parallel.tensor={degree}: a vocabulary of {rows} (model.vocab_size) leaves a rank without a row"


def _sequence(f: Facts) -> str | None:
    if f.tensor == 1 or not f.sequence:
        return None
    slices = f"into parallel.context={f.context} x parallel.tensor={f.tensor} slices"
    if f.length % (f.context * f.tensor):
        return f"data.sequence_length={f.length}: does not divide {slices}; change it or use parallel.sequence=false"
    if (f.target or f.length) % (f.context * f.tensor):
        return (
            f"data.sequence_length={f.length}: gives targets of {f.target} tokens, which do not divide {slices}; "
            "change it or use parallel.sequence=false"
        )
    return None


def _query_stream(f: Facts) -> str | None:
    if f.tensor == 1 or not f.sequence or f.query_stream % f.tensor == 0:
        return None
    return (
        f"parallel.tensor={f.tensor}: does not divide the query stream, the {f.query_stream} predicted tokens of a "
        "sequence in multiples of 8; change objective.context or use parallel.sequence=false"
    )


def _context(f: Facts) -> str | None:
    if fits_context(f.length, f.context):
        if fits_context(f.target or f.length, f.context):
            return None
        return (
            f"data.sequence_length={f.length}: gives targets of {f.target} tokens, which parallel.context={f.context} "
            f"cannot cut into {2 * f.context} equal chunks; change the length or the objective"
        )
    return (
        f"data.sequence_length={f.length}: parallel.context={f.context} cuts a sequence into {2 * f.context} equal "
        f"chunks; {nearest_length(f.length, f.context)} is the nearest that can be cut"
    )


def _ring(f: Facts) -> str | None:
    if not f.ring or f.context == 1:
        return None
    remedy = "or use parallel.ring=false"
    if f.device == "cpu":
        return "parallel.ring: torch's ring attention has GPU kernels alone; use parallel.ring=false"
    if not f.causal:
        return "parallel.ring: the order of its rows suits causal attention alone; use parallel.ring=false"
    if f.masked:
        return f"parallel.ring: torch's ring attention takes no document mask; use data.mask_documents=false {remedy}"
    if f.attention_dropout:
        return f"parallel.ring: parts of the keys cannot share one dropout; use model.attention_dropout=0 {remedy}"
    if f.precision not in ("bf16", "fp16"):
        return f"parallel.ring: flash attention computes in bf16 and fp16, not {f.precision}; use either {remedy}"
    if f.compile:
        return f"parallel.ring: is not known to be right in compiled blocks; use train.compile=false {remedy}"
    if f.offload_activations:
        return f"parallel.ring: torch cannot move what its ring saves; use train.offload_activations=false {remedy}"
    if f.pipeline > 1:
        return f"parallel.ring: is not built for pipelines; use parallel.pipeline=1 {remedy}"
    return None


def _frozen_pipeline(f: Facts) -> str | None:
    if not f.frozen or f.pipeline == 1:
        return None
    return (
        f"parallel.pipeline={f.pipeline}: a stage whose parameters are all frozen has nothing to go back through, and "
        "torch's schedules ask every stage for gradients; use parallel.zero=3 to share the layers among data ranks"
    )


def _adapter_axes(f: Facts) -> str | None:
    if f.adapter == "none":
        return None
    if f.tensor > 1:
        return (
            f"parallel.tensor={f.tensor}: the tensor plan does not say how an adapter is cut, and what is trained is "
            "small; use parallel.zero=3 to share the rest"
        )
    if f.context > 1:
        return (
            f"parallel.context={f.context}: virtual tokens and an adapter's dropout belong to whole rows; use more "
            "data ranks with a smaller batch.micro"
        )
    return None


def _frozen_engine(f: Facts) -> str | None:
    if f.engine == "native" or not f.frozen:
        return None
    return f"engine={f.engine}: is not told what is frozen (adapt.method, adapt.freeze); use engine=native"


def _engine(f: Facts) -> str | None:
    degrees = {"tensor": f.tensor, "pipeline": f.pipeline, "context": f.context}
    asked = [f"parallel.{axis}={degree}" for axis, degree in degrees.items() if degree > 1]
    if f.engine == "native" or not asked:
        return None
    return f"engine={f.engine}: carries data parallelism and ZeRO alone, not {' and '.join(asked)}; use engine=native"


def _engine_fp16(f: Facts) -> str | None:
    if (f.engine, f.device, f.precision) != ("deepspeed", "cpu", "fp16"):
        return None
    return "precision.compute=fp16: DeepSpeed has no fp16 on a CPU; use bf16 or engine=native"


def _engine_float64(f: Facts) -> str | None:
    if f.engine == "native" or f.precision != "fp64":
        return None
    return f"precision.compute=fp64: engine={f.engine} has no float64; use precision.compute=fp32 or engine=native"


def _engine_precision(f: Facts) -> str | None:
    if f.engine == "deepspeed" and f.zero == 0 and f.precision in ("bf16", "fp16"):
        return (
            f"parallel.zero=0: DeepSpeed adds up gradients in {f.precision} there, not in float32; use parallel.zero=1"
        )
    if f.engine == "accelerate" and f.zero == 0 and f.world > 1 and f.precision != "fp32":
        return (
            f"parallel.zero=0: Accelerate's DDP has {f.precision} by autocast alone, which casts elsewhere than one "
            "process does; use parallel.zero=1"
        )
    return None


ELEMENTWISE = ("adamw", "adam", "sgd")


def _engine_optimizer(f: Facts) -> str | None:
    if f.engine != "deepspeed" or f.optimizer in ELEMENTWISE:
        return None
    return (
        f"optimizer.name={f.optimizer}: needs whole tensors, and DeepSpeed shards them as one flat buffer; use "
        f"{', '.join(ELEMENTWISE)} or engine=native"
    )


def _engine_shard(f: Facts) -> str | None:
    if f.engine == "native" or f.shard in (None, f.data) or f.zero == 0:
        return None
    return f"parallel.shard={f.shard}: engine={f.engine} shards over all data ranks; drop the key or use engine=native"


def _engine_compile(f: Facts) -> str | None:
    if f.engine != "deepspeed" or f.zero != 3 or not f.compile:
        return None
    return "train.compile: DeepSpeed's hooks at ZeRO 3 stand inside of blocks; use train.compile=false"


def _engine_places(f: Facts) -> str | None:
    if f.engine != "deepspeed":
        return None
    if f.parameter_place != "none" and f.zero != 3:
        return f"deepspeed.offload_parameters={f.parameter_place}: DeepSpeed does so at ZeRO 3 alone; parallel.zero=3"
    if f.optimizer_place == "nvme" and f.zero != 3:
        return "deepspeed.offload_optimizer=nvme: DeepSpeed does so at ZeRO 3 alone; use parallel.zero=3 or cpu"
    if f.optimizer_place != "none" and f.zero == 0:
        return f"deepspeed.offload_optimizer={f.optimizer_place}: DeepSpeed has it from ZeRO 1 on; use parallel.zero=1"
    return None


def _teacher(f: Facts) -> str | None:
    degrees = {"tensor": f.tensor, "pipeline": f.pipeline, "context": f.context}
    asked = [f"parallel.{axis}={degree}" for axis, degree in degrees.items() if degree > 1]
    if not f.distilled or not asked:
        return None
    return (
        f"distill: every rank asks a whole teacher of whole sequences, which {' and '.join(asked)} would part; use "
        "data ranks with parallel.zero"
    )


def _quantized(f: Facts) -> str | None:
    if not f.quantized or f.tensor == 1:
        return None
    return (
        f"quantize: parallel.tensor={f.tensor} parts the rows whose groups share a scale; use parallel.tensor=1 with "
        "data ranks, parallel.context or a pipeline"
    )


def _quantized_adapter(f: Facts) -> str | None:
    if not f.quantized or f.adapter not in ("lora", "prefix"):
        return None
    return (
        f"quantize: torchao exchanges the linear layers that adapt.method={f.adapter} has put into blocks, which loses "
        "or rounds what it trains; drop one of the two"
    )


def _quantized_selective(f: Facts) -> str | None:
    if not (f.quantized and f.compile and f.recompute == "selective"):
        return None
    return (
        "train.recompute=selective: torchao notes scales as it rounds, which torch does not compile inside of what is "
        "recomputed; use train.recompute=full or train.compile=false"
    )


def _quantized_float64(f: Facts) -> str | None:
    if not f.quantized or f.precision != "fp64":
        return None
    return "quantize: torchao rounds no float64; use precision.compute=fp32"


def _keeps_zeros(f: Facts) -> str | None:
    if not f.keeps_zeros:
        return None
    if f.adapter == "lora":
        return (
            "train.keep_zeros: what LoRA adds to a matrix fills its zeros; train the matrices, with adapt.method=none"
        )
    if f.engine == "native":
        return None
    return f"train.keep_zeros: engine={f.engine} owns the weights and their update; use engine=native"


def _quantized_engine(f: Facts) -> str | None:
    if not f.quantized or f.engine == "native":
        return None
    return f"quantize: engine={f.engine} owns the modules whose weights are rounded; use engine=native"


def _offload(f: Facts) -> str | None:
    if not f.offload or f.world > 1 or f.engine == "deepspeed":
        return None
    return "parallel.offload: one process keeps its masters beside the model; use parallel.offload=false"


def _attention_dropout(f: Facts) -> str | None:
    if not f.attention_dropout or f.world == 1:
        return None
    return (
        f"model.attention_dropout={f.attention_dropout:g}: is drawn inside the attention kernel on each rank, so that "
        "losses depend on the layout"
    )


def _unused(f: Facts) -> str | None:
    if f.world == 1:
        return None
    if f.zero == 0 and (f.shard or 1) > 1:
        return f"parallel.shard={f.shard}: has no effect, ZeRO 0 shards nothing"
    if f.pipeline == 1 and (f.stages > 1 or f.schedule != "1f1b"):
        return f"parallel.schedule={f.schedule}, parallel.stages={f.stages}: have no effect without a pipeline"
    if f.ring and f.context == 1:
        return "parallel.ring: has no effect without context ranks"
    return None


ROWS: tuple[Row, ...] = (
    Row("world", "degrees multiply to the number of processes", _world),
    Row("shard", "the ranks that share a sharded copy divide the data ranks", _shard),
    Row("zero 2 in a pipeline", "a pipeline reduces gradients once a step: stage 2 is stage 1 there", _zero_2),
    Row("zero 3 in zero-bubble", "torch computes wrong gradients from parameters let go too early", _zero_3),
    Row("compile in zero-bubble", "torch does not carry compiled stages there (pytorch#161904)", _compile),
    Row("selective recomputation in zero-bubble", "it allows one pass back through a block, not two", _recompute),
    Row("stages of a rank", "gpipe and 1f1b: 1; zbv and dualpipev: 2; interleaved: any", _stages),
    Row("layers", "no more stages than embedding, blocks, final norm and head", _layers),
    Row("projected tables in zero-bubble", "torch goes back through a table that blocks share twice", _tables),
    Row("one block for all", "a pipeline does not part a block that all layers share", _shared_blocks),
    Row(
        "micro-batches",
        "of each step, also under a ramp: 1f1b as many as ranks or more; dualpipev as many as stages or more; "
        "interleaved a multiple of (micro-batches // ranks); gpipe and zbv any",
        _micro_batches,
    ),
    Row("query heads", "each tensor rank has as many whole heads as the others", _heads),
    Row("key heads", "as query heads: none is copied to several ranks", _kv_heads),
    Row("feed-forward width", "tensor ranks divide it", _mlp),
    Row("generator", "tensor ranks divide the heads and the feed-forward width of ELECTRA's generator too", _generator),
    Row("vocabulary", "each tensor rank has a row of it; it need not divide", _vocabulary),
    Row("sequence slices", "context x tensor ranks divide sources and targets, or parallel.sequence=false", _sequence),
    Row("query stream", "tensor ranks divide XLNet's query stream, unless parallel.sequence=false", _query_stream),
    Row("context chunks", "a sequence, source and target, is a multiple of two chunks a context rank", _context),
    Row(
        "ring",
        "on GPUs, in bf16 or fp16, without document masks, dropout of attention, compiled blocks, activations in host "
        "memory and pipelines",
        _ring,
    ),
    Row("frozen parameters in a pipeline", "every stage has something to train", _frozen_pipeline),
    Row("adapters", "under data parallelism and ZeRO alone", _adapter_axes),
    Row("frozen parameters under an engine", "the native engine alone knows them", _frozen_engine, fixed=True),
    Row("engine", "deepspeed and accelerate carry data parallelism and ZeRO alone", _engine),
    Row("deepspeed fp16", "DeepSpeed has no fp16 on a CPU", _engine_fp16, fixed=True),
    Row("engine's float64", "neither deepspeed nor accelerate has it", _engine_float64, fixed=True),
    Row("engine's formats", "bf16 and fp16 with float32 sums from ZeRO 1 on", _engine_precision),
    Row("deepspeed optimizers", "its flat shards carry adamw, adam and sgd", _engine_optimizer, fixed=True),
    Row("engine's shards", "over all data ranks", _engine_shard),
    Row("deepspeed ZeRO 3 compiled", "its hooks stand inside of the blocks", _engine_compile),
    Row("deepspeed offload", "of the optimizer from ZeRO 1 on; of parameters, and to nvme, at ZeRO 3", _engine_places),
    Row("teacher", "distillation goes with data parallelism and ZeRO: a teacher is whole on every rank", _teacher),
    Row("fake quantisation", "tensor ranks would part the groups of weights that share a scale", _quantized),
    Row("adapters rounded", "torchao exchanges the layers that lora and prefix add to", _quantized_adapter, fixed=True),
    Row(
        "selective recomputation, rounded",
        "torch does not compile it with fake quantisation inside",
        _quantized_selective,
        fixed=True,
    ),
    Row("float64 rounded", "torchao has no fake quantisation of it", _quantized_float64, fixed=True),
    Row("rounded under an engine", "engines own the modules", _quantized_engine, fixed=True),
    Row("kept zeros", "engines own the weights and their update, and LoRA fills zeros", _keeps_zeros, fixed=True),
    Row("offload", "one process keeps its masters beside the model", _offload, fixed=True),
    Row("attention dropout", "its masks depend on the layout: each rank draws its own", _attention_dropout, warns=True),
    Row("settings without effect", "those of a pipeline or ring not there, of shards at ZeRO 0", _unused, warns=True),
)


def table() -> list[Row]:
    """Every rule, those that only warn last."""
    return sorted(ROWS, key=lambda row: row.warns)


def is_fixed(facts: Facts) -> bool:
    """Whether something is refused that no other layout of the same world mends."""
    return any(row.fixed and row.check(facts) for row in ROWS)


def refusals(facts: Facts) -> list[str]:
    """The reasons why a layout cannot work, one line each; empty where it can."""
    return [reason for row in ROWS if not row.warns and (reason := row.check(facts))]


def layout_warnings(facts: Facts) -> list[str]:
    """What works, but a user should know."""
    return [reason for row in ROWS if row.warns and (reason := row.check(facts))]
