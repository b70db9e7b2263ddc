"""`eval`: the run's own figures again, on any text of its tokenizer; another corpus or tokenizer is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwright import log
from shardwright.config import Config, ConfigError, parse
from shardwright.data.prepare import PrepareConfig, prepare
from shardwright.train import evaluate
from shardwright.train.build import build_corpus, fit_to_corpus, has_validation
from shardwright.train.preview import preview
from shardwright.train.run import train
from shardwright.train.score import evaluate_run


def prepare_text(source: Path, output: Path, **options: object) -> Path:
    """A prepared folder of a bundled text."""
    raw = {"input": [str(source)], "output": str(output), "validation_every": 10, **options}
    prepare(parse(PrepareConfig, raw, "prepare"), progress=False)
    return output


@pytest.fixture(scope="module")
def poems(bundled: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other text of the same tokenizer."""
    tokenizer = {"path": str(prepared / "tokenizer.json")}
    return prepare_text(
        bundled / "chinese_poems.jsonl", tmp_path_factory.mktemp("poems") / "poems", tokenizer=tokenizer
    )


@pytest.fixture(scope="module")
def foreign(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text of another, larger tokenizer, and without a validation split."""
    folder = tmp_path_factory.mktemp("foreign") / "english"
    return prepare_text(bundled / "english.jsonl", folder, tokenizer={"vocab_size": 700}, validation_every=0)


def test_a_mixture_is_scored_as_in_training_and_on_one_source_by_itself(
    tiny: Callable[..., Config], prepared: Path, poems: Path
) -> None:
    sources = json.dumps([{"path": str(prepared)}, {"path": str(poems)}])
    result = train(tiny("data.path=null", f"data.sources={sources}", "train.steps=2"))
    whole = evaluate_run(result.run)
    assert whole["val_loss"] == pytest.approx(result.val_loss, rel=1e-5)
    assert "xz_bits_per_byte" not in whole, "the text of several sources has no order"
    one = evaluate_run(result.run, str(poems))
    assert one["val_loss"] != whole["val_loss"] and one["xz_bits_per_byte"] > 0


def test_text_of_another_tokenizer_is_refused(tiny: Callable[..., Config], foreign: Path) -> None:
    result = train(tiny("train.steps=1"))
    with pytest.raises(
        ConfigError, match=r"was prepared with tokenizer .*tokenizer\.path=.*run/tokenizer\.json"
    ) as error:
        evaluate_run(result.run, str(foreign))
    assert str(foreign) in str(error.value) and "\n" not in str(error.value)


def test_a_corpus_that_changed_since_is_refused(
    tiny: Callable[..., Config], prepared: Path, poems: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(prepared, corpus)
    result = train(tiny(f"data.path={corpus}", "train.steps=1"))
    shutil.rmtree(corpus)
    shutil.copytree(poems, corpus)
    with pytest.raises(ConfigError, match=rf"data.corpus: names .*{corpus} is .*restore that corpus"):
        evaluate_run(result.run)
    assert evaluate_run(result.run, str(corpus))["val_loss"] > 0, "asked for by name it is another text"


def test_a_long_evaluation_says_how_far_it_is(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(tiny("train.steps=1"))
    short = evaluate_run(result.run)
    assert "evaluate:" not in capsys.readouterr().err
    monkeypatch.setattr(evaluate, "BAR_SECONDS", 0.0)
    monkeypatch.setattr(log, "PLAIN_SECONDS", 0.0)
    assert evaluate_run(result.run) == short
    said = capsys.readouterr().err
    assert re.search(r"evaluate: \d+ % of [\d.]+k? tokens, [\d.]+[kM]? tokens/s", said), said
    assert "evaluate: 100 %" in said, said
    log.get_logger().setLevel("WARNING")  # what --json sets
    try:
        evaluate_run(result.run)
        assert capsys.readouterr().err == ""
    finally:
        log.get_logger().setLevel("INFO")


def test_a_corpus_without_validation_text_is_said_at_the_start(
    tiny: Callable[..., Config], foreign: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny(f"data.path={foreign}")
    corpus = build_corpus(config)
    assert not has_validation(corpus) and has_validation(build_corpus(tiny(f"data.path={prepared}")))
    fit_to_corpus(config, corpus)
    said = capsys.readouterr().err
    assert said.count("warning") == 1 and f"the validation split of {foreign} is empty" in said.replace("\n", "")
    preview(config)
    assert "the run ends without validation figures" in capsys.readouterr().err
    config = tiny(f"data.path={foreign}", "evaluate.every=5")
    for check in (lambda: fit_to_corpus(config, corpus), lambda: preview(config)):
        with pytest.raises(ConfigError, match=r"evaluate.every=5: the validation split of .* is empty; .*=null"):
            check()
