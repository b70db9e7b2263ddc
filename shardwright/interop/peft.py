"""Adapters in peft's files: adapter_config.json and adapter_model.safetensors, in Hugging Face's names.

Beside huggingface.py, whose maps say which of their modules is which of ours. Where theirs joins several layers of ours
(GPT-2's c_attn, DeBERTa's in_proj, ModernBERT's Wqkv), the additions of ours are one of theirs: their a lie one below
the other, and each b in the columns of its own, so that the rank is the sum of the ranks and layers that are not
trained get zeros. The other way round each of ours takes the rows of b that are its own. Neither changes what is
computed. `pairs` are a [r, I] and b [O, r] by the name of our layer, as blocks.0.attention.q.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from shardwright.config import AdaptConfig, ConfigError
from shardwright.interop.folder import read_json, write_json
from shardwright.interop.huggingface import joined_of, model_shapes, names_of_embedding, parts_of, rules_of
from shardwright.model.family import TensorRule
from shardwright.model.transformer import TransformerConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
#: By `adapt.method`.
KINDS = {"lora": "LORA", "prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "p_tuning": "P_TUNING"}
TASKS = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
CLASSIFYING = {"text": "SEQ_CLS", "tokens": "TOKEN_CLS"}
#: Of our names; what is trained of it is in their files by the largest module, since peft saves a classifier whole.
HEAD = "head.label."
Pairs = Mapping[str, tuple[Tensor, Tensor]]

#: Of peft's LoRA what changes the computation in a way that is not here, and the value that says that it is not used.
PLAIN: dict[str, Any] = {
    "use_dora": False, "use_qalora": False, "use_bdlora": None, "bias": "none", "lora_bias": False,
    "layer_replication": None, "megatron_config": None, "trainable_token_indices": None, "target_parameters": None,
    "arrow_config": None, "kasa_config": None, "velora_config": None, "alora_invocation_tokens": None,
}  # fmt: skip


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds what peft writes."""
    return (folder / CONFIG).is_file()


def write_adapter(folder: Path, raw: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Both files."""
    write_json(folder / CONFIG, dict(raw))
    whole = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
    save_file(whole, folder / WEIGHTS, metadata={"format": "pt"})


def read_adapter(folder: Path, expected: Sequence[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(content of adapter_config.json, tensors); ConfigError where they are missing, damaged or of another method."""
    if not is_adapter(folder):
        raise ConfigError(f"adapt.begin={folder}: holds no {CONFIG}; expected a folder that peft wrote")
    raw = read_json(folder / CONFIG)
    if raw.get("peft_type") not in expected:
        known = " or ".join(expected)
        raise ConfigError(f"adapt.begin={folder}: is an adapter of kind {raw.get('peft_type')}; expected {known}")
    if not (folder / WEIGHTS).is_file():
        raise ConfigError(f"adapt.begin={folder}: has no {WEIGHTS}; pickled weights are not opened, save it again")
    try:
        return raw, load_file(folder / WEIGHTS)
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ConfigError(f"adapt.begin={folder}: {WEIGHTS} is damaged: {error}") from None


# ------------------------------------------------------------------------------------------ LoRA, out


def lora_files(
    model: TransformerConfig, adapt: AdaptConfig, pairs: Pairs, base: str | None, beside: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, tensors); ConfigError where theirs has no linear layer in the place of one of ours.

    `beside`: the model's own tensors that were trained too, by name.
    """
    modules, tensors = _saved(model, beside, pairs)
    joined, targets, shapes = {}, [], model_shapes(model)
    for rule in _touched(model, pairs):
        module = rule.theirs.removesuffix(".weight")
        a, b = _join(rule, pairs, adapt.rank, shapes, model.heads)
        tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        targets.append(module)
        if len(rule.ours) > 1:
            joined[module] = a.shape[0] // adapt.rank
    names = _shortest(targets, [rule.theirs.removesuffix(".weight") for rule in rules_of(model)])
    raw = {
        "peft_type": "LORA",
        "task_type": CLASSIFYING.get(model.classify, TASKS.get(model.kind)),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": adapt.rank,
        "lora_alpha": _number(adapt.alpha),
        "lora_dropout": adapt.dropout,
        "use_rslora": adapt.rslora,
        "target_modules": names,
        "modules_to_save": modules or None,
        "fan_in_fan_out": any(rule.transpose for rule in _touched(model, pairs)),
        "bias": "none",
        "rank_pattern": {_pattern(name): adapt.rank * count for name, count in joined.items()},
        "alpha_pattern": {
            _pattern(name): _number(adapt.alpha * (count**0.5 if adapt.rslora else count))
            for name, count in joined.items()
        },
    }
    return raw, tensors


def _saved(model: TransformerConfig, beside: Mapping[str, Tensor], pairs: Pairs) -> tuple[list[str], dict[str, Tensor]]:
    """(their modules, tensors by peft's names) of what was trained beside an adapter; ConfigError where it is no whole
    module of theirs, or one that another shares its weights with."""
    rules = rules_of(model)
    touched = {rule.theirs for rule in _touched(model, pairs)}
    trained = [rule for rule in rules if beside.keys() & set(rule.ours)]
    whole = {rule.theirs for rule in trained if beside.keys() >= set(rule.ours)} - touched
    modules = {_module_of(rule, rules, whole): None for rule in trained}
    for name in names_of_embedding(model):
        if any(name.startswith(f"{module}.") for module in modules):
            raise ConfigError(
                f"export: {name} is shared in transformers' code, where peft would part it; export with --merge"
            )
    return list(modules), {f"{PREFIX}{rule.theirs}": joined_of(rule, beside, model) for rule in trained}


def _module_of(rule: TensorRule, rules: Sequence[TensorRule], whole: set[str]) -> str:
    """Their module that is trained with a tensor: the one that holds it, of a classifier's head the largest."""
    parts, found = rule.theirs.split("."), None
    for size in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:size])
        if any(other.theirs.startswith(f"{module}.") and other.theirs not in whole for other in rules):
            break
        found = module
        if not rule.ours[0].startswith(HEAD):
            break
    if found is None:
        raise ConfigError(
            f"export: {rule.ours[0]} was trained beside the adapter, whose files hold whole modules of transformers' "
            "alone; export with --merge"
        )
    return found


