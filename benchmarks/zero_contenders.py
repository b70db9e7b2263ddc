"""What the ranks of zero.py run: this project's step and DeepSpeed's over the same model, side by side in one process.

Both train the same GPT-2 of this project (so that kernels are the same) from the same weights on the same
micro-batches; what differs is who shards, gathers, reduces and updates. All contenders live in the same processes and
take turns there, so that none waits beside another one that computes.
"""

from __future__ import annotations

import gc
import logging
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.counting import Memory, Traffic
from shardwright.config import Config
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.parallel.mesh import build_world, keep_host_memory
from shardwright.train.build import build_objective, build_step
from shardwright.train.settings import read_config
from shardwright.train.stages import Batch, LossModel

MICRO_BATCHES = 4
RATE = 1e-3
CHECKED = 4  # steps whose losses are compared; two of them warm up before times are taken


@dataclass(frozen=True)
class Job:
    """What all contenders train."""

    layers: int
    width: int
    vocab_size: int
    length: int
    batch: int
    precision: str
    steps: int  # of a turn
    rounds: int

    @property
    def block(self) -> int:
        """Parameters of a block's matrices."""
        return 12 * self.width**2

    @property
    def size(self) -> int:
        """Parameters, about."""
        return self.layers * self.block + (self.vocab_size + self.length) * self.width


class Contender(Protocol):
    """One engine at one stage."""

    def step(self, batches: Sequence[Batch]) -> float:
        """A whole optimizer step; the mean loss of this rank's micro-batches, or of all ranks'."""

    def close(self) -> None:
        """Let go of what would outlive it."""


class Ours:
    """This project's step."""

    def __init__(self, job: Job, stage: int) -> None:
        self.config = config_of(job, stage)
        self.world = build_world("cpu", 1, self.config.parallel)
        self.inner = build_step(self.config, self.world)
        self.number = 0

    def step(self, batches: Sequence[Batch]) -> float:
        """All micro-batches at once."""
        self.number += 1
        self.inner.accumulate(batches, torch.tensor(self.number))
        return float(self.inner.update(1.0)[0])

    def close(self) -> None:
        """Nothing is left."""

    def watch(self, tracker: Memory) -> None:
        """Have what is made from now on named: what lives when a micro-batch begins are gradients of those before."""
        model = self.inner.stages.models[0]
        objective: Any = model.objective
        inner = objective.loss

        def loss(*args: Any, **kwargs: Any) -> Any:
            tracker.making = "logits"
            found = inner(*args, **kwargs)
            tracker.making = "activations"
            return found

        objective.loss = loss
        tracker.making = "activations"
        self.name(tracker)
        model.register_forward_pre_hook(lambda *_: tracker.name_unknown("gradients"), prepend=True)

    def name(self, tracker: Memory) -> None:
        """Name masters and moments, once they are there."""
        masters: Any = self.inner.masters
        tracker.name("masters", masters.parts.values())
        tracker.name("optimizer", [t for state in self.inner.optimizer.state.values() for t in state.values()])


