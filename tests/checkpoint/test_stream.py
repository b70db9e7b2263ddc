"""Streaming: the same checkpoint as a save of all at once, and never more than one tensor alive."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor

from shardwright.checkpoint import CheckpointError, DamagedError, SaveError, StoredTensors, load, save, save_streamed
from shardwright.checkpoint.integrity import rank_path


def tensors() -> dict[str, Tensor]:
    shapes = {"model.a": (3, 5), "model.b": (700, 900), "model.deep.c": (), "optimizer.a": (3, 5), "model.d": (0, 4)}
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "model.a": found["model.a"].bfloat16()}


def on_meta(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in found.items()}


def streamed(folder: Path) -> Path:
    found = tensors()
    return save_streamed(folder, on_meta(found), found.__getitem__, {"note": 1}, step=7)


def test_what_is_streamed_is_what_is_saved_at_once(tmp_path: Path) -> None:
    first, second = save(tmp_path / "first", tensors(), {"note": 1}, step=7), streamed(tmp_path / "second")
    assert rank_path(first, 0, ".safetensors").read_bytes() == rank_path(second, 0, ".safetensors").read_bytes()
    assert rank_path(first, 0, ".json").read_bytes() == rank_path(second, 0, ".json").read_bytes()
    back = {name: torch.empty_like(tensor) for name, tensor in tensors().items()}
    assert load(second, back) == {"note": 1}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors().items())


def test_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    before: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        assert not [tensor for tensor in before if tensor() is not None], name
        made = torch.zeros(3, 4)
        before.append(weakref.ref(made))
        return made

    meta = {f"layer{n}": torch.empty(3, 4, device="meta") for n in range(20)}
    save_streamed(tmp_path, meta, read, {}, step=0)
    assert len(before) == 20


def test_a_checkpoint_is_read_by_name(tmp_path: Path) -> None:
    stored, found = StoredTensors(streamed(tmp_path), within="model."), tensors()
    assert set(stored) == {"a", "b", "deep.c", "d"} and len(stored) == 4
    for name, tensor in stored.items():
        assert tensor.dtype == stored.meta[name].dtype and torch.equal(tensor, found[f"model.{name}"]), name
    with pytest.raises(CheckpointError, match="holds no tensor whose name begins with 'head.'"):
        StoredTensors(stored.checkpoint, within="head.")


def test_a_changed_byte_is_found_when_its_tensor_is_read(tmp_path: Path) -> None:
    checkpoint = streamed(tmp_path)
    path = rank_path(checkpoint, 0, ".safetensors")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    stored = StoredTensors(checkpoint)
    with pytest.raises(DamagedError, match="damaged"):
        list(stored.items())


def test_a_source_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def read(name: str) -> Tensor:
        raise OSError("the disk is gone")

    with pytest.raises(SaveError, match="step 0 was not saved .*the disk is gone"):
        save_streamed(tmp_path, {"a": torch.empty(2, device="meta")}, read, {}, step=0)
    assert not list(tmp_path.glob("*step*"))