def _touched(model: TransformerConfig, pairs: Pairs) -> Iterator[TensorRule]:
    """The rules of matrices that something is added to."""
    left = set(pairs)
    for rule in rules_of(model):
        ours = {name.removesuffix(".weight") for name in rule.ours}
        if not ours & left:
            continue
        if rule.shape is not None:
            raise ConfigError(
                f"{rule.theirs}: is no linear layer in transformers' code, where peft cannot add; export with --merge"
            )
        left -= ours
        yield rule
    assert not left, f"no place for {sorted(left)[:3]}"


def _join(
    rule: TensorRule, pairs: Pairs, rank: int, shapes: Mapping[str, torch.Size], heads: int
) -> tuple[Tensor, Tensor]:
    """Their a and b of one matrix."""
    ours = [name.removesuffix(".weight") for name in rule.ours]
    if len(ours) == 1:
        return pairs[ours[0]]
    here = [name for name in ours if name in pairs]
    like = pairs[here[0]][1]
    blocks = []
    for name in ours:
        block = like.new_zeros(shapes[f"{name}.weight"][0], rank * len(here))
        if name in pairs:
            block[:, rank * here.index(name) :][:, :rank] = pairs[name][1]
        blocks.append(block)
    return torch.cat([pairs[name][0] for name in here]), rule.join(blocks, heads)


def _shortest(targets: Sequence[str], every: Sequence[str]) -> list[str] | str:
    """The shortest endings that name these modules and no other, or one pattern where numbers would be part of them."""
    others, found = set(every) - set(targets), []
    for module in targets:
        parts = module.split(".")
        for start in range(len(parts) - 1, -1, -1):
            ending = ".".join(parts[start:])
            if parts[start].isdigit():
                return "|".join(dict.fromkeys(_pattern(name) for name in targets))
            if not any(f".{other}".endswith(f".{ending}") for other in others):
                break
        found.append(ending)
    return sorted(set(found))


