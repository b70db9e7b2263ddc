"""Four gloo ranks, run by test_ranks.py as `ranks_worker.py FOLDER`; exits with 0 where every check holds.

torch is imported once, then the ranks are forked; worlds of 2, 3 and 4 of them follow each other, so that what one
world saved another one loads.
"""

import contextlib
import os
import resource
import shutil
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shardwright.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    DamagedError,
    SaveError,
    agree_on_newest,
    find_newest,
    load,
    read_manifest,
    save,
)
from shardwright.checkpoint.integrity import rank_path, read_rank_manifest

FULL = {
    "row": torch.arange(35.0).view(7, 5),
    "one": torch.arange(4.0).view(1, 4),
    "col": torch.arange(24.0).view(4, 6),
    "rep": torch.arange(30.0).view(10, 3),
    "plain": torch.arange(9.0),
    "count": torch.tensor(11),
}


@contextlib.contextmanager
def world(rank: int, size: int, folder: Path) -> Iterator[bool]:
    """The first `size` processes make a group; the others pass by."""
    if rank < size:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
        yield True
        dist.barrier()
        dist.destroy_process_group()
    else:
        yield False


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def zeros_like(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def check_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in found.items():
        assert torch.equal(whole(tensor), expected[name]), name


def holders(path: Path) -> Counter[tuple[str, tuple[int, ...]]]:
    """How many ranks' files hold each box."""
    manifest = read_manifest(path)
    of_ranks = [read_rank_manifest(path, rank, entry) for rank, entry in enumerate(manifest.ranks)]
    return Counter((chunk.name, chunk.offsets) for one in of_ranks for chunk in one.chunks)


def expect(kind: type[Exception], words: list[str], call: object) -> None:
    """Every rank must get the same type of error with these words in it."""
    try:
        call()  # type: ignore[operator]
    except kind as error:
        assert type(error) is kind and "\n" not in str(error), repr(error)
        assert all(word in str(error) for word in words), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")


def sharded_model(rank: int) -> dict[str, torch.Tensor]:
    """FSDP2 weights after one AdamW step, and its moments: what ZeRO-3 checkpoints."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 13), torch.nn.GELU(), torch.nn.Linear(13, 8))
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 8) + rank).square().mean().backward()
    optimizer.step()
    named = dict(model.named_parameters())
    moments = {f"{kind}.{n}": optimizer.state[p][kind] for n, p in named.items() for kind in ("exp_avg", "exp_avg_sq")}
    return {f"model.{n}": p for n, p in named.items()} | moments


def on_two(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    placements = {"row": Shard(0), "one": Shard(0), "col": Shard(1), "rep": Replicate()}
    tensors = {name: distribute_tensor(FULL[name], mesh, [place]) for name, place in placements.items()}
    tensors |= {"plain": FULL["plain"], "count": FULL["count"]} | sharded_model(rank)
    expected = {name: whole(tensor).contiguous() for name, tensor in tensors.items()}
    stages = {f"stage{rank}": torch.full((5,), float(rank)), "tied": torch.full((3,), 7.0)}

    path = save(folder / "plain", tensors, {"rank": rank}, step=1)
    assert read_manifest(path).state == {"rank": 0}
    assert set(holders(path).values()) == {1}, "each box is written by one rank"
    path = save(folder / "stages", tensors | stages, {"drawn": 5}, step=1)
    if rank == 0:
        save_file(expected, folder / "expected.safetensors")
    own = zeros_like(tensors | stages)
    load(path, own)
    check_equal(own, expected | stages)
    asynchronous_on_two(rank, folder / "async", tensors, expected)
    refusals_on_two(rank, folder / "plain", tensors)


def asynchronous_on_two(
    rank: int, folder: Path, tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    big = tensors | {"big": distribute_tensor(torch.zeros(2, 200_000), init_device_mesh("cpu", (2,)), [Shard(0)])}
    copy = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    with CheckpointWriter(folder, keep_last=1) as writer:
        for step in (1, 2, 3):
            writer.save(copy, {"step": step}, step=step)
            dist.all_reduce(torch.ones(1000))  # training's own group is free to use meanwhile
        for tensor in copy.values():
            tensor.zero_()
        writer.wait()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if rank == 1 else soft, hard))
        writer.save(big, {}, step=4)
        expect(SaveError, ["rank 1: step 4 was not saved", "no space left"], writer.wait)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        newest, skipped = agree_on_newest(folder, deep=True)
        assert newest == folder / "step_00000003" and skipped == [], (newest, skipped)
        fresh = zeros_like(tensors)
        assert load(newest, fresh) == {"step": 3}
        check_equal(fresh, expected)
        writer.save(big, {}, step=5)
        assert writer.wait() == folder / "step_00000005"
    assert find_newest(folder, deep=True)[0] == folder / "step_00000005"


def refusals_on_two(rank: int, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    expect(ValueError, ["different steps"], lambda: save(folder, tensors, {}, step=2 + rank))
    state = {"x": {1}} if rank else {}
    expect(ValueError, ["rank 1: state.x is a set"], lambda: save(folder, tensors, state, step=2))
    gap = {"w": torch.zeros(2 + rank)}
    expect(SaveError, ["rank 0:", "w is float32 [2] on rank 0", "[3] on rank 1"], lambda: save(folder, gap, {}, step=2))
    assert find_newest(folder)[0] == folder / "step_00000001"


def on_three(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (3,))
    expected = load_file(folder / "expected.safetensors")
    placements = {"row": Shard(1), "one": Shard(1), "col": Shard(0), "rep": Shard(0), "plain": Shard(0)}
    fresh: dict[str, torch.Tensor] = {
        name: distribute_tensor(torch.zeros_like(tensor), mesh, [placements.get(name, Shard(0))])
        for name, tensor in expected.items()
        if tensor.dim()
    }
    fresh["count"] = torch.tensor(0)
    fresh["tied"] = torch.zeros(3)
    stage = {0: "stage0", 2: "stage1"}.get(rank)
    if stage:
        fresh[stage] = torch.zeros(5)
    path = folder / "stages" / "step_00000001"
    assert load(path, fresh) == {"drawn": 5}
    extra = {"tied": torch.full((3,), 7.0), "stage0": torch.zeros(5), "stage1": torch.ones(5)}
    check_equal(fresh, expected | extra)

    unknown = fresh | ({"nobody": torch.zeros(1)} if rank == 2 else {})
    expect(CheckpointError, ["rank 2:", "1 missing in the checkpoint: nobody"], lambda: load(path, unknown))
    fewer = {name: tensor for name, tensor in fresh.items() if name != "stage1"}
    expect(CheckpointError, ["1 in the checkpoint but not asked for: stage1"], lambda: load(path, fewer))
    if rank == 0:
        flip_tensor(shutil.copytree(path, folder / "flipped"), "stage1")
    dist.barrier()
    words = ["rank 2:", "rank_00001.safetensors", "'stage1'"]
    expect(DamagedError, words, lambda: load(folder / "flipped", fresh))


def flip_tensor(path: Path, name: str) -> None:
    for rank, entry in enumerate(read_manifest(path).ranks):
        for chunk in read_rank_manifest(path, rank, entry).chunks:
            if chunk.name == name:
                with open(rank_path(path, rank, ".safetensors"), "r+b") as stream:
                    stream.seek(chunk.start)
                    byte = stream.read(1)[0]
                    stream.seek(chunk.start)
                    stream.write(bytes([byte ^ 1]))


def on_four(rank: int, folder: Path) -> None:
    """Two axes: what is replicated on one, on both, or kept on a sub-mesh alone, is still written once."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    full = {name: torch.randn(6, 7) + i for i, name in enumerate(["hybrid", "norm", "both", "sub", "rows2", "all"])}
    for tensor in full.values():
        dist.broadcast(tensor, 0)
    tensors: dict[str, torch.Tensor] = {
        "hybrid": distribute_tensor(full["hybrid"], mesh, [Replicate(), Shard(0)]),
        "norm": distribute_tensor(full["norm"], mesh, [Shard(0), Replicate()]),
        "both": distribute_tensor(full["both"], mesh, [Shard(0), Shard(1)]),
        "sub": distribute_tensor(full["sub"], mesh["tensor"], [Shard(1)]),
        "rows2": distribute_tensor(full["rows2"], mesh, [Shard(0), Shard(0)]),
        "all": distribute_tensor(full["all"], mesh, [Replicate(), Replicate()]),
        "plain": torch.ones(3),
    }
    path = save(folder / "four", tensors, {}, step=1)
    counts = holders(path)
    assert set(counts.values()) == {1}, counts
    others = {"hybrid": [Shard(1), Shard(0)], "both": [Replicate(), Shard(0)], "all": [Shard(0), Shard(0)]}
    fresh = {
        name: distribute_tensor(torch.zeros(6, 7), mesh, others.get(name, [Shard(1), Replicate()])) for name in full
    }
    fresh["plain"] = torch.zeros(3)
    load(path, fresh)
    check_equal(fresh, full | {"plain": torch.ones(3)})


def run_rank(rank: int, folder: Path) -> int:
    try:
        for count, work in ((2, on_two), (3, on_three), (4, on_four)):
            with world(rank, count, folder) as inside:
                if inside:
                    work(rank, folder)
    except BaseException:
        print(f"rank {rank}: {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


def main(folder: Path) -> int:
    torch.set_num_threads(1)
    running = set()
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            os._exit(run_rank(rank, folder))
        running.add(pid)
    failed = 0
    while running:
        pid, status = os.wait()
        running.discard(pid)
        failed |= status
        if status:  # the others would wait for it
            for other in running:
                os.kill(other, signal.SIGKILL)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
