"""Proof of an export: what was written is opened as its users will open it, and gives what our model gives.

Above weights.py and huggingface.py. With transformers installed and memory for the model, the logits of random tokens
are compared, and those of other heads, ours rounded to the files' number format as well, so that one bound serves all
formats; where their code lacks a part of ours, ours goes without it. Otherwise the files' tensors are compared with
ours, one at a time, which finds damage but not a misread config.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from shardwright.data.tokenizers import Tokenizer
from shardwright.hardware import memory
from shardwright.interop.folder import MODEL_CONFIG
from shardwright.interop.huggingface import Exported
from shardwright.interop.model_config import as_they_compute, called_for
from shardwright.interop.weights import WeightFiles
from shardwright.log import get_logger
from shardwright.model.families import build_model
from shardwright.model.transformer import TransformerConfig

BOUND = 5e-5  # of the largest logit: some ten times what reordered float32 sums differ by
SAMPLE = "It was a dark night; the people\nof these States -- all 1,234 of them -- slept.  床前明月光，疑是地上霜。"
ROWS, LENGTH = 2, 64  # tokens that are compared
TALKATIVE = ("torchao", "torch.utils._pytree")  # loggers, while transformers imports these
WORKING_BYTES = 1 << 29  # transformers, activations, logits
GIB = 1 << 30


@dataclass(frozen=True)
class Verdict:
    """What a check found, in one line; `difference` relative to the largest logit, None where none were compared."""

    passed: bool
    text: str
    difference: float | None = None


def check_export(
    folder: Path, config: TransformerConfig, ours: Mapping[str, Tensor], written: Mapping[str, Exported]
) -> Verdict:
    """Whether `folder` and those inside it hold the model of `config` with the tensors `ours`, as `written` converts
    them, by folder."""
    found = [_check_part(folder / part, part, config, ours, tensors) for part, tensors in written.items()]
    if failed := [verdict for verdict in found if not verdict.passed]:
        return failed[0]
    differences = [verdict.difference for verdict in found if verdict.difference is not None]
    return Verdict(True, "; ".join(verdict.text for verdict in found), max(differences) if differences else None)


def _check_part(
    folder: Path, part: str, config: TransformerConfig, ours: Mapping[str, Tensor], written: Exported
) -> Verdict:
    """`part`: the folder's name inside that of the whole model, "" where it is that one."""
    lacking = what_lacks(written)
    if lacking is not None:
        get_logger().warning("export: logits are not compared: %s", lacking)
        return _compare_tensors(folder, written)
    raw = json.loads((folder / MODEL_CONFIG).read_text("utf-8"))
    name, inputs = raw["architectures"][0], random_inputs(config, raw.get("pad_token_id"))
    if config.classify == "text" and config.kind == "encoder-decoder":
        end_rows(inputs["input_ids"], raw.get("eos_token_id"))
    expected = our_logits(as_they_compute(config, part), called_for(config, part), ours, written.dtype, inputs)
    return judge(name, expected, lambda: their_logits(folder, name, inputs, list(expected)))


def judge(name: str, expected: Mapping[str, Tensor], read: Callable[[], Mapping[str, Tensor]]) -> Verdict:
    """Whether the logits that `read` has from transformers' model of this name are ours, by head."""
    try:
        found = read()
    except Exception as error:  # whatever transformers makes of files that it cannot read
        return Verdict(False, f"{name} of transformers cannot open it: {' '.join(str(error).split())[:300]}")
    differences = [relative(found[head], expected[head]) for head in expected]
    passed = all(one <= BOUND for one in differences)  # so that nan fails
    difference = max(differences) if passed else next(one for one in differences if not one <= BOUND)
    what = f"logits of transformers' {name} differ by {difference:.1e} of the largest from ours"
    if passed:
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
        with quiet():
            theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            same = theirs(SAMPLE, add_special_tokens=False)["input_ids"] == tokenizer.encode(SAMPLE).tolist()
    except Exception as error:  # whatever transformers makes of a file that it cannot read
        get_logger().warning("export: transformers cannot open %s: %s", tokenizer.file, str(error).split("\n")[0])
        return False
    if not same:
        name, advice = type(theirs).__name__, "read it by the library that it is made with"
        get_logger().warning("export: %s of transformers cuts text otherwise than %s; %s", name, tokenizer.file, advice)
    return same


def what_lacks(written: Exported, *libraries: str) -> str | None:
    """What a comparison of logits lacks; None where it can be made."""
    for library in ("transformers", *libraries):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed; pip install 'shardwright[hf]'"
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


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest, relative to the largest value; nan where there is one."""
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)  # an untrained head may give zeros
    return float((found - expected).abs().max() / largest)


def random_inputs(config: TransformerConfig, padding: int | None) -> dict[str, Tensor]:
    """Tokens but for padding, which some of theirs do not number; two segments where the model tells them apart."""
    generator = torch.Generator().manual_seed(0)
    # Of a row whose padding has no token theirs finds the end where it is alone.
    rows = 1 if config.classify == "text" and padding is None else ROWS
    shape = (rows, min(LENGTH, config.max_length))
    ids = torch.randint(0, config.vocab_size - 1, shape, generator=generator)
    ids += ids >= (config.vocab_size if padding is None else padding)
    if getattr(config, "token_types", 0) < 2:
        return {"input_ids": ids}
    return {"input_ids": ids, "token_type_ids": torch.arange(shape[1]).expand(shape) * 2 // shape[1]}


def end_rows(ids: Tensor, end: int | None) -> None:
    """An end at the end of rows [B, T] and nowhere else, where theirs tells the class of a text."""
    if end is not None:
        ids[ids == end] = (end + 1) % int(ids.max())
        ids[:, -1] = end


@torch.no_grad()
def our_logits(
    config: TransformerConfig,
    method: str,
    ours: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    inputs: dict[str, Tensor],
) -> dict[str, Tensor]:
    """By head, in float32, from weights that are rounded to `dtype` as the files' are; the model is gone afterwards."""
    model = build_model(config).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(ours[name].to(dtype) if dtype is not None else ours[name])
    return answer(model, inputs, method)


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, Tensor], method: str = "forward") -> dict[str, Tensor]:
    """Logits by head."""
    found = getattr(model, method)(**taken(model, inputs))
    return {"logits": found} if isinstance(found, Tensor) else dict(found)


@torch.no_grad()
def their_logits(
    folder: Path, name: str, inputs: dict[str, Tensor], heads: list[str], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Of these heads, computed in `dtype`; where a model has several, that of tokens has another name."""
    return named_as_ours(answer(open_theirs(folder, name, dtype), inputs), heads)


def open_theirs(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Their model of this name, in evaluation mode."""
    import transformers

    with quiet():
        model: nn.Module = getattr(transformers, name).from_pretrained(folder, dtype=dtype, local_files_only=True)
    return model.eval()


def named_as_ours(theirs: Mapping[str, Tensor], heads: Iterable[str]) -> dict[str, Tensor]:
    """Their logits by our heads' names."""
    return {head: theirs[head if head in theirs else f"prediction_{head}"] for head in heads}


def taken(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of an encoder-decoder the decoder reads the same tokens."""
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return inputs
    return {**inputs, "decoder_input_ids": inputs["input_ids"]}


@contextmanager
def quiet() -> Iterator[None]:
    """transformers, and what it imports, without bars and advice, for a while."""
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
