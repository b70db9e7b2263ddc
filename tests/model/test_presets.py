"""Presets have the shapes that papers and published config.json files say, written down here and not read off ours."""

from __future__ import annotations

import pytest

from shardwright.model.families import FAMILIES

#: family: size: (blocks, width, heads, feed-forward width); of an encoder-decoder, blocks of each stack.
SHAPES: dict[str, dict[str, tuple[int, int, int, int]]] = {
    "bert": {
        "tiny": (2, 128, 2, 512), "mini": (4, 256, 4, 1024), "small": (4, 512, 8, 2048), "medium": (8, 512, 8, 2048),
        "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096),
    },
    "roberta": {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
    "albert": {
        "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096), "xlarge": (24, 2048, 16, 8192),
        "xxlarge": (12, 4096, 64, 16384),
    },
    "deberta": {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096), "xlarge": (48, 1024, 16, 4096)},
    "deberta_v2": {
        "v2-xlarge": (24, 1536, 24, 6144), "v2-xxlarge": (48, 1536, 24, 6144), "v3-xsmall": (12, 384, 6, 1536),
        "v3-small": (6, 768, 12, 3072), "v3-base": (12, 768, 12, 3072), "v3-large": (24, 1024, 16, 4096),
    },
    "modernbert": {"base": (22, 768, 12, 1152), "large": (28, 1024, 16, 2624)},
    "electra": {"small": (12, 256, 4, 1024), "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
    "xlnet": {"base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096)},
    "t5": {
        "small": (6, 512, 8, 2048), "base": (12, 768, 12, 3072), "large": (24, 1024, 16, 4096),
        "3B": (24, 1024, 32, 16384), "11B": (24, 1024, 128, 65536), "v1.1-small": (8, 512, 6, 1024),
        "v1.1-base": (12, 768, 12, 2048), "v1.1-large": (24, 1024, 16, 2816), "v1.1-XL": (24, 2048, 32, 5120),
        "v1.1-XXL": (24, 4096, 64, 10240),
    },
    "bart": {"base": (6, 768, 12, 3072), "large": (12, 1024, 16, 4096)},
    "transformer": {"base": (6, 512, 8, 2048), "big": (6, 1024, 16, 4096)},
}  # fmt: skip
EMBEDDINGS = {"albert": dict.fromkeys(SHAPES["albert"], 128), "electra": {"small": 128, "base": 768, "large": 1024}}


@pytest.mark.parametrize("family", SHAPES)
def test_shapes_are_published(family: str) -> None:
    found = {}
    for size in FAMILIES[family].config.SIZES:
        config = FAMILIES[family].config.model_validate({"family": family, "size": size, "vocab_size": 100})
        found[size] = (config.layers, config.width, config.heads, config.hidden_width)
        assert getattr(config, "num_decoder_layers", config.layers) == config.layers
        if family in EMBEDDINGS:
            assert config.token_width == EMBEDDINGS[family][size]
    assert found == SHAPES[family]


def test_no_preset_is_left_out() -> None:
    """Those of decoders are held against whole config.json files and counts in tests/interop/test_published.py."""
    decoders = {name for name, family in FAMILIES.items() if family.kind == "decoder"}
    assert SHAPES.keys() | decoders | {"crammed"} == FAMILIES.keys()
