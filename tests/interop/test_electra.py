"""ELECTRA against Hugging Face's two models of it: logits, losses, gradients, counts, and both folders' tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.interop.huggingface import export_tensors, import_all, import_tensors
from shardwright.interop.model_config import folders_beside, read_config, write_config
from shardwright.model.count import num_parameters
from shardwright.model.dropout import uniform
from shardwright.model.electra import Electra, ElectraConfig
from shardwright.model.families import build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import Inputs
from shardwright.objective.replaced import Replaced, ReplacedConfig
from shardwright.objective.setting import Setting
from shardwright.train.draft import DraftModel, place_keys

transformers = pytest.importorskip("transformers")

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SMALL = {"vocab_size": 101, "layers": 3, "width": 32, "heads": 4, "max_length": 64}
CASES: dict[str, dict[str, Any]] = {
    "narrow-embedding": {"embed_width": 16, "generator_width": 8, "generator_heads": 2, "generator_layers": 2},
    "wide-embedding": {"generator_width": 16, "generator_heads": 1, "activation": "relu", "mlp_width": 80},
    "alike": {"embed_width": 16, "generator_width": 16, "generator_heads": 4, "generator_mlp_width": 24},
    "free-head": {"generator_width": 8, "generator_heads": 2, "tied": False, "norm_eps": 1e-6},
}
FOLDERS = ("", "generator")
#: Google's discriminators, as Hugging Face counts them.
PUBLISHED = {"small": 13_549_057, "base": 109_483_009, "large": 335_142_913}


def build_ours(case: str) -> Electra:
    """With random biases and norms as well, so that nothing is tested at zero or one."""
    config = ElectraConfig.model_validate({**SMALL, **CASES[case]})
    model = build_model(config)
    apply_init(model, config, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    assert isinstance(model, Electra)
    return model.eval()


def build_theirs(config: ElectraConfig, folder: str) -> torch.nn.Module:
    raw = write_config(config, folder)
    theirs = transformers.AutoConfig.for_model(**raw)
    theirs._attn_implementation = "eager"
    return getattr(transformers, raw["architectures"][0])(theirs).eval()


def to_theirs(model: Electra, folder: str = "") -> torch.nn.Module:
    theirs, state = build_theirs(model.config, folder), dict(model.named_parameters())
    result = theirs.load_state_dict(dict(export_tensors(model.config, state, folder)), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"generator_lm_head.weight"} if folder and model.config.tied else set())
    return theirs


def padded(length: int) -> dict[str, Tensor]:
    """Rows that end in padding, but for the first, with two kinds of segments."""
    generator = torch.Generator().manual_seed(1)
    ids, types = torch.randint(0, 101, (3, length), generator=generator), torch.ones(3, length, dtype=torch.int64)
    types[:, : length // 2] = 0
    mask = torch.ones_like(ids)
    mask[1, max(1, length - 5) :], mask[2, max(1, length // 2) :] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}


def logits(model: Electra, folder: str, batch: dict[str, Tensor]) -> Tensor:
    return model.draft_logits(**batch) if folder else model(**batch)["logits"]


def expect_gradients(ours: Electra, *theirs: tuple[str, torch.nn.Module]) -> None:
    """Each of ours is the sum of what their models have, zero where none has any."""
    expected = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    for folder, model in theirs:
        found = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        for name, gradient in import_tensors(ours.config, found, folder):
            expected[name] += gradient
    for name, parameter in ours.named_parameters():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(mine, expected[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("length", [33, 1])
def test_logits_loss_and_gradients_equal(case: str, folder: str, length: int) -> None:
    ours = build_ours(case)
    theirs, batch = to_theirs(ours, folder), padded(length)
    real = batch["attention_mask"].bool()
    found, expected = logits(ours, folder, batch)[real], theirs(**batch).logits[real]
    torch.testing.assert_close(found, expected, **CLOSE)

    labels = torch.randint(0, 101 if folder else 2, (len(found),), generator=torch.Generator().manual_seed(2))
    if folder:
        mine, target = F.cross_entropy(found, labels), F.cross_entropy(expected, labels)
    else:
        mine = F.binary_cross_entropy_with_logits(found, labels.float())
        everywhere = torch.zeros_like(batch["input_ids"]).masked_scatter(real, labels)
        target = theirs(**batch, labels=everywhere).loss
    torch.testing.assert_close(mine, target, atol=1e-6, rtol=1e-6)
    mine.backward()
    target.backward()
    expect_gradients(ours, (folder, theirs))


@pytest.mark.parametrize("case", CASES)
def test_both_terms_are_those_of_their_two_heads(case: str) -> None:
    """The whole step: the generator's loss, tokens drawn from its softmax, the discriminator's loss on them.

    Their generator's softmax is drawn from by numpy, with the same numbers: the token that arrives first.
    """
    ours, batch = build_ours(case).train(), padded(33)
    objective = Replaced(ReplacedConfig(name="replaced"), Setting(length=33, vocab_size=101, specials={"mask": 3}))
    places, used = torch.arange(3 * 5).view(3, 5), torch.tensor([[1.0] * 5, [1, 1, 1, 0, 0], [1.0] * 5])
    places[1, 3:] = 0
    text, documents = batch["input_ids"], batch["attention_mask"].int() - 1
    whole = {
        "input_ids": text.scatter(1, torch.where(used > 0, places, places[:, :1]), 3),
        "documents": documents, "token_types": batch["token_type_ids"], "sequence": torch.tensor([4, 17, 2**33]),
        "labels": text.gather(1, places), "places": places, "weights": used,
        "replaced_weights": batch["attention_mask"].float(),
    }  # fmt: skip
    stage = DraftModel(ours, objective, seed=11)
    counts = objective.count(whole)
    stage.begin(torch.tensor(6), {term: weight / counts[term] for term, weight in objective.terms.items()})
    found = stage(whole["input_ids"], **whole).sum()
    found.backward()
    assert stage.early is not None

    masked = {**batch, "input_ids": whole["input_ids"]}
    generator, judge, active = to_theirs(ours, "generator"), to_theirs(ours), used > 0
    logits = generator(**masked).logits.gather(1, places.unsqueeze(-1).expand(-1, -1, 101))
    first = F.cross_entropy(logits[active], whole["labels"][active])
    keys = place_keys(Inputs(text, sequence=whole["sequence"], step=6, seed=11), places)
    times = -np.log1p(-uniform(keys[active], torch.arange(101), torch.float64).numpy())
    drawn = torch.tensor((times / logits[active].double().softmax(-1).detach().numpy()).argmin(-1))
    filled = whole["input_ids"].index_put(
        (torch.arange(3).repeat_interleave(5).view(3, 5)[active], places[active]), drawn
    )
    changed = (filled != text).long()
    second = judge(**{**batch, "input_ids": filled}, labels=changed).loss
    torch.testing.assert_close(stage.early.sum(), first.detach(), **CLOSE)
    torch.testing.assert_close(found, 50 * second, **CLOSE)
    (first + 50 * second).backward()
    expect_gradients(ours, ("generator", generator), ("", judge))


@pytest.mark.parametrize("folder", FOLDERS)
def test_packed_documents_equal_documents_one_by_one(folder: str) -> None:
    ours, sizes = build_ours("narrow-embedding"), (7, 1, 13, 12)
    theirs = to_theirs(ours, folder)
    ids = torch.randint(0, 101, (1, sum(sizes)), generator=torch.Generator().manual_seed(3))
    packed = {
        "input_ids": ids,
        "documents": torch.repeat_interleave(torch.arange(4), torch.tensor(sizes)).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0),
    }
    found = logits(ours, folder, packed)[0]
    expected = torch.cat([theirs(part).logits[0] for part in ids.split(sizes, dim=1)])
    torch.testing.assert_close(found, expected, **CLOSE)
    for logits_of_one in (found, expected):
        logits_of_one.square().mean().backward()
    expect_gradients(ours, (folder, theirs))


@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal(case: str) -> None:
    ours = build_ours(case)
    assert folders_beside(ours.config) == ["generator"]
    back = dict(import_all(ours.config, {folder: to_theirs(ours, folder).state_dict() for folder in FOLDERS}))
    assert set(back) == {n for n, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert torch.equal(back[name], parameter), name


@pytest.mark.parametrize("case", CASES)
def test_config_round_trip(case: str) -> None:
    config = ElectraConfig.model_validate({**SMALL, **CASES[case]})
    raws = [transformers.AutoConfig.for_model(**write_config(config, folder)).to_dict() for folder in FOLDERS]
    again = read_config(raws[0], {"generator": raws[1]})
    assert [write_config(again, folder) for folder in FOLDERS] == [write_config(config, folder) for folder in FOLDERS]
    assert again.derived() == config.derived()


def test_a_discriminator_alone_imports_and_judges() -> None:
    theirs = to_theirs(build_ours("narrow-embedding"))
    config = read_config(theirs.config.to_dict())
    assert isinstance(config, ElectraConfig)
    assert config.generator_layers == 0
    assert folders_beside(config) == []
    ours = build_model(config).eval()
    ours.load_state_dict(dict(import_all(config, {"": theirs.state_dict()})))
    batch = padded(9)
    torch.testing.assert_close(ours(**batch)["logits"][0], theirs(**batch).logits[0], **CLOSE)


def test_what_does_not_fit_is_named() -> None:
    ours = build_ours("narrow-embedding")
    state = {folder: to_theirs(ours, folder).state_dict() for folder in FOLDERS}
    with pytest.raises(ValueError, match="those of its generator are missing"):
        list(import_all(ours.config, {"": state[""]}))
    table = "electra.embeddings.word_embeddings.weight"
    other = state["generator"] | {name: state["generator"][name] + 1 for name in (table, "generator_lm_head.weight")}
    with pytest.raises(ValueError, match=r"generator: embed.tokens.weight differs from that beside it"):
        list(import_all(ours.config, {"": state[""], "generator": other}))
    raws = [write_config(ours.config, folder) for folder in FOLDERS]
    with pytest.raises(ValueError, match="generator/config.json: says 99 of what is 101"):
        read_config(raws[0], {"generator": raws[1] | {"vocab_size": 99}})


@pytest.mark.parametrize("size", ElectraConfig.SIZES)
def test_published_sizes(size: str) -> None:
    """Both models of each size have as many parameters as Hugging Face's; what they share is counted once."""
    config = ElectraConfig(size=size, vocab_size=30522)
    with torch.device("meta"):
        ours = {name: p.numel() for name, p in build_model(config).named_parameters()}
        theirs = [build_theirs(config, folder) for folder in FOLDERS]
    counts = [sum(p.numel() for p in model.parameters()) for model in theirs]
    shared = sum(p.numel() for p in theirs[0].electra.embeddings.parameters())
    assert sum(ours.values()) == sum(counts) - shared == num_parameters(config)["total"]
    assert counts[0] == PUBLISHED[size]
    assert sum(n for name, n in ours.items() if ".generator." not in name) == PUBLISHED[size]
