"""The loader: whoever reads, the same batches; nothing but the consumer's count is state; no death goes unnoticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from shardwright.config import ConfigError, RunError
from shardwright.data.loader import Loader, StepBatch, to_device
from shardwright.data.order import Plan
from shardwright.data.shards import ShardError
from shardwright.data.stream import Stream, ValidationStream
from shardwright.objective.causal import Causal, CausalConfig
from shardwright.objective.setting import Setting

CAUSAL = Causal(CausalConfig(), Setting(32))
ROOT = Path(__file__).resolve().parents[2]
SIZES = [3, 8, 5, 16, 7, 9, 70, 2]
EXCLUDED = ((10, 14), (30, 31))


def ramp(step: int, drawn: int) -> int:
    return SIZES[step % len(SIZES)]


@pytest.fixture(scope="module")
def stream(folder: Path) -> Stream:
    return Stream([str(folder)], raw_length=33, stride=32, seed=0, lanes=16)


def plan(rank: int = 0, size: int = 1) -> Plan:
    return Plan(ramp, 4, lanes=16, data_rank=rank, data_size=size, excluded=EXCLUDED)


@pytest.fixture(scope="module")
def pooled(stream: Stream) -> Iterator[Loader]:
    """Two worker processes, started once."""
    with Loader(stream, plan(), CAUSAL, workers=2, prefetch=3) as loader:
        yield loader


def loaders(stream: Stream, pooled: Loader) -> Iterator[Loader]:
    for workers in (0, "thread"):
        with Loader(stream, plan(), CAUSAL, workers=workers, prefetch=3) as loader:
            yield loader
    yield pooled


def facts(batch: StepBatch) -> tuple:
    tensors = [{name: tensor.tolist() for name, tensor in micro.items()} for micro in batch.micro_batches]
    return batch.step, batch.drawn, batch.count, batch.first, batch.last, tensors


def take(loader: Loader, steps: int) -> list[tuple]:
    return [facts(next(loader)) for _ in range(steps)]


def test_every_kind_of_worker_gives_the_same_batches(stream: Stream, pooled: Loader) -> None:
    for loader in loaders(stream, pooled):
        drawn = 0
        for step, batch in zip(range(12), loader.start(), strict=False):
            numbers = plan().numbers(drawn, ramp(step, drawn))
            assert facts(batch)[:5] == (step, drawn, len(numbers), numbers[0], numbers[-1])
            share = plan().share(drawn, len(numbers))
            assert len(batch.micro_batches) == len(share)
            for row, micro in zip(share, batch.micro_batches, strict=True):
                wanted = CAUSAL.corrupt(stream.sequences(row))
                assert micro.keys() == wanted.keys()
                for name, array in wanted.items():
                    assert micro[name].dtype == torch.from_numpy(array).dtype
                    assert (micro[name].numpy() == array).all()
            drawn += len(numbers)


def test_a_start_anywhere_gives_the_tail(stream: Stream, pooled: Loader) -> None:
    for loader in loaders(stream, pooled):
        loader.start()
        whole = take(loader, 12)
        for step in (11, 3, 0, 7):  # and what was read ahead for the start before is forgotten
            loader.start(step, whole[step][1])
            assert take(loader, 12 - step) == whole[step:]


def test_ranks_together_equal_one(stream: Stream) -> None:
    alone = Loader(stream, plan(), CAUSAL).start()
    ranks = [Loader(stream, plan(rank, 3), CAUSAL, workers="thread").start() for rank in range(3)]
    for _ in range(12):
        one, parts = next(alone), [next(loader) for loader in ranks]
        assert len({len(part.micro_batches) for part in parts}) == 1
        rows = [row for part in parts for row in rows_of(part)]
        assert rows == rows_of(one)
        assert {(p.step, p.drawn, p.count, p.first, p.last) for p in parts} == {facts(one)[:5]}
        for micro in (micro for part in parts for micro in part.micro_batches):
            assert micro["input_ids"].shape == (4, 32)
            assert (micro["weights"][micro["sequence"] < 0] == 0).all()
    for loader in ranks:
        loader.close()


def rows_of(batch: StepBatch) -> list[tuple[int, list[int]]]:
    return [
        (number, labels)
        for micro in batch.micro_batches
        for number, labels in zip(micro["sequence"].tolist(), micro["labels"].tolist(), strict=True)
        if number >= 0
    ]


def test_a_new_plan_takes_effect_at_a_start(stream: Stream, pooled: Loader) -> None:
    for loader in loaders(stream, pooled):
        loader.start(0, 0)
        take(loader, 3)
        loader.start(1, 3, Plan(6, 4, lanes=16, excluded=((4, 100),)))
        batch = next(loader)
        assert (batch.step, batch.drawn, batch.first, batch.last) == (1, 3, 3, 104)
        loader.plan = plan()


def test_batches_outlive_the_ones_after_them(stream: Stream, pooled: Loader) -> None:
    """Memory is used again only once nobody holds it."""
    for loader in loaders(stream, pooled):
        loader.start()
        held = [next(loader) for _ in range(40)]
        copies = [facts(batch) for batch in held]
        for _ in range(40):
            next(loader)
        assert [facts(batch) for batch in held] == copies


@pytest.mark.parametrize("workers", [0, "thread"])
def test_validation_ends(folder: Path, workers: int | str) -> None:
    stream = ValidationStream([str(folder)], raw_length=33, stride=32)
    seen, targets = [], 0.0
    for rank in range(2):
        with Loader(stream, Plan(10, 5, lanes=1, data_rank=rank, data_size=2), CAUSAL, workers=workers) as loader:
            batches = list(loader.start())
            assert len(batches) == -(-stream.num_sequences // 10)
            for micro in (micro for batch in batches for micro in batch.micro_batches):
                assert micro["input_ids"].shape == (5, 32)
                seen += [n for n in micro["sequence"].tolist() if n >= 0]
                targets += micro["weights"].sum().item()
            with pytest.raises(StopIteration):
                next(loader)
    assert sorted(seen) == list(range(stream.num_sequences)) and targets == stream.num_tokens


@pytest.fixture
def damaged(build_folder, tmp_path: Path) -> Path:
    """A corpus of which a byte was altered after it was written."""
    folder = build_folder(tmp_path / "damaged", train=[[[token % 9 + 1] * 50 for token in range(40)]])
    path = folder / "train/000/00000.tar"
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"\x05\x00" * 40)] ^= 2
    path.write_bytes(raw)
    return folder


@pytest.mark.parametrize("workers", [0, "thread", 1])
def test_an_error_comes_out_where_its_batch_would(damaged: Path, workers: int | str) -> None:
    stream = Stream([str(damaged)], raw_length=9, stride=8, seed=0, lanes=2)
    good = []
    with Loader(stream, Plan(2, 2, lanes=2), CAUSAL, workers=workers, prefetch=2) as loader:
        with pytest.raises(ShardError, match=r"00000\.tar: document 4 .* does not match its checksum"):
            for batch in loader:
                good.append(batch.step)
        assert good == list(range(len(good)))


def test_a_killed_worker_is_named(stream: Stream) -> None:
    loader = Loader(stream, plan(), CAUSAL, workers=1, prefetch=1)
    next(loader.start())
    (victim,) = loader.worker_pids
    os.kill(victim, signal.SIGKILL)
    with pytest.raises(RunError, match=rf"data worker 0 \(pid {victim}\) was killed by SIGKILL"):
        for _ in range(1000):
            next(loader)
    with pytest.raises(StopIteration):
        next(loader)
    loader.close()


def test_close_does_not_wait_for_a_worker_that_hangs(stream: Stream) -> None:
    loader = Loader(stream, plan(), CAUSAL, workers=1, prefetch=1)
    next(loader.start())
    stuck = loader.worker_pids[0]
    os.kill(stuck, signal.SIGSTOP)
    loader.close()
    assert not psutil.pid_exists(stuck) and loader.worker_pids == []


def test_workers_leave_signals_to_the_parent(pooled: Loader) -> None:
    pooled.start()
    next(pooled)
    for pid in pooled.worker_pids:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGUSR1)
    assert [next(pooled).step for _ in range(60)] == list(range(1, 61))


SCRIPT = """
    import sys, time
    from shardwright.data.loader import Loader
    from shardwright.data.order import Plan
    from shardwright.data.stream import Stream
    from shardwright.objective.causal import Causal, CausalConfig
    from shardwright.objective.setting import Setting

    if __name__ == "__main__":
        stream = Stream([sys.argv[1]], raw_length=33, stride=32, seed=0, lanes=16)
        loader = Loader(stream, Plan(8, 4, lanes=16), Causal(CausalConfig(), Setting(32)), workers=1).start()
        next(loader)
        print(*loader.worker_pids, flush=True)
        if sys.argv[2] == "stay":
            time.sleep(600)
        sys.stdin.readline()  # until its worker has been looked at
