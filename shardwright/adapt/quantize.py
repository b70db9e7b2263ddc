"""Weights in 8 or 4 bits through torchao: what quantises them, and training that rounds them as the export will.

Weight-only and symmetric: a group of neighbouring inputs of a row shares a scale. Fake quantisation rounds weights in
every forward pass and lets gradients through as if it had not (Jacob et al. 2018); masters and checkpoints hold the
weights as they are. Beside interop, under train, which applies it and writes the export.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from shardwright.config import ConfigError

#: Inputs that share a scale where nothing is said; None is all of a row.
GROUPS: dict[str, int | None] = {"int8": None, "int4": 32}
NEEDED = "takes torchao, which is not installed; pip install 'shardwright[export]'"


def group_of(number_format: str, group: int | None) -> int | None:
    """Inputs that share a scale."""
    return GROUPS[number_format] if group is None else group


def build_torchao_config(number_format: str, group: int | None) -> Any:
    """torchao's config of such weights, as transformers' TorchAoConfig takes it; it runs on every device.

    int8 has kernels of its own. So has int4, but on GPUs alone and for bfloat16: the form that opens everywhere keeps
    each 4-bit value in a byte.
    """
    with _quiet():
        from torchao.quantization import Int8WeightOnlyConfig, PerGroup, PerRow

    if number_format == "int8":
        return Int8WeightOnlyConfig(granularity=PerRow() if group is None else PerGroup(group))
    return _build_intx_config(number_format, group)


def _build_intx_config(number_format: str, group: int | None) -> Any:
    """The same values, in the form that fake quantisation has too."""
    with _quiet():
        from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup

    granularity = PerAxis(0) if group is None else PerGroup(group)
    return IntxWeightOnlyConfig(getattr(torch, number_format), granularity)


def rounded(weight: Tensor, number_format: str, group: int | None) -> Tensor:
    """A weight [out, in] as an export holds it, in its own dtype: quantised and taken back."""
    with _quiet():
        from torchao.quantization import quantize_

    shell = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta"))
    shell[0].weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    quantize_(shell, build_torchao_config(number_format, group))
    return plain(shell[0].weight)


def is_quantized(tensor: Tensor) -> bool:
    """Whether it is one of torchao's."""
    return type(tensor) not in (Tensor, nn.Parameter)


def plain(tensor: Tensor) -> Tensor:
    """What a tensor of torchao's stands for; any other as it is."""
    return tensor.dequantize() if is_quantized(tensor) else tensor.detach()


def apply_fake_quantization(blocks: Iterable[nn.Module], number_format: str, group: int | None) -> None:
    """Have every linear layer of these blocks compute with rounded weights, in place; names of parameters stay.

    ConfigError where a group does not divide a layer's inputs.
    """
    with _quiet():
        from torchao.quantization import quantize_
        from torchao.quantization.qat import QATConfig

    group = group_of(number_format, group)
    how = QATConfig(_build_intx_config(number_format, group), step="prepare")
    for block in blocks:
        check_groups(block.named_modules(), group, f"quantize.group={group}")
        with _quiet():
            quantize_(block, how)
        for module in block.modules():
            if hasattr(module, "fused"):  # layers that are joined into one product are not called as modules
                module.fused = False  # type: ignore[assignment]


def check_groups(modules: Iterable[tuple[str, nn.Module]], group: int | None, key: str) -> None:
    """ConfigError where groups of so many inputs do not fill the rows of every linear layer among these, by name."""
    for name, module in modules:
        if isinstance(module, nn.Linear) and group is not None and module.in_features % group:
            fitting = [n for n in (256, 128, 64, 32, 16, 8) if module.in_features % n == 0]
            remedy = f"use {', '.join(map(str, fitting))}, or int8 by rows" if fitting else "use int8 by rows"
            raise ConfigError(f"{key}: does not divide the {module.in_features} inputs of {name}; {remedy}")


@contextmanager
def _quiet() -> Iterator[None]:
    """torchao imported without what it says of kernels for other devices; ConfigError where it is not installed."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        if not str(error.name).startswith("torchao"):
            raise
        raise ConfigError(f"quantisation {NEEDED}") from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
