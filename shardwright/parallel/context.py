"""Context parallelism: the ranks of one axis share each sequence, and attention sees all of it.

A row of T tokens is cut into 2c chunks, and rank r of c owns chunks r and 2c-1-r: an early and a late one, so that
causal attention costs every rank the same. A rank computes everything for its own rows alone; only keys and values
are gathered over the axis, in one collective a block (Llama 3, Grattafiori et al. 2024, section 3.3.2), and their
gradients reduce-scattered in the backward pass. The mask comes from the model, which is told where queries and keys
stand (`row_index`, `key_index`), so packed documents, grouped heads and any kind of positions work, on any device.

ring.py is the other way, for GPUs and rows without document masks: torch's ring attention, over the same rows.
Shapes: B batch, T tokens of a row, S keys (= T), H heads, K key heads, d head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardwright.config import ConfigError
from shardwright.parallel.collectives import gather

#: What attention has to know of every key of a row.
OF_KEYS = ("documents", "order", "token_types")


class ContextRows:
    """Which tokens of every row belong to rank `index` of `size`; ConfigError where `length` cannot be cut.

    `keys`: whether attention is to know where keys stand, for a mask of its own.
    """

    def __init__(self, size: int, index: int, length: int, *, keys: bool = True) -> None:
        if not fits_context(length, size):
            raise ConfigError(
                f"data.sequence_length={length}: parallel.context={size} cuts a sequence into {2 * size} equal chunks; "
                f"nearest that can be cut: data.sequence_length={nearest_length(length, size)}"
            )
        self.size, self.index, self.length, self.keys = size, index, length, keys
        edges = [number * length // (2 * size) for number in range(2 * size + 1)]
        self.spans = [(edges[chunk], edges[chunk + 1]) for chunk in own_chunks(size, index)]
        self.rows = torch.cat([torch.arange(*span) for span in self.spans])
        self.own_places = torch.full((length,), -1).index_copy_(0, self.rows, torch.arange(len(self.rows)))
        # The place in the row of each key that attention is given: ContextCore puts them back in their order.
        self.order = torch.arange(length)

    def slice(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Own rows of a batch of whole sequences ([B, T] each; [B] ones stay), and where queries and keys stand.

        What belongs to `places` in the row stays whole, with weights of zero where another rank has the place. Adds
        `row_index` [B, T/c] and, with `keys`, `key_index` [B, T] and, of each of OF_KEYS, `key_<name>` [B, T].
        """
        ids, placed = batch["input_ids"], self._placed(batch)
        own = {name: self._own(name, tensor) for name, tensor in batch.items() if name not in placed} | placed
        own["row_index"] = self.rows.to(ids.device).expand(ids.shape[0], -1)
        if not self.keys:
            assert "documents" not in batch, "documents need to know where keys stand"
            return own
        own["key_index"] = self.order.to(ids.device).expand(ids.shape[0], -1)
        return own | {f"key_{name}": batch[name] for name in OF_KEYS if name in batch}

    def _placed(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`places`, `labels` and `weights` [B, P] of every term that has places, counted in own rows."""
        found: dict[str, Tensor] = {}
        for term in [name.removesuffix("places") for name in batch if name.endswith("places")]:
            places = self.own_places.to(batch[f"{term}places"].device)[batch[f"{term}places"]]
            here = places >= 0
            found |= {f"{term}places": places.clamp(min=0), f"{term}weights": batch[f"{term}weights"] * here}
            found[f"{term}labels"] = batch[f"{term}labels"]
        return found

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.dim() < 2:
            return tensor
        if tensor.shape[1] != self.length:
            raise ValueError(f"{name} {list(tensor.shape)}: has no dim of {self.length} tokens to share out")
        return torch.cat([tensor[:, start:stop] for start, stop in self.spans], dim=1)


#: Arrays of an encoder's row as those of a row are named.
_OF_SOURCE = {
    "encoder_ids": "input_ids",
    "encoder_positions": "position_ids",
    "encoder_documents": "documents",
    "encoder_row_index": "row_index",
    "encoder_key_index": "key_index",
    "encoder_key_documents": "key_documents",
}


class PairRows:
    """`ContextRows` of an encoder-decoder, whose streams are of two lengths and cut each by itself."""

    def __init__(self, size: int, index: int) -> None:
        self.rows = cache(partial(ContextRows, size, index))

    def slice(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Own rows of both; see `ContextRows.slice`."""
        of_source, of_target = (self.rows(batch[name].shape[1]) for name in ("encoder_ids", "input_ids"))
        target = of_target.slice({name: x for name, x in batch.items() if name not in _OF_SOURCE})
        source = of_source.slice({_OF_SOURCE[name]: x for name, x in batch.items() if name in _OF_SOURCE})
        return target | {name: source[of_row] for name, of_row in _OF_SOURCE.items() if of_row in source}


def own_chunks(size: int, index: int) -> tuple[int, int]:
    """The early and the late chunk, of 2 x size, that rank `index` owns."""
    return index, 2 * size - 1 - index


def fits_context(length: int, size: int) -> bool:
    """Whether rows of `length` tokens can be shared out among `size` ranks."""
    return size == 1 or (length > 0 and length % (2 * size) == 0)


def nearest_length(length: int, size: int) -> int:
    """The row length next to `length` that `size` ranks can share; the longer one of two."""
    return max((length + size) // (2 * size), 1) * 2 * size


class ContextCore(nn.Module):
    """Stands where `inner` stood in an attention: gathers keys and values, then has `inner` attend chunk by chunk."""

    def __init__(self, inner: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.inner, self.mesh = inner, mesh
        self.size, self.index = mesh.size(), mesh.get_local_rank()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, *rest: Any) -> Tensor:
        """Own q [B, H, N, d], k and v [B, K, S/c, d]; mask [B, 1 or H, N, S], keys in order -> [B, H, N, d].

        N is T/c, the own tokens; with a second stream more where nothing is causal.

        S is T but in attention to another stream. Where no key is hidden there need not be a mask. `rest` is what
        else `inner` is told, of own queries and all keys in their order.
        """
        keys = self._gather(torch.stack([k, v]))
        if not causal:
            return self.inner(q, *torch.cat(keys, dim=3).unbind(0), mask, False, *rest)
        assert not rest, "told of whole rows"
        assert mask is not None, "own rows need their mask: give the model row_index and key_index"
        chunk, outputs = q.shape[2] // 2, []
        for part, place in enumerate(own_chunks(self.size, self.index)):
            rows = slice(part * chunk, (part + 1) * chunk)
            seen = place + 1  # later chunks are hidden anyway
            k, v = torch.cat(keys[:seen], dim=3).unbind(0)
            outputs.append(self.inner(q[:, :, rows], k, v, mask[:, :, rows, : seen * chunk], causal))
        return torch.cat(outputs, dim=2)

    def _gather(self, own: Tensor) -> list[Tensor]:
        """Own keys and values [2, B, K, S/c, d] -> those of each chunk of the row, in order; gradients are summed."""
        whole, chunk = gather(own.unsqueeze(0), 0, self.mesh.get_group()), own.shape[3] // 2
        early, late = zip(*(part.split(chunk, dim=3) for part in whole.unbind(0)), strict=True)
        return [*early, *reversed(late)]


class ContextWindow(nn.Module):
    """Stands where a convolution looks for the neighbours of its tokens: some of them are other ranks' tokens."""

    def __init__(self, inner: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.inner, self.mesh = inner, mesh

    def forward(self, x: Tensor, near: Tensor) -> Tensor:
        """Own x [B, T/c, I], near [B, T/c, N] -> [B, T/c, N, I], zeros where `near` says no."""
        chunk, size = x.shape[1] // 2, near.shape[-1]
        whole = gather(x.unsqueeze(0), 0, self.mesh.get_group())
        early, late = zip(*(part.split(chunk, dim=1) for part in whole.unbind(0)), strict=True)
        row = F.pad(torch.cat([*early, *reversed(late)], dim=1), (0, 0, size // 2, size - 1 - size // 2))
        places = own_chunks(self.mesh.size(), self.mesh.get_local_rank())
        parts = [row[:, place * chunk : (place + 1) * chunk + size - 1].unfold(1, size, 1) for place in places]
        return torch.cat(parts, dim=1).transpose(-1, -2) * near.unsqueeze(-1)


def apply_context(model: nn.Module, mesh: DeviceMesh) -> None:
    """Let every attention of `model` (any part of one) see the keys of all ranks of `mesh`, the 1-D context axis.

    To be called before blocks are compiled or wrapped; a mesh of one rank changes nothing.
    """
    assert mesh.ndim == 1, f"the context axis alone, not {mesh.mesh_dim_names}"
    if mesh.size() == 1:
        return
    replace_cores(model, lambda core: ContextCore(core, mesh))
    replace_cores(model, lambda window: ContextWindow(window, mesh), "window")


def replace_cores(model: nn.Module, build: Callable[[nn.Module], nn.Module], name: str = "core") -> None:
    """Put what `build` makes of the core of every attention in its place, or of another part by its name."""
    for module in list(model.modules()):
        core = getattr(module, name, None)
        if isinstance(core, nn.Module):
            assert not hasattr(core, "inner"), "applied twice"
            setattr(module, name, build(core))
