"""torch's ring attention between context ranks, in place of gathering keys: `parallel.ring`.

`torch.distributed.tensor.experimental.context_parallel`, a prototype of torch's, stands in for SDPA while it is open:
a rank attends its own keys, then those of the other ranks as they come, and merges the parts by their logsumexp (Liu
et al. 2023, Ring Attention). Causal attention of whole rows needs no mask there, so that the flash kernel serves it
and nothing of [T/c, T] exists; by torch's default keys and values still arrive in one all-gather, beside which own
keys are attended, and their gradients go round. Its order is ours (ContextRows), which the first pass checks.

What is silent in torch is an error here. Outside the open context SDPA sees own keys alone, and a backward pass there
gives wrong gradients without a word: RingCore refuses both. Only the flash kernel is let in. Blocks are not compiled:
torch tests graphs of that one function alone. Beside context.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn.attention import SDPBackend, sdpa_kernel

from shardwright.config import ConfigError
from shardwright.parallel.context import ContextRows, replace_cores


class Ring:
    """The ranks of `mesh`, the 1-D context axis, that hold `rows`; `open` has to stand around all passes."""

    def __init__(self, mesh: DeviceMesh, rows: ContextRows, device: torch.device) -> None:
        self.mesh, self.rows, self.device = mesh, rows, device
        self.is_open, self._checked = False, False

    @contextmanager
    def open(self) -> Iterator[None]:
        """For forward passes (evaluation as well) and everything that goes back through them; not to be nested.

        SDPA of the whole process is torch's ring attention meanwhile. RuntimeError in SDPA where flash does not serve:
        other formats than bf16 and fp16, wide heads, old devices. torch keeps 1 kB of host memory each time.
        """
        assert not self.is_open, "opened twice"
        # torch asks for a tensor to share out; the numbers of the rows show in which order it does.
        order = torch.arange(self.rows.length, device=self.device)
        shared = context_parallel(self.mesh, buffers=[order], buffer_seq_dims=[0], no_restore_buffers={order})
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), shared:
            self._check(order)
            self.is_open = True
            try:
                yield
            finally:
                self.is_open = False

    def _check(self, order: Tensor) -> None:
        if self._checked:  # once: it reads the device
            return
        if order.tolist() != self.rows.rows.tolist():
            raise RuntimeError(
                f"torch {torch.__version__} shares rows out in another order than context ranks here: use "
                "parallel.ring=false"
            )
        self._checked = True

    def check_open(self) -> None:
        """RuntimeError unless `open` stands around."""
        if not self.is_open:
            raise RuntimeError("a pass outside of Ring.open: torch would attend to this rank's own keys alone")


class RingCore(nn.Module):
    """Stands where `inner` stood in an attention: lets it attend causally, with what torch has put in SDPA's place."""

    def __init__(self, inner: nn.Module, ring: Ring) -> None:
        super().__init__()
        self.inner, self.ring = inner, ring

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Own q [B, H, T/c, d], k and v [B, K, T/c, d], no mask -> [B, H, T/c, d]."""
        assert causal and mask is None, "the ring takes no mask: cut rows with keys=False"
        self.ring.check_open()
        y: Tensor = self.inner(q, k, v, None, True)
        if y.requires_grad:
            y.register_hook(lambda _: self.ring.check_open())
        return y


def check_device(device: torch.device) -> None:
    """ConfigError where torch's ring attention has no kernel."""
    if device.type != "cuda":
        raise ConfigError(
            f"parallel.ring: torch's ring attention has GPU kernels alone, and this is a {device.type}; "
            "use parallel.ring=false"
        )


def apply_ring(model: nn.Module, ring: Ring) -> None:
    """Let every attention of `model` go through `ring`, whose mesh has several ranks."""
    assert ring.mesh.ndim == 1 and ring.mesh.size() > 1
    replace_cores(model, lambda core: RingCore(core, ring))
