"""`shardwright verify`: layouts that do as one process does pass by a tight bound, and planted errors are named.

The steps in float64 that it compares are held against plain autograd in float64.
"""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F

from shardwright.config import ConfigError
from shardwright.launcher.cli import run
from shardwright.model.cpu_kernels import GeluTanh
from shardwright.model.position import rotary, rotate
from shardwright.parallel.mesh import World
from shardwright.train.build import build_step
from shardwright.train.compare import BOUNDS, judged
from shardwright.train.settings import read_config
from shardwright.train.verify import comparable, verify
from tests.train.work_verify import SCALED, STALE, TIED, check

WORLD = World(device=torch.device("cpu"))


@pytest.fixture
def raw(prepared, tmp_path):
    """A run of a tiny GPT-2, four micro-batches a step."""
    return {
        "run": str(tmp_path / "runs" / "tiny"),
        "model": {"family": "gpt2", "layers": 2, "width": 32, "heads": 2, "max_length": 32},
        "objective": {"name": "causal"},
        "data": {"path": str(prepared), "sequence_length": 32, "lanes": 4, "workers": 0},
        "batch": {"sequences": 8, "micro": 2},
        "train": {"steps": 100, "threads": 1, "device": "cpu", "compile": False},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup": 0.0},
    }


# ------------------------------------------------------------------------------------------ float64


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["model.family=llama"],
        ["model.head_bias=true", "model.logit_softcap=5.0", "model.positions=sinusoidal"],
    ],
    ids=lambda settings: settings[0] if settings else "gpt2",
)
def test_a_step_in_float64_rounds_nothing_to_float32(raw, settings):
    config = read_config(raw, ["precision.compute=fp64", "model.vocab_size=97", "train.clip=null", *settings])
    step = build_step(config, WORLD)
    batches = [_batch(seed) for seed in range(2)]
    model = copy.deepcopy(step.stages.models[0].model)  # without the hooks that hand gradients on
    step.accumulate(batches, torch.tensor(0))
    total = sum(_plain_loss(model, batch) for batch in batches) / sum(b["weights"].double().sum() for b in batches)
    names, parameters = zip(*model.named_parameters(), strict=True)
    expected = dict(zip(names, torch.autograd.grad(total, parameters), strict=True))
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    for name, gradient in expected.items():
        assert step.masters.weights[name].grad.dtype == torch.float64
        assert float((step.masters.weights[name].grad - gradient).norm()) < 1e-13 * size, name
    numbers = step.update(1.0)
    assert numbers.dtype == torch.float64
    assert numbers[0].item() == pytest.approx(total.item(), rel=1e-14)
    assert numbers[1].item() == pytest.approx(size, rel=1e-13)


def test_what_a_compiler_is_given_for_gelu_rounds_nothing_either():
    found = []
    for function in (GeluTanh.apply, lambda x: F.gelu(x, approximate="tanh")):
        x = torch.linspace(-6, 6, 1000, dtype=torch.float64, requires_grad=True)
        y = function(x)
        y.sum().backward()
        found.append((y.detach(), x.grad))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_rotation_rounds_nothing_either():
    x = torch.linspace(-3, 3, 2 * 5 * 3 * 8, dtype=torch.float64).view(2, 5, 3, 8)
    cos, sin = rotary(torch.arange(5)[None], 8, 10000.0)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos.double(), sin.double())
    torch.testing.assert_close(rotate(x, cos, sin), torch.cat([turned.real, turned.imag], -1), rtol=1e-14, atol=1e-15)


def _batch(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(97, (2, 25), generator=generator)
    documents = (torch.rand(2, 24, generator=generator) < 0.1).cumsum(1).int()
    weights = (torch.rand(2, 24, generator=generator) < 0.8).float()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "weights": weights, "documents": documents,
            "sequence": torch.arange(2)}  # fmt: skip


