"""The peer of cram.py: Hugging Face's BERT by its usual recipe, pre-trained for some minutes, or fine-tuned.

`python cram_peer.py JOB` (a `Pretraining` or a `Tuning` as JSON), by the peers' Python. Both go by transformers'
Trainer: BertForMaskedLM of random weights on rows of `[CLS] text [SEP]`, grouped and shuffled each epoch, masked anew
each time by DataCollatorForLanguageModeling; then BertForSequenceClassification on what that came to. The schedule of
the first is linear after a warm-up and follows the clock, so that it ends with the budget exactly (the usual one counts
steps, which nobody knows beforehand). The clock starts with the first step, whose time (compiling) is no part of the
schedule. Each writes its model to `output` and prints what it did as its last line.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import say

MASKED = 0.15


@dataclass(frozen=True)
class Pretraining:
    """Model, data and the usual settings."""

    rows: str  # .npy, integers [N, T], special tokens included
    tokenizer: str  # tokenizer.json that has the special tokens
    specials: dict[str, str]  # their spellings by role: mask_token, ...
    output: str
    seconds: float | None  # None counts steps, and keeps no model
    steps: int | None
    lr: float
    layers: int
    width: int
    heads: int
    batch: int
    threads: int
    bf16: bool
    compiled: bool
    dropout: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: float = 0.05  # of the budget
    seed: int = 0


@dataclass(frozen=True)
class Tuning:
    """A pre-trained model, rows with classes and the usual settings."""

    model: str
    rows: str  # .npz: input_ids and attention_mask [N, T], labels [N]
    output: str
    steps: int
    batch: int
    lr: float
    warmup: float  # of the steps
    threads: int
    bf16: bool
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    seed: int = 0


class Rows(torch.utils.data.Dataset):
    """Rows of arrays, by their names."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: array[index].tolist() for name, array in self.arrays.items()}


def factor_at(progress: float, warmup: float) -> float:
    """Learning-rate factor: linear warm-up, then linear to zero."""
    return progress / warmup if progress < warmup else max(1 - progress, 0.0) / (1 - warmup)


def build_clock(job: Pretraining) -> Any:
    """A callback that turns the clock into the schedule, stops the run when its time is over, and measures speed."""
    from transformers import TrainerCallback

    budget = job.seconds or math.inf

    class Clock(TrainerCallback):
        begin, startup, steps, seconds = 0.0, 0.0, 0, 0.0

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begin = time.monotonic()

        def on_step_begin(self, *_: Any, **given: Any) -> None:
            elapsed = time.monotonic() - self.begin - self.startup
            progress = 0.0 if math.isinf(budget) else elapsed / max(budget - self.startup, 1e-9)
            # A first step at zero would be lost.
            factor = max(factor_at(progress, job.warmup), 0.01)
            for group in given["optimizer"].param_groups:
                group["lr"] = job.lr * factor

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.steps, self.seconds = self.steps + 1, time.monotonic() - self.begin
            if self.steps == 1:
                self.startup = self.seconds
            if self.steps % 100 == 0:
                say(f"Hugging Face: step {self.steps}, {self.seconds:.0f} of {budget:.0f} s")
            control.should_training_stop |= self.seconds >= budget

        @property
        def steps_per_s(self) -> float:
            return (self.steps - 1) / max(self.seconds - self.startup, 1e-9)

    return Clock()


def usual_arguments(job: Pretraining | Tuning, **more: Any) -> Any:
    """Trainer's settings that both jobs share."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=job.output,
        per_device_train_batch_size=job.batch,
        learning_rate=job.lr,
        weight_decay=job.weight_decay,
        adam_beta1=job.betas[0],
        adam_beta2=job.betas[1],
        max_grad_norm=1.0,
        bf16=job.bf16,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_drop_last=True,
        dataloader_pin_memory=False,
        seed=job.seed,
        **more,
    )


def build_tokenizer(job: Pretraining) -> Any:
    """What the collator masks with: our vocabulary, its special tokens known."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=job.tokenizer, **job.specials)


def build_model(job: Pretraining, tokenizer: Any, length: int) -> Any:
    """transformers' BERT of random weights."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=job.width,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        intermediate_size=4 * job.width,
        max_position_embeddings=length,
        hidden_dropout_prob=job.dropout,
        attention_probs_dropout_prob=job.dropout,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForMaskedLM(config)


def pretrain(job: Pretraining) -> dict[str, Any]:
    """Train and save; what it did."""
    from transformers import DataCollatorForLanguageModeling, Trainer

    ids, tokenizer = np.load(job.rows), build_tokenizer(job)
    model, clock = build_model(job, tokenizer, ids.shape[1]), build_clock(job)
    special = np.isin(ids, tokenizer.all_special_ids).astype(np.int64)
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASKED)
    more = {"max_steps": job.steps or 1_000_000, "lr_scheduler_type": "constant", "torch_compile": job.compiled}
    rows = Rows(input_ids=ids, special_tokens_mask=special)
    arguments = usual_arguments(job, **more)
    Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[clock]).train()
    if job.seconds is not None:
        model.save_pretrained(job.output)
    tokens = clock.steps * job.batch * ids.shape[1]
    return {"steps": clock.steps, "tokens": tokens, "seconds": clock.seconds, "steps_per_s": clock.steps_per_s}


def tune(job: Tuning) -> dict[str, Any]:
    """Fine-tune and save; what it did."""
    from transformers import BertForSequenceClassification, Trainer

    model = BertForSequenceClassification.from_pretrained(job.model, num_labels=2)
    more = {"max_steps": job.steps, "lr_scheduler_type": "linear", "warmup_steps": round(job.warmup * job.steps)}
    with np.load(job.rows) as rows:
        Trainer(model, usual_arguments(job, **more), train_dataset=Rows(**rows)).train()
    model.save_pretrained(job.output)
    return {"steps": job.steps}


def main() -> None:
    """Do the job."""
    from transformers import set_seed

    given = json.loads(sys.argv[1])
    job = Tuning(**given) if "model" in given else Pretraining(**given)
    torch.set_num_threads(job.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    set_seed(job.seed)
    found = tune(job) if isinstance(job, Tuning) else pretrain(job)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
