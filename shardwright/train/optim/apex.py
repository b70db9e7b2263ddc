"""NVIDIA apex, where it is installed: its fused Adam in the place of torch's, and its fused norms.

The package called `apex` on PyPI is an unrelated project (a toolkit for Pyramid, 2013), and a line that says so is all
it gets. apex is found without importing anything of it; what it offers is taken on GPUs alone. State keeps the names
and shapes of torch's Adam, so that checkpoints are the same with either.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shardwright.config import Config, ConfigError
from shardwright.parallel.mesh import choose_device
from shardwright.train.optim.state import build_adam_state

WHERE = "https://github.com/NVIDIA/apex (built from source, with --cpp_ext and --cuda_ext)"
Found = Literal["nvidia", "unrelated", "missing"]
FUSED = ("adamw", "adam")  # optimizers that have a fused form in apex


def find_apex() -> Found:
    """Which `apex` is installed, told by the files of NVIDIA's."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return "missing"
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    own = ("optimizers/fused_adam.py", "normalization/fused_layer_norm.py")
    return "nvidia" if any(all((folder / file).is_file() for file in own) for folder in folders) else "unrelated"


def wants_apex(key: str, asked: str, device: torch.device) -> bool:
    """Whether `key` (optimizer.fused, train.fused_norms) means apex; ConfigError where it was named and cannot be."""
    if asked not in ("auto", "apex"):
        return False
    found = find_apex()
    if asked == "auto":
        return found == "nvidia" and device.type == "cuda"
    if found == "unrelated":
        raise ConfigError(
            f"{key}=apex: the apex that is installed is PyPI's, an unrelated project; pip uninstall apex, and get "
            f"NVIDIA's from {WHERE}, or use {key}=torch"
        )
    if found == "missing":
        raise ConfigError(
            f"{key}=apex: NVIDIA apex is not installed, and is not on PyPI, where apex is an unrelated project; get it "
            f"from {WHERE}, or use {key}=torch"
        )
    if device.type != "cuda":
        raise ConfigError(f"{key}=apex: its kernels are for GPUs; use {key}=torch on a CPU")
    return True


def check_apex(config: Config) -> None:
    """ConfigError where the config names apex and it cannot be: known before anything is made."""
    device = choose_device(config.train.device)
    wants_apex("train.fused_norms", config.train.fused_norms, device)
    if config.optimizer.name in FUSED:
        wants_apex("optimizer.fused", config.optimizer.fused, device)


def build_fused_adam(
    groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float, decoupled: bool
) -> torch.optim.Optimizer:
    """apex's FusedAdam over `groups`, with the face of torch's fused one: `found_inf`, and counters by parameter."""
    fused = importlib.import_module("apex.optimizers").FusedAdam

    class FusedAdam(fused):  # type: ignore[misc, valid-type]
        """Skips by apex's own no-op flag, on the device; counts in `state`, from which a group's counter is taken."""

        found_inf: Tensor | None = None

        def step(self, closure: Any = None) -> None:
            """One update, or none where `found_inf` is 1."""
            skipped = torch.zeros((), device=self._dummy_overflow_buf.device)
            if self.found_inf is not None:
                skipped = self.found_inf.to(skipped.device)
            self._dummy_overflow_buf.copy_(skipped.to(self._dummy_overflow_buf.dtype).reshape(-1))
            for group in self.param_groups:
                group["step"] = self.state[group["params"][0]]["step"].to(torch.int32).reshape(1).clone()
            super().step()
            for group in self.param_groups:
                for parameter in group["params"]:
                    self.state[parameter]["step"].add_(1 - skipped)

    optimizer = FusedAdam(
        [{**group, "params": [tensor for _, tensor in group["params"]]} for group in groups],
        betas=betas,
        eps=eps,
        adam_w_mode=decoupled,
        capturable=True,
    )
    for group, given in zip(optimizer.param_groups, groups, strict=True):
        group["param_names"] = [name for name, _ in given["params"]]
        for parameter in group["params"]:
            optimizer.state[parameter] = build_adam_state(parameter)
    return optimizer


def apply_fused_norms(modules: Iterable[nn.Module]) -> int:
    """Let every LayerNorm and RMSNorm among `modules` compute by apex's kernels, in place; how many were found."""
    kernels = importlib.import_module("apex.normalization.fused_layer_norm")
    count = 0
    for module in modules:
        if isinstance(module, nn.LayerNorm) and module.weight is not None and module.bias is not None:
            module.forward = partial(_layer_norm, kernels, module)  # type: ignore[method-assign]
        elif isinstance(module, nn.RMSNorm) and module.weight is not None:
            module.forward = partial(_rms_norm, kernels, module)  # type: ignore[method-assign]
        else:
            continue
        count += 1
    return count


def _layer_norm(kernels: Any, module: nn.LayerNorm, x: Tensor) -> Tensor:
    return kernels.fused_layer_norm_affine(x, module.weight, module.bias, module.normalized_shape, module.eps)


def _rms_norm(kernels: Any, module: nn.RMSNorm, x: Tensor) -> Tensor:
    return kernels.fused_rms_norm_affine(x, module.weight, module.normalized_shape, module.eps)
