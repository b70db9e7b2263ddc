"""The sections of a run's config and their defaults, family and objective as far as all of them share it.

Lowest room of the house: it knows no model family and no objective by name. The tables of families and objectives are
handed in by the rooms above (see train/settings.py), and become tagged unions of one schema (reading.py).
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from shardwright.config.adapt import AdaptConfig
from shardwright.config.fields import ConfigError, Strict, free, meaning, parse_duration


class ModelConfig(Strict):
    """What every family shares; each family subclasses it in its own file."""

    family: str
    vocab_size: int = meaning(0, "Tokens the model knows; 0 takes the tokenizer's", ge=0)


class ObjectiveConfig(Strict):
    """What every objective shares; each objective subclasses it in its own file."""

    name: str
    special_tokens: dict[str, Annotated[int, Field(ge=0)]] = meaning(
        {}, "Ids of special tokens by use, as mask or cls; filled in at the start, checked where given"
    )

    def specials(self, length: int) -> tuple[str, ...]:
        """Uses of special tokens that rows of `length` need; `sentinels:N` stands for N of them."""
        return ()


class DistillConfig(Strict):
    """`distill`: a trained model, the teacher, whose predictions the objective's are drawn to (Hinton et al. 2015)."""

    teacher: str = free(..., "Run folder, checkpoint, imported model or Hugging Face folder of the teacher")
    sha256: str | None = meaning(None, "sha256 of the teacher's weights; filled in at the start, checked where given")
    temperature: float = meaning(2.0, "What logits of both are divided by", gt=0)
    weight: float = meaning(0.5, "Weight of the teacher's term; the rest is the labels'", gt=0, le=1)


class QuantizeConfig(Strict):
    """`quantize`: weights of linear layers rounded in every forward pass, for an export in this format."""

    format: Literal["int8", "int4"] = meaning(..., "Whole numbers that weights are rounded to")
    group: int | None = meaning(None, "Inputs that share a scale; null is 32 for int4, a whole row for int8", ge=1)


class SourceConfig(Strict):
    """One prepared folder of a mixture."""

    path: str = free(..., "Prepared folder or URL that holds a manifest.json")
    weight: float = meaning(1.0, "Share of the mixture, relative to the other sources", gt=0)


class DataConfig(Strict):
    """Where tokens come from and in which order."""

    path: str | None = free(None, "Prepared folder or URL; short for one source")
    corpus: list[str] = meaning([], "sha256 of each source's manifest; filled in at the start, checked where given")
    tokenizer: str | None = meaning(None, "sha256 of the tokenizer; filled in at the start, checked where given")
    end_of_document: int | None = meaning(None, "Id of the token that ends a document; as `tokenizer`", ge=0)
    vocab_size: int | None = free(None, "Tokens of the tokenizer; as `tokenizer`", ge=1)
    sources: list[SourceConfig] = meaning([], "Several prepared folders, mixed by weight")
    sequence_length: int = meaning(512, "Tokens of one training sequence", ge=2)
    lanes: int = meaning(64, "Independent reading positions the order is made of", ge=1)
    shuffle_block: int = meaning(4096, "Sequences permuted together within a lane", ge=1)
    mask_documents: bool = meaning(True, "Attention does not cross documents")
    reset_positions: bool = meaning(True, "Positions restart at each document")
    cross_document_targets: bool = meaning(True, "An end of document predicts the first token of the next one")
    workers: Annotated[int, Field(ge=0)] | Literal["thread"] = free(
        "thread", "Loader processes, or one prefetch thread; 0 reads in line"
    )
    prefetch: int = free(2, "Steps read ahead", ge=1)
    cache: str | None = free(None, "Folder for shards fetched from URLs; default under the user's cache folder")
    cache_gib: float = free(20.0, "Most that the shard cache may hold", gt=0)
    allow: list[Literal["pipe", "pickle"]] = free(
        [], "Shard kinds that run code, refused unless named: 'pipe', 'pickle'"
    )

    @model_validator(mode="after")
    def _one_way_to_name_it(self) -> DataConfig:
        if self.path and self.sources:
            raise ValueError("give either path or sources, not both")
        return self

    def mixture(self) -> list[SourceConfig]:
        """The sources, whichever way they were given."""
        return self.sources or ([SourceConfig(path=self.path)] if self.path else [])


class RampConfig(Strict):
    """The global batch grows from `start` by `increment` each time a stretch of sequences was drawn."""

    start: int = meaning(..., "First global batch, in sequences", ge=1)
    increment: int = meaning(..., "Sequences added at each rise", ge=1)
    sequences: int = meaning(..., "Sequences over which the batch reaches its full size", ge=1)


