"""Masters, compute copies and the loss scale."""

import pytest
import torch
from torch import nn

from shardwright.config import LossScaleConfig
from shardwright.parallel.precision import LossScaler, Masters


def _tied() -> nn.Module:
    model = nn.Module()
    model.embed, model.mix, model.head = nn.Embedding(10, 7), nn.Linear(7, 7), nn.Linear(7, 10, bias=False)
    model.head.weight = model.embed.weight
    model.forward = lambda ids: model.head(torch.tanh(model.mix(model.embed(ids))))
    return model


def test_float32_masters_are_the_parameters():
    model = _tied()
    masters = Masters(model, torch.float32)
    assert set(masters.weights) == {"embed.weight", "mix.weight", "mix.bias"}
    masters.weights["mix.bias"].fill_(3)
    assert torch.equal(model.mix.bias.detach(), torch.full((7,), 3.0))


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_of_several_backwards_accumulate_in_float32(compute):
    torch.manual_seed(0)
    model = _tied()
    masters = Masters(model, compute)
    ids = torch.arange(10)
    single = torch.autograd.grad(model(ids).float().sum(), list(model.parameters()))
    masters.clear()
    for _ in range(3):
        model(ids).float().sum().backward()
    for (name, master), grad in zip(masters.weights.items(), single, strict=True):
        assert master.grad.dtype == torch.float32
        # Three times the same low-precision gradient, added without rounding.
        torch.testing.assert_close(master.grad, 3 * grad.float(), rtol=1e-6, atol=1e-6, msg=name)
    expected = torch.stack([m.grad.double().square().sum() for m in masters.weights.values()]).sum().sqrt()
    torch.testing.assert_close(masters.grad_square(torch.tensor(1.0)).sqrt().double(), expected)


def test_publish_rounds_the_masters_once():
    model = _tied()
    masters = Masters(model, torch.bfloat16)
    masters.weights["mix.weight"].add_(1e-4)
    masters.publish()
    assert torch.equal(model.mix.weight.detach(), masters.weights["mix.weight"].bfloat16())
    assert model.head.weight is model.embed.weight


def test_scale_falls_after_hysteresis_grows_after_window_and_stays_above_its_floor():
    config = LossScaleConfig(initial=8.0, window=3, hysteresis=2, floor=2.0)
    scaler = LossScaler(config, torch.device("cpu"), enabled=True)
    seen = []
    for overflow in [1, 1, 0, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1]:
        scaler.update(torch.tensor(bool(overflow)))
        seen.append(scaler.scale.item())
    assert seen == [8, 4, 4, 4, 8, 8, 8, 8, 4, 4, 2, 2, 2]


def test_state_goes_round():
    config = LossScaleConfig(initial=8.0, window=5)
    one, two = (LossScaler(config, torch.device("cpu"), enabled=True) for _ in range(2))
    for overflow in (True, False, False):
        one.update(torch.tensor(overflow))
    two.load_state_tensors(one.state_tensors())
    for _ in range(4):
        one.update(torch.tensor(False))
        two.update(torch.tensor(False))
    assert [t.item() for t in one.state_tensors().values()] == [t.item() for t in two.state_tensors().values()]