def _plain_loss(model, batch):
    logits = model(batch["input_ids"], documents=batch["documents"])["logits"]
    assert logits.dtype == torch.float64
    return (F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="none")
            * batch["weights"].flatten()).sum()  # fmt: skip


# ------------------------------------------------------------------------------------------ layouts that are right

LAYOUTS = {
    "zero3": (2, ["parallel.zero=3"]),
    "tensor": (2, ["parallel.tensor=2", "model.residual_dropout=0.1"]),
    "context": (2, ["parallel.context=2", "model.family=llama", "optimizer.name=adafactor"]),
    "pipeline": (2, ["parallel.pipeline=2", "parallel.schedule=zbv", "parallel.zero=1"]),
    "tensor pipeline": (4, ["parallel.pipeline=2", "parallel.tensor=2", "model.tied=false", "optimizer.name=muon"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_passes_in_float64(name, ranks, raw):
    size, settings = LAYOUTS[name]
    reports = ranks.run(size, "tests.train.work_verify:check", raw, settings, "fp64", timeout=240)
    for report in reports:
        assert report["passed"], report["verdict"]
        assert report["steps"] == reports[0]["steps"] and report["left"] == []
    report = reports[0]
    assert report["processes"] == size and report["format"] == report["against"] == "fp64"
    assert [step["step"] for step in report["steps"]] == [1, 2]
    judged_weights = [row for row in report["tensors"] if row["weight"] is not None]
    assert len(judged_weights) >= 0.8 * len(report["tensors"])
    assert max(row["gradient"] for row in report["tensors"]) < 1e-11


def test_a_run_in_its_own_format_is_held_to_that_formats_bound(ranks, raw):
    settings = ["precision.compute=bf16", "parallel.zero=2"]
    report = ranks.run(2, "tests.train.work_verify:check", raw, settings, "config")[0]
    assert report["passed"], report["verdict"]
    assert (report["format"], report["against"]) == ("bf16", "bf16")


def test_fp16_lowers_its_scale_and_takes_the_step_again(raw):
    found = check(raw, ["precision.compute=fp16", "precision.loss_scale.initial=16777216.0"], "config")
    assert found["retries"] > 0 and found["passed"], found["verdict"]


def test_a_run_by_the_clock_is_compared_as_one_of_steps(raw):
    raw["train"] = {**raw["train"], "steps": None, "budget": "1h"}
    assert check(raw, [])["passed"]


# ------------------------------------------------------------------------------------------ errors

ERRORS = {
    "scaled gradient": (2, ["parallel.zero=1"], "fp32", (1, "gradient", SCALED)),
    "scaled copy": (2, ["parallel.pipeline=2"], "fp64", (1, "gradient", TIED)),
    "stale weight": (2, ["parallel.zero=2"], "fp32", (2, "weight", STALE)),
    "unsummed norms": (2, ["parallel.tensor=2"], "fp32", (1, "gradient", "blocks.0.attention_norm.weight")),
    "unsummed norms in bf16": (
        2, ["parallel.tensor=2", "precision.compute=bf16"], "config", (1, "gradient", "blocks.0.attention_norm.weight")
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", ERRORS)
def test_a_planted_error_is_named(plant, ranks, raw):
    size, settings, number_format, (step, what, tensor) = ERRORS[plant]
    what_is_planted = plant.partition(" in ")[0]
    for report in ranks.run(size, "tests.train.work_verify:check", raw, settings, number_format, what_is_planted):
        assert not report["passed"]
        first = report["first"]
        assert (first["step"], first["what"], first["tensor"]) == (step, what, tensor)
        assert f"step {step}" in report["verdict"] and tensor in report["verdict"]
        assert report["left"] == []


def test_a_layout_asked_to_be_deterministic_is_run_twice(ranks, raw):
    settings = ["parallel.zero=1", "train.deterministic=true"]
    steady = ranks.run(2, "tests.train.work_verify:check", raw, settings)
    assert all(report["passed"] and report["repeat"] == "" for report in steady), steady[0]["verdict"]
    unsteady = ranks.run(2, "tests.train.work_verify:check", raw, settings, "fp32", "unsteady gradient")
    for report in unsteady:
        assert not report["passed"] and report["first"] is None
        assert report["repeat"] == f"gradient {SCALED} at step 1" and report["repeat"] in report["verdict"]


def test_a_failure_on_rank_0_reaches_all_ranks(ranks, raw):
    for heard, left in ranks.run(2, "tests.train.work_verify:fail", raw, ["parallel.zero=1"]):
        assert heard == "rank 0: no such luck" and left == []


def test_what_cannot_run_is_refused(raw):
    with pytest.raises(ConfigError, match="tensor=2"):
        verify(read_config(raw, ["parallel.tensor=2"]))
    with pytest.raises(ConfigError, match="expected fp32, fp64 or config"):
        verify(read_config(raw), number_format="fp8")


@pytest.mark.parametrize("engine", ["deepspeed", "accelerate"])
def test_float64_is_not_asked_of_an_engine_that_has_none(engine, raw):
    config = read_config(raw, [f"engine={engine}"])
    with pytest.raises(ConfigError, match=rf"^--format=fp64: engine={engine} has no float64; .* works: --format=fp32"):
        verify(config, number_format="fp64")
    alone, spread = comparable(config, "fp32")
    assert (alone.engine, spread.engine, spread.precision.compute) == ("native", engine, "fp32")


# ------------------------------------------------------------------------------------------ verdicts and command


def test_what_is_not_finite_is_out_of_bound_and_rounding_is_not_judged():
    bounds, tiny = BOUNDS["fp32"], set()
    rows = [("a", 1e-3, math.inf, 1.0), ("b", 0.0, 0.0, 0.0), ("c", 1e-12, 1e-12, 1e-9), ("d", 1e-3, 1e-3, math.nan)]
    found = judged("gradient", 1, rows[:3], bounds, tiny)
    assert found[0].relative == math.inf and found[1].relative == 0.0
    assert found[2].relative == pytest.approx(1e-12 / bounds.floor) and tiny == {"b", "c"}
    weights = judged("weight", 1, rows, bounds, tiny)
    assert [figure.relative for figure in weights] == [math.inf, None, None, math.inf]
    assert [figure.share > 1 for figure in weights] == [True, False, False, True]
    later = judged("gradient", 3, rows[:3], bounds, set())
    assert later[0].bound == math.sqrt(3) * bounds.gradient


def test_blocks_are_compiled_only_where_the_config_says_so(raw):
    for setting, expected in (("auto", False), ("true", True), ("false", False)):
        alone, spread = comparable(read_config(raw, [f"train.compile={setting}"]), "fp32")
        assert alone.train.compile is spread.train.compile is expected


def test_the_command_says_it_in_json_text_and_html(raw, tmp_path, capsys):
    path, page = tmp_path / "config.yaml", tmp_path / "page.html"
    path.write_text(json.dumps(raw))
    assert run(["verify", str(path), "--steps", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] and len(report["steps"]) == 1 and report["steps"][0]["loss"]["difference"] == 0
    settings = ["precision.compute=bf16", "--format", "config", "--output", str(page)]
    assert run(["verify", str(path), *settings]) == 0
    text = capsys.readouterr().out
    assert "step 3: loss" in text and "passed: " in text and "bf16, beside one process in bf16" in text
    assert "Passed" in page.read_text() and len(page.read_text()) < 200_000
    assert run(["verify", str(path), "parallel.tensor=2"]) == 2
    assert run(["verify", str(path), "--format", "fp8"]) == 2
    for place, words in ((tmp_path, "is a folder; name a file"), (path / "page.html", "choose another place")):
        assert run(["verify", str(path), "--output", str(place)]) == 2
        assert words in capsys.readouterr().err