class BatchConfig(Strict):
    """The global batch is stated; all else is derived from it."""

    sequences: int | None = meaning(None, "Global batch in sequences", ge=1)
    tokens: int | None = meaning(None, "Global batch in tokens", ge=1)
    micro: int = free(8, "Sequences one device takes through forward and backward at once", ge=1)
    ramp: RampConfig | None = meaning(None, "Batch-size ramp at the start of the run")

    @model_validator(mode="after")
    def _one_size(self) -> BatchConfig:
        if (self.sequences is None) == (self.tokens is None):
            raise ValueError("give the global batch once: sequences or tokens")
        return self


class TrainConfig(Strict):
    """How long and how."""

    steps: int | None = meaning(None, "Length of the run in optimizer steps", ge=1)
    tokens: int | None = meaning(None, "Length of the run in tokens", ge=1)
    budget: str | None = meaning(None, "Length of the run in wall-clock time: 90s, 10m, 24h, 3d")
    seed: int = meaning(0, "Seed of weights, data order and dropout", ge=0, lt=2**63)
    clip: float | None = meaning(1.0, "Largest gradient norm; null does not clip", gt=0)
    keep_zeros: bool = meaning(
        False, "Weights of linear layers that are zero stay zero, as `shardwright prune` left them"
    )
    recompute: Literal["none", "full", "selective"] | Annotated[int, Field(ge=1)] = free(
        "none", "Activation checkpointing: none, full, selective, or every n-th layer"
    )
    compile: bool | Literal["auto"] = free("auto", "torch.compile of each block; auto where a compiler is found")
    fused_norms: Literal["auto", "apex", "torch"] = free(
        "auto", "Kernels of norms: NVIDIA apex's where it is installed and blocks are not compiled (auto), or torch's"
    )
    deterministic: bool = free(False, "Deterministic kernels, slower where it matters")
    device: Literal["auto", "cpu", "cuda"] = free("auto", "Where to train")
    offload_activations: bool = free(False, "Keep what the backward pass needs in host memory")
    threads: int | None = free(None, "CPU threads of a process; null takes every core it may use", ge=1, le=1024)

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if sum(x is not None for x in (self.steps, self.tokens, self.budget)) != 1:
            raise ValueError("give the length of the run once: steps, tokens or budget")
        if self.budget is not None:
            parse_duration(self.budget)
        return self


class LossScaleConfig(Strict):
    """Dynamic loss scaling of fp16."""

    initial: float = meaning(65536.0, "First scale", gt=0)
    growth: float = meaning(2.0, "Factor after `window` steps without overflow", gt=1)
    backoff: float = meaning(0.5, "Factor after `hysteresis` overflows", gt=0, lt=1)
    window: int = meaning(2000, "Steps without overflow before the scale grows", ge=1)
    hysteresis: int = meaning(1, "Overflows in a row before the scale falls", ge=1)
    floor: float = meaning(1.0, "A scale that falls to this stops the run with advice", gt=0)


class PrecisionConfig(Strict):
    """One rule for every layout: parameters and activations in `compute`, masters in float32."""

    compute: Literal["fp32", "bf16", "fp16", "fp64"] = meaning(
        "fp32", "Number format of forward and backward; fp64 is for comparisons, its masters are float64 as well"
    )
    loss_scale: LossScaleConfig = meaning(LossScaleConfig(), "Loss scaling, for fp16 only")


class OptimizerConfig(Strict):
    """The rule that turns gradients into updates."""

    name: Literal["adamw", "adam", "sgd", "adafactor", "lamb", "muon"] = meaning("adamw", "Update rule")
    lr: float = meaning(3e-4, "Peak learning rate", gt=0)
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = meaning(
        [0.9, 0.95], "Decay of the first and second moment", min_length=2, max_length=2
    )
    eps: float = meaning(1e-8, "Added to the root of the second moment", gt=0)
    weight_decay: float = meaning(0.1, "Decoupled decay of matrices", ge=0)
    decay_embeddings: bool = meaning(True, "Embeddings decay too")
    momentum: float = meaning(0.95, "Momentum of sgd and muon", ge=0, lt=1)
    nesterov: bool = meaning(True, "Nesterov momentum in sgd and muon")
    matrix_lr: float | None = meaning(None, "Muon's learning rate of matrices; null takes lr", gt=0)
    relative_step: bool = meaning(False, "Adafactor's own learning-rate rule")
    fused: Literal["auto", "apex", "torch"] = free(
        "auto", "Fused kernels of adam and adamw: NVIDIA apex's where it is installed and there is a GPU, or torch's"
    )
    matmul: Literal["auto", "fp32"] = meaning(
        "auto", "Number format of muon's products: bf16 where the device is fast in it, or the weights' own"
    )


