"""Finding NVIDIA apex, telling it from PyPI's package of that name, and handing over to it; its kernels need a GPU."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwright.config import ConfigError, OptimizerConfig
from shardwright.train.optim import apex, build_optimizer
from shardwright.train.run import train
from shardwright.train.verify import verify

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ADAM = """
import torch
class FusedAdam(torch.optim.Optimizer):
    # What the stand-in shares with apex's: the flag that its kernels read, and counters by group.
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, adam_w_mode=True,
                 capturable=False):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        assert capturable
        self._dummy_overflow_buf = torch.zeros(1, dtype=torch.int)
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group["step"] + (self._dummy_overflow_buf != 1).to(torch.int)
            for p in group["params"]:
                if int(self._dummy_overflow_buf) != 1:
                    p.data.sub_(group["lr"] * p.grad.sign())
"""
NORM = """
def fused_layer_norm_affine(x, weight, bias, shape, eps):
    return x * 0 + 7
def fused_rms_norm_affine(x, weight, shape, eps):
    return x * 0 + 8
"""


def install(folder, monkeypatch, files):
    """A package called apex on the path."""
    for name, text in files.items():
        path = folder / "apex" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(folder))


@pytest.fixture
def nvidia(tmp_path, monkeypatch):
    """A stand-in for NVIDIA's."""
    install(
        tmp_path,
        monkeypatch,
        {
            "__init__.py": "",
            "optimizers/__init__.py": "from apex.optimizers.fused_adam import FusedAdam",
            "optimizers/fused_adam.py": ADAM,
            "normalization/__init__.py": "",
            "normalization/fused_layer_norm.py": NORM,
        },
    )
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


@pytest.fixture
def unrelated(tmp_path, monkeypatch):
    """PyPI's, which raises when it is imported."""
    install(tmp_path, monkeypatch, {"__init__.py": "raise ImportError('pyramid')"})


def test_missing_apex_is_not_asked_of_pypi():
    assert apex.find_apex() == "missing"
    assert not apex.wants_apex("optimizer.fused", "auto", GPU) and not apex.wants_apex("optimizer.fused", "torch", GPU)
    with pytest.raises(ConfigError, match=r"optimizer\.fused=apex: .* not on PyPI.*github.com/NVIDIA/apex"):
        apex.wants_apex("optimizer.fused", "apex", GPU)


@pytest.mark.parametrize("key", ["optimizer.fused", "train.fused_norms"])
def test_a_run_that_names_it_is_refused_before_it_leaves_a_folder(key, tiny):
    config = tiny(f"{key}=apex")
    with pytest.raises(ConfigError, match=f"^{key}=apex: "):
        train(config)
    assert not Path(config.run).exists()
    with pytest.raises(ConfigError, match=f"^{key}=apex: "):
        verify(config)


def test_a_key_that_an_optimizer_does_not_read_is_no_reason(tiny):
    apex.check_apex(tiny("optimizer.fused=apex", "optimizer.name=sgd"))


def test_the_package_of_that_name_on_pypi_is_told_apart(unrelated):
    assert apex.find_apex() == "unrelated" and not apex.wants_apex("train.fused_norms", "auto", GPU)
    with pytest.raises(ConfigError, match="PyPI's, an unrelated project"):
        apex.wants_apex("train.fused_norms", "apex", GPU)


def test_nvidias_is_taken_by_auto_and_by_name_where_there_is_a_gpu(nvidia):
    assert apex.find_apex() == "nvidia"
    assert apex.wants_apex("optimizer.fused", "auto", GPU) and apex.wants_apex("optimizer.fused", "apex", GPU)
    assert not apex.wants_apex("optimizer.fused", "auto", CPU)
    with pytest.raises(ConfigError, match="GPUs"):
        apex.wants_apex("optimizer.fused", "apex", CPU)


def test_its_adam_skips_and_counts_as_torchs_does(nvidia):
    weight = torch.ones(3)
    group = {"params": [("w.weight", weight)], "lr": 0.5, "base_lr": 0.5, "weight_decay": 0.0, "label": "decayed"}
    optimizer = apex.build_fused_adam([group], betas=(0.9, 0.95), eps=1e-8, decoupled=True)
    weight.grad = torch.ones(3)
    for skipped, value, steps in ((0.0, 0.5, 1), (1.0, 0.5, 1), (0.0, 0.0, 2)):
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.step()
        assert weight.tolist() == [value] * 3 and float(optimizer.state[weight]["step"]) == steps
    plain = build_optimizer(OptimizerConfig(fused="torch"), [("w.weight", torch.ones(3))])
    assert optimizer.param_groups[0]["param_names"] == ["w.weight"]
    assert optimizer.state[weight].keys() == next(iter(plain.state.values())).keys()


def test_its_norms_stand_in_for_those_with_weights(nvidia):
    model = nn.Sequential(nn.LayerNorm(4), nn.RMSNorm(4), nn.LayerNorm(4, elementwise_affine=False))
    names = [name for name, _ in model.named_parameters()]
    assert apex.apply_fused_norms(model) == 2
    x = torch.randn(2, 4)
    assert (model[0](x) == 7).all() and (model[1](x) == 8).all() and (model[2](x) != 7).all()
    assert [name for name, _ in model.named_parameters()] == names
