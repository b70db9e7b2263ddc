"""Special tokens of an objective: found by their usual names, or given ids after the tokenizer's last."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from shardwright.config import Config, ConfigError
from shardwright.train.settings import read_config
from shardwright.train.specials import fit_special_tokens


class Vocabulary:
    """As much of a tokenizer as is asked: names and ids."""

    def __init__(self, size: int, **names: int) -> None:
        self.vocab_size, self.names = size, names

    def token_id(self, name: str) -> int | None:
        return self.names.get(name)


def config_of(objective: dict[str, Any]) -> Config:
    return read_config(
        {
            "model": {"family": "gpt2", "layers": 1, "width": 8, "heads": 1},
            "objective": objective,
            "data": {"path": "unused", "sequence_length": 64},
            "batch": {"sequences": 2, "micro": 2},
            "train": {"steps": 1},
        }
    )


def fit(objective: dict[str, Any], vocabulary: Vocabulary) -> tuple[dict[str, int], int]:
    config = config_of(objective)
    size = fit_special_tokens(config, vocabulary)  # type: ignore[arg-type]
    return config.objective.special_tokens, size


def test_usual_names_are_found() -> None:
    bert = Vocabulary(30522, **{"[PAD]": 0, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103})
    assert fit({"name": "masked"}, bert) == ({"mask": 103, "cls": 101, "sep": 102, "pad": 0}, 30522)
    roberta = Vocabulary(50265, **{"<s>": 0, "<pad>": 1, "</s>": 2, "<mask>": 50264})
    assert fit({"name": "masked"}, roberta) == ({"mask": 50264, "cls": 0, "sep": 2, "pad": 1}, 50265)
    assert fit({"name": "denoise", "damage": ["infill"]}, roberta) == ({"mask": 50264, "bos": 0, "pad": 1}, 50265)
    t5 = Vocabulary(32100, **{"<pad>": 0, **{f"<extra_id_{n}>": 32099 - n for n in range(100)}})
    assert fit({"name": "span"}, t5) == ({"pad": 0, "first_sentinel": 32099, "last_sentinel": 32000}, 32100)


def test_what_is_missing_is_added_after_the_last_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    plain = Vocabulary(512, **{"[MASK]": 7})
    with caplog.at_level(logging.INFO, logger="shardwright"):
        found, size = fit({"name": "masked"}, plain)
        assert (found, size) == ({"mask": 7, "cls": 512, "sep": 513, "pad": 514}, 515)
        assert fit({"name": "masked", "special_tokens": found}, plain) == (found, size)  # as a run goes on
    assert [r.message for r in caplog.records].count(
        "the tokenizer has no token for cls=512, sep=513, pad=514: new ids after its 512"
    ) == 1
    assert fit({"name": "span"}, Vocabulary(512)) == (
        {"pad": 512, "first_sentinel": 612, "last_sentinel": 513}, 613
    )  # fmt: skip
    assert fit({"name": "causal"}, Vocabulary(512)) == ({}, 512)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask": 9}, r"special_tokens\.mask=9: the tokenizer has id 7 for it; drop the key"),
        ({"bos": 9}, r"special_tokens\.bos=9: the objective has no use for it; it needs mask, cls, sep, pad"),
        ({"mask": 7, "cls": 7}, r"mask=7: is another special token too"),
    ],
)
def test_what_contradicts_the_tokenizer_is_refused(given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit({"name": "masked", "special_tokens": given}, Vocabulary(512, **{"[MASK]": 7}))
