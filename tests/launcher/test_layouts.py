"""`shardwright layouts` and the layout in `train --dry-run`: what they print is what a start of a run would decide."""

import json

import pytest

from shardwright.launcher.cli import run
from shardwright.parallel.refusals import ROWS, refusals
from shardwright.train.layout import build_facts
from shardwright.train.settings import read_config

DEBUG = ["debug/gpt2", "data.path=null", "model.vocab_size=512"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that succeeds prints."""
    assert run([*arguments]) == 0
    return capsys.readouterr().out


def test_without_a_config_every_rule_stands_there_once(capsys):
    lines = answer(capsys, "layouts").splitlines()
    for row in ROWS:
        assert sum(row.rule in line and line.strip().startswith(row.name) for line in lines) == 1
    assert [rule["name"] for rule in json.loads(answer(capsys, "layouts", "--json"))["rules"]] == [
        row.name for row in sorted(ROWS, key=lambda row: row.warns)
    ]


def test_what_is_listed_for_a_config_is_what_would_start(capsys):
    found = json.loads(answer(capsys, "layouts", *DEBUG, "--world", "4", "--limit", "1000", "--json"))
    assert found["refusals"] == [] and found["world"] == 4 and len(found["layouts"]) == found["fitting"] > 20
    for layout in found["layouts"]:
        settings = [f"parallel.{key}={json.dumps(value)}" for key, value in layout.items()]
        assert refusals(build_facts(read_config(DEBUG[0], [*DEBUG[1:], *settings]), 4)) == [], layout
    degrees = {(x["data"], x["context"], x["tensor"], x["pipeline"]) for x in found["layouts"]}
    assert {(4, 1, 1, 1), (2, 1, 2, 1), (1, 4, 1, 1), (1, 1, 2, 2)} <= degrees


@pytest.mark.parametrize("layout", ["tensor=4", "tensor=8", "context=2", "context=4"])
def test_t5_as_published_is_cut_like_any_other(layout):
    config = read_config("t5", [f"parallel.{layout}", "model.vocab_size=32128", "model.heads=16"])
    assert refusals(build_facts(config, 8)) == [], "its row of targets is filled up to 120"


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_an_engine_is_offered_what_it_carries(engine, capsys):
    asked = [*DEBUG, f"engine={engine}", "parallel.tensor=2"]
    found = json.loads(answer(capsys, "layouts", *asked, "--world", "4", "--limit", "1000", "--json"))
    assert found["refusals"] and f"engine={engine}: carries data parallelism" in found["refusals"][0]
    degrees = {(x["data"], x["context"], x["tensor"], x["pipeline"]) for x in found["nearest"] + found["layouts"]}
    assert degrees == {(4, 1, 1, 1)} and {x["zero"] for x in found["layouts"]} == {0, 1, 2, 3}
    for layout in found["layouts"]:
        settings = [f"parallel.{key}={json.dumps(value)}" for key, value in layout.items()]
        assert refusals(build_facts(read_config(DEBUG[0], [*asked[1:], *settings]), 4)) == [], layout


def test_the_listed_words_are_settings_of_a_command(capsys):
    text = answer(capsys, "layouts", *DEBUG, "--world", "2", "--limit", "3")
    start = text.index("as config keys:")
    words = [line.split() for line in text[start:].splitlines()[1:4]]
    assert all(read_config(DEBUG[0], [*DEBUG[1:], *line]) for line in words)
    assert "data=2 in a world of 2: fits" in text and "more: --limit" in text


def test_a_refused_layout_is_told_why_and_what_is_near(capsys):
    text = answer(capsys, "layouts", *DEBUG, "parallel.tensor=3")
    assert "tensor=3 in a world of 3: refused" in text
    assert "parallel.tensor=3: does not divide the query heads (model.heads=4)" in text
    assert "nearest that fits: data=3" in text
    warned = answer(capsys, "layouts", *DEBUG, "model.attention_dropout=0.1", "--world", "2")
    assert "warning: model.attention_dropout=0.1" in warned


def test_the_world_is_the_launchers_or_that_of_the_degrees(capsys, monkeypatch):
    settings = [*DEBUG, "parallel.tensor=2", "parallel.data=3"]
    assert json.loads(answer(capsys, "layouts", *settings, "--json"))["world"] == 6
    monkeypatch.setenv("WORLD_SIZE", "12")
    assert json.loads(answer(capsys, "layouts", *DEBUG, "--json"))["world"] == 12


def test_a_dry_run_tells_the_layout(capsys):
    settings = ["parallel.data=3", "parallel.pipeline=2", "parallel.schedule=zbv"]
    text = answer(capsys, "train", *DEBUG, *settings, "--dry-run")
    assert "= 8 a micro-batch x 1 micro-batches x 3 data ranks - 8 of padding" in text
    assert "layout: data=3 pipeline=2 on 6 processes" in text
    stages = [line.strip() for line in text.splitlines() if line.startswith("  stage ")]
    assert [line.split(": ")[1] for line in stages] == ["embed", "blocks.0", "blocks.1", "final_norm"]
    assert [line.split("rank ")[1][0] for line in stages] == ["0", "1", "1", "0"]
    found = json.loads(answer(capsys, "train", *DEBUG, *settings, "--dry-run", "--json"))
    assert found["layout"]["stages"] == [["embed"], ["blocks.0"], ["blocks.1"], ["final_norm"]]
    assert "layout:" not in answer(capsys, "train", *DEBUG, "--dry-run")


def test_a_dry_run_refuses_what_a_run_would(capsys):
    assert run(["train", *DEBUG, "parallel.tensor=3", "--dry-run"]) == 2
    assert "parallel.tensor=3: does not divide" in capsys.readouterr().err