class Mean(nn.Module):
    """The model with the mean loss of a micro-batch."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        config = config_of(job, 0)
        model = build_model(config.model)  # type: ignore[arg-type]
        apply_init(model, config.model, config.train.seed)  # type: ignore[arg-type]
        self.inner = LossModel(model, build_objective(config), config.train.seed)

    def forward(self, batch: Batch) -> Tensor:
        """0-dim."""
        self.inner.begin(torch.tensor(0), {"lm": 1 / batch["weights"].sum()})
        return self.inner(batch["input_ids"], **batch).sum()


class DeepSpeed:
    """DeepSpeed's engine, with torch's fused AdamW as its optimizer.

    small: buckets of one block and nothing gathered ahead or for longer, which takes the least memory. Otherwise its
    own defaults, with buckets of the whole model: those of 500 million elements that it takes by itself hold the same,
    but are allocated in full. wide: bf16 gradients are summed up over ranks in float32, as ours are; by default it
    sends them in bf16.
    """

    def __init__(self, job: Job, stage: int, *, small: bool = False, wide: bool = False) -> None:
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel(logging.ERROR)
        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        model = Mean(job).train()
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        )
        config = settings_of(job, stage, small=small) | ({"communication_data_type": "fp32"} if wide else {})
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(self, batches: Sequence[Batch]) -> float:
        """One micro-batch after the other; the engine knows which is the last."""
        total = torch.zeros(())
        for batch in batches:
            loss = self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach()
        return float(total) / len(batches)

    def close(self) -> None:
        """Its hooks."""
        self.engine.destroy()


def settings_of(job: Job, stage: int, *, small: bool) -> dict[str, Any]:
    """DeepSpeed's config."""
    bucket = job.block if small else job.size
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if small and stage == 3:
        names = ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")
        zero |= {**{f"stage3_{name}": bucket for name in names}, "stage3_param_persistence_threshold": 0}
    return {
        "train_micro_batch_size_per_gpu": job.batch,
        "gradient_accumulation_steps": MICRO_BATCHES,
        "gradient_clipping": 1.0,
        "zero_optimization": zero,
        "bf16": {"enabled": job.precision == "bf16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "wall_clock_breakdown": False,
        "steps_per_print": 10**9,
    }


BUILD: dict[str, Callable[[Job, int], Contender]] = {
    "ours": Ours,
    "deepspeed": DeepSpeed,
    "deepspeed-small": lambda job, stage: DeepSpeed(job, stage, small=True),
    "deepspeed-wide": lambda job, stage: DeepSpeed(job, stage, wide=True),
}


# ----------------------------------------------------------------------------------------- what ranks are asked


def measure_memory(job: Job, names: Sequence[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Peak bytes of this rank's tensors in each contender's second step, and its first losses, by `who/stage`."""
    batches = start(job)
    found = {}
    for who, stage in names:
        tracker = Memory()
        with tracker:
            contender = BUILD[who](job, stage)
            if isinstance(contender, Ours):
                contender.watch(tracker)
            losses = [contender.step(batches)]
            tracker.peak = tracker.live
            losses.append(contender.step(batches))
        figures: dict[str, Any] = {"peak": tracker.peak}
        if isinstance(contender, Ours):
            contender.name(tracker)
            figures["parts"] = tracker.at_peak()
        losses += [contender.step(batches) for _ in range(CHECKED - len(losses))]
        found[f"{who}/{stage}"] = {**figures, "losses": losses}
        contender.close()
        del contender, tracker
        gc.collect()
    return found


def measure_traffic(job: Job, names: Sequence[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Calls and bytes of collectives in each contender's third step, by collective."""
    batches = start(job)
    found = {}
    for who, stage in names:
        contender, tracker = BUILD[who](job, stage), Traffic()
        losses = [contender.step(batches) for _ in range(2)]
        with tracker:
            contender.step(batches)
        sent = {collective: list(amount) for (_, collective), amount in tracker.amounts.items()}
        found[f"{who}/{stage}"] = {"sent": sent, "losses": losses}
        contender.close()
    return found


def measure_time(job: Job, names: Sequence[tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """Seconds a step of each contender in each round, between barriers, and what of it this rank computed."""
    batches = start(job)
    contenders = {f"{who}/{stage}": BUILD[who](job, stage) for who, stage in names}
    found: dict[str, dict[str, Any]] = {}
    for name, contender in contenders.items():
        found[name] = {"losses": [contender.step(batches) for _ in range(2)], "seconds": [], "busy": []}
    for _ in range(job.rounds):
        for name, contender in contenders.items():
            dist.barrier()
            begin, busy = time.perf_counter(), time.process_time()
            for _ in range(job.steps):
                contender.step(batches)
            busy = time.process_time() - busy
            dist.barrier()
            found[name]["seconds"].append((time.perf_counter() - begin) / job.steps)
            found[name]["busy"].append(busy / job.steps)
    return {**found, "collectives": time_collectives(job)}


def time_collectives(job: Job, calls: int = 20) -> dict[str, float]:
    """Median seconds of a call of each collective on a block's float32 gradients."""
    ranks = dist.get_world_size()
    whole = torch.zeros(job.block // ranks * ranks)
    part = whole.new_empty(len(whole) // ranks)
    ways: dict[str, Callable[[], Any]] = {
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(part, whole),
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, part),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(calls):
        for name, way in ways.items():
            dist.barrier()
            begin = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in found.items()}


def start(job: Job) -> list[Batch]:
    """A process group, memory kept as a run of ours keeps it (for all), and this rank's micro-batches."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    keep_host_memory()
    dist.init_process_group("gloo")
    return batches_of(job, dist.get_rank())


def config_of(job: Job, stage: int) -> Config:
    """Our config of a job."""
    raw = {
        "run": "none",
        "model": {
            "family": "gpt2",
            "layers": job.layers,
            "width": job.width,
            "heads": max(job.width // 64, 1),
            "max_length": job.length,
            "vocab_size": job.vocab_size,
        },
        "objective": {"name": "causal"},
        "data": {"sequence_length": job.length},
        "batch": {"sequences": job.batch * MICRO_BATCHES, "micro": job.batch},
        "precision": {"compute": job.precision},
        "optimizer": {"lr": RATE, "betas": [0.9, 0.95], "weight_decay": 0.0},
        "parallel": {"zero": stage},
        "train": {"steps": 10, "compile": False, "device": "cpu", "threads": 1, "clip": 1.0},
    }
    return read_config(raw, [])


def batches_of(job: Job, rank: int) -> list[Batch]:
    """The micro-batches of a rank, the same in every step."""
    generator = torch.Generator().manual_seed(rank)
    made = []
    for _ in range(MICRO_BATCHES):
        tokens = torch.randint(0, job.vocab_size, (job.batch, job.length + 1), generator=generator)
        made.append(
            {
                "input_ids": tokens[:, :-1].contiguous(),
                "labels": tokens[:, 1:].contiguous(),
                "weights": torch.ones(job.batch, job.length),
                "sequence": torch.arange(job.batch),
            }
        )
    return made
