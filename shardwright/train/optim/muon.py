"""Muon: momentum, then the update's singular values brought to 1, for the hidden matrices of a model.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the scale of the update is that of Liu et al. 2025,
"Muon is scalable for LLM training". Embeddings, heads, norms and biases go by AdamW in the same optimizer.
Works on full logical matrices: q, k, v, gate and up are separate. Where they are spread over ranks, the momentum
stays so, and each rank brings some of the matrices together, does their products and sends the results back.
Shapes: [rows, columns], or [N, rows, columns] for N matrices of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardwright.parallel.logical import Logical
from shardwright.train.optim.groups import Named, build_decay_groups, build_group, is_orthogonalized
from shardwright.train.optim.guarded import guarded_adamw_, guarded_descend_
from shardwright.train.optim.spread import deal, logical_by_parameter
from shardwright.train.optim.state import build_adam_state, build_momentum_state

# Quintic whose repeated use sends singular values in (0, 1] near 1, within about 0.7..1.2 after 5 steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7
# AdamW's updates have a root mean square of 0.2 to 0.4; an orthogonal [rows, columns] one has
# 1/sqrt(max(rows, columns)). Scaled to 0.2, learning rate and weight decay of AdamW carry over.
UPDATE_RMS = 0.2
# Elements multiplied at once: on a CPU what its cache holds, elsewhere 128 MiB in bf16.
MOST_STACKED = {"cpu": 2**22}
MOST_STACKED_ELSEWHERE = 2**26


class Muon(torch.optim.Optimizer):
    """Muon on the groups labelled "matrices", AdamW on the others; see `build_groups`.

    matmul_dtype: number format of the Newton-Schulz products; None takes what the device is fast in
    (`pick_matmul_dtype`). Momentum and weights stay in the parameters' format. Group options read at every
    step: lr, momentum, nesterov, weight_decay (decoupled), and betas, eps for AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        matmul_dtype: torch.dtype | None = None,
        logical: Mapping[Tensor, Logical] | None = None,
    ) -> None:
        super().__init__(groups, {})
        self.matmul_dtype = matmul_dtype
        self.logical = logical_by_parameter(self.param_groups, logical)
        self._scratch = Scratch()
        for group in self.param_groups:
            build = build_momentum_state if group["label"] == "matrices" else build_adam_state
            for p in group["params"]:
                self.state[p] = build(p)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, or nothing at all where `found_inf` is 1."""
        assert closure is None and getattr(self, "grad_scale", None) is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if group["label"] == "matrices":
                self._step_matrices(group, params)
            else:
                self._step_adamw(group, params)

    def _step_matrices(self, group: dict[str, Any], params: list[Tensor]) -> None:
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        grads = [_grad(p) for p in params]
        guarded_descend_(buffers, grads, step=group["momentum"] - 1.0, decay=-1.0, found_inf=self.found_inf)
        logicals = [self.logical[p] for p in params]
        self._step_here(group, [p for p, whole in zip(params, logicals, strict=True) if whole.here])
        spread = [(p, logical) for p, logical in zip(params, logicals, strict=True) if not logical.here]
        if spread:
            self._step_dealt(group, [p for p, _ in spread], [logical for _, logical in spread])

    def _step_here(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Matrices that this rank alone holds, in full."""
        for indices in batch_by_shape(params):
            batch = [params[i] for i in indices]
            wanted = self._stack(batch)
            for p, out in zip(batch, wanted, strict=True):
                self._direction(group, p, out)
            self._orthogonalize_(wanted)
            self._descend(group, batch, wanted.unbind(), batch[0].shape)

    def _step_dealt(self, group: dict[str, Any], params: list[Tensor], logicals: list[Logical]) -> None:
        """Matrices that are spread over ranks, or held by several: each is the work of one of them."""
        for indices, dealing in deal(logicals, _most_stacked(params)):
            batch = [params[i] for i in indices]
            parts = {i: self._direction(group, batch[i], torch.empty_like(batch[i])) for i in dealing.needed}
            # Updates were rounded to the products' format, so less may travel; a format picked by each rank for
            # itself could differ.
            travels = self.matmul_dtype or batch[0].dtype
            wholes = dealing.collect(parts, batch[0].dtype)
            updates = dealing.scatter(self._orthogonal(wholes, travels), travels)
            for i, p in enumerate(batch):
                self._descend(group, [p], [updates[i].to(p.dtype)], dealing.logicals[i].shape)

    def _orthogonal(self, wholes: dict[int, Tensor], dtype: torch.dtype) -> dict[int, Tensor]:
        """Matrices by number orthogonalised, in `dtype`."""
        done: dict[int, Tensor] = {}
        keys, matrices = list(wholes), list(wholes.values())
        for indices in batch_by_shape(matrices):
            batch = [matrices[i] for i in indices]
            wanted = torch.stack(batch, out=self._stack(batch))
            self._orthogonalize_(wanted)
            copies = wanted.to(dtype, copy=True)
            done |= {keys[i]: one for i, one in zip(indices, copies, strict=True)}
        return done

    def _direction(self, group: dict[str, Any], p: Tensor, out: Tensor) -> Tensor:
        weight = group["momentum"] if group["nesterov"] else 1.0
        return torch.lerp(_grad(p), self.state[p]["momentum_buffer"], weight, out=out)

    def _stack(self, matrices: Sequence[Tensor]) -> Tensor:
        """Memory for [N, rows, columns], until the next call."""
        first = matrices[0]
        return self._scratch.take("wanted", (len(matrices), *first.shape), first.dtype, first.device)

    def _orthogonalize_(self, matrices: Tensor) -> None:
        orthogonalize_(matrices, self._matmul_dtype(matrices), self._scratch)

    def _matmul_dtype(self, like: Tensor) -> torch.dtype:
        return self.matmul_dtype or pick_matmul_dtype(like)

    def _descend(
        self, group: dict[str, Any], params: Sequence[Tensor], updates: Sequence[Tensor], shape: Sequence[int]
    ) -> None:
        """Apply the updates, or parts of them, of matrices of `shape`."""
        scale = UPDATE_RMS * math.sqrt(max(shape))
        # Decoupled decay is by lr alone, as AdamW's, hence the division.
        step, decay = group["lr"] * scale, group["weight_decay"] / scale
        guarded_descend_(params, updates, step=step, decay=decay, found_inf=self.found_inf)

    def _step_adamw(self, group: dict[str, Any], params: list[Tensor]) -> None:
        guarded_adamw_(
            params,
            [_grad(p) for p in params],
            [self.state[p] for p in params],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
            found_inf=self.found_inf,
        )


