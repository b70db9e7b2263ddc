"""What lies on the disk after a save, and what a save that fails leaves behind."""

import json
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader

from shardwright.checkpoint import CheckpointError, SaveError, find_newest, load, read_manifest, save
from shardwright.checkpoint.integrity import DTYPES

TENSORS = {"model.w": torch.arange(12.0).view(3, 4), "exp_avg.w": torch.ones(3, 4), "step": torch.tensor(5.0)}


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_checkpoint_is_a_manifest_a_marker_and_one_tensor_file_a_rank(tmp_path: Path) -> None:
    path = save(tmp_path, TENSORS, {"drawn": 80, "excluded": [[1, 2]], "scale": 0.1}, step=100)
    assert path == tmp_path / "step_00000100"
    names = ["complete.json", "manifest.json", "tensors/000/rank_00000.json", "tensors/000/rank_00000.safetensors"]
    assert files(path) == names
    assert (tmp_path / "latest").read_text() == "step_00000100\n"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000100"]
    manifest = read_manifest(path)
    assert (manifest.step, manifest.serial) == (100, 1)
    assert manifest.state == {"drawn": 80, "excluded": [[1, 2]], "scale": 0.1}
    assert {name: (info.shape, info.dtype) for name, info in manifest.tensors.items()} == {
        "model.w": ((3, 4), "float32"),
        "exp_avg.w": ((3, 4), "float32"),
        "step": ((), "float32"),
    }
    assert json.loads((path / "manifest.json").read_text())["num_tensors"] == 3


def test_the_same_input_makes_the_same_bytes(tmp_path: Path) -> None:
    one = save(tmp_path / "one", TENSORS, {"b": 1, "a": 2}, step=1)
    two = save(tmp_path / "two", dict(reversed(TENSORS.items())), {"a": 2, "b": 1}, step=1)
    for name in files(one):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_stock_safetensors_and_the_stock_dcp_reader_read_the_files(tmp_path: Path) -> None:
    folder = save(tmp_path, TENSORS, {}, step=1) / "tensors" / "000"
    with safe_open(folder / "rank_00000.safetensors", framework="pt") as stored:
        assert {*stored.keys()} == {*TENSORS}
        assert all(torch.equal(stored.get_tensor(name), tensor) for name, tensor in TENSORS.items())
    fresh = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    dcp.load(fresh, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in TENSORS.items())


SHAPES = st.lists(st.integers(0, 5), max_size=4)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=8), st.tuples(SHAPES, st.sampled_from([*DTYPES])), max_size=6))
def test_any_shape_dtype_and_name_comes_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, spec: dict[str, tuple[list[int], str]]
) -> None:
    def bits(shape: list[int], dtype: str) -> torch.Tensor:
        raw = torch.randint(0, 2 if dtype == "bool" else 256, [*shape, DTYPES[dtype][0].itemsize], dtype=torch.uint8)
        return raw.view(DTYPES[dtype][0]).squeeze(-1)

    tensors = {name: bits(*of) for name, of in spec.items() if name != "__metadata__"}
    path = save(tmp_path_factory.mktemp("run"), tensors, {}, step=0)
    fresh = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    load(path, fresh)
    for name, tensor in tensors.items():
        left, right = (t.reshape(-1).view(torch.uint8) for t in (fresh[name], tensor))
        assert torch.equal(left, right)


def test_views_parameters_and_shared_memory_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {
        "transposed": base.t(),
        "strided": base[::2, 1:3],
        "parameter": torch.nn.Parameter(base[2:4]),
        "same": base,
        "expanded": torch.ones(1).expand(5),
    }
    path = save(tmp_path, tensors, {}, step=1)
    fresh = {name: torch.zeros(tensor.shape) for name, tensor in tensors.items()}
    load(path, fresh)
    assert all(torch.equal(fresh[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"w": [1.0]}, "w is a list, not a tensor"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, "w cannot be stored"),
        ({"w": torch.zeros(2, device="meta")}, "w cannot be stored"),
        ({"w": torch.zeros(2, 2).to_sparse()}, "w cannot be stored"),
        ({"__metadata__": torch.zeros(2)}, "'__metadata__' cannot be used"),
        ({3: torch.zeros(2)}, "3 cannot be used"),
    ],
)
def test_what_is_not_plain_tensor_bytes_is_refused_by_name(tmp_path: Path, tensors: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        save(tmp_path, tensors, {}, step=1)
    assert find_newest(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"data": {"ranges": [1, {2}]}}, r"state.data.ranges\[1\] is a set"),
        ({"lr": torch.tensor(1.0)}, "state.lr is a Tensor"),
        ({"seen": {3: 1}}, "state.seen has the key 3"),
        ({"raw": b"x"}, "state.raw is a bytes"),
    ],
)
def test_a_state_that_json_would_change_is_refused_by_key(tmp_path: Path, state: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        save(tmp_path, TENSORS, state, step=1)


def test_floats_of_the_state_come_back_exactly(tmp_path: Path) -> None:
    values = torch.randn(100, dtype=torch.float64).tolist() + [float("inf"), 5e-324, 2**53 + 1, "é中\udcff"]
    assert load(save(tmp_path, {}, {"values": values}, step=1), {})["values"] == values


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, TENSORS, {"try": 1}, step=4)
    path = save(tmp_path, {"other": torch.zeros(2)}, {"try": 2}, step=4)
    assert load(path, {"other": torch.ones(2)}) == {"try": 2}
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["latest", "step_00000004"]


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond that: what a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4M", "none", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here; the file size limit test covers the same path")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


BIG = {"w": torch.randn(700_000)}  # 2.8 MB


def check_that_the_first_save_stands(folder: Path, error: SaveError) -> None:
    text = str(error)
    assert "\n" not in text and "step 2 was not saved" in text and "no space left" in text and str(folder) in text
    path, skipped = find_newest(folder, deep=True)
    assert path is not None and path.name == "step_00000001" and skipped == []
    fresh = {"w": torch.zeros(700_000)}
    assert load(path, fresh) == {"n": 1} and torch.equal(fresh["w"], BIG["w"])


def test_a_full_disk_is_one_line_and_loses_nothing_and_the_run_may_go_on(small_disk: Path) -> None:
    save(small_disk, BIG, {"n": 1}, step=1)
    with pytest.raises(SaveError) as caught:
        save(small_disk, BIG, {"n": 2}, step=2)
    check_that_the_first_save_stands(small_disk, caught.value)
    small = {"w": torch.zeros(3)}
    assert save(small_disk, small, {"n": 3}, step=3, keep_last=1).name == "step_00000003"
    assert save(small_disk, BIG, {"n": 4}, step=4, keep_last=1).name == "step_00000004"  # step 1 made room


def test_a_quota_in_the_middle_of_a_file_is_treated_alike(tmp_path: Path) -> None:
    save(tmp_path, BIG, {"n": 1}, step=1)
    with file_size_limit(1 << 20), pytest.raises(SaveError) as caught:
        save(tmp_path, BIG, {"n": 2}, step=2)
    check_that_the_first_save_stands(tmp_path, caught.value)
    save(tmp_path, BIG, {"n": 3}, step=3)
    assert find_newest(tmp_path)[0] == tmp_path / "step_00000003"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(CheckpointError, match="checkpoints cannot be written to .*file"):
        save(tmp_path / "file" / "checkpoints", TENSORS, {}, step=1)


def test_no_write_permission_is_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)  # holds for root as well
    with pytest.raises(CheckpointError, match="no write permission"):
        save(small_disk / "checkpoints", TENSORS, {}, step=1)
