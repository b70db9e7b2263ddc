"""The typed configuration: defaults <- YAML <- ``key=value``, strict, with errors made for people.

Lowest room of the house: it knows no model family and no objective by name. The tables of
families and objectives are handed in by the rooms above (see ``train.settings``), and become
tagged unions of one schema. Every field says whether it belongs to the run's *meaning* (a
run folder goes on only where all of these match) or is *free* (layout, workers, paths, logs).
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from yaml.composer import ComposerError

from shardwright.mistakes import describe


class ConfigError(ValueError):
    """A user's mistake in a config, a path or an argument: one line, exit code 2."""


class RunError(RuntimeError):
    """A run that cannot go on for a reason the user should read: one line, exit code 1."""


class Strict(BaseModel):
    """Base of every section: unknown keys and wrong types are errors."""

    model_config = ConfigDict(
        extra="forbid", strict=True, validate_default=True, validate_assignment=True, allow_inf_nan=False
    )


S = TypeVar("S", bound=Strict)


def meaning(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes what the run computes."""
    return Field(default, description=description, json_schema_extra={"role": "meaning"}, **limits)


def free(default: Any, description: str, **limits: Any) -> Any:
    """A field that may change between one start and the next of the same run."""
    return Field(default, description=description, json_schema_extra={"role": "free"}, **limits)


#: user:password@ in a URL, or a signed query.
_SECRET = re.compile(
    r"[a-z][\w+.-]*://[^/\s@:]*:[^/\s@]+@|[?&](x-\w+-signature|x-\w+-(security-)?token|sig|signature|\w*token|api_?key|"
    r"password|secret)=[^&\s]",
    re.I,
)


def find_secret(text: str) -> bool:
    """Whether a URL in a text holds a password or a signature."""
    return _SECRET.search(text) is not None


def without_secret(text: str | None) -> str | None:
    """A place that may stand in config.yaml, in logs and in manifests; ValueError, which does not repeat it."""
    if text is not None and find_secret(text):
        raise ValueError(
            "holds a password or a signature, which would stand in config.yaml and in logs; give it to fsspec by the "
            "environment, such as FSSPEC_HTTPS, or by its file (docs/trust.md)"
        )
    return text


def parse_duration(text: str) -> float:
    """Seconds in 90s, 10m, 24h or 3d."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"{text!r} is not a duration such as 90s, 10m, 24h or 3d")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[match[2]]


class ModelConfig(Strict):
    """What every family shares; each family subclasses it in its own file."""

    family: str
    vocab_size: int = meaning(0, "Tokens the model knows; 0 takes the tokenizer's", ge=0)


class ObjectiveConfig(Strict):
    """What every objective shares; each objective subclasses it in its own file."""

    name: str


class SourceConfig(Strict):
    """One prepared folder of a mixture."""

    path: str = free(..., "Prepared folder or URL that holds a manifest.json")
    weight: float = meaning(1.0, "Share of the mixture, relative to the other sources", gt=0)
    _no_secret = field_validator("path")(without_secret)


class DataConfig(Strict):
    """Where tokens come from and in which order."""

    path: str | None = free(None, "Prepared folder or URL; short for one source")
    corpus: list[str] = meaning([], "sha256 of each source's manifest; filled in at the start, checked where given")
    tokenizer: str | None = meaning(None, "sha256 of the tokenizer; filled in at the start, checked where given")
    end_of_document: int | None = meaning(None, "Id of the token that ends a document; as `tokenizer`", ge=0)
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
    _no_secret = field_validator("path")(without_secret)

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
    floor: float = meaning(0.1, "Last factor, as a share of the peak", ge=0, le=1)
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
    model: ModelConfig
    objective: ObjectiveConfig
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
                fitting = [d for d in range(1, size + 1) if size % d == 0]
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


def build_schema(
    models: Mapping[str, type[ModelConfig]], objectives: Mapping[str, type[ObjectiveConfig]]
) -> type[Config]:
    """The Config class with `model` and `objective` typed by the given tables."""
    fields: dict[str, Any] = {
        "model": (_tagged_union(models, "family"), ...),
        "objective": (_tagged_union(objectives, "name"), ...),
    }
    return create_model("Config", __base__=Config, __doc__="A complete shardwright run.", **fields)


def load_config(
    source: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    schema: type[Config],
) -> Config:
    """Read a config by file, name or mapping and apply ``key=value`` overrides.

    Raises ConfigError with one line that names the key, the value and what is allowed.
    """
    if isinstance(source, Mapping):
        where, raw = "config", copy.deepcopy(dict(source))
    else:
        path = find_config(source)
        where, raw = str(path), read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    return parse(schema, raw, where)


def parse(schema: type[S], raw: Mapping[str, Any], where: str) -> S:
    """Validate `raw` against a section class; ConfigError with one line otherwise."""
    try:
        return schema.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe(error, schema, where)) from None