def build_groups(
    named: Named,
    *,
    lr: float,
    matrix_lr: float | None,
    weight_decay: float,
    decay_embeddings: bool,
    momentum: float,
    nesterov: bool,
    betas: tuple[float, float],
    eps: float,
) -> list[dict[str, Any]]:
    """Muon's groups: the hidden matrices (at `matrix_lr`, or `lr`), then the rest for AdamW at `lr`."""
    matrices = [(n, p) for n, p in named if is_orthogonalized(n, p)]
    rest = [(n, p) for n, p in named if not is_orthogonalized(n, p)]
    peak = lr if matrix_lr is None else matrix_lr
    muon = build_group("matrices", matrices, lr=peak, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov)
    adam = build_decay_groups(
        rest, lr=lr, weight_decay=weight_decay, decay_embeddings=decay_embeddings, betas=betas, eps=eps
    )
    return ([muon] if matrices else []) + adam


class Scratch:
    """Memory that a step writes again and again; on CPU kept, since fresh pages cost more than the arithmetic.

    A GPU's allocator keeps its own.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised contiguous tensor; the next one of the same name may lie in the same memory."""
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)
        size = math.prod(shape)
        kept = self._kept.get((what, dtype))
        if kept is None or kept.numel() < size:
            kept = self._kept[what, dtype] = torch.empty(size, dtype=dtype, device=device)
        return kept[:size].view(shape)


def orthogonalize_(matrices: Tensor, dtype: torch.dtype, scratch: Scratch | None = None) -> Tensor:
    """Bring the singular values of [N, rows, columns] near 1, in place, by products in `dtype`.

    For M = U S V^T it leaves U S' V^T with S' within about 0.7..1.2; singular values far below 1e-2 of the
    Frobenius norm stay smaller.
    """
    scratch = scratch or Scratch()
    # The norm is taken before rounding, so that no singular value starts above 1.
    matrices /= torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).clamp(min=EPS)
    x = scratch.take("x", tuple(matrices.shape), dtype, matrices.device).copy_(matrices)
    return matrices.copy_(newton_schulz(x, scratch))


def newton_schulz(x: Tensor, scratch: Scratch, steps: int = STEPS) -> Tensor:
    """x <- a x + (b G + c G^2) x with G = x x^T, `steps` times (from the right, G = x^T x, if x is tall).

    x: [N, rows, columns] of norm at most 1, overwritten. The result lies in `scratch`.
    """
    a, b, c = COEFFICIENTS
    number, rows, columns = x.shape
    tall, square = rows > columns, (number, min(rows, columns), min(rows, columns))
    gram = scratch.take("gram", square, x.dtype, x.device)
    polynomial = scratch.take("polynomial", square, x.dtype, x.device)
    other = scratch.take("other", (number, rows, columns), x.dtype, x.device)
    for _ in range(steps):
        torch.bmm(*((x.mT, x) if tall else (x, x.mT)), out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(x, *((x, polynomial) if tall else (polynomial, x)), beta=a, out=other)
        x, other = other, x
    return x


def batch_by_shape(params: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of matrices to multiply together: of one shape and bounded size.

    On CPU too: oneDNN runs a bf16 product of 512 x 512 on one thread, and a batch of them on all.
    """
    shapes: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(params):
        shapes.setdefault(tuple(p.shape), []).append(i)
    for shape, indices in shapes.items():
        size = max(1, _most_stacked(params) // math.prod(shape))
        yield from (indices[i : i + size] for i in range(0, len(indices), size))


def _most_stacked(params: Sequence[Tensor]) -> int:
    return MOST_STACKED.get(params[0].device.type, MOST_STACKED_ELSEWHERE)


def pick_matmul_dtype(parameter: Tensor) -> torch.dtype:
    """bf16 where the device multiplies it natively, else the parameter's own format (float64 always keeps it)."""
    if parameter.dtype != torch.float32:
        return parameter.dtype
    if parameter.device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if parameter.device.type == "cpu":
        found = torch.cpu.get_capabilities()
        return torch.bfloat16 if found.get("amx_bf16") or found.get("avx512_bf16") else torch.float32
    return torch.float32


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
