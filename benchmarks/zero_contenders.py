"""What the ranks of zero.py run: this project's step and DeepSpeed's over the same model, side by side in one process.

Both train the same GPT-2 of this project (so that kernels are the same) from the same weights on the same
micro-batches; what differs is who shards, gathers, reduces and updates. All contenders live in the same processes and
take turns there, so that none waits beside another one that computes.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.counting import Memory
from shardwright.config import Config
from shardwright.model.count import num_parameters
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.parallel.mesh import World, build_world
from shardwright.train.build import build_objective, build_step
from shardwright.train.settings import read_config
from shardwright.train.stages import Batch, LossModel

MICRO_BATCHES = 4
RATE = 1e-3


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


class Contender(Protocol):
    """One engine at one stage."""

    def step(self, batches: Sequence[Batch]) -> float:
        """A whole optimizer step; the mean loss of this rank's micro-batches, or of all ranks'."""


class Ours:
    """This project's step."""

    def __init__(self, job: Job, stage: int) -> None:
        config = config_of(job, stage)
        self.world = build_world("cpu", 1, config.parallel)
        self.inner = build_step(config, self.world)
        self.number = 0

    def step(self, batches: Sequence[Batch]) -> float:
        """All micro-batches at once."""
        self.number += 1
        self.inner.accumulate(batches, torch.tensor(self.number))
        return float(self.inner.update(1.0)[0])


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
    """DeepSpeed's engine, with torch's fused AdamW as its optimizer."""

    def __init__(self, job: Job, stage: int, bucket: int) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed

        deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
        model = Mean(job).train()
        zero = {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "stage3_max_live_parameters": bucket,
            "stage3_max_reuse_distance": bucket,
            "stage3_param_persistence_threshold": 0,
            "overlap_comm": False,
        }
        settings = {
            "train_micro_batch_size_per_gpu": job.batch,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "gradient_clipping": 1.0,
            "zero_optimization": zero,
            "bf16": {"enabled": job.precision == "bf16"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "wall_clock_breakdown": False,
            "steps_per_print": 10**9,
        }
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
        )
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)

    def step(self, batches: Sequence[Batch]) -> float:
        """One micro-batch after the other; the engine knows which is the last."""
        total = 0.0
        for batch in batches:
            loss = self.engine(batch)
            self.engine.backward(loss)
            self.engine.step()
            total += float(loss.detach())
        return total / len(batches)


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
