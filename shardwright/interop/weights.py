"""Hugging Face's weight files: safetensors, one or several under an index, read and written one tensor at a time.

Lowest file of the room: names are Hugging Face's here, and what they mean is huggingface.py's matter. Shapes and dtypes
are known beforehand, from headers alone, as tensors on the meta device. Pickled files are never opened.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwright.checkpoint.integrity import DTYPE_NAMES, DTYPES
from shardwright.config import ConfigError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin")
CODES = {code: dtype for dtype, code in DTYPES.values()}


class WeightFiles(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for. `meta` holds them on the meta device.

    ConfigError where there are no safetensors, where a file that the index names is missing or cut, and where index and
    files disagree about what there is.
    """

    def __init__(self, folder: Path) -> None:
        indexed = _read_index(folder)
        files = sorted(set(indexed.values())) if indexed is not None else [_find_single(folder)]
        self.meta: dict[str, Tensor] = {}
        self._file: dict[str, Path] = {}
        for path in files:
            for name, tensor in _read_header(path).items():
                self.meta[name], self._file[name] = tensor, path
        if indexed is not None and indexed != self._file:
            name = sorted(set(indexed.items()) ^ set(self._file.items()))[0][0]
            raise ConfigError(f"{folder / INDEX}: does not say what its files hold of {name}; fetch the folder again")

    def __getitem__(self, name: str) -> Tensor:
        # Opened for each tensor: what was read of an open file stays mapped and counts as this process's memory.
        with _opened(self._file[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


def write_weights(folder: Path, meta: Mapping[str, Tensor], read: Callable[[str], Tensor], shard_bytes: int) -> int:
    """Write the tensors of `meta`, each from `read(name)` when its turn comes; returns how many files they fill.

    One file, or files of at most `shard_bytes` (a larger tensor has a file of its own) and their index.
    """
    shards = list(_cut(meta, shard_bytes))
    files = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(len(shards))]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: meta[name] for name in names}, read)
    if len(shards) > 1:
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = {"total_size": sum(tensor.nbytes for tensor in meta.values())}
        index = {"metadata": total, "weight_map": dict(sorted(places.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return len(shards)


def _cut(meta: Mapping[str, Tensor], shard_bytes: int) -> Iterator[list[str]]:
    """Names of each file, in their order."""
    names: list[str] = []
    size = 0
    for name, tensor in meta.items():
        if names and size + tensor.nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


def _shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05}-of-{count:05}.safetensors"


def _write_file(path: Path, meta: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
    """One safetensors file: 8 bytes of the header's length, the header, the tensors' bytes in its order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in meta.items():
        begin, end = end, end + tensor.nbytes
        code = DTYPES[DTYPE_NAMES[tensor.dtype]][1]
        entries[name] = {"dtype": code, "shape": [*tensor.shape], "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for name, expected in meta.items():
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype), name
            stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _find_single(folder: Path) -> Path:
    """The only safetensors file of a folder without an index."""
    if (folder / SINGLE).is_file():
        return folder / SINGLE
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise ConfigError(f"{folder}: holds {len(found)} safetensors files and no {INDEX}; fetch the folder again")
    pickled = sorted({path.name for pattern in PICKLED for path in folder.glob(pattern)})
    if pickled:
        raise ConfigError(
            f"{folder}: its weights are pickled ({pickled[0]}), and reading a pickle can run what its writer put "
            "there; where you trust it, let transformers turn it into safetensors: "
            "AutoModel.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise ConfigError(f"{folder}: holds no weights; expected {SINGLE} or {INDEX}")


def _read_index(folder: Path) -> dict[str, Path] | None:
    """Name -> file, from the index; None where there is no index."""
    path = folder / INDEX
    if not path.is_file() or (folder / SINGLE).is_file():
        return None
    try:
        places = json.loads(path.read_text("utf-8"))["weight_map"]
        found = {str(name): folder / str(file) for name, file in places.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path}: is not an index of safetensors; expected a weight_map of names to files") from None
    for file in set(found.values()):
        if file.parent != folder:
            raise ConfigError(f"{path}: names {file}, a file of another folder; expected files beside it")
        if not file.is_file():
            raise ConfigError(f"{file}: is missing, and {INDEX} names it; fetch the folder again")
    return found


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path}: is no whole safetensors file ({_one_line(error)}); fetch it again") from None


def _read_header(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file on the meta device."""
    found = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - it is no mapping
            part = file.get_slice(name)
            code, shape = part.get_dtype(), part.get_shape()
            if code not in CODES:
                raise ConfigError(f"{path}: {name} is of type {code}; expected one of {', '.join(sorted(CODES))}")
            found[name] = torch.empty(shape, dtype=CODES[code], device="meta")
    return found


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
