"""Crammed BERT, which transformers lacks, against its authors' formulas written out, and their count of parameters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.model.count import num_parameters
from shardwright.model.families import FAMILIES
from tests.interop.masked import CLOSE, build_ours, check_packing, ids


def plain_logits(weights: dict[str, Tensor], tokens: Tensor, layers: int, heads: int) -> Tensor:
    """Embedding, scaled sinusoids, norm; x + attention(norm(x)), x + glu(norm(x)); norm; product with the embedding.

    No bias but those of norms.
    """

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-12)

    table = weights["embed.tokens.weight"]
    length, width = tokens.shape[1], table.shape[1]
    angles = torch.arange(length).unsqueeze(1) * torch.exp(
        torch.arange(0, width, 2) * (-torch.log(torch.tensor(1e4)) / width)
    )
    sinusoids = torch.zeros(length, width)
    sinusoids[:, 0::2], sinusoids[:, 1::2] = angles.sin(), angles.cos()
    x = norm(table[tokens] + weights["embed.positions.scale"] * sinusoids, "embed.norm")
    for n in range(layers):
        y = norm(x, f"blocks.{n}.attention_norm")
        q, k, v = ((y @ weights[f"blocks.{n}.attention.{part}.weight"].T).unflatten(-1, (heads, -1)).transpose(1, 2)
                   for part in "qkv")  # fmt: skip
        y = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, -1) @ v
        x = x + y.transpose(1, 2).flatten(2) @ weights[f"blocks.{n}.attention.out.weight"].T
        y = norm(x, f"blocks.{n}.mlp_norm")
        up, gate = (y @ weights[f"blocks.{n}.mlp.{part}.weight"].T for part in ("up", "gate"))
        x = x + (F.gelu(gate) * up) @ weights[f"blocks.{n}.mlp.down.weight"].T
    return norm(x, "final_norm") @ table.T


def test_logits_are_the_formulas() -> None:
    ours, tokens = build_ours({"family": "crammed"}), ids(2, 19)
    weights = dict(ours.named_parameters())
    found, expected = ours(tokens)["logits"], plain_logits(weights, tokens, 3, 4)
    torch.testing.assert_close(found, expected, **CLOSE)
    gradients = [torch.autograd.grad(x.square().mean(), list(weights.values())) for x in (found, expected)]
    for name, mine, plain in zip(weights, *gradients, strict=True):
        torch.testing.assert_close(mine, plain, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_documents() -> None:
    check_packing(build_ours({"family": "crammed"}))


def test_size_is_that_of_the_authors_model() -> None:
    """16 blocks of 4 D^2 and 3 D x 2 D, their norms, the embedding of 32,768 tokens with its norm, a scale, a norm."""
    config = FAMILIES["crammed"].config.model_validate({"size": "base", "vocab_size": 32768})
    width = 768
    block = 4 * width**2 + 3 * width * 2 * width + 4 * width
    assert num_parameters(config)["total"] == 16 * block + 32768 * width + 2 * width + 1 + 2 * width
