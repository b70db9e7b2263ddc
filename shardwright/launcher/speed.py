"""What `doctor` measures: matmul rate by number format, memory and disk bandwidth, an all-reduce between two processes.

Room launcher. `python -m shardwright.launcher.speed RANK SIZE STORE BACKEND` is one process of the all-reduce.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from shardwright.hardware import measure_bandwidth, measure_gemm
from shardwright.launcher.checks import Check
from shardwright.log import quantity

ALL_REDUCE_BYTES = 2**20
PATIENCE = 60.0  # seconds until two processes that do not find each other are given up
# Variables by which a launcher tells a process its place; the probe's processes have one of their own.
PLACES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def check_speed(seconds: float = 10.0) -> Iterator[Check]:
    """Measures compute and communication in about `seconds`, most of them for the processes to start."""
    import torch

    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        rate = measure_gemm(device, dtype, 0.1 * seconds)
        yield Check("speed", f"{name} matmul", "ok", f"{quantity(rate, ' ')}FLOP/s on {device.type}")
    rate = measure_bandwidth(device, 0.05 * seconds)
    yield Check("speed", "memory", "ok", f"{quantity(rate, ' ')}B/s copied, reads and writes counted")
    yield check_disk_speed(Path.cwd())
    yield check_all_reduce("gloo")
    if torch.cuda.device_count() > 1:
        yield check_all_reduce("nccl")


def check_disk_speed(folder: Path, mib: int = 64) -> Check:
    """Writes a file through to the disk, as a checkpoint does, and removes it."""
    block = os.urandom(2**20)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            start = time.perf_counter()
            for _ in range(mib):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = mib * len(block) / (time.perf_counter() - start)
    except OSError as error:
        reason = f"cannot write in {folder}: {error.strerror}"
        return Check("speed", "disk", "warning", reason, "start in another folder, or run=PATH")
    return Check("speed", "disk", "ok", f"{quantity(rate, ' ')}B/s written through to the disk")


def check_all_reduce(backend: str, size: int = 2) -> Check:
    """An all-reduce of 1 MB between processes of this machine, its sum verified."""
    name = f"{backend} all-reduce"
    found = _all_reduce(backend, size, {})
    if isinstance(found, float):
        bus = 2 * (size - 1) / size * ALL_REDUCE_BYTES / found
        detail = f"1 MB between {size} processes in {found * 1e3:.2f} ms, {quantity(bus, ' ')}B/s bus bandwidth"
        return Check("speed", name, "ok", detail)
    if backend == "gloo" and isinstance(_all_reduce(backend, size, {"GLOO_SOCKET_IFNAME": "lo"}), float):
        remedy = "export GLOO_SOCKET_IFNAME=lo on one machine, the name of its network interface on several"
        return Check("speed", name, "failed", f"works over the loopback interface only: {found}", remedy)
    return Check("speed", name, "failed", found, "several processes cannot work together here; one process can")


def _all_reduce(backend: str, size: int, extra: dict[str, str]) -> float | str:
    """Median seconds of one all-reduce, or in one line why there is none."""
    environment = {k: v for k, v in os.environ.items() if k not in PLACES} | {"OMP_NUM_THREADS": "1"} | extra
    roots = [str(Path(__file__).parents[2]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, roots))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "shardwright.launcher.speed"]
        places = [[str(rank), str(size), str(Path(folder) / "store"), backend] for rank in range(size)]
        processes = [
            subprocess.Popen(
                command + place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for place in places
        ]
        deadline = time.monotonic() + PATIENCE
        try:
            answers = [process.communicate(timeout=max(deadline - time.monotonic(), 0.1)) for process in processes]
        except subprocess.TimeoutExpired:
            return f"no answer within {PATIENCE:.0f} s"
        finally:
            for process in processes:
                process.kill()
                process.wait()
    for process, (_, errors) in zip(processes, answers, strict=True):
        if process.returncode:
            return (errors.strip().splitlines() or [f"a process ended with code {process.returncode}"])[-1]
    return float(json.loads(answers[0][0]))


def _reduce_among(rank: int, size: int, store: str, backend: str, repeats: int = 50) -> float:
    """One process of the all-reduce: median seconds; raises where the sum is wrong."""
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        times = []
        for repeat in range(repeats + 5):
            data = torch.full((ALL_REDUCE_BYTES // 4,), float(rank + 1), device=device)
            start = time.perf_counter()
            dist.all_reduce(data)
            total = data[-1].item()  # waits for a GPU as well
            times.append(time.perf_counter() - start)
            if total != size * (size + 1) / 2:
                raise ValueError(f"all-reduce gave {total} for {size * (size + 1) / 2} in repeat {repeat}")
        return statistics.median(times[5:])
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    print(json.dumps(_reduce_among(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])))
