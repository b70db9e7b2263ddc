"""What ranks run for test_context.py: a model whose sequences are shared, and the same model in one process."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import Inputs, LanguageModel
from shardwright.parallel.context import ContextRows, apply_context
from shardwright.parallel.recompute import apply_recompute

V, ROWS, LENGTH = 61, 3, 32
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"family": "gpt2"},
    "llama": {"family": "llama", "kv_heads": 2},
    "modern": {"family": "llama", "kv_heads": 1, "qk_norm": True, "logit_softcap": 15.0},
    "sinusoidal": {"family": "gpt2", "positions": "sinusoidal", "norm_placement": "post"},
    "deberta": {"family": "deberta", "relative_span": 10, "layers": 3},
    "deberta_v2": {"family": "deberta_v2", "buckets": 8, "convolution": 5, "layers": 3},
    "albert": {"family": "albert", "embed_width": 16, "sentence_head": False},
    "crammed": {"family": "crammed"},
    "modernbert": {"family": "modernbert", "layers": 3, "window": 6, "mlp_width": 48},
}


def make(shape: str, dtype: torch.dtype, **fields: Any) -> LanguageModel:
    """A small model with weights large enough that everything matters."""
    small = {"vocab_size": V, "layers": 2, "width": 32, "heads": 4, "max_length": 64, "init": "fan_in"}
    raw = {**small, **SHAPES[shape], **fields}
    model = build_model(FAMILIES[raw["family"]].config.model_validate(raw))
    apply_init(model, model.config, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.to(dtype)


def whole_batch(packed: bool, length: int = LENGTH) -> dict[str, Tensor]:
    """Whole rows; `packed` ones hold documents whose bounds lie anywhere, also across ranks."""
    generator = torch.Generator().manual_seed(length)
    shape = (ROWS, length)
    batch = {
        "input_ids": torch.randint(0, V, shape, generator=generator),
        "labels": torch.randint(0, V, shape, generator=generator),
        "weights": torch.rand(shape, generator=generator).round(decimals=2),
        "sequence": torch.tensor([5, 1 << 40, 7]),
    }
    if not packed:
        return batch
    starts = torch.rand(shape, generator=generator) < 0.15
    starts[:, 0] = True
    index = torch.arange(length).expand(shape)
    batch["documents"] = starts.cumsum(1).int()
    batch["position_ids"] = index - torch.where(starts, index, 0).cummax(1).values
    return batch


class Loss(nn.Module):
    """A model with the part of the mean loss that the given rows have."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor], count: float) -> Tensor:
        """0-dim, in the wider of float32 and the model's dtype."""
        names = ("input_ids", "position_ids", "documents", "sequence", "row_index", "key_index", "key_documents")
        inputs = Inputs(**{name: batch[name] for name in names if name in batch}, step=3, seed=11)
        logits = self.model.logits(self.model.hidden(inputs))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
        return (losses * batch["weights"].flatten()).sum() / count


def build_mesh() -> DeviceMesh:
    """All ranks on one context axis."""
    dist.init_process_group("gloo")
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("context",))


class Case(NamedTuple):
    """What is compared."""

    shape: str
    packed: bool
    fields: dict[str, Any] = {}
    compiled: bool = False
    recompute: str = "none"
    wrong: bool = False  # documents of keys are those of another row: the comparison has to notice


def compare(case: Case, dtypes: list[torch.dtype]) -> dict[torch.dtype, tuple[float, float, int]]:
    """By dtype: relative errors of the loss and of all gradients, summed over ranks, against one process; graphs."""
    mesh, batch = build_mesh(), whole_batch(case.packed)
    own = ContextRows(mesh.size(), mesh.get_local_rank(), LENGTH).slice(batch)
    if case.wrong:
        own["key_documents"] = own["key_documents"].roll(1, 0)
    count = float(batch["weights"].sum())
    results = {}
    for dtype in dtypes:
        spread, alone = make(case.shape, dtype, **case.fields), make(case.shape, dtype, **case.fields)
        apply_context(spread, mesh)
        graphs = apply_blocks(spread, case.compiled, case.recompute)
        found, expected = Loss(spread)(own, count), Loss(alone)(batch, count)
        found.backward()
        expected.backward()
        total, value = found.detach().double(), float(expected.detach())
        dist.all_reduce(total)
        results[dtype] = (abs(float(total) - value) / abs(value), gradient_error(spread, alone), graphs.frame_count)
    return results


