"""DeepSpeed's own configuration, made from ours; what a user adds under `deepspeed.extra` is checked key by key.

DeepSpeed takes any unknown key in silence (a misspelt `gradient_clipping` clips nothing) and lets many keys contradict
each other. So every key that ours decide is refused with the key that decides it, sections are held against DeepSpeed's
pydantic classes, and anything else is unknown. Imported by deepspeed.py alone, once DeepSpeed is there.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any

from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils.logging import log_levels
from pydantic import BaseModel, ValidationError

from shardwright.config import Config, ConfigError
from shardwright.train.layout import optimizer_place

#: Sections of DeepSpeed's that may be added to, with their classes.
SECTIONS: dict[str, type[BaseModel]] = {
    "zero_optimization": DeepSpeedZeroConfig,
    "bf16": DeepSpeedBF16Config,
    "comms_logger": CommsLoggerConfig,
    "tensorboard": TensorBoardConfig,
    "wandb": WandbConfig,
    "csv_monitor": CSVConfig,
    "comet": CometConfig,
}
#: Sections without a class, with their keys and defaults.
KEYS: dict[str, Mapping[str, Any]] = {
    "flops_profiler": vars(DeepSpeedFlopsProfilerConfig({})),
    "aio": AIO_DEFAULT_DICT,
}
#: Single values, with their types.
VALUES: dict[str, tuple[type, ...]] = {
    "communication_data_type": (str,),
    "prescale_gradients": (bool,),
    "gradient_predivide_factor": (int, float),
    "wall_clock_breakdown": (bool,),
    "memory_breakdown": (bool,),
    "dump_state": (bool,),
    "disable_python_gc": (bool,),
    "steps_per_print": (int,),
    "log_level": (str,),
}
#: Sections in the section, and what makes them.
OFFLOADS = {"offload_optimizer": "deepspeed.offload_optimizer", "offload_param": "deepspeed.offload_parameters"}
#: Single values of which DeepSpeed knows a few.
CHOICES: dict[str, tuple[str, ...]] = {
    "communication_data_type": ("fp32", "fp16", "bf16"),
    "log_level": tuple(log_levels),
}
#: What a key of ours decides.
DECIDED: dict[str, str] = {
    "train_batch_size": "batch.sequences",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "gradient_accumulation_steps": "batch.sequences and batch.micro",
    "managed_gradient_accumulation": "batch.sequences and batch.micro",
    "gradient_clipping": "train.clip",
    "gradient_allreduce_op": "the loss, which is divided by counts of all ranks",
    "optimizer": "optimizer.*",
    "scheduler": "schedule.*",
    "fp16": "precision.*",
    "amp": "precision.*",
    "torch_autocast": "precision.*",
    "data_types": "precision.*",
    "zero_allow_untested_optimizer": "optimizer.name",
    "zero_force_ds_cpu_optimizer": "optimizer.name",
    "checkpoint": "checkpoint.*",
    "compile": "train.compile",
    "activation_checkpointing": "train.recompute",
    "seed": "train.seed",
    "data_efficiency": "data.*",
    "dataloader_drop_last": "data.*",
    "tensor_parallel": "parallel.tensor, of engine=native",
    "pipeline": "parallel.pipeline, of engine=native",
    "sequence_parallel_size": "parallel.context, of engine=native",
    "zero_optimization.stage": "parallel.zero",
    "zero_optimization.overlap_comm": "deepspeed.overlap",
    "zero_optimization.reduce_bucket_size": "deepspeed.bucket",
    "zero_optimization.allgather_bucket_size": "deepspeed.bucket",
    "zero_optimization.offload_optimizer.device": "deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_optimizer.pin_memory": "deepspeed.pin_memory",
    "zero_optimization.offload_param.device": "deepspeed.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "deepspeed.nvme_path",
    "zero_optimization.offload_param.pin_memory": "deepspeed.pin_memory",
    "zero_optimization.memory_efficient_linear": "train.recompute",
    "zero_optimization.round_robin_gradients": "the order of the shards, by which checkpoints find them",
    "zero_optimization.cpu_offload": "deepspeed.offload_optimizer",
    "zero_optimization.cpu_offload_param": "deepspeed.offload_parameters",
    "zero_optimization.cpu_offload_use_pin_memory": "deepspeed.pin_memory",
    "zero_optimization.zero_hpz_partition_size": "parallel.shard, of engine=native",
    "zero_optimization.compute_grad_norm": "the guard, which needs the norm",
    "bf16.enabled": "precision.compute",
    "bf16.check_grad_overflow": "guard.nonfinite",
    "bf16.bf16_master_weights_and_grads": "precision: masters are float32",
    "bf16.bf16_optimizer_states": "precision: moments are float32",
}


def engine_config(config: Config, data_ranks: int, *, gpu: bool) -> dict[str, Any]:
    """What `deepspeed.initialize` gets; ConfigError naming what does not fit."""
    made = _made(config, data_ranks, gpu=gpu)
    extra = config.deepspeed.extra
    _check_extra(extra, made)
    merged = _merged(made, extra)
    for section, schema in SECTIONS.items():
        if section in merged:
            _validate(section, schema, merged[section])
    return merged


def _made(config: Config, data_ranks: int, *, gpu: bool) -> dict[str, Any]:
    """The part that our keys decide."""
    compute, micro = config.precision.compute, config.batch.micro
    made: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": math.ceil(math.ceil(config.global_batch() / data_ranks) / micro),
        "gradient_clipping": config.train.clip or 0.0,
        "zero_optimization": _zero(config, gpu=gpu),
        "zero_allow_untested_optimizer": True,  # plain SGD
        "zero_force_ds_cpu_optimizer": False,  # torch's fused kernels need no compiler, and are as fast
        "steps_per_print": 2**31 - 1,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    if compute == "bf16":
        made["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if compute == "fp16":
        made["fp16"] = {"enabled": True, "loss_scale": 1.0}  # overridden each step by our own scale
    return made


def _zero(config: Config, *, gpu: bool) -> dict[str, Any]:
    ours = config.deepspeed
    made: dict[str, Any] = {
        "stage": config.parallel.zero,
        "reduce_bucket_size": ours.bucket,
        "allgather_bucket_size": ours.bucket,
    }
    if config.train.recompute == "selective":
        # DeepSpeed's own adds the bias in place, to a product that is kept: the second forward adds it once more.
        made["memory_efficient_linear"] = False
    if ours.overlap is not None:
        made["overlap_comm"] = ours.overlap
    places = {"offload_optimizer": optimizer_place(config), "offload_param": ours.offload_parameters}
    for key, place in places.items():
        if place != "none":
            made[key] = {"device": place, "pin_memory": ours.pin_memory and gpu}
        if place == "nvme":
            made[key]["nvme_path"] = ours.nvme_path
    return made


def check_places(config: Config) -> None:
    """ConfigError where the offloads contradict each other; which ZeRO stage they need is in the refusals."""
    ours = config.deepspeed
    places = (optimizer_place(config), ours.offload_parameters)
    if config.parallel.offload and ours.offload_optimizer not in (None, "cpu"):
        raise ConfigError(
            f"deepspeed.offload_optimizer={ours.offload_optimizer}: contradicts parallel.offload=true, which is cpu; "
            "keep one of them"
        )
    if "nvme" in places and not ours.nvme_path:
        raise ConfigError("deepspeed.nvme_path: is missing; name a folder on a fast local disk for what goes to nvme")
    if ours.nvme_path and "nvme" not in places:
        raise ConfigError(
            f"deepspeed.nvme_path={ours.nvme_path}: nothing goes there; use deepspeed.offload_optimizer=nvme or drop it"
        )


def _check_extra(extra: Mapping[str, Any], made: Mapping[str, Any]) -> None:
    """ConfigError at the first key that our config decides, or that DeepSpeed does not know."""
    for key, value in extra.items():
        where = f"deepspeed.extra.{key}"
        _refuse_decided(key, where)
        if key in SECTIONS or key in KEYS:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}={value!r}: is a section; give its keys, as in {where}.enabled=true")
            known = KEYS.get(key) or _names(SECTIONS[key])
            for inner in _flat(value):
                _refuse_decided(f"{key}.{inner}", f"{where}.{inner}")
                if inner.partition(".")[0] not in known:
                    raise _unknown(f"{where}.{inner}", inner.partition(".")[0], known)
            _check_types(where, KEYS.get(key, {}), value)
            for inner in OFFLOADS if key == "zero_optimization" else ():
                if inner in value and not isinstance(value[inner], Mapping):  # null would take ours away
                    raise ConfigError(
                        f"{where}.{inner}={value[inner]!r}: is a section; give its keys, or use {OFFLOADS[inner]}"
                    )
            if key == "bf16" and "bf16" not in made:
                raise ConfigError(f"{where}: precision.compute is not bf16; drop it, or use precision.compute=bf16")
        else:
            _check_value(where, key, value)


def _check_value(where: str, key: str, value: Any) -> None:
    """ConfigError where a single value is of another type or range than DeepSpeed's."""
    if key not in VALUES:
        raise _unknown(where, key, [*SECTIONS, *KEYS, *VALUES, *DECIDED])
    if not isinstance(value, VALUES[key]) or (isinstance(value, bool) and bool not in VALUES[key]):
        expected = " or ".join(kind.__name__ for kind in VALUES[key])
        raise ConfigError(f"{where}={value!r}: expected {expected}")
    if key in CHOICES and str(value).lower() not in CHOICES[key]:
        raise ConfigError(f"{where}={value}: expected one of {', '.join(CHOICES[key])}")
    if key == "gradient_predivide_factor" and not float(str(value)) > 0:
        raise ConfigError(f"{where}={value}: expected more than 0")


