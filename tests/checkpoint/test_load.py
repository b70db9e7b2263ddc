"""Loading accounts for every tensor or refuses, changes nothing when it refuses, and never runs a pickle."""

import io
import json
import logging
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader

from shardwright.checkpoint import CheckpointError, DamagedError, load, save
from shardwright.checkpoint.integrity import sha256
from shardwright.log import get_logger

TENSORS = {f"{kind}.{i}": torch.randn(4, 3 + i) for kind in ("model", "exp_avg") for i in range(3)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "run", TENSORS, {"drawn": 8}, step=8)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the project's logger says."""
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    get_logger().addHandler(handler)
    yield text
    get_logger().removeHandler(handler)


def zeros() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}


def test_tensors_are_filled_in_place_and_counted(checkpoint: Path, lines: io.StringIO) -> None:
    fresh = zeros()
    fresh["model.0"] = torch.nn.Parameter(fresh["model.0"])
    fresh["model.1"] = torch.zeros(4, 4).t()  # memory of another order
    places = {name: tensor.data_ptr() for name, tensor in fresh.items()}
    assert load(checkpoint, fresh) == {"drawn": 8}
    assert all(torch.equal(fresh[name], tensor) for name, tensor in TENSORS.items())
    assert places == {name: tensor.data_ptr() for name, tensor in fresh.items()}
    assert "restored 6 of 6 tensors" in lines.getvalue()


def test_everything_that_does_not_fit_is_named_and_nothing_is_touched(checkpoint: Path) -> None:
    fresh = zeros()
    del fresh["exp_avg.2"]
    fresh["model.extra"] = torch.zeros(1)
    fresh["model.0"] = torch.zeros(4, 9)
    fresh["model.1"] = torch.zeros(4, 4, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError) as caught:
        load(checkpoint, fresh)
    text = str(caught.value)
    assert "\n" not in text and "3 of 6 tensors" in text
    assert "1 missing in the checkpoint: model.extra" in text
    assert "1 in the checkpoint but not asked for: exp_avg.2" in text
    assert "model.0 (stored [4, 3], asked [4, 9])" in text
    assert "model.1 (stored float32, asked bfloat16)" in text
    assert not any(tensor.any() for tensor in fresh.values())


def test_long_lists_are_cut(tmp_path: Path) -> None:
    path = save(tmp_path, {f"w{i}": torch.zeros(1) for i in range(100)}, {}, step=1)
    with pytest.raises(CheckpointError, match="100 in the checkpoint but not asked for: w0, .* and 92 more"):
        load(path, {})


def test_a_part_is_loaded_only_when_asked_for(checkpoint: Path, lines: io.StringIO) -> None:
    part = {"model.2": torch.zeros(4, 5)}
    with pytest.raises(CheckpointError, match="5 in the checkpoint but not asked for"):
        load(checkpoint, part)
    load(checkpoint, part, partial_load=True)
    assert torch.equal(part["model.2"], TENSORS["model.2"])
    assert "restored 1 of 6 tensors" in lines.getvalue()


def test_a_part_may_be_all_under_a_prefix(checkpoint: Path, lines: io.StringIO) -> None:
    part = {name: tensor for name, tensor in zeros().items() if name.startswith("model.")}
    load(checkpoint, part, within="model.")
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in part.items())
    assert f"restored {len(part)} of {len(part)} tensors" in lines.getvalue()
    del part["model.1"]
    with pytest.raises(CheckpointError, match="1 in the checkpoint but not asked for: model.1"):
        load(checkpoint, part, within="model.")


def test_a_part_reads_and_checks_only_its_bytes(checkpoint: Path) -> None:
    path = checkpoint / "tensors/000/rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the last tensor of the file
    path.write_bytes(data)
    part = {"exp_avg.0": torch.zeros(4, 3)}
    load(checkpoint, part, partial_load=True)
    assert torch.equal(part["exp_avg.0"], TENSORS["exp_avg.0"])
    with pytest.raises(DamagedError, match="model.2"):
        load(checkpoint, zeros())


def test_another_dtype_is_cast_only_when_asked_for(checkpoint: Path) -> None:
    half = {name: tensor.bfloat16() for name, tensor in zeros().items()}
    load(checkpoint, half, cast=True)
    assert all(torch.equal(half[name], tensor.bfloat16()) for name, tensor in TENSORS.items())


