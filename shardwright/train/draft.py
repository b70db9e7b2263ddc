"""ELECTRA's stages: the first one drafts, by its generator, what all of them then judge.

Beside stages.py, whose `LossModel` it specialises. The generator with its head, its loss and the drawing belong to the
stage of the embedding, so tied tables never part. Its loss does not travel: it hangs on the activation that leaves the
stage, and the backward pass that comes through there starts its own (as with Megatron's auxiliary losses); its value is
kept for `Stages` to add. What the last stage is to say of each token travels as a channel more beside the activations,
0 or 1 and so exact in every format. One process runs the same code. Shapes: B batch, T tokens (t of them between
stages, where sequence parallelism cuts them), P places, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from shardwright.config import ConfigError
from shardwright.model.dropout import mix, token_keys, uniform
from shardwright.model.electra import Electra
from shardwright.model.transformer import Inputs, LanguageModel
from shardwright.objective.draw import draw
from shardwright.objective.heads import Heads, at_places
from shardwright.objective.objective import Objective
from shardwright.objective.replaced import Replaced
from shardwright.train.stages import Batch, LossModel

_DRAW = 0xE1EC72A  # tells these numbers from others of the same place


class DraftModel(LossModel):
    """`LossModel` of an `Electra` under the objective `replaced`; activations between stages are [B, t, D + 1]."""

    def forward(self, x: Tensor, **batch: Tensor) -> Tensor:
        """See `LossModel`."""
        self.passes += 1
        inputs = self.inputs(batch)
        if self.first:
            filled, replaced, loss = self._draft(inputs, batch)
            hidden = _Attach.apply(self.model.hidden(inputs._replace(input_ids=filled)), loss * self.factor)
            beside = self.own_tokens(replaced)
        else:
            hidden, beside = self.model.hidden(inputs, x[..., :-1]), x[..., -1].detach()
        if not self.last:
            return torch.cat([hidden, beside.unsqueeze(-1).to(hidden.dtype)], dim=-1)
        zero = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        judged = {**batch, "masked_sum": zero, "replaced_labels": self.all_tokens(beside)}
        return self.sums(hidden, Heads(None, None, self.model.other_heads()), judged)

    def border(self, shapes: Mapping[str, torch.Size]) -> tuple[int, int, int]:
        """See `LossModel`; a channel more."""
        rows, tokens, width = super().border(shapes)
        return rows, tokens, width + 1

    def _draft(self, inputs: Inputs, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(ids with drawn tokens [B, T], 1 where they are not the text's [B, T], the generator's scaled sum)."""
        objective, model = cast(Replaced, self.objective), cast(Electra, self.model)
        hidden, heads = self.localize(model.draft(inputs), Heads(self.vocabulary(), model.transform))
        loss = objective.generator_loss(hidden, heads, batch, self.scales)
        terms = dict.fromkeys(objective.terms, torch.zeros_like(loss)) | {"masked": loss}
        sums = self.stacked(terms)
        self.early = sums.detach() if self.early is None else self.early + sums.detach()
        assert heads.vocabulary is not None and heads.transform is not None
        with torch.no_grad():
            chosen = heads.transform(at_places(hidden, batch["places"]))
            drawn = draw(chosen, heads.vocabulary, place_keys(inputs, batch["places"]), uniform)
        return *objective.replace(batch, drawn), sums.sum()


def place_keys(inputs: Inputs, places: Tensor) -> Tensor:
    """int64 [B, P]: a key for each place, of (seed, step, sequence number, place in the row) alone."""
    assert inputs.sequence is not None, "batches name their sequences"
    index = inputs.row_index
    if index is None:
        index = torch.arange(inputs.input_ids.shape[1], device=places.device)
    return mix(token_keys(inputs.seed, inputs.step, inputs.sequence, index).gather(1, places) ^ _DRAW)


class _Attach(torch.autograd.Function):
    """`x` itself; the backward pass that goes through it starts one from `loss` too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return outer[0], one


def build_loss_model(
    model: LanguageModel, objective: Objective, seed: int, *, first: bool = True, last: bool = True
) -> LossModel:
    """The stage of a model with its objective; ConfigError where the two do not go together."""
    drafts, replaced = isinstance(model, Electra), isinstance(objective, Replaced)
    if replaced and not (drafts and cast(Electra, model).config.generator.layers):
        raise ConfigError(
            "objective.name=replaced: needs a generator; use model.family=electra with generator_layers > 0"
        )
    kind = DraftModel if replaced else LossModel
    return kind(model, objective, seed, first=first, last=last)
