"""Fine-tuning a part of a model, in four ways, and cheaper weights: of 8 or 4 bits, or zero.

    freeze.py    which parameters are trained      prompt.py  virtual tokens before a row: prompt tuning and p-tuning
    lora.py      low-rank additions to matrices    prefix.py  virtual keys and values in every block
    quantize.py  weights of few bits, by torchao   prune.py   weights that are zero, and stay it
    build.py     a config's adapter put into a model, and what its parameters begin with

Stands on config and model. A module is exchanged for one of the same name that keeps its parameters, so that the names
of the model's own tensors stay as they are; an adapter's stand beside them. The files that peft knows are interop's
matter (interop/peft.py).
"""

from shardwright.adapt.build import (
    adapted_shapes,
    adapter_names,
    apply_adapter,
    first_value,
    num_adapter,
    trained_names,
    virtual_parts,
    virtual_vectors,
)
from shardwright.adapt.freeze import apply_freeze

__all__ = [
    "adapted_shapes",
    "adapter_names",
    "apply_adapter",
    "apply_freeze",
    "first_value",
    "num_adapter",
    "trained_names",
    "virtual_parts",
    "virtual_vectors",
]
