"""Real gloo ranks: saved on 2, loaded on 3 and on 1, and on a mesh of 2 x 2; what fails on one rank fails on all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import shardwright
from shardwright.checkpoint import damage, load, read_manifest
from shardwright.checkpoint.ranks import Ranks, build_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four processes left behind after every check of ranks_worker.py held."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = Path(__file__).parent / "ranks_worker.py"
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(Path(shardwright.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, worker, folder], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_saved_on_two_ranks_loads_on_one(folder: Path) -> None:
    expected = load_file(folder / "expected.safetensors")
    fresh = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    path = folder / "plain" / "step_00000001"
    assert load(path, fresh) == {"rank": 0}
    assert all(torch.equal(fresh[name], tensor) for name, tensor in expected.items())
    assert [*damage(path)] == []


def test_ranks_share_the_writing(folder: Path) -> None:
    manifest = read_manifest(folder / "plain" / "step_00000001")
    one, two = (entry.file_bytes for entry in manifest.ranks)
    assert 0.5 < one / two < 2
    assert manifest.tensors["row"].ranks == ((0, 1),)
    assert manifest.tensors["one"].ranks == ((0, 0),), "a rank with an empty shard writes nothing of it"


def test_an_unfinished_save_left_nothing(folder: Path) -> None:
    assert sorted(path.name for path in (folder / "async").iterdir()) == ["latest", "step_00000005"]


def test_alone_agreeing_is_free_and_errors_keep_their_type() -> None:
    ranks = build_ranks()
    assert isinstance(ranks, Ranks) and (ranks.rank, ranks.size) == (0, 1)
    assert ranks.together("x", lambda: 5) == 5 and ranks.together("x", None) is None
    assert ranks.share("text") == "text"
    assert ranks.gather(torch.tensor([3])).tolist() == [[3]]
    with pytest.raises(ZeroDivisionError):
        ranks.together("x", lambda: 1 // 0)
