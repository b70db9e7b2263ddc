"""A Hugging Face folder: one that is here or on the hub, its JSON files, and a new one, whole or not at all.

Beside weights.py, below what the train room makes of both. What belongs to a model but is none of its tensors
(`COMPANIONS`) goes from folder to folder as it is.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardwright.config import ConfigError

MODEL_CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
OTHERS = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
COMPANIONS = (MODEL_CONFIG, GENERATION, TOKENIZER_CONFIG, *OTHERS)
TOKENIZERS = ("tokenizer.json", "*.model", "*.spm", "vocab.json", "merges.txt", "vocab.txt", "*.tiktoken")
#: Marian's tokenizer, which cuts the text of either language by a model of its own: kept, and not read here.
PAIR = ("source.spm", "target.spm", "vocab.json")
GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SPECIAL_IDS = (*GENERATION_IDS, "cls_token_id", "sep_token_id", "mask_token_id")
UNFINISHED = "unfinished_"
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_huggingface(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return (folder / MODEL_CONFIG).is_file()


def find_folder(name: str) -> Path:
    """The folder of a model: one that is here, or what the hub has under that name, fetched into Hugging Face's cache.

    Weights that are no safetensors are not fetched. ConfigError where there is neither.
    """
    folder = Path(name)
    if is_huggingface(folder):
        return folder
    if folder.exists():
        raise ConfigError(f"{name}: is no Hugging Face folder; expected {MODEL_CONFIG} in it")
    if not HUB_NAME.fullmatch(name):
        raise ConfigError(f"{name}: no such folder")
    return _fetch(name)


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(
            f"{name}: no such folder, and to fetch it from the hub takes pip install 'shardwright[hf]'"
        ) from None
    wanted = [*COMPANIONS, *TOKENIZERS, "*.safetensors", "*.safetensors.index.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, ValueError) as error:  # what its own errors are
        why = " ".join(str(error).split())[:400]
        raise ConfigError(f"{name}: no such folder, and the hub did not give it: {why}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds; ConfigError where it holds none."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: holds no mapping; fetch it again")
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Written as Hugging Face writes its files."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def holds_pair(folder: Path) -> bool:
    """Whether Marian's tokenizer lies there; vocab.json alone is of others too."""
    return all((folder / name).is_file() for name in PAIR)


def read_ids(folder: Path) -> dict[str, int]:
    """Ids of special tokens by use (bos, decoder_start, ...): of generation_config.json, or else of config.json."""
    raw: dict[str, Any] = {}
    for name in (MODEL_CONFIG, GENERATION):
        if (folder / name).is_file():
            raw |= {key: value for key, value in read_json(folder / name).items() if isinstance(value, int)}
    return {key.removesuffix("_token_id"): raw[key] for key in SPECIAL_IDS if key in raw}


def copy_companions(source: Path, target: Path) -> None:
    """What `source` has of `COMPANIONS`, and Marian's tokenizer, byte for byte."""
    for name in (*COMPANIONS, *(PAIR if holds_pair(source) else ())):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write into that becomes `output` at the end, and vanishes if the block fails.

    ConfigError where `output` holds something. What a killed process left of it is removed.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise ConfigError(f"{output}: holds something already; name a new folder with --output")
    place = output.absolute().with_name(f"{UNFINISHED}{output.absolute().name}")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
        place.rename(output.absolute())
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