def find_config(name: str | Path) -> Path:
    """A config by path, or by name among the configs shipped with the project."""
    given = Path(name)
    for candidate in (given, Path(f"{given}.yaml")):
        if candidate.is_file():
            return candidate
    shipped = {str(p.relative_to(folder).with_suffix("")): p for folder in config_folders() for p in _yamls(folder)}
    stem = str(name).removesuffix(".yaml").removeprefix("configs/")
    if stem in shipped:
        return shipped[stem]
    close = difflib.get_close_matches(stem, shipped, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"shipped configs: {', '.join(sorted(shipped))}"
    if not str(name):
        raise ConfigError(f"config: is empty; expected a file or a name; {hint}")
    what = "is a folder, not a config file" if given.is_dir() else "no such config file"
    raise ConfigError(f"{name}: {what}; {hint}")


def config_folders() -> list[Path]:
    """Where shipped configs lie: the installed package's folder, or the checkout's."""
    package = Path(__file__).parent
    return [f for f in (package / "configs", package.parent / "configs") if f.is_dir()][:1]


def _yamls(folder: Path) -> list[Path]:
    return [p for p in sorted(folder.rglob("*.yaml")) if p.parent.name != "hardware"]


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads numbers as everyone who writes them means them, and refuses a key that stands twice.

    1e-3 is a number; 010 and 1:30 are none, where YAML 1.1 has octal 8 and 90 seconds; a date stays text.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise ComposerError(problem=f"{key.value!r} stands twice; keep one", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


_NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)",
    "tag:yaml.org,2002:float": r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+|[0-9][0-9_]*\.[0-9_]*"
    r"|\.[0-9][0-9_]*([eE][-+]?[0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
}
_REPLACED = {*_NUMBERS, "tag:yaml.org,2002:timestamp"}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag not in _REPLACED]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^({_pattern})$"), list("-+0123456789."))


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping; ConfigError names the file and line of a syntax error."""
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: is not valid YAML: {getattr(error, 'problem', error)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of sections such as model: and train:, found {raw!r}")
    return raw


def to_yaml(config: Strict) -> str:
    """The fully resolved config as YAML, in the schema's order."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """`meaning` fields on which two configs disagree: (key, old value, new value)."""
    mine, theirs = dict(_meanings(old)), dict(_meanings(new))
    return [(k, mine.get(k), theirs.get(k)) for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)]


def _tagged_union(table: Mapping[str, type[Strict]], tag: str) -> Any:
    members = tuple(dict.fromkeys(table.values()))
    return Annotated[Union[members], Field(discriminator=tag)] if len(members) > 1 else members[0]  # noqa: UP007


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one dotted key of a raw mapping from ``key=value``; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, for example train.steps=100")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or "a character that YAML does not have"
        raise ConfigError(
            f"{override!r}: the value is not valid YAML: {problem}; put quotes around plain text"
        ) from None
    *parents, leaf = key.split(".")
    node: Any = raw
    for number, part in enumerate(parents):
        place = _place(node, part, ".".join(parents[:number]))
        if isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        node = node[place]
    node[_place(node, leaf, ".".join(parents))] = value


def _place(node: Any, part: str, where: str) -> str | int:
    """The key or index that `part` of a dotted key means in `node`, which stands at `where`."""
    if not isinstance(node, dict | list):
        raise ConfigError(f"{where}.{part}: {where} is a single value, not a section")
    if isinstance(node, list) and part.isdigit() and int(part) < len(node):
        return int(part)
    if isinstance(node, list) or (where and part.isdigit() and not node):
        raise ConfigError(f"{where}.{part}: {where} has no entry {part}; give the whole list, as in {where}=[...]")
    return part


def _meanings(section: Strict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every leaf in which two runs must agree."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        extra = field.json_schema_extra
        if isinstance(extra, dict) and extra.get("role") == "free":
            continue
        if isinstance(value, Strict):
            yield from _meanings(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(v, Strict) for v in value):
            for index, item in enumerate(value):
                yield from _meanings(item, f"{key}.{index}.")
        else:
            yield key, value
