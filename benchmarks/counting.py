"""What a step sends and what it holds, counted on one rank: bytes of collectives by mesh axis, peak bytes of tensors.

Dispatch modes: they see every operator that runs within them, whoever calls it, and so count this project and its
peers alike. (Of torch's own, CommDebugMode fails where a module is called twice, and MemTracker is private.) Used by
tests/parallel/test_communication.py, tests/estimate/test_memory.py and zero.py here.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shardwright.estimate.communication import Amount, plus

# By operator, of torch's both libraries of collectives; one that is not here is counted under its own name.
_NAMES = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "all_gather_into_tensor": "all-gather",
    "all_gather_into_tensor_out": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "reduce_scatter_tensor": "reduce-scatter",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "all_reduce": "all-reduce",
    "all_reduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "all_to_all_single": "all-to-all",
    "broadcast_": "broadcast",
    "recv_": "receive",
}
# What the first tensors that an operator is given are, where it is one of FSDP's.
_CATEGORIES = {
    "chunk_cat": ("gradients",),
    "_reduce_scatter_base_": ("gradients", "buffers"),
    "_allgather_base_": ("buffers", "buffers"),
    "allreduce_": ("gradients",),
}
_SILENT = {"wait_tensor", "_wrap_tensor_autograd"}


class Traffic(TorchDispatchMode):
    """Counts the collectives of this rank by the ranks they run over; groups of one, which send nothing, are left out.

    `amounts`: calls and bytes of whole tensors, by ranks (`0,2`) and collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.amounts: dict[tuple[str, str], Amount] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # it takes itself apart, and comes back with plain tensors
        answer = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet._qualified_op_name.startswith(("_c10d_functional::", "c10d::")) and packet.__name__ not in _SILENT:
            self._count(packet.__name__, tree_leaves((args, kwargs, answer)))
        return answer

    def _count(self, operator: str, leaves: list[Any]) -> None:
        group = _group_of(leaves)
        if group.size() > 1:
            size = max((leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)), default=0)  # a barrier has none
            plus(self.amounts, name_of(group), _NAMES.get(operator, operator), 1, size)


def name_of(group: dist.ProcessGroup) -> str:
    """Its ranks, `0,2`."""
    return ",".join(map(str, dist.get_process_group_ranks(group)))


def _group_of(leaves: Iterable[Any]) -> dist.ProcessGroup:
    """The group among an operator's arguments: an object in one library, the last of its texts in the other."""
    texts = []
    for leaf in leaves:
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf)
        if isinstance(leaf, str):
            texts.append(leaf)
    return dist.distributed_c10d._resolve_process_group(texts[-1])


class Memory(TorchDispatchMode):
    """Live bytes of tensors, by storage: of those that operators make within it, and of those that it is told of.

    What kernels use inside themselves is not in it, nor what gloo copies. `peak` is the most there ever was, and
    `at_peak` says of what categories: `name` gives storages theirs, also afterwards; one without a name is of the
    category that was `making` when it was first seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.making = "rest"
        self._made: dict[int, str] = {}
        self._sizes: dict[int, int] = {}  # bytes by storage, numbered in the order in which they were seen
        self._numbers: dict[int, int] = {}  # of storages that live, by address of their object
        self._events: list[tuple[int, int]] = []  # (number, bytes gained or lost)
        self._names: dict[int, str] = {}

    def __enter__(self) -> Memory:
        self._resize = torch.UntypedStorage.resize_
        tracker = self

        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            answer = tracker._resize(storage, size)
            tracker._names[tracker._see(storage)] = "gathered"  # FSDP's way to take memory and to give it back
            return answer

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        super().__enter__()
        return self

    def __exit__(self, *rest: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*rest)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented
        answer = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "fsdp"):
            for leaf, category in zip(args, _CATEGORIES.get(func.overloadpacket.__name__, ()), strict=False):
                self.name(category, tree_leaves(leaf), weak=True)
            if func.namespace == "fsdp":
                self.name("buffers", tree_leaves((kwargs or {}).get("out", ())), weak=True)
        if not func.is_view:  # a view of what was not seen is of something that a backend made for itself
            for leaf in tree_leaves(answer):
                if isinstance(leaf, Tensor):
                    self._see(leaf.untyped_storage())
        return answer

    def name(self, category: str, tensors: Iterable[Tensor], *, weak: bool = False) -> None:
        """Say what the storages of tensors are, and that they are there; a `weak` name replaces none."""
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            number = self._see(local.untyped_storage())
            self._names[number] = self._names.get(number, category) if weak else category

    def name_unknown(self, category: str) -> None:
        """Everything that lives and has no name yet is of this category."""
        for number in self._numbers.values():
            self._names.setdefault(number, category)

    def at_peak(self) -> dict[str, int]:
        """Bytes by category at the peak."""
        sizes: Counter[int] = Counter()
        live, best = 0, Counter[int]()
        for number, change in self._events:
            live += change
            sizes[number] += change
            if live == self.peak:
                best = sizes.copy()
        found: Counter[str] = Counter()
        for number, size in best.items():
            found[self._names.get(number, self._made[number])] += size
        return {name: size for name, size in found.items() if size}

    def _see(self, storage: torch.UntypedStorage) -> int:
        address = storage._cdata
        if address not in self._numbers:
            number = self._numbers[address] = len(self._sizes)
            self._sizes[number], self._made[number] = 0, self.making
            weakref.finalize(storage, self._forget, address)
        number = self._numbers[address]
        self._change(number, storage.nbytes() - self._sizes[number])
        return number

    def _forget(self, address: int) -> None:
        number = self._numbers.pop(address)
        self._change(number, -self._sizes[number])

    def _change(self, number: int, change: int) -> None:
        if change:
            self._sizes[number] += change
            self._events.append((number, change))
            self.live += change
            self.peak = max(self.peak, self.live)
