"""Proof of an export: what was written is opened as its users will open it, and gives what our model gives.

Above weights.py and huggingface.py. With transformers installed and memory for the model, the logits of random tokens
are compared, ours rounded to the files' number format as well, so that one bound serves all formats. Otherwise the
files' tensors are compared with ours, one at a time, which finds damage but not a misread config.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shardwright.data.tokenizers import Tokenizer
from shardwright.hardware import memory
from shardwright.interop.folder import MODEL_CONFIG
from shardwright.interop.huggingface import Exported, as_theirs, method_beside
from shardwright.interop.weights import WeightFiles
from shardwright.log import get_logger
from shardwright.model.families import build_model
from shardwright.model.transformer import TransformerConfig

BOUND = 5e-5  # of the largest logit: some ten times what reordered float32 sums differ by
SAMPLE = "It was a dark night; the people\nof these States -- all 1,234 of them -- slept.  床前明月光，疑是地上霜。"
ROWS, LENGTH = 2, 64  # tokens that are compared
WORKING_BYTES = 1 << 29  # transformers, activations, logits
GIB = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """What a check found, in one line; `difference` relative to the largest logit, None where none were compared."""

    passed: bool
    text: str
    difference: float | None = None


def check_export(
    folder: Path, config: TransformerConfig, ours: Mapping[str, Tensor], written: Exported, inside: str = ""
) -> Verdict:
    """Whether `folder` holds the model of `config` with the tensors `ours`, as `written` converts them.

    `inside`: which of the models that ours holds it is, see huggingface.py's `folders_beside`.
    """
    lacking = _lacking(written)
    if lacking is not None:
        get_logger().warning("export: logits are not compared: %s", lacking)
        return _compare_tensors(folder, written)
    inputs = _random_inputs(config)
    expected = _our_logits(config, ours, written, inputs, inside)
    name = json.loads((folder / MODEL_CONFIG).read_text("utf-8"))["architectures"][0]
    try:
        found = _their_logits(folder, name, inputs)
    except Exception as error:  # whatever transformers makes of files that it cannot read
        return Verdict(False, f"{name} of transformers cannot open it: {' '.join(str(error).split())[:300]}")
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # an untrained head may give zeros
    difference = float((found - expected).abs().max() / largest)
    what = f"logits of transformers' {name} differ by {difference:.1e} of the largest from ours"
    if difference <= BOUND:  # so that nan fails
        return Verdict(True, what, difference)
    return Verdict(False, f"{what}, more than {BOUND:.0e}", difference)


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> bool:
    """Whether transformers cuts a sample of text as `tokenizer` does; a warning where not, or where it cannot be told.

    A SentencePiece model of the unigram kind is read by none of its classes as its own library reads it.
    """
    if importlib.util.find_spec("transformers") is None:
        return True
    import transformers

    try:
        with _quiet():
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            same = theirs(SAMPLE, add_special_tokens=False)["input_ids"] == tokenizer.encode(SAMPLE).tolist()
    except Exception as error:  # whatever transformers makes of a file that it cannot read
        get_logger().warning("export: transformers cannot open %s: %s", tokenizer.file, str(error).split("\n")[0])
        return False
    if not same:
        name, advice = type(theirs).__name__, "read it by the library that it is made with"
        get_logger().warning("export: %s of transformers cuts text otherwise than %s; %s", name, tokenizer.file, advice)
    return same


def _lacking(written: Exported) -> str | None:
    """What a comparison of logits lacks; None where it can be made."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed; pip install 'shardwright[hf]'"
    need = 1.2 * 4 * sum(tensor.numel() for tensor in written.meta.values()) + WORKING_BYTES
    free = memory()[1]
    if need > free:
        return f"that takes {need / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free; the files' tensors are"
    return None


def _compare_tensors(folder: Path, written: Exported) -> Verdict:
    """Every tensor of the files against ours, to the bit."""
    files = WeightFiles(folder)
    if files.keys() != written.keys():
        return Verdict(False, f"its files hold {len(files)} tensors of {len(written)}")
    for name in written:
        if not torch.equal(files[name], written[name]):
            return Verdict(False, f"its files hold another {name}")
    return Verdict(True, f"all {len(files)} tensors read back")


def _random_inputs(config: TransformerConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, min(LENGTH, config.max_length))
    return {"input_ids": torch.randint(0, config.vocab_size, shape, generator=generator)}


@torch.no_grad()
def _our_logits(
    config: TransformerConfig, ours: Mapping[str, Tensor], written: Exported, inputs: dict[str, Tensor], inside: str
) -> Tensor:
    """In float32, from weights that are rounded as the files' are; the model is gone afterwards."""
    model = build_model(as_theirs(config)).eval()
    dtype = written.dtype
    for name, parameter in model.named_parameters():
        parameter.copy_(ours[name].to(dtype) if dtype is not None else ours[name])
    if method := method_beside(config, inside):
        return getattr(model, method)(**inputs)
    return model(**_taken(model, inputs))["logits"]


@torch.no_grad()
def _their_logits(folder: Path, name: str, inputs: dict[str, Tensor]) -> Tensor:
    import transformers

    with _quiet():
        model = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    output = model(**_taken(model, inputs))
    return output.logits if "logits" in output else output.prediction_logits  # of models with a head for pairs beside


def _taken(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an encoder-decoder the decoder reads the same tokens."""
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return inputs
    return {**inputs, "decoder_input_ids": inputs["input_ids"]}


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bars and its advice, for a while."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
