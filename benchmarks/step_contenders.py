"""One contender of step.py: a process that builds its model and then steps when it is told to.

`python step_contenders.py NAME JOB` (JOB is a `Job` as JSON), by this project's Python or by the peers'. All train the
same shape on the same random tokens, with AdamW (fused), clipping at 1.0 and no dropout, and do nothing but steps.
Shapes: N batches, B sequences, T tokens.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Channel, Pace

LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Shape:
    """A GPT-2 and its batch."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    length: int
    batch: int


@dataclass(frozen=True)
class Job:
    """What a contender is given."""

    shape: dict[str, int]
    precision: str
    device: str
    threads: int | None
    tokens: str  # .npy, int64 [N, B, T + 1]
    documents: str  # .npy, bool [N, B, T + 1]: a document begins here

    def load_tokens(self) -> torch.Tensor:
        """All batches, int64 [N, B, T + 1], on the device."""
        return torch.from_numpy(np.load(self.tokens)).to(self.device)


def waiter(device: str) -> Any:
    """What waits until the device has done its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


# ------------------------------------------------------------------------------------------------- ours


def config_of(job: Job) -> dict[str, Any]:
    """This project's config of the job."""
    shape = Shape(**job.shape)
    return {
        "model": {
            "family": "gpt2",
            "vocab_size": shape.vocab_size,
            "layers": shape.layers,
            "width": shape.width,
            "heads": shape.heads,
            "max_length": shape.length,
        },
        "objective": {"name": "causal"},
        "data": {"path": "unused", "sequence_length": shape.length},
        "batch": {"sequences": shape.batch, "micro": shape.batch},
        "train": {"steps": 1_000_000, "clip": CLIP, "device": job.device, "threads": job.threads},
        "precision": {"compute": job.precision},
        "optimizer": {"name": "adamw", "lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "betas": list(BETAS)},
    }


def our_batches(job: Job, *, masked: bool) -> list[dict[str, torch.Tensor]]:
    """The random tokens as the loader would pack them, with or without document boundaries."""
    from shardwright.data.stream import Sequences
    from shardwright.objective.causal import Causal, CausalConfig
    from shardwright.objective.setting import Setting

    setting = Setting(Shape(**job.shape).length, mask_documents=masked, reset_positions=masked)
    objective = Causal(CausalConfig(), setting)
    batches = []
    for tokens, begins in zip(np.load(job.tokens), np.load(job.documents), strict=True):
        lengths = np.full(len(tokens), tokens.shape[1])
        rows, starts = np.nonzero(begins) if masked else np.empty((2, 0), np.int64)
        arrays = objective.corrupt(Sequences(np.arange(len(tokens)), tokens, lengths, rows, starts))
        batches.append({name: torch.from_numpy(array).to(job.device) for name, array in arrays.items()})
    return batches


def our_steps(job: Job, *, masked: bool) -> tuple[dict[str, float], Iterator[torch.Tensor]]:
    """Facts of this project's model, and its own steps, built as `train` builds them; each gives its outcome."""
    from shardwright.model.count import num_flops, num_parameters
    from shardwright.parallel.mesh import build_world
    from shardwright.train.build import build_step
    from shardwright.train.settings import read_config

    config: Any = read_config(config_of(job))
    world = build_world(job.device, job.threads)
    step, batches = build_step(config, world), our_batches(job, masked=masked)
    facts = {
        "parameters": num_parameters(config.model)["total"],
        "flops_per_token": num_flops(config.model, Shape(**job.shape).length).model,
    }

    def steps() -> Iterator[torch.Tensor]:
        for number, batch in enumerate(itertools.cycle(batches)):
            step.accumulate([batch], torch.tensor(number, device=world.device))
            yield step.update(1.0)

    return facts, steps()


def run_ours(job: Job, channel: Channel, *, masked: bool) -> None:
    """This project's step."""
    facts, steps = our_steps(job, masked=masked)
    pace = Pace(channel, waiter(job.device))
    pace.begin(**facts)
    for outcome in steps:
        pace.tick(outcome[0].item)


def run_profile(job: Job, channel: Channel) -> None:
    """Where the time of this project's step goes: the share of each operation by itself, greatest first."""
    _, steps = our_steps(job, masked=False)
    for _ in range(3):
        next(steps)
    channel.send()
    channel.receive()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if job.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        next(steps)
        waiter(job.device)()
    field = "self_device_time_total" if job.device == "cuda" else "self_cpu_time_total"
    times = {event.key: float(getattr(event, field)) for event in profile.key_averages()}
    whole = sum(times.values()) or 1.0
    shares = sorted(((spent / whole, name) for name, spent in times.items()), reverse=True)
    channel.send(shares=[(name, share) for share, name in shares])
    channel.receive()


# ------------------------------------------------------------------------------------- Hugging Face's GPT-2


def build_huggingface(shape: Shape) -> Any:
    """transformers' GPT-2 of this shape, without dropout."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.length,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class Rows(torch.utils.data.Dataset):
    """The random tokens as a dataset that a Trainer takes, over and over."""

    def __init__(self, tokens: torch.Tensor, repeats: int = 1_000) -> None:
        self.tokens, self.repeats = tokens[..., :-1].flatten(0, 1).cpu(), repeats

    def __len__(self) -> int:
        return len(self.tokens) * self.repeats

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.tokens[index % len(self.tokens)]
        return {"input_ids": row, "labels": row}


def run_trainer(job: Job, channel: Channel, *, compiled: bool) -> None:
    """transformers.Trainer with its default fused AdamW; the turns are a callback after each step."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    shape = Shape(**job.shape)
    model, pace = build_huggingface(shape), Pace(channel, waiter(job.device))
    losses: list[torch.Tensor] = []

    class Turns(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            pace.begin(parameters=model.num_parameters())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            pace.tick(lambda: float(losses[-1]))

    class WithLoss(Trainer):
        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            losses[:] = [super().training_step(*arguments, **named)]
            return losses[0]

    arguments = TrainingArguments(
        output_dir="unused",
        per_device_train_batch_size=shape.batch,
        max_steps=100_000,
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        max_grad_norm=CLIP,
        lr_scheduler_type="constant",
        bf16=job.precision == "bf16",
        use_cpu=job.device == "cpu",
        torch_compile=compiled,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=job.device == "cuda",
    )
    WithLoss(model, arguments, train_dataset=Rows(job.load_tokens()), callbacks=[Turns()]).train()


def run_accelerate(job: Job, channel: Channel, *, compiled: bool) -> None:
    """The loop of Accelerate's documentation around the same model."""
    from accelerate import Accelerator

    shape = Shape(**job.shape)
    accelerator = Accelerator(
        mixed_precision="bf16" if job.precision == "bf16" else "no",
        cpu=job.device == "cpu",
        dynamo_backend="inductor" if compiled else "no",
    )
    model = build_huggingface(shape)
    loader = torch.utils.data.DataLoader(Rows(job.load_tokens()), batch_size=shape.batch)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    pace = Pace(channel, waiter(job.device))
    pace.begin(parameters=sum(p.numel() for p in model.parameters()))
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        pace.tick(loss.item)


def adamw(model: torch.nn.Module) -> torch.optim.AdamW:
    """torch's AdamW with its fused kernel."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, betas=BETAS, fused=True)


# ------------------------------------------------------------------------------------------------ LitGPT


def build_litgpt(shape: Shape) -> Any:
    """LitGPT's model in GPT-2's shape. It has no learned positions: rotary ones, in its default share, stand in."""
    from litgpt import GPT, Config

    config = Config(
        name="gpt2-shape",
        block_size=shape.length,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        intermediate_size=4 * shape.width,
        parallel_residual=False,
        attn_bias=True,
        bias=True,
        mlp_class_name="GptNeoxMLP",
        gelu_approximate="tanh",
    )
    return GPT(config)


def run_litgpt(job: Job, channel: Channel, *, compiled: bool) -> None:
    """The step of LitGPT's `pretrain`: Fabric, its chunked loss, a tied head; compiled is pretrain's default."""
    import lightning
    from litgpt.utils import chunked_cross_entropy

    shape = Shape(**job.shape)
    precision = "bf16-mixed" if job.precision == "bf16" else "32-true"
    fabric = lightning.Fabric(accelerator=job.device, devices=1, precision=precision)
    model = build_litgpt(shape)
    model.apply(model._init_weights)
    model.transformer.wte.weight = model.lm_head.weight
    parameters = sum(p.numel() for p in model.parameters())
    model = fabric.setup(torch.compile(model) if compiled else model)
    optimizer = fabric.setup_optimizers(adamw(model))
    pace = Pace(channel, waiter(job.device))
    pace.begin(parameters=parameters)
    for tokens in cycled(job):
        loss = chunked_cross_entropy(model(tokens[:, :-1].contiguous()), tokens[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=CLIP)
        optimizer.step()
        optimizer.zero_grad()
        pace.tick(loss.item)


def cycled(job: Job) -> Iterator[torch.Tensor]:
    """Batches int64 [B, T + 1], endless."""
    return itertools.cycle(job.load_tokens())


# ----------------------------------------------------------------------------------------- the ceiling


def run_products(job: Job, channel: Channel) -> None:
    """No model: the best rate of large square products, and the products of one step in their own shapes."""
    from shardwright.hardware import measure_gemm
    from shardwright.parallel.mesh import build_world

    world, dtype = build_world(job.device, job.threads), FORMATS[job.precision]
    shape = Shape(**job.shape)
    channel.send()
    while True:
        request = channel.receive()
        square = measure_gemm(world.device, dtype, request["seconds"])
        channel.send(square=square, own=own_products(shape, dtype, job.device))


def own_products(shape: Shape, dtype: torch.dtype, device: str) -> float:
    """FLOP/s over the matrix products of one step's blocks and head, each run alone at its best, attention left out."""
    rows, wide = shape.batch * shape.length, shape.width
    weights = [(wide, 3 * wide), (wide, wide), (wide, 4 * wide), (4 * wide, wide)]
    times = [(shape.layers, product_seconds(rows, *size, dtype, device)) for size in weights]
    times.append((1, product_seconds(rows, wide, shape.vocab_size, dtype, device)))
    flops = 6 * rows * wide * (12 * wide * shape.layers + shape.vocab_size)
    return flops / sum(count * seconds for count, seconds in times)


def product_seconds(rows: int, inner: int, outer: int, dtype: torch.dtype, device: str) -> float:
    """Best seconds of forward and both backward products of a linear layer, into memory that is kept."""
    wait = waiter(device)
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(outer, inner, device=device).to(dtype)
    y, dx, dw = x @ weight.t(), torch.empty_like(x), torch.empty_like(weight)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(x, weight.t(), out=y)
        torch.mm(y, weight, out=dx)
        torch.mm(y.t(), x, out=dw)
        wait()
        best = min(best, time.perf_counter() - begin)
    return best


CONTENDERS: dict[str, Callable[[Job, Channel], None]] = {
    "ours": partial(run_ours, masked=False),
    "ours-masked": partial(run_ours, masked=True),
    "trainer": partial(run_trainer, compiled=False),
    "trainer-compiled": partial(run_trainer, compiled=True),
    "accelerate": partial(run_accelerate, compiled=False),
    "accelerate-compiled": partial(run_accelerate, compiled=True),
    "litgpt": partial(run_litgpt, compiled=False),
    "litgpt-compiled": partial(run_litgpt, compiled=True),
    "products": run_products,
    "profile": run_profile,
}


def main() -> None:
    """Run the contender that the command line names."""
    name, job = sys.argv[1], Job(**json.loads(sys.argv[2]))
    channel = Channel()
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    CONTENDERS[name](job, channel)


if __name__ == "__main__":
    main()