"""


@pytest.mark.faults
@pytest.mark.parametrize("ending", ["leave", "stay"])
def test_workers_end_with_their_parent(folder: Path, tmp_path: Path, ending: str) -> None:
    """A program that just ends is not held up by its workers; one that is killed leaves none behind."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(folder), ending]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        assert len(workers) == 1
        if ending == "stay":
            process.kill()
        else:
            process.stdin.write("\n")
            process.stdin.flush()
        assert process.wait(60) == (0 if ending == "leave" else -signal.SIGKILL)
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_close_stops_a_thread_that_waits_for_room(stream: Stream) -> None:
    loader = Loader(stream, plan(), CAUSAL, workers="thread", prefetch=1).start()
    next(loader)
    loader.close()
    loader.close()
    assert facts(next(loader.start()))[0] == 0
    loader.close()


def test_wrong_workers_are_refused(stream: Stream) -> None:
    for workers in (-1, "threads", 1.5):
        with pytest.raises(ConfigError, match="data.workers"):
            Loader(stream, plan(), CAUSAL, workers=workers)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_on_the_gpu(stream: Stream) -> None:
    loader = Loader(stream, plan(), CAUSAL, workers="thread", device="cuda").start()
    on_cpu = Loader(stream, plan(), CAUSAL).start()
    for _ in range(20):
        one, other = next(loader), next(on_cpu)
        assert {t.device.type for micro in one.micro_batches for t in micro.values()} == {"cuda"}
        assert facts(one) == facts(other)
    loader.close()


def test_to_device_keeps_cpu_tensors_as_they_are() -> None:
    tensors = {"x": torch.from_numpy(np.arange(3))}
    assert to_device(tensors, torch.device("cpu"))["x"] is tensors["x"]
    assert to_device(tensors, torch.device("meta"))["x"].device.type == "meta"