def _check_types(where: str, defaults: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """ConfigError at the first value of another type than its default has: DeepSpeed has no class for these."""
    for key, value in values.items():
        if key not in defaults:
            continue
        kind = str if defaults[key] is None else type(defaults[key])
        given = float(value) if kind is float and type(value) is int else value
        if type(given) is not kind:
            raise ConfigError(f"{where}.{key}={value!r}: expected {kind.__name__}")


def _names(schema: type[BaseModel]) -> list[str]:
    """Keys of a section, by either name where there are two: DeepSpeed's pages use the alias."""
    found = {name: field.alias for name, field in schema.model_fields.items()}
    return [*found, *(alias for alias in found.values() if alias)]


def _refuse_decided(key: str, where: str) -> None:
    if key in DECIDED:
        raise ConfigError(f"{where}: is decided by {DECIDED[key]}; drop it from deepspeed.extra")


def _unknown(where: str, key: str, known: Iterable[str]) -> ConfigError:
    close = difflib.get_close_matches(key, list(known), n=1)
    if close and close[0] in DECIDED:
        return ConfigError(f"{where}: DeepSpeed has no such key; {close[0]} is decided by {DECIDED[close[0]]}")
    hint = f"did you mean {close[0]}?" if close else "see deepspeed.ai/docs/config-json"
    return ConfigError(f"{where}: DeepSpeed has no such key; {hint}")


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in section.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _merged(made: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(made)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _validate(section: str, schema: type[BaseModel], values: Mapping[str, Any]) -> None:
    """ConfigError with the first thing that DeepSpeed's own class refuses."""
    try:
        schema(**values)
    except ValidationError as error:
        first = error.errors()[0]
        path = ".".join(str(part) for part in first["loc"])
        where = f"deepspeed.extra.{section}{'.' + path if path else ''}"
        if first["type"] == "extra_forbidden":
            raise _unknown(where, str(first["loc"][-1]), _fields(schema, first["loc"][:-1])) from None
        raise ConfigError(f"{where}={first.get('input')!r}: {first['msg']}") from None
    except (AssertionError, ValueError) as error:
        raise ConfigError(f"deepspeed.extra.{section}: {' '.join(str(error).split())}") from None


def _fields(schema: type[BaseModel], path: Iterable[int | str]) -> Iterable[str]:
    """Keys of the section at `path` in `schema`."""
    found: Any = schema
    for part in path:
        kinds = [found.model_fields[part].annotation] if part in found.model_fields else []
        options = [k for kind in kinds for k in (kind, *getattr(kind, "__args__", ())) if hasattr(k, "model_fields")]
        if not options:
            return ()
        found = options[0]
    return _names(found)
