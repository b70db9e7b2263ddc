"""An export whose linear layers have weights of 8 or 4 bits: what `shardwright export --quantize` calls.

Above exports.py, which writes the model as it is; transformers opens that through torchao, and writes what both open
again. Proven twice: each tensor of the files is, to the bit, what torchao makes of ours, and the logits of the files
are those of our model with these weights. The model is held in memory.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shardwright.adapt.quantize import (
    NEEDED,
    build_torchao_config,
    check_groups,
    group_of,
    is_quantized,
    plain,
    rounded,
)
from shardwright.config import ConfigError, RunError
from shardwright.interop.check import Verdict, end_rows, our_logits, quiet, random_inputs, relative, their_logits
from shardwright.interop.folder import MODEL_CONFIG, whole_folder
from shardwright.interop.huggingface import Imported
from shardwright.interop.model_config import as_they_compute, called_for, folders_beside
from shardwright.interop.weights import WeightFiles
from shardwright.log import get_logger
from shardwright.train.exports import export_model
from shardwright.train.folder import CONFIG
from shardwright.train.imports import open_huggingface
from shardwright.train.load import locate
from shardwright.train.settings import read_config
from shardwright.train.writing import writing

BITS = ("int8", "int4")
#: Of the largest logit, by the format that the rest of the model is in: the same weights, products in another order.
BOUNDS = {torch.float32: 5e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
WHOLE = "unquantized"  # folder inside the new one, while it is made


@dataclass(frozen=True)
class Quantized:
    """What a quantised export has made, and how far it is from the model as it was.

    bytes, bytes_before: of the weight files. difference: of the logits from the unquantised model's, the largest over
    the largest logit; divergence: KL of its distribution of tokens from the unquantised one's, nats a token. Both on
    random tokens.
    """

    output: str
    format: str
    group: int | None
    quantized: int
    tensors: int
    bytes: int
    bytes_before: int
    difference: float
    divergence: float
    verdict: Verdict | None

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def export_quantized(
    path: str | Path,
    output: Path,
    number_format: str,
    *,
    group: int | None = None,
    dtype: str | None = None,
    shard: str = "5GB",
    check: bool = True,
) -> Quantized:
    """Write the model of a run, checkpoint or imported model into the new Hugging Face folder `output`, its linear
    layers in `number_format` (int8 or int4), `group` inputs a scale, what else it has in `dtype`.

    RunError where what was written is not that, and nothing is left of it; ConfigError where a group does not divide a
    layer's inputs, or transformers has no linear layers in this family.
    """
    _check_means(number_format)
    folder, _ = locate(path)
    config = read_config(folder / CONFIG)
    if folders_beside(config.model):  # type: ignore[arg-type]
        raise ConfigError(f"--quantize: model.family={config.model.family} is several models to transformers; use none")
    model: Any = config.model
    if model.family in ("bart", "transformer") and model.classify == "none":
        raise ConfigError(
            f"--quantize: transformers does not open the {model.family} that it has quantised by torchao, for the bias "
            "of its logits; use t5"
        )
    if config.adapt.method != "none":
        raise ConfigError(
            f"--quantize: {folder} has an adapter; take it in first: shardwright export {folder} --merge, then "
            "shardwright import"
        )
    given = config.quantize
    if group is None and given is not None and given.format == number_format:
        group = given.group
    group = group_of(number_format, group)
    if given is not None and (given.format, group_of(given.format, given.group)) != (number_format, group):
        get_logger().warning("export: the run was trained for %s, not for this: see `quantize` in its config", given)
    with writing(output, "--output"), whole_folder(output) as place:
        full = place / WHOLE
        export_model(path, full, dtype=dtype, shard=shard, check=check)
        names = _write(full, place, build_torchao_config(number_format, group), group, shard)
        found = _measure(full, place, names, number_format, group, check=check)
        if found.verdict is not None and not found.verdict.passed:
            raise RunError(f"{output}: is not written: {found.verdict.text}; report this with the model section")
        shutil.rmtree(full)
    return Quantized(**{**vars(found), "output": str(output)})


def _check_means(number_format: str) -> None:
    if number_format not in BITS:
        raise ConfigError(f"--quantize {number_format}: expected one of {', '.join(BITS)}")
    for package in ("torchao", "transformers"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(f"--quantize {number_format}: {NEEDED.replace('torchao,', f'{package},')}")


def _write(full: Path, place: Path, quantization: Any, group: int | None, shard: str) -> list[str]:
    """Quantise the model in `full` into `place`, with what lies beside its weights; names of the tensors that are."""
    import transformers

    kind = getattr(transformers, _architecture(full))
    with quiet():
        with torch.device("meta"):
            empty = kind(transformers.AutoConfig.from_pretrained(full))
        head = empty.get_output_embeddings()  # stays as it is
        layers = [(name, module) for name, module in empty.named_modules() if module is not head]
        check_groups(layers, group, f"--group {group}")
        how = transformers.TorchAoConfig(quantization)
        model = kind.from_pretrained(full, dtype="auto", local_files_only=True, quantization_config=how)
        names = [name for name, tensor in model.state_dict().items() if is_quantized(tensor)]
        if not names:
            raise ConfigError(
                f"--quantize: transformers has no linear layers in {kind.__name__}, which torchao could quantise; "
                "GPT-2's are of a class of its own: train a llama-style decoder"
            )
        model.save_pretrained(place, max_shard_size=shard)
    for file in full.iterdir():  # tokenizer, generation config
        if not (place / file.name).exists() and ".safetensors" not in file.name:
            shutil.copyfile(file, place / file.name)
    return names


def _architecture(folder: Path) -> str:
    return str(json.loads((folder / MODEL_CONFIG).read_text("utf-8"))["architectures"][0])


@torch.no_grad()
def _measure(
    full: Path, place: Path, names: list[str], number_format: str, group: int | None, *, check: bool
) -> Quantized:
    """Sizes, distance from the unquantised model, and with `check` whether the files hold what they should."""
    opened = open_huggingface(full)
    before = WeightFiles(full)
    quantized = {name: rounded(before[name], number_format, group) for name in names}
    held = Imported(opened.model, {**{name: before[name] for name in before}, **quantized}, before.meta)
    name, raw = _architecture(full), json.loads((full / MODEL_CONFIG).read_text("utf-8"))
    inputs = random_inputs(opened.model, raw.get("pad_token_id"))
    if opened.model.classify == "text" and opened.model.kind == "encoder-decoder":
        end_rows(inputs["input_ids"], raw.get("eos_token_id"))
    shape, method = as_they_compute(opened.model), called_for(opened.model)
    exact = our_logits(shape, method, opened.tensors, None, inputs)
    expected = our_logits(shape, method, held, None, inputs)
    verdict = _judge(place, name, quantized, expected, inputs) if check else None
    return Quantized(
        output=str(place),
        format=number_format,
        group=group,
        quantized=len(names),
        tensors=len(before),
        bytes=_weight_bytes(place),
        bytes_before=_weight_bytes(full),
        difference=relative(expected["logits"], exact["logits"]),
        divergence=_divergence(exact["logits"], expected["logits"]),
        verdict=verdict,
    )


def _judge(
    place: Path,
    name: str,
    quantized: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    inputs: dict[str, Tensor],
) -> Verdict:
    """Whether transformers opens the files, and finds in them what torchao made of our weights."""
    import transformers

    try:
        with quiet():
            model = getattr(transformers, name).from_pretrained(place, dtype="auto", local_files_only=True)
        state, dtype = model.state_dict(), model.dtype
        for tensor, wanted in quantized.items():
            if not torch.equal(plain(state[tensor]), wanted):
                return Verdict(False, f"its files hold another {tensor} than torchao makes of it")
        del model, state
        found = their_logits(place, name, inputs, list(expected), dtype)
    except Exception as error:  # whatever transformers makes of files that it cannot read
        return Verdict(False, f"{name} of transformers cannot open it: {' '.join(str(error).split())[:300]}")
    difference = max(relative(found[head].float(), expected[head]) for head in expected)
    bound = BOUNDS.get(dtype, BOUNDS[torch.float32])
    what = f"logits of transformers' {name} differ by {difference:.1e} of the largest from ours of these weights"
    passed = difference <= bound
    return Verdict(passed, what if passed else f"{what}, more than {bound:.0e}", difference)


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _divergence(exact: Tensor, other: Tensor) -> float:
    """Mean KL(exact || other) of distributions over the vocabulary, nats a token."""
    ours, theirs = exact.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())
