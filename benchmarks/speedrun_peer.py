"""The peer of speedrun.py: Hugging Face's GPT-2 by its usual recipe, trained by transformers.Trainer for some minutes.

`python speedrun_peer.py RECIPE` (a `Recipe` as JSON), by the peers' Python. Documents are joined into one stream, cut
into blocks that are shuffled each epoch; the schedule is cosine after a warm-up, and follows the clock, so that it ends
with the budget exactly (the usual one counts steps, which nobody knows beforehand). The clock starts with the first
step. Writes the model to `output` and prints what it did as its last line.
"""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import say


@dataclass(frozen=True)
class Recipe:
    """Model, data and the usual settings."""

    tokens: str  # .npy, integers [N]
    output: str
    seconds: float
    vocab_size: int
    end_of_document: int
    device: str
    lr: float
    layers: int
    width: int
    heads: int
    length: int
    batch: int
    dropout: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05  # of the budget
    seed: int = 0


class Blocks(torch.utils.data.Dataset):
    """The stream cut into blocks [T], which are their own labels."""

    def __init__(self, tokens: np.ndarray, length: int) -> None:
        blocks = tokens[: len(tokens) // length * length].reshape(-1, length)
        self.blocks = torch.from_numpy(blocks.astype(np.int64))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.blocks[index], "labels": self.blocks[index]}


def build_model(recipe: Recipe) -> Any:
    """transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=recipe.vocab_size,
        n_positions=recipe.length,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        resid_pdrop=recipe.dropout,
        embd_pdrop=recipe.dropout,
        attn_pdrop=recipe.dropout,
        bos_token_id=recipe.end_of_document,
        eos_token_id=recipe.end_of_document,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def factor_at(progress: float, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    if progress < warmup:
        return progress / warmup
    done = min((progress - warmup) / (1 - warmup), 1.0)
    return 0.5 * (1 + math.cos(math.pi * done))


def build_clock(recipe: Recipe) -> Any:
    """A callback that turns the clock into the schedule and stops the run when its time is over."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        begin, steps, seconds = 0.0, 0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.monotonic()

        def on_step_begin(self, *_: Any, **given: Any) -> None:
            progress = (time.monotonic() - self.begin) / recipe.seconds
            # A first step at zero would be lost.
            factor = max(factor_at(progress, recipe.warmup), 0.01)
            for group in given["optimizer"].param_groups:
                group["lr"] = recipe.lr * factor

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps, self.seconds = self.steps + 1, time.monotonic() - self.begin
            if self.steps % 20 == 0:
                say(f"Hugging Face: step {self.steps}, {self.seconds:.0f} of {recipe.seconds:.0f} s")
            control.should_training_stop = self.seconds >= recipe.seconds

    return Clock()


def main() -> None:
    """Train and save."""
    from transformers import Trainer, TrainingArguments, set_seed

    recipe = Recipe(**json.loads(sys.argv[1]))
    set_seed(recipe.seed)
    model, clock = build_model(recipe), build_clock(recipe)
    arguments = TrainingArguments(
        output_dir=recipe.output,
        per_device_train_batch_size=recipe.batch,
        max_steps=1_000_000,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        bf16=True,
        use_cpu=recipe.device == "cpu",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=recipe.device == "cuda",
        seed=recipe.seed,
    )
    Trainer(model, arguments, train_dataset=Blocks(np.load(recipe.tokens), recipe.length), callbacks=[clock]).train()
    model.save_pretrained(recipe.output)
    tokens = clock.steps * recipe.batch * recipe.length
    print(json.dumps({"steps": clock.steps, "tokens": tokens, "seconds": clock.seconds}))


if __name__ == "__main__":
    main()