def apply_blocks(model: LanguageModel, compiled: bool, recompute: str) -> CompileCounterWithBackend:
    """Recomputation and compilation in their order; what counts the graphs."""
    graphs = CompileCounterWithBackend("aot_eager")
    blocks = list(model.blocks.values())
    apply_recompute(blocks, recompute, compiled=False)
    if compiled:
        torch._dynamo.reset()
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=graphs)  # type: ignore[method-assign]
    apply_recompute(blocks, recompute, compiled=True)
    return graphs


def gradient_error(spread: nn.Module, alone: nn.Module) -> float:
    """The largest error of a parameter's gradient, summed over ranks, in norms of the whole gradient.

    Not of its own norm: the gradient of a key's bias is zero but for rounding.
    """
    errors, norms = [], []
    for (name, p), (other, q) in zip(spread.named_parameters(), alone.named_parameters(), strict=True):
        assert name == other
        assert p.grad is not None and q.grad is not None, name
        summed = p.grad.double()
        dist.all_reduce(summed)
        errors.append((summed - q.grad).norm())
        norms.append(q.grad.double().norm())
    return float(torch.stack(errors).max() / torch.stack(norms).norm())


def evaluate(shape: str) -> float:
    """The largest difference of logits without gradients, own rows against the same rows of one process."""
    mesh = build_mesh()
    spread, alone = make(shape, torch.float32).eval(), make(shape, torch.float32).eval()
    apply_context(spread, mesh)
    batch = whole_batch(packed=True, length=24)
    rows = ContextRows(mesh.size(), mesh.get_local_rank(), 24)
    own = rows.slice(batch)
    names = ("input_ids", "position_ids", "documents")
    with torch.no_grad():
        mine = spread.hidden(
            Inputs(*(own[n] for n in names), **{n: own[n] for n in ("row_index", "key_index", "key_documents")})
        )
        whole = alone.hidden(Inputs(*(batch[n] for n in names)))
    return float((mine - whole[:, rows.rows]).abs().max())


class Collectives(TorchDispatchMode):
    """Counts collectives by name. (torch's CommDebugMode fails where a module is called twice, as the core is.)"""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet._qualified_op_name.startswith(("_c10d_functional::", "c10d::")):
            self.counts[packet.__name__] += 1
        return func(*args, **(kwargs or {}))


def count_collectives() -> dict[str, int]:
    """Collectives of a forward and a backward pass of a two-block model, by phase and name."""
    mesh = build_mesh()
    model = make("llama", torch.float32)
    apply_context(model, mesh)
    own = ContextRows(mesh.size(), mesh.get_local_rank(), 16).slice(whole_batch(packed=True, length=16))
    with Collectives() as forward:
        value = Loss(model)(own, 1.0)
    with Collectives() as backward:
        value.backward()
    found = {"forward": forward.counts, "backward": backward.counts}
    quiet = ("wait_tensor", "_wrap_tensor_autograd")
    return {f"{phase} {op}": n for phase, counts in found.items() for op, n in counts.items() if op not in quiet}


def names_of_cores() -> list[str]:
    """Classes of the cores of a model after `apply_context` over all ranks; a part without blocks is left alone."""
    mesh, model = build_mesh(), make("gpt2", torch.float32)
    apply_context(model, mesh)
    assert model.embed is not None
    apply_context(model.embed, mesh)
    return [type(block.attention.core).__name__ for block in model.blocks.values()]  # type: ignore[union-attr]