class ScheduleConfig(Strict):
    """Learning-rate factor as a pure function of progress 0..1."""

    name: Literal["cosine", "linear", "inverse_sqrt", "wsd", "constant"] = meaning("cosine", "Shape after warm-up")
    warmup: float = meaning(0.02, "Fraction of the run that warms up", ge=0, lt=1)
    warmup_steps: int | None = meaning(None, "Warm-up in steps, in place of the fraction", ge=0)
    warmup_tokens: int | None = meaning(None, "Warm-up in tokens, in place of the fraction", ge=0)
    start: float = meaning(0.0, "First factor of the warm-up, as a share of the peak", ge=0, le=1)
    floor: float = meaning(0.1, "Last factor, as a share of the peak", ge=0, le=1)
    end: float = meaning(1.0, "Share of the run at which cosine and linear have come to the floor", gt=0, le=1)
    decay: float = meaning(0.2, "Fraction of the run over which wsd anneals", gt=0, le=1)
    decay_shape: Literal["linear", "cosine", "sqrt"] = meaning("linear", "Shape of wsd's annealing")


Schedule = Literal["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


class ParallelConfig(Strict):
    """`parallel`: how the run is spread over processes. No part of the result."""

    data: int | None = free(None, "Data-parallel copies; null is what the other degrees leave of the world", ge=1)
    zero: Literal[0, 1, 2, 3] = free(1, "ZeRO stage: shard nothing, the optimizer, gradients too, parameters too")
    shard: int | None = free(None, "Data ranks that share one sharded copy (hybrid sharding); null is all", ge=1)
    tensor: int = free(1, "Ranks that share each matrix", ge=1)
    sequence: bool = free(True, "Tensor ranks keep a slice of the sequence between matrices")
    context: int = free(1, "Ranks that share each sequence", ge=1)
    ring: bool = free(False, "torch's ring attention in place of gathering keys; GPUs, no document masks")
    pipeline: int = free(1, "Ranks that share the layers", ge=1)
    schedule: Schedule = free("1f1b", "Order of forward and backward passes in the pipeline")
    stages: int | None = free(None, "Pipeline stages of a rank; null is 2 where the schedule interleaves, else 1", ge=1)
    offload: bool = free(False, "Keep float32 masters, gradients and optimizer in host memory")
    check_tied: int = free(100, "Steps between checks that tied copies are equal, where a pipeline parts them", ge=1)
    timeout: str = free("10m", "Longest wait for another rank: 90s, 10m, 1h")

    @field_validator("timeout")
    @classmethod
    def _check_timeout(cls, value: str) -> str:
        parse_duration(value)
        return value


Place = Literal["none", "cpu", "nvme"]


class DeepSpeedConfig(Strict):
    """`deepspeed`: what the engine of that name is told beyond layout, batch, precision, clipping and optimizer."""

    offload_optimizer: Place | None = free(
        None, "Where float32 masters and the optimizer are kept; null is cpu under parallel.offload, else none"
    )
    offload_parameters: Place = free("none", "Where parameters are kept between uses; ZeRO 3 alone")
    nvme_path: str | None = free(None, "Folder on a fast local disk, for what is offloaded to nvme")
    pin_memory: bool = free(True, "Offload to page-locked host memory, where there is a GPU")
    overlap: bool | None = free(None, "Reduce gradients during the backward pass; null leaves it to DeepSpeed")
    bucket: int = free(50_000_000, "Elements reduced or gathered at once", ge=1)
    extra: dict[str, Any] = free({}, "More keys of DeepSpeed's own config, checked against its schema")


class EvaluateConfig(Strict):
    """Validation on the prepared validation split."""

    every: int | None = free(None, "Steps between evaluations; null evaluates at the end alone", ge=1)
    batch: int = free(8, "Sequences a forward pass", ge=1)
    max_tokens: int | None = free(None, "Most tokens an evaluation during the run reads; the last one reads all", ge=1)


class CheckpointConfig(Strict):
    """When to save and what to keep."""

    every: int | None = free(None, "Steps between checkpoints; null saves at the end alone", ge=1)
    keep_last: int = free(2, "Newest checkpoints kept", ge=1)
    keep_every: int | None = free(None, "Checkpoints at multiples of this many steps are kept for good", ge=1)
    asynchronous: bool = free(True, "Write while training goes on")


class GuardConfig(Strict):
    """What to do when a loss is not finite or jumps."""

    nonfinite: Literal["skip", "rollback", "stop"] = meaning("skip", "On a loss or gradient that is not finite")
    spike: Literal["ignore", "skip", "rollback", "stop"] = meaning("ignore", "On a loss far above its recent mean")
    threshold: float = meaning(6.0, "Standard deviations above the running mean that make a spike", gt=0)
    window: int = meaning(100, "Steps the running mean and deviation look back over", ge=2)
    most: int = meaning(100, "Skips and roll-backs in all before the run stops", ge=1)


class WatchConfig(Strict):
    """`watch`: heartbeats of the ranks, the end of a run that stands still, and what is kept of a failing step."""

    every: str = free("10s", "Time between two heartbeats of a rank: 2s, 10s, 1m")
    timeout: str | None = free(
        "10m",
        "Longest time without progress, three times that until the first step is done; then a page says who holds the "
        "others up, and all leave. Never more than 0.8 of parallel.timeout; null never",
    )
    capsules: bool = free(True, "Keep what `shardwright replay` needs of a step that fails")

    @field_validator("every", "timeout")
    @classmethod
    def _check_duration(cls, value: str | None) -> str | None:
        if value is not None:
            parse_duration(value)
        return value


class LogConfig(Strict):
    """What a run writes about itself."""

    every: int = free(10, "Steps between log lines", ge=1)
    tensorboard: bool = free(True, "Write TensorBoard events")
    wandb: str | None = free(None, "Weights & Biases project; null is off")
    profile: list[Annotated[int, Field(ge=1)]] | None = free(
        None, "First and last step of a profiler trace", min_length=2, max_length=2
    )
    measure_peak: bool = free(False, "Measure the GEMM peak where the device is unknown, so that MFU can be given")

    @field_validator("profile")
    @classmethod
    def _check_profile(cls, steps: list[int] | None) -> list[int] | None:
        if steps and steps[0] > steps[1]:
            raise ValueError(f"got {steps}; expected the first and the last step, in this order")
        return steps


class Config(Strict):
    """A complete run."""

    run: str | None = free(None, "Run folder; default runs/<name of the config>")
    begin: str | None = meaning(
        None, "Run folder, checkpoint or imported model whose weights the run begins with; null draws them"
    )
    model: ModelConfig
    objective: ObjectiveConfig
    distill: DistillConfig | None = meaning(None, "The teacher of the run; null trains by the labels alone")
    quantize: QuantizeConfig | None = meaning(None, "Quantisation-aware training; null leaves weights as they are")
    adapt: AdaptConfig = AdaptConfig()
    data: DataConfig = DataConfig()
    batch: BatchConfig
    train: TrainConfig
    precision: PrecisionConfig = PrecisionConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    engine: Literal["native", "deepspeed", "accelerate"] = free(
        "native", "Who owns the step: PyTorch's own parts, or an engine that carries data parallelism and ZeRO"
    )
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    log: LogConfig = LogConfig()
    watch: WatchConfig = WatchConfig()

    def check_batch(self) -> None:
        """ConfigError unless the micro-batch divides the global batch, at every level of a ramp."""
        micro, full, ramp = self.batch.micro, self.global_batch(), self.batch.ramp
        sizes = {"batch.sequences": full}
        if ramp is not None:
            sizes |= {"batch.ramp.start": ramp.start, "batch.ramp.increment": ramp.increment}
        for key, size in sizes.items():
            if size % micro:
                fitting = [d for n in range(1, math.isqrt(size) + 1) if size % n == 0 for d in (n, size // n)]
                near = min(fitting, key=lambda d: (abs(d - micro), -d))
                raise ConfigError(
                    f"batch.micro={micro}: does not divide {key}={size}; nearest that does: batch.micro={near}"
                )

    def global_batch(self) -> int:
        """Sequences of a full global batch."""
        if self.batch.sequences is not None:
            return self.batch.sequences
        tokens, length = self.batch.tokens or 0, self.data.sequence_length
        if tokens % length:
            raise ConfigError(
                f"batch.tokens={tokens}: is not a multiple of data.sequence_length={length}; "
                f"nearest {max(tokens // length, 1) * length}"
            )
        return tokens // length
