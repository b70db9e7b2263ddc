"""Device memory of one training process, by category, from the config alone.

This engine's own formula: float32 masters and gradients (4 + 4 bytes a parameter), compute copies
(2 more in bf16 and fp16), the optimizer's moments, the activations that backward needs, and the one
chunk of logits that exists at a time. The allocator's fragmentation is not in it.
"""

from __future__ import annotations

from shardwright.model.count import activation_bytes, num_parameters
from shardwright.model.transformer import TransformerConfig

# float32 moments a parameter. Muon keeps one for matrices of blocks and two for the rest; Adafactor a row and a column.
MOMENTS = {"adamw": 2.0, "adam": 2.0, "sgd": 1.0, "adafactor": 0.0}
CHUNK_ROWS = 2048  # of objective.cross_entropy
CHUNK_COPIES = 3  # logits, log-probabilities and their gradient in float32


def step_memory(
    model: TransformerConfig,
    *,
    length: int,
    micro_batch: int,
    value_bytes: int,
    optimizer: str,
    recompute: str | int = "none",
) -> dict[str, int]:
    """Bytes by category of a step over micro-batches of `micro_batch` sequences of `length` tokens."""
    parts = num_parameters(model)
    total, tokens = parts["total"], micro_batch * length
    memory = {
        "masters": 4 * total,
        "gradients": 4 * total,
        "compute copies": 0 if value_bytes == 4 else value_bytes * total,
        "optimizer": int(4 * _moments(optimizer, parts) * total),
        "activations": _activations(model, tokens, value_bytes, recompute),
        "logits": CHUNK_COPIES * 4 * min(tokens, CHUNK_ROWS) * model.vocab_size + 4 * model.width * model.vocab_size,
    }
    return {**memory, "total": sum(memory.values())}


def _moments(optimizer: str, parts: dict[str, int]) -> float:
    if optimizer == "muon":
        matrices = parts["attention"] + parts["mlp"]
        return 2 - matrices / parts["total"]
    return MOMENTS[optimizer]


def _activations(model: TransformerConfig, tokens: int, value_bytes: int, recompute: str | int) -> int:
    every = recompute if isinstance(recompute, int) else 1
    repeated = 0 if recompute in ("none", "selective") else -(-model.layers // every)
    kept = activation_bytes(model, tokens, value_bytes=value_bytes)
    inputs = activation_bytes(model, tokens, value_bytes=value_bytes, recomputed=True)
    working = kept if repeated else 0  # one block at a time is whole again in the backward pass
    return (model.layers - repeated) * kept + repeated * inputs + working