def _pattern(module: str) -> str:
    """A regular expression for a module in all layers."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split("."))


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else value


# ------------------------------------------------------------------------------------------ LoRA, in


def lora_pairs(
    model: TransformerConfig, adapt: AdaptConfig, folder: Path, layers: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """a [R, I] and b [O, R] of our `layers` from a folder of peft's, R at most the config's rank; b is scaled to it.

    Layers that theirs leaves alone are left out. ConfigError where theirs adds to what is none of ours, or computes
    otherwise.
    """
    raw, tensors = read_adapter(folder, ("LORA",))
    for key, plain in PLAIN.items():
        if raw.get(key, plain) not in (plain, None, [], {}):
            raise ConfigError(f"adapt.begin={folder}: {key}={raw[key]!r} is not supported; expected {plain!r}")
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    shapes = model_shapes(model)
    for rule in rules_of(model):
        module = rule.theirs.removesuffix(".weight")
        a = tensors.pop(f"{PREFIX}{module}.lora_A.weight", None)
        b = tensors.pop(f"{PREFIX}{module}.lora_B.weight", None)
        if a is None or b is None:
            continue
        scale = _scale(raw, module, a.shape[0]) / adapt.scale
        sizes = [shapes[name][0] for name in rule.ours]
        found, here = (b.shape[0], a.shape[1]), (sum(sizes), shapes[rule.ours[0]][1])
        if found != here:
            raise ConfigError(
                f"adapt.begin={folder}: {module} is a matrix of {list(found)} there and of {list(here)} in the model "
                "beneath; name the model that it was trained on with begin="
            )
        for name, part in zip(rule.ours, rule.split(b, sizes, model.heads), strict=True):
            layer = name.removesuffix(".weight")
            pair = _fitting(a, part * scale, adapt.rank, f"adapt.begin={folder}: {module}")
            if layer in layers:
                pairs[layer] = pair
            elif part.any():
                raise ConfigError(
                    f"adapt.begin={folder}: adds to {layer}; put {layer.rpartition('.')[2]} into adapt.targets"
                )
    for rule in rules_of(model):
        tensors.pop(f"{PREFIX}{rule.theirs}", None)  # see `saved_tensors`
    if tensors:
        raise ConfigError(f"adapt.begin={folder}: {sorted(tensors)[0]} has no place in a {model.family}")
    return pairs


def saved_tensors(model: TransformerConfig, folder: Path) -> dict[str, Tensor]:
    """The model's own tensors by our names that a folder of peft's holds beside LoRA: what it calls modules_to_save.

    ConfigError where one has another shape.
    """
    _, tensors = read_adapter(folder, ("LORA",))
    found: dict[str, Tensor] = {}
    shapes = model_shapes(model)
    for rule in rules_of(model):
        tensor = tensors.get(f"{PREFIX}{rule.theirs}")
        try:
            found |= {} if tensor is None else parts_of(rule, tensor, model, shapes)
        except ValueError as error:
            raise ConfigError(f"adapt.begin={folder}: {error}") from None
    return found


def _scale(raw: Mapping[str, Any], module: str, rank: int) -> float:
    """What theirs multiplies the product by, as peft decides it."""

    def of(patterns: Mapping[str, Any], default: Any) -> Any:
        return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)

    alpha = float(of(raw.get("alpha_pattern") or {}, raw.get("lora_alpha", 8)))  # peft's own default
    return alpha / (rank**0.5 if raw.get("use_rslora") else rank)


def _fitting(a: Tensor, b: Tensor, rank: int, where: str) -> tuple[Tensor, Tensor]:
    """The same product without columns of b that are zero, where there are more of them than `rank`."""
    if a.shape[0] <= rank:
        return a, b
    used = b.any(0).nonzero().flatten()
    if len(used) > rank:
        raise ConfigError(f"{where} has rank {len(used)}; set adapt.rank to at least that")
    return a[used], b[:, used].contiguous()


# ------------------------------------------------------------------------------------------ virtual tokens


def virtual_files(
    model: TransformerConfig, adapt: AdaptConfig, vectors: Tensor, base: str | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(adapter_config.json, tensors) of virtual tokens [n, D], or of keys and values in blocks [n, L 2 K d].

    What they came out of is left out, as peft does: it is of no use once they are trained.
    """
    prefix = adapt.method == "prefix"
    width = model.num_kv_heads * model.head_width if prefix else model.token_width
    kinds: dict[str, dict[str, Any]] = {
        "prompt": {"prompt_tuning_init": "RANDOM"},
        "prefix": {"prefix_projection": adapt.projection is not None, "encoder_hidden_size": adapt.projection},
        "p_tuning": {
            "encoder_reparameterization_type": "MLP",
            "encoder_hidden_size": adapt.encoder_width or model.token_width,
        },
    }
    raw = {
        "peft_type": KINDS[adapt.method],
        "task_type": TASKS.get(model.kind) or "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "num_virtual_tokens": adapt.tokens,
        "token_dim": width,
        # Of an encoder-decoder, peft puts a prefix before the decoder where there are two, and virtual tokens before
        # the source in any case.
        "num_transformer_submodules": 2 if prefix and model.kind == "encoder-decoder" else 1,
        "num_attention_heads": model.num_kv_heads,
        "num_layers": len(model.runs[-1]),
        **kinds[adapt.method],
    }
    return raw, {"prompt_embeddings": vectors}


def virtual_vectors(model: TransformerConfig, adapt: AdaptConfig, folder: Path) -> Tensor:
    """[n, ..] out of a folder of peft's; ConfigError where they are of another shape, or cannot be trained on."""
    if adapt.method == "p_tuning" or adapt.projection is not None:
        raise ConfigError(
            f"adapt.begin={folder}: peft saves what a network gave, not the network; go on with them as they are by "
            f"{'adapt.projection=null' if adapt.method == 'prefix' else 'adapt.method=prompt'}"
        )
    expected = ("PROMPT_TUNING", "P_TUNING") if adapt.method == "prompt" else ("PREFIX_TUNING",)
    _, tensors = read_adapter(folder, expected)
    width = len(model.runs[-1]) * 2 * model.num_kv_heads * model.head_width
    shape = (adapt.tokens, width if adapt.method == "prefix" else model.token_width)
    found = tensors.get("prompt_embeddings")
    if found is None or tuple(found.shape) != shape:
        raise ConfigError(
            f"adapt.begin={folder}: has virtual tokens {None if found is None else list(found.shape)}; the config says "
            f"{list(shape)} (adapt.tokens, and the model)"
        )
    return found
