"""XLNet against Hugging Face's: two streams in an order, an encoder without one, counts, tensors with their heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.interop.huggingface import export_tensors, import_tensors
from shardwright.interop.model_config import read_config, write_config
from shardwright.model.count import num_parameters
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.model.xlnet import XLNet, XLNetConfig

transformers = pytest.importorskip("transformers")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"vocab_size": 101, "layers": 3, "width": 32, "heads": 4}
CASES: dict[str, dict[str, Any]] = {
    "usual": {},
    "one-head": {"heads": 1, "activation": "relu", "mlp_width": 80},
    "free-head": {"tied": False, "norm_eps": 1e-6, "activation": "gelu_tanh"},
}
#: The published models, as Hugging Face counts them.
PUBLISHED = {"base": 116_750_336, "large": 360_300_800}


def build_ours(case: str) -> XLNet:
    """With random biases and norms as well, so that nothing is tested at zero or one."""
    config = XLNetConfig.model_validate({**SMALL, **CASES[case]})
    model = build_model(config)
    apply_init(model, config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    assert isinstance(model, XLNet)
    return model.eval()


def to_theirs(model: XLNet) -> torch.nn.Module:
    theirs = transformers.XLNetLMHeadModel(transformers.AutoConfig.for_model(**write_config(model.config))).eval()
    result = theirs.load_state_dict(dict(export_tensors(model.config, dict(model.named_parameters()))), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_loss.weight"} if model.config.tied else set())
    return theirs


class Rows:
    """Rows that end in padding, but for the first, in an order in which their last `predicted` tokens are predicted."""

    def __init__(self, length: int, predicted: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(0, 101, (3, length), generator=generator)
        self.mask = torch.ones_like(self.ids)
        self.mask[1, max(predicted + 1, length - 5) :] = 0
        self.mask[2, max(predicted + 1, length // 2) :] = 0
        self.types = torch.ones_like(self.ids)
        self.types[:, : length // 2] = 0
        real = [int(row.sum()) for row in self.mask]
        self.places = torch.stack([torch.randperm(n, generator=generator)[:predicted] for n in real])
        ranks = torch.arange(1, predicted + 1).expand(3, -1)
        self.order = torch.zeros_like(self.ids).scatter_(1, self.places, ranks)
        self.labels = self.ids.gather(1, self.places)

    def ours(self) -> dict[str, Tensor]:
        """By our names."""
        return {
            "input_ids": self.ids, "attention_mask": self.mask, "token_type_ids": self.types,
            "order": self.order, "places": self.places,
        }  # fmt: skip

    def theirs(self) -> dict[str, Tensor]:
        """1 in `perm_mask[b, i, j]` hides j from i: what comes later, itself too, but not what is never predicted."""
        own, key = self.order.unsqueeze(2), self.order.unsqueeze(1)
        return {
            "input_ids": self.ids, "attention_mask": self.mask.float(), "token_type_ids": self.types,
            "perm_mask": ((key >= own) & (key > 0)).float(),
            "target_mapping": F.one_hot(self.places, self.ids.shape[1]).float(),
        }  # fmt: skip


def expect_gradients(ours: XLNet, theirs: torch.nn.Module) -> None:
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    for name, expected in import_tensors(ours.config, found):
        mine = ours.get_parameter(name).grad
        mine = torch.zeros_like(expected) if mine is None else mine
        torch.testing.assert_close(mine, expected, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("length", "predicted"), [(33, 7), (2, 1), (8, 7)])
def test_two_streams(case: str, length: int, predicted: int) -> None:
    ours, rows = build_ours(case), Rows(length, predicted)
    theirs = to_theirs(ours)
    found, expected = ours(**rows.ours())["logits"], theirs(**rows.theirs()).logits
    torch.testing.assert_close(found, expected, **CLOSE)

    loss = F.cross_entropy(found.flatten(0, 1), rows.labels.flatten())
    target = theirs(**rows.theirs(), labels=rows.labels).loss
    torch.testing.assert_close(loss, target, atol=1e-6, rtol=1e-6)
    loss.backward()
    target.backward()
    expect_gradients(ours, theirs)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [33, 1])
def test_as_an_encoder(case: str, length: int) -> None:
    ours, rows = build_ours(case), Rows(length, 1)
    theirs, real = to_theirs(ours), rows.mask.bool()
    found = ours(rows.ids, rows.mask, rows.types)["logits"][real]
    expected = theirs(rows.ids, attention_mask=rows.mask.float(), token_type_ids=rows.types).logits[real]
    torch.testing.assert_close(found, expected, **CLOSE)
    torch.testing.assert_close(ours(rows.ids)["logits"], theirs(rows.ids).logits, **CLOSE)
    for logits in (found, expected):
        F.cross_entropy(logits, rows.ids[real]).backward()
    expect_gradients(ours, theirs)


@pytest.mark.parametrize("predicted", [0, 3])
def test_packed_documents_equal_documents_one_by_one(predicted: int) -> None:
    ours, sizes = build_ours("usual"), (7, 5, 13, 9)
    theirs, generator = to_theirs(ours), torch.Generator().manual_seed(2)
    ids = torch.randint(0, 101, (1, sum(sizes)), generator=generator)
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    chosen = [torch.randperm(size, generator=generator)[:predicted] for size in sizes]
    packed = {"input_ids": ids, "documents": torch.repeat_interleave(torch.arange(4), torch.tensor(sizes)).unsqueeze(0)}
    order = torch.zeros_like(ids)
    if predicted:
        places = torch.cat([start + part for start, part in zip(starts, chosen, strict=True)]).unsqueeze(0)
        order.scatter_(1, places, torch.arange(1, 4 * predicted + 1).unsqueeze(0))
        packed |= {"order": order, "places": places}
    expected = []
    for part, when, where in zip(ids.split(sizes, 1), order.split(sizes, 1), chosen, strict=True):
        hidden = (when.unsqueeze(1) >= when.unsqueeze(2)) & (when.unsqueeze(1) > 0)
        target = F.one_hot(where, part.shape[1]).float().unsqueeze(0)
        given = {"perm_mask": hidden.float(), "target_mapping": target} if predicted else {}
        expected.append(theirs(part, **given).logits)
    found, target = ours(**packed)["logits"], torch.cat(expected, dim=1)
    torch.testing.assert_close(found, target, **CLOSE)
    for logits in (found, target):
        logits.square().mean().backward()
    expect_gradients(ours, theirs)


def test_a_token_does_not_see_itself_nor_what_comes_later() -> None:
    """Changing a token changes the predictions after it in the order, and no other."""
    ours, rows = build_ours("usual"), Rows(16, 6)
    before = ours(**rows.ours())["logits"]
    for rank in range(6):
        ids = rows.ids.clone()
        ids[:, :] = ids.scatter(1, rows.places[:, rank : rank + 1], 100 - rows.labels[:, rank : rank + 1])
        after = ours(**rows.ours() | {"input_ids": ids})["logits"]
        changed = (after != before).any(-1)
        assert not changed[:, : rank + 1].any()
        assert changed[:, rank + 1 :].all()


def test_a_query_that_sees_nothing_is_finite() -> None:
    """The first of a document whose tokens are all predicted; Hugging Face's sees an even mix of all that is hidden."""
    ours = build_ours("usual").train()
    ids, documents = torch.randint(0, 101, (2, 6)), torch.tensor([[0, 0, 1, 1, 1, 1]]).expand(2, -1)
    order, places = torch.tensor([[1, 2, 0, 0, 0, 3]]).expand(2, -1), torch.tensor([[0, 1, 5]]).expand(2, -1)
    logits = ours(ids, documents=documents, order=order, places=places)["logits"]
    other = ours((ids + 1) % 101, documents=documents, order=order, places=places)["logits"]
    assert torch.equal(logits[:, 0], other[:, 0])
    assert not torch.equal(logits[:, 1], other[:, 1])
    logits.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_places_need_an_order() -> None:
    with pytest.raises(ValueError, match="places need the order"):
        build_ours("usual")(torch.zeros(1, 4, dtype=torch.int64), places=torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(case: str) -> None:
    ours = build_ours(case)
    back = dict(import_tensors(ours.config, to_theirs(ours).state_dict()))
    assert set(back) == {n for n, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(back[name], parameter), name


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case: str) -> None:
    config = XLNetConfig.model_validate({**SMALL, **CASES[case]})
    again = read_config(transformers.AutoConfig.for_model(**write_config(config)).to_dict())
    assert write_config(again) == write_config(config)


@pytest.mark.parametrize("size", XLNetConfig.SIZES)
def test_published_sizes(size: str) -> None:
    config = XLNetConfig(size=size, vocab_size=32000)
    with torch.device("meta"):
        ours = build_model(config)
        theirs = transformers.XLNetLMHeadModel(transformers.AutoConfig.for_model(**write_config(config)))
    counts = {sum(p.numel() for p in model.parameters()) for model in (ours, theirs)}
    assert counts == {num_parameters(config)["total"]} == {PUBLISHED[size]}


def test_what_the_family_does_not_have_is_refused() -> None:
    for field, value in {"kv_heads": 2, "qkv_bias": True, "norm_placement": "pre", "positions": "rotary"}.items():
        with pytest.raises(ValueError, match=field):
            XLNetConfig.model_validate({**SMALL, field: value})