def test_large_tensors_are_read_in_groups_of_rows(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(5000.0 * 2003).view(5000, 2003), "one": torch.tensor(3.5)}  # 40 MB
    path = save(tmp_path, tensors, {}, step=1)
    fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(path, fresh)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.parent, "is not a whole checkpoint: complete.json"),
        (lambda path: path.parent / "step_00000099", "is not a folder"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(checkpoint: Path, make: object, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        load(make(checkpoint), zeros())  # type: ignore[operator]


def test_a_newer_format_is_refused(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda manifest: manifest | {"version": 2})
    with pytest.raises(CheckpointError, match="version 2; this version of shardwright reads"):
        load(checkpoint, zeros())


def rewrite(checkpoint: Path, change: object) -> None:
    """Alter the manifest as a forger would, with its hash."""
    manifest = change(json.loads((checkpoint / "manifest.json").read_text()))  # type: ignore[operator]
    data = json.dumps(manifest).encode()
    (checkpoint / "manifest.json").write_bytes(data)
    marker = json.loads((checkpoint / "complete.json").read_text()) | {"sha256": sha256(data)}
    (checkpoint / "complete.json").write_text(json.dumps(marker))


class Malice:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.folder),)


PICKLE_EVENTS: list[str] = []
WATCH = {"on": False}


def watch_for_pickles() -> None:
    """Count every global that any unpickler of this process looks up from here on, while WATCH is on."""

    def hook(event: str, _: object) -> None:
        if WATCH["on"] and event == "pickle.find_class":
            PICKLE_EVENTS.append(event)

    if "installed" not in WATCH:
        sys.addaudithook(hook)  # cannot be removed again; hence the switch
        WATCH["installed"] = True
    PICKLE_EVENTS.clear()


def test_no_pickle_is_run_whatever_lies_in_the_folder(tmp_path: Path, checkpoint: Path) -> None:
    watch_for_pickles()
    payload = pickle.dumps(Malice(tmp_path / "owned"))
    for folder in (checkpoint, checkpoint / "tensors", checkpoint / "tensors/000"):
        for name in (".metadata", "__0.metadata", "__0_0.distcp", "state.pt", "pytorch_model.bin", "rank_00001.json"):
            (folder / name).write_bytes(payload)
    WATCH["on"] = True
    fresh = zeros()
    load(checkpoint, fresh)
    WATCH["on"] = False
    assert all(torch.equal(fresh[name], tensor) for name, tensor in TENSORS.items())
    assert not (tmp_path / "owned").exists() and PICKLE_EVENTS == []

    # The same folder through DCP's default storage runs it: the plant is live.
    with pytest.raises(BaseException):  # noqa: B017 - whatever it says once it has run the code
        dcp.load(zeros(), storage_reader=FileSystemReader(checkpoint), no_dist=True)
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["complete.json", "manifest.json", "rank_00000.json", "rank_00000.safetensors"])
def test_a_pickle_in_place_of_a_file_is_damage(tmp_path: Path, checkpoint: Path, name: str) -> None:
    (path,) = checkpoint.rglob(name)
    path.write_bytes(pickle.dumps(Malice(tmp_path / "owned")))
    with pytest.raises(DamagedError, match=name):
        load(checkpoint, zeros())
    assert not (tmp_path / "owned").exists()


def test_a_forged_checkpoint_with_a_pickle_as_tensor_is_only_bytes(tmp_path: Path) -> None:
    payload = torch.frombuffer(bytearray(pickle.dumps(Malice(tmp_path / "owned"))), dtype=torch.uint8)
    path = save(tmp_path / "run", {"w": payload}, {}, step=1)
    fresh = {"w": torch.zeros_like(payload)}
    load(path, fresh)
    assert torch.equal(fresh["w"], payload) and not (tmp_path / "owned").exists()


def test_a_copy_elsewhere_loads_as_well(tmp_path: Path, checkpoint: Path) -> None:
    fresh = zeros()
    load(shutil.copytree(checkpoint, tmp_path / "any name"), fresh)
    assert torch.equal(fresh["model.0"], TENSORS["model.0"])
