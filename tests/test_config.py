"""The config layer: defaults <- YAML <- key=value, and one clear line for every mistake."""

import json
import math
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardwright.config import ConfigError, differences, find_config, parse_duration, read_yaml, to_yaml
from shardwright.train.settings import SCHEMA, read_config

ROOT = Path(__file__).resolve().parents[1]
RAW = {
    "model": {"family": "gpt2", "layers": 2},
    "objective": {"name": "causal"},
    "batch": {"sequences": 8},
    "train": {"steps": 10},
}


def test_overrides_win_over_yaml_and_yaml_over_defaults(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**RAW, "optimizer": {"lr": 0.1}}))
    config = read_config(path, ["optimizer.lr=2e-3", "train.recompute=full", "data.sources=[{path: a}, {path: b}]"])
    assert (config.optimizer.lr, config.optimizer.eps, config.train.recompute) == (2e-3, 1e-8, "full")
    assert [s.path for s in config.data.mixture()] == ["a", "b"]
    assert config.run == "runs/small"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.widht=3", "model.widht: unknown key; did you mean 'width'?"),
        ("train.stepz=1", "train.stepz: unknown key; did you mean 'steps'?"),
        ("optimiser={}", "optimiser: unknown key; did you mean 'optimizer'?"),
        ("model.width=abc", "model.width: got 'abc' (str); input should be a valid integer"),
        ("train.steps=1.5", "train.steps: got 1.5 (float); input should be a valid integer"),
        ("data.lanes=true", "data.lanes: got True (bool)"),
        ("model.family=gpt9", "model.family: got 'gpt9', expected one of 'gpt2'"),
        ("optimizer.name=adamm", "optimizer.name: got 'adamm' (str); input should be 'adamw', 'adam'"),
        ("data.workers=x", "data.workers: got 'x' (str); input should be a valid integer or input should be 'thread'"),
        ("train.tokens=5", "train: give the length of the run once: steps, tokens or budget"),
        ("batch.tokens=8", "batch: give the global batch once: sequences or tokens"),
        ("precision.loss_scale.floor=-1", "precision.loss_scale.floor: got -1 (int); input should be greater than 0"),
        ("data.sources=[{path: x, wieght: 2}]", "data.sources.0.wieght: unknown key; did you mean 'weight'?"),
        ("batch.micro=3", "batch.micro=3: does not divide batch.sequences=8; nearest that does: batch.micro=4"),
        ("batch.sequences=4000000007", "batch.micro=8: does not divide batch.sequences=4000000007; nearest that does:"),
        ("batch.ramp={start: 2, increment: 2, sequences: 9}", "batch.micro=8: does not divide batch.ramp.start=2"),
        ("steps", "'steps': expected key=value"),
        ("optimizer.betas=[2.0, 3.0]", "optimizer.betas.0: got 2.0 (float); input should be less than 1"),
        ("optimizer.lr=.inf", "optimizer.lr: got inf (float); input should be a finite number"),
        ("train.seed=100000000000000000000000", "train.seed: got"),
        ("model.width.x=1", "model.width: got {'x': 1} (dict)"),
        ("train.steps.x=1", "train.steps.x: train.steps is a single value, not a section"),
        ("train=5", "train: got 5 (int); expected a section of keys, such as train.steps=..."),
        ("model=5", "model: got 5 (int); expected a section of keys, such as model.family=..."),
        ("data.sources.0={path: x}", "data.sources.0: data.sources has no entry 0; give the whole list"),
        ("data.sources.0.path=x", "data.sources.0: data.sources has no entry 0; give the whole list"),
        ("train.steps=010", "train.steps: got '010' (str); input should be a valid integer"),
        ("train.steps=1:30", "train.steps: got '1:30' (str); input should be a valid integer"),
        ("train={steps: 1, steps: 2}", "the value is not valid YAML: 'steps' stands twice; keep one"),
        ("run=[a", "the value is not valid YAML: expected ',' or ']'"),
        ("train.threads=100000", "train.threads: got 100000 (int); input should be less than or equal to 1024"),
        ("data.workers=-1", "data.workers: got -1 (int); input should be greater than or equal to 0 or"),
        ("data.allow=[pips]", "data.allow.0: got 'pips' (str); input should be 'pipe' or 'pickle'"),
        ("train.recompute=0", "or input should be greater than or equal to 1"),
        ("log.profile=[12,10]", "log.profile: got [12, 10]; expected the first and the last step, in this order"),
        ("log.profile=[0,10]", "log.profile.0: got 0 (int); input should be greater than or equal to 1"),
    ],
)
def test_a_mistake_gets_one_line_with_key_value_and_what_is_allowed(override, line):
    with pytest.raises(ConfigError) as error:
        read_config(RAW, [override])
    assert line in str(error.value) and "\n" not in str(error.value)


