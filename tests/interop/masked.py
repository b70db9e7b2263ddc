"""What the oracle tests of encoders share: a model of ours, theirs of the same weights, and what both make of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.interop.huggingface import export_tensors, import_tensors
from shardwright.interop.model_config import write_config
from shardwright.model.encoder import Encoder
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init

VOCABULARY = 101
SMALL = {"vocab_size": VOCABULARY, "layers": 3, "width": 32, "heads": 4, "max_length": 64}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def build_ours(fields: Mapping[str, Any], seed: int = 0) -> Encoder:
    """A model with random biases and norms as well, so that nothing is tested at zero or one."""
    config = FAMILIES[fields["family"]].config.model_validate({**SMALL, **fields})
    model = build_model(config)
    apply_init(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    assert isinstance(model, Encoder)
    return model.eval()


def build_theirs(ours: Encoder) -> torch.nn.Module:
    """Theirs with the same weights, all of which they know but absolute positions of a mask decoder."""
    import transformers

    raw = write_config(ours.config)
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.AutoConfig.for_model(**{**special, **raw})
    config._attn_implementation = "eager"
    theirs: torch.nn.Module = getattr(transformers, raw["architectures"][0])._from_config(config).eval()
    state = dict(export_tensors(ours.config, dict(ours.named_parameters())))
    result = theirs.load_state_dict(state, strict=False)
    assert not [name for name in result.unexpected_keys if not name.endswith("position_embeddings.weight")]
    theirs.tie_weights()  # type: ignore[operator]
    tied = {name for name in result.missing_keys if "decoder" in name or name.endswith("position_ids")}
    assert set(result.missing_keys) == tied
    return theirs


def ids(rows: int, length: int, seed: int = 1) -> Tensor:
    """Token ids, none of which is the padding of theirs."""
    return torch.randint(2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def check_equal(ours: Encoder, theirs: torch.nn.Module, **given: Tensor) -> None:
    """Logits, a loss of some masked tokens, and the gradients of all parameters."""
    found, expected = ours(**given)["logits"], _logits(theirs(**given))
    torch.testing.assert_close(found, expected, **CLOSE)
    labels = torch.where(given["input_ids"] % 3 == 0, given["input_ids"], -100)
    labels[:, 0] = 5
    check_loss(ours, theirs, found, expected, labels)


def check_gradients(ours: Encoder, theirs: torch.nn.Module) -> None:
    """Every gradient of theirs has its counterpart, at the scale of the whole gradient."""
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    for name, gradient in import_tensors(ours.config, gradients):
        mine = ours.get_parameter(name).grad
        mine = torch.zeros_like(gradient) if mine is None else mine
        torch.testing.assert_close(mine, gradient, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


def check_padding(ours: Encoder, theirs: torch.nn.Module, side: str) -> None:
    """Rows of 17 and 9 tokens, padded on one side: logits and loss of real tokens, gradients, and the row alone."""
    tokens, where = ids(2, 17), slice(8, None) if side == "left" else slice(9)
    mask = torch.zeros_like(tokens)
    mask[0], mask[1, where] = 1, 1
    tokens = tokens.where(mask.bool(), torch.tensor(1))  # their padding, by which RoBERTa knows it
    found, expected = ours(tokens, attention_mask=mask)["logits"], _logits(theirs(tokens, attention_mask=mask))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], **CLOSE)
    if side == "right":  # else places are others to a model that counts them
        torch.testing.assert_close(found[1, where], ours(tokens[1:, where])["logits"][0], **CLOSE)
    check_loss(ours, theirs, found, expected, torch.where(mask.bool(), tokens.roll(1), -100))


def check_packing(ours: Encoder, theirs: torch.nn.Module | None = None) -> None:
    """Documents of 5, 1 and 7 tokens in one row are what they are one by one: to theirs, or to ours without theirs."""
    tokens, lengths = ids(1, 13), (5, 1, 7)
    documents = torch.repeat_interleave(torch.tensor([4, 5, 7]), torch.tensor(lengths)).unsqueeze(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)
    found = ours(tokens, documents=documents, position_ids=positions)["logits"]
    expected = torch.cat([_logits((theirs or ours)(alone)) for alone in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(found, expected, **CLOSE)
    if theirs is not None:
        check_loss(ours, theirs, found, expected, tokens.roll(1))


def check_loss(ours: Encoder, theirs: torch.nn.Module, found: Tensor, expected: Tensor, labels: Tensor) -> None:
    """The loss of both logits [B, T, V] on labels [B, T], -100 where there is none, and all gradients."""
    ours.zero_grad()
    theirs.zero_grad()
    loss, target = (F.cross_entropy(x.flatten(0, 1), labels.flatten()) for x in (found, expected))
    torch.testing.assert_close(loss, target, atol=1e-6, rtol=1e-6)
    loss.backward()
    target.backward()
    check_gradients(ours, theirs)


def check_round_trip(ours: Encoder, theirs: torch.nn.Module) -> None:
    """Weights that went there and back are those from before, bit by bit."""
    back = dict(import_tensors(ours.config, theirs.state_dict()))
    assert set(back) == {n for n, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(back[name], parameter), name


def _logits(output: Mapping[str, Any]) -> Tensor:
    return output["logits"] if "logits" in output else output["prediction_logits"]
