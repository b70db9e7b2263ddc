"""First values of every parameter, by the name of a scheme and the name of the parameter.

Each parameter has a generator of its own, keyed by (seed, name), so its value does not depend on the layout, on
the order of creation, or on which other parameters exist. Norms start at one and biases at zero in all schemes.
Shapes: D width, F feed-forward width, H heads, d head width, V vocabulary; a weight is [out, in].
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from shardwright.model.transformer import TransformerConfig

# (config, last part of the name such as "q" or "tokens", shape) -> standard deviation.
Scheme = Callable[[TransformerConfig, str, torch.Size], float]

EMBEDDINGS = ("tokens", "positions", "token_types", "table")
RESIDUAL = ("out", "down")  # what adds to the residual stream


def _gpt2(config: TransformerConfig, part: str, shape: torch.Size) -> float:
    """N(0, 0.02), what enters the residual stream divided by sqrt(2 layers) (Radford et al. 2019)."""
    return config.init_std / (math.sqrt(2 * config.layers) if part in RESIDUAL else 1.0)


def _bert(config: TransformerConfig, part: str, shape: torch.Size) -> float:
    """N(0, 0.02) throughout (Devlin et al. 2019)."""
    return config.init_std


def _xavier(config: TransformerConfig, part: str, shape: torch.Size) -> float:
    """Variance 2 / (in + out), drawn uniformly (Glorot & Bengio 2010); vectors of tokens N(0, 1 / D)."""
    return config.width**-0.5 if part in EMBEDDINGS else math.sqrt(2 / (shape[0] + shape[1]))


def _he(config: TransformerConfig, part: str, shape: torch.Size) -> float:
    """Variance 2 / in (He et al. 2015); vectors of tokens N(0, 1 / D)."""
    return config.width**-0.5 if part in EMBEDDINGS else math.sqrt(2 / shape[1])


def _t5(config: TransformerConfig, part: str, shape: torch.Size) -> float:
    """Variance 1 / in, embeddings N(0, 1), biases of distances N(0, 1 / D) (Raffel et al. 2020, Mesh TensorFlow).

    q is divided by sqrt(d) where the scores are not. (Hugging Face draws a free head from N(0, 1), which gives logits
    of the size of sqrt(D); the paper's program has a linear layer like any other.)
    """
    if part in EMBEDDINGS:
        return 1.0
    if part.endswith("relative"):
        return config.width**-0.5
    unscaled = part == "q" and config.score_scale == 1.0
    return (shape[1] * config.head_width if unscaled else shape[1]) ** -0.5


def _small(config: TransformerConfig, part: str, shape: torch.Size) -> float:
    """sqrt(2 / 5D), what enters the residual stream 2 / (layers sqrt(D)) (Nguyen & Salazar 2019; Wang 2021)."""
    if part in RESIDUAL:
        return 2 / (config.layers * math.sqrt(config.width))
    return math.sqrt(2 / (5 * config.width))


def _fan_in(config: TransformerConfig, part: str, shape: torch.Size) -> float:
    """Variance 1 / in, what enters the residual stream 0, embeddings and a free head N(0, init_std)."""
    if part in RESIDUAL:
        return 0.0
    return config.init_std if part in (*EMBEDDINGS, "head") else shape[1] ** -0.5


SCHEMES: dict[str, Scheme] = {
    "gpt2": _gpt2,
    "bert": _bert,
    "xavier": _xavier,
    "he": _he,
    "t5": _t5,
    "small": _small,
    "fan_in": _fan_in,
}


def initial_value(config: TransformerConfig, name: str, shape: torch.Size, seed: int) -> Tensor:
    """The float32 value on the CPU that parameter `name` starts from, whole."""
    *_, part, leaf = name.split(".")
    if leaf == "bias":
        return torch.zeros(shape)
    if part.endswith("norm"):
        return torch.ones(shape)
    if leaf == "scale":  # of sinusoidal positions (Hua et al. 2022)
        return torch.full(shape, config.width**-0.5)
    if len(shape) == 1:  # vectors that are no bias: Transformer-XL's u and v, XLNet's first query
        return torch.empty(shape).normal_(std=config.init_std, generator=build_generator(seed, name))
    std = SCHEMES[config.init](config, part, shape)
    value = torch.empty(shape)
    if config.init == "xavier" and part not in EMBEDDINGS:
        return value.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=build_generator(seed, name))
    return value.normal_(std=std, generator=build_generator(seed, name))


@torch.no_grad()
def apply_init(model: nn.Module, config: TransformerConfig, seed: int) -> None:
    """Set every parameter of `model` from its name and `seed`."""
    for name, parameter in model.named_parameters():
        parameter.copy_(initial_value(config, name, parameter.shape, seed))


def build_generator(seed: int, name: str) -> torch.Generator:
    """The numbers that a parameter of this name is drawn from."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