def test_broken_yaml_names_file_and_line(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("model:\n  family: [gpt2\ntrain: {}\n")
    with pytest.raises(ConfigError, match=r"broken.yaml line \d: is not valid YAML"):
        read_config(path)


def test_a_key_that_stands_twice_is_refused_with_file_and_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("model: {family: gpt2}\ntrain:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    with pytest.raises(ConfigError, match=r"twice.yaml line 5: is not valid YAML: 'steps' stands twice; keep one"):
        read_config(path)
    path.write_text("a: {b: &b {<<: {k: 1}, k: 2}}\nc: {<<: *b, k: 3}\n")
    assert read_yaml(path) == {"a": {"b": {"k": 2}}, "c": {"k": 3}}, "a merged key may be given anew"


def test_numbers_are_read_as_they_are_written(tmp_path):
    path = tmp_path / "numbers.yaml"
    texts = "[1e-3, 1.5E+3, .5, 1., -5, 1_000, 0xff, .inf, 0, 010, 08, 1:30, 1:30.5, 2024-05-01, ._]"
    path.write_text(f"x: {texts}")
    expected = [1e-3, 1500.0, 0.5, 1.0, -5, 1000, 255, math.inf, 0, "010", "08", "1:30", "1:30.5", "2024-05-01", "._"]
    found = read_yaml(path)["x"]
    assert found == expected and list(map(type, found)) == list(map(type, expected))


def test_an_entry_of_a_list_that_is_there_can_be_set():
    raw = {**RAW, "data": {"sources": [{"path": "a"}, {"path": "b"}]}}
    config = read_config(raw, ["data.sources.1={path: c, weight: 2}", "data.sources.0.weight=3"])
    assert [(s.path, s.weight) for s in config.data.sources] == [("a", 3), ("c", 2)]
    with pytest.raises(ConfigError, match=r"data.sources.3: data.sources has no entry 3; give the whole list"):
        read_config(raw, ["data.sources.3.path=x"])


@pytest.mark.parametrize(("name", "line"), [(".", ".: is a folder"), ("/", "/: is a folder"), ("", "config: is empty")])
def test_what_is_no_config_file_gets_one_line(name, line):
    with pytest.raises(ConfigError) as error:
        find_config(name)
    assert line in str(error.value) and "debug/gpt2" in str(error.value)


def test_a_config_is_found_by_name_and_a_near_miss_is_proposed():
    assert find_config("debug/gpt2") == ROOT / "configs/debug/gpt2.yaml"
    with pytest.raises(ConfigError, match="did you mean debug/gpt2"):
        find_config("debug/gtp2")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_reads_and_fits_the_schema(path):
    if path.parent.name == "hardware":
        pytest.skip("held by test_hardware")
    read_config(path)
    schema = json.loads((ROOT / "configs/schema.json").read_text())
    jsonschema.validate(read_config(path).model_dump(mode="json"), schema)
    assert "yaml-language-server: $schema=" in path.read_text().splitlines()[0]


def test_the_exported_schema_is_current():
    exported = json.loads((ROOT / "configs/schema.json").read_text())
    current = json.loads(json.dumps(SCHEMA.model_json_schema()))
    assert exported == current, "run: shardwright schema > configs/schema.json"


def test_a_resolved_config_reads_back_equal(tmp_path):
    config = read_config(RAW, ["train.budget=10m", "train.steps=null", "optimizer.lr=1e-5"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    assert read_config(path) == config


def test_only_meaning_counts_as_a_difference():
    one, two = read_config(RAW), read_config(RAW, ["data.workers=4", "log.every=3", "run=x", "optimizer.lr=0.5"])
    assert differences(one, two) == [("optimizer.lr", 3e-4, 0.5)]
    assert differences(one, read_config({**RAW, "model": {"family": "llama", "layers": 2}}))[0][0] == "model.family"


@given(st.floats(0.1, 1e4), st.sampled_from("smhd"))
def test_durations(number, unit):
    assert parse_duration(f"{number:.3f}{unit}") == pytest.approx(
        float(f"{number:.3f}") * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    )


@pytest.mark.parametrize("text", ["", "10", "10x", "-3m", "0s"])
def test_what_is_no_duration(text):
    with pytest.raises(ValueError, match="is not a duration"):
        parse_duration(text)
