"""Published sizes are presets: their config.json reads as the preset, and all three ways of counting agree."""

from __future__ import annotations

import pytest
import torch

from shardwright.interop.model_config import read_config
from shardwright.model.count import num_parameters
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.transformer import TransformerConfig
from shardwright.train.settings import read_config as read_run
from tests.interop.published import PUBLISHED, Published

transformers = pytest.importorskip("transformers")

DERIVED = ("num_kv_heads", "head_width", "hidden_width")
#: What is said of training and not of the model: GPT-2's files have dropout, and its presets have none.
ELSEWHERE = {"family", "size", "kv_heads", "head_dim", "mlp_width"} | {
    f"{part}_dropout" for part in ("embed", "residual", "attention")
}


def preset(published: Published) -> TransformerConfig:
    fields = {"family": published.family, "size": published.size, "vocab_size": published.config["vocab_size"]}
    return FAMILIES[published.family].config.model_validate(fields)


def test_every_preset_is_here() -> None:
    decoders = {name: family for name, family in FAMILIES.items() if family.kind == "decoder"}
    sizes = {(name, size) for name, family in decoders.items() for size in family.config.SIZES}
    assert {(p.family, p.size) for p in PUBLISHED} == sizes


@pytest.mark.parametrize("published", PUBLISHED, ids=lambda p: f"{p.family}-{p.size}")
def test_a_preset_is_the_published_model(published: Published) -> None:
    config, read = preset(published), read_config(published.config)
    assert read.model_dump(exclude=ELSEWHERE) == config.model_dump(exclude=ELSEWHERE)
    assert [getattr(read, name) for name in DERIVED] == [getattr(config, name) for name in DERIVED]
    with torch.device("meta"):
        ours = build_model(config)
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**published.config))
    assert sum(p.numel() for p in ours.parameters()) == published.parameters
    assert sum(p.numel() for p in theirs.parameters()) == published.parameters
    assert num_parameters(config)["total"] == published.parameters


#: Brown et al. 2020, table 2.1: peak rate and batch in millions of tokens.
RECIPES = {"gpt3": ("125M", 6.0e-4, 0.5), "gpt3-175b": ("175B", 0.6e-4, 3.2)}


@pytest.mark.parametrize("name", RECIPES)
def test_gpt3_is_trained_as_published(name: str) -> None:
    """Appendix B of the paper."""
    config, (size, lr, batch) = read_run(name), RECIPES[name]
    assert (config.model.size, config.data.sequence_length) == (size, 2048)  # type: ignore[attr-defined]
    optimizer, schedule, ramp = config.optimizer, config.schedule, config.batch.ramp
    assert (optimizer.name, optimizer.betas, optimizer.eps) == ("adamw", [0.9, 0.95], 1e-8)
    assert (optimizer.lr, optimizer.weight_decay, config.train.clip) == (lr, 0.1, 1.0)
    assert (schedule.name, schedule.warmup_tokens, schedule.floor) == ("cosine", 375_000_000, 0.1)
    assert config.batch.tokens == pytest.approx(batch * 1e6, rel=0.05)
    assert ramp is not None and ramp.start * 2048 == 32_768, "from a small value, 32 thousand tokens"
    assert 4e9 <= ramp.sequences * 2048 <= 12.001e9, "over the first 4 to 12 billion"
    assert config.train.tokens == 300_000_000_000


def test_gpt3_has_the_shapes_of_the_paper() -> None:
    """Table 2.1, but for two rows that do not multiply: 1.3B says 24 heads of 128 in 2,048, 13B a width of 5,140."""
    rows = {
        "125M": (12, 768, 12, 64), "350M": (24, 1024, 16, 64), "760M": (24, 1536, 16, 96), "1.3B": (24, 2048, 16, 128),
        "2.7B": (32, 2560, 32, 80), "6.7B": (32, 4096, 32, 128), "13B": (40, 5120, 40, 128),
        "175B": (96, 12288, 96, 128),
    }  # fmt: skip
    for size, row in rows.items():
        config = FAMILIES["gpt3"].config.model_validate({"family": "gpt3", "size": size})
        assert (config.layers, config.width, config.heads, config.head_width) == row
        assert (config.hidden_width, config.max_length) == (4 * config.width, 2048)
