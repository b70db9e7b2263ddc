"""Weights of 8 and 4 bits: what torchao makes of them, training for it, and files that transformers opens."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwright.adapt.quantize import apply_fake_quantization, plain, rounded
from shardwright.config import Config, ConfigError, RunError
from shardwright.interop.weights import WeightFiles
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import LanguageModel
from shardwright.train import quantized
from shardwright.train.layout import blocks_of
from shardwright.train.load import load
from shardwright.train.quantized import export_quantized
from shardwright.train.run import train
from tests.equivalence.cells import BOUNDS, SHAPES, config, disagreement, weights
from tests.equivalence.work import leg
from tests.interop.commands import done, refused
from tests.ranks import Ranks

Tiny = Callable[..., Config]
LLAMA = {"family": "llama", "kv_heads": 1, "mlp_width": 96}
FORMATS = [("int8", None), ("int8", 8), ("int4", 8)]


# ------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize(("number_format", "group"), FORMATS)
def test_rounded_weights_are_the_formula(number_format: str, group: int | None) -> None:
    """Symmetric: scale is the largest of a group over half the range, values are whole numbers of scales."""
    weight = torch.randn(24, 64)
    bits = int(number_format.removeprefix("int"))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    grouped = weight.double().unflatten(1, (-1, group or 64))
    scale = grouped.abs().amax(-1, keepdim=True) / ((high - low) / 2)
    wanted = (grouped / scale).round().clamp(low, high) * scale
    found = rounded(weight, number_format, group).double().unflatten(1, (-1, group or 64))
    ties = ((grouped / scale).frac().abs() - 0.5).abs() < 1e-3  # a group's largest is one: float32 may go either way
    assert ((found - wanted).abs() <= 1e-6)[~ties].all() and ties.double().mean() < 0.2
    assert ((found - grouped).abs() <= scale * (1 + 1e-5)).all()
    assert len(torch.unique((found / scale).round()[0, 0])) <= 2**bits


def build(shape: str) -> LanguageModel:
    fields = {**SHAPES[shape], "vocab_size": 101}
    made = FAMILIES[str(fields["family"])].config.model_validate(fields)
    model = build_model(made).eval()
    apply_init(model, made, 0)
    return model


def linears(model: LanguageModel) -> list[nn.Linear]:
    return [m for block in blocks_of(model) for m in block.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize(("number_format", "group"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_training_computes_with_what_the_export_holds(shape: str, number_format: str, group: int | None) -> None:
    """Of every family: fake quantisation gives what torchao's own dequantised weights give, and no name changes."""
    fake, real = build(shape), build(shape)
    names = [name for name, _ in fake.named_parameters()]
    apply_fake_quantization(blocks_of(fake), number_format, group)
    assert [name for name, _ in fake.named_parameters()] == names
    ids = torch.randint(0, 101, (2, 16))
    given = {"input_ids": ids}
    if "decoder_input_ids" in inspect.signature(real.forward).parameters:
        given["decoder_input_ids"] = ids
    with torch.no_grad():
        exact = real(**given)["logits"]
        for layer in linears(real):
            layer.weight.copy_(rounded(layer.weight, number_format, group))
        found, wanted = fake(**given)["logits"], real(**given)["logits"]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (wanted - exact).abs().max() > 0


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    """Straight through: the gradient at the rounded weights; a row's largest may be beyond the range, and is cut."""
    fake, real = build("llama"), build("llama")
    inside = {id(m.weight): m.weight.abs() < m.weight.abs().amax(1, keepdim=True) for m in linears(real)}
    apply_fake_quantization(blocks_of(fake), "int8", None)
    with torch.no_grad():
        for layer in linears(real):
            layer.weight.copy_(rounded(layer.weight, "int8", None))
    ids = torch.randint(0, 101, (2, 16))
    for model in (fake, real):
        model(input_ids=ids)["logits"].square().mean().backward()
    for mine, theirs in zip(fake.parameters(), real.parameters(), strict=True):
        where = inside.get(id(theirs), torch.ones_like(theirs, dtype=torch.bool))
        torch.testing.assert_close(mine.grad[where], theirs.grad[where], rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------------------------------------ export


@pytest.fixture(scope="session")
def llama(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a Llama-style model that has learned something."""
    run = tmp_path_factory.mktemp("exported") / "llama"
    train(tiny(run, "train.steps=30", "checkpoint.every=null", **LLAMA))
    return run


def opened(folder: Path, **options: Any) -> Any:
    """As its users open it."""
    import transformers

    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(folder, **options).eval()


@pytest.mark.parametrize(("number_format", "group"), [("int8", None), ("int8", 16), ("int4", 32)])
def test_files_hold_what_torchao_makes_of_our_weights(
    llama: Path, tmp_path: Path, number_format: str, group: int | None
) -> None:
    made = export_quantized(llama, tmp_path / "out", number_format, group=group)
    assert made.verdict is not None and made.verdict.passed and made.verdict.difference < 5e-5
    values = sum(layer.weight.numel() for layer in linears(load(llama).model))
    assert made.quantized == 14 and made.bytes_before - made.bytes > 0.55 * 4 * values
    state = opened(tmp_path / "out").state_dict()
    theirs, ours = "model.layers.1.mlp.down_proj.weight", "blocks.1.mlp.down.weight"
    held = dict(load(llama).model.named_parameters())
    assert torch.equal(plain(state[theirs]), rounded(held[ours], number_format, group))
    assert not isinstance(state["lm_head.weight"], type(state[theirs])), "the head stays as it is"
    # Ours with these weights gives their logits.
    model, ids = load(llama).model, torch.randint(0, 512, (2, 20))
    with torch.no_grad():
        exact = model(input_ids=ids)["logits"]
        for layer in linears(model):
            layer.weight.copy_(rounded(layer.weight, number_format, group))
        found, wanted = opened(tmp_path / "out")(ids).logits, model(input_ids=ids)["logits"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert 0 < made.difference < 0.5 and made.divergence > 0
    assert (wanted - exact).abs().max() > 0
    settings = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "torchao"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= files
    assert len(files) == len([f for f in files if (tmp_path / "out" / f).is_file()])


@pytest.mark.parametrize(
    ("family", "objective"),
    [
        ("qwen3", "causal"),
        ("bert", "masked"),
        ("roberta", "masked"),
        ("deberta_v2", "masked"),
        ("modernbert", "masked"),
        ("t5", "span"),
    ],
)
def test_families_of_every_kind_go_out(tiny: Tiny, tmp_path: Path, family: str, objective: str) -> None:
    run = tmp_path / "run"
    train(tiny(run, "train.steps=1", f"objective.name={objective}", "model.mlp_width=64", family=family))
    made = export_quantized(run, tmp_path / "out", "int4", group=16)
    assert made.verdict is not None and made.verdict.passed and made.quantized >= 8


def test_bf16_and_several_files(llama: Path, tmp_path: Path) -> None:
    made = export_quantized(llama, tmp_path / "out", "int8", dtype="bf16", shard="30KB")
    assert made.verdict is not None and made.verdict.passed
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert opened(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_damage_between_writing_and_checking_is_found(llama: Path, tmp_path: Path, monkeypatch) -> None:
    """The files of another format than was asked for: nothing is left of them."""
    real = quantized.build_torchao_config
    monkeypatch.setattr(quantized, "build_torchao_config", lambda *_: real("int4", 16))
    with pytest.raises(RunError, match="its files hold another .* than torchao makes of it"):
        export_quantized(llama, tmp_path / "out", "int8")
    assert list(tmp_path.iterdir()) == []


def test_the_command(llama: Path, tmp_path: Path, capsys) -> None:
    said = done(capsys, "export", llama, "--output", tmp_path / "out", "--quantize", "int4", "--group", 16)
    assert "14 of 21 tensors in int4" in said and "KL" in said and "differ by" in said
    answer = json.loads(done(capsys, "export", llama, "--output", tmp_path / "b", "--quantize", "int8", "--json"))
    assert answer["format"] == "int8" and answer["bytes"] < answer["bytes_before"] and answer["verdict"]["passed"]
    plain_export = done(capsys, "export", llama, "--output", tmp_path / "c")
    assert "tensors" in plain_export and WeightFiles(tmp_path / "c").keys()


def test_what_cannot_be_quantised_is_refused(llama: Path, tiny: Tiny, tmp_path: Path, capsys) -> None:
    out = ("--output", tmp_path / "out")
    refused(capsys, "export", llama, *out, "--quantize", "int3", says="--quantize int3: expected one of int8, int4")
    refused(
        capsys, "export", llama, *out, "--quantize", "int4", "--group", 64,
        says="--group 64: does not divide the 32 inputs of model.layers.0.self_attn.q_proj; use 32, 16, 8, or int8",
    )  # fmt: skip
    refused(capsys, "export", llama, *out, "--group", 64, says="--group: goes with --quantize")
    train(tiny(tmp_path / "gpt2", "train.steps=1"))
    refused(capsys, "export", tmp_path / "gpt2", *out, "--quantize", "int8", says="no linear layers in GPT2LMHeadModel")
    infill = "objective={name: denoise, damage: [infill]}"
    train(tiny(tmp_path / "bart", "train.steps=1", infill, family="bart"))
    refused(capsys, "export", tmp_path / "bart", *out, "--quantize", "int8", says="for the bias of its logits; use t5")
    keys = (f"begin={llama}", "adapt.method=lora", "train.steps=1")
    train(tiny(tmp_path / "lora", *keys, **LLAMA))
    refused(capsys, "export", tmp_path / "lora", *out, "--quantize", "int8", says="has an adapter; take it in first")
    refused(capsys, "export", tmp_path / "lora", *out, "--quantize", "int8", "--merge", says="--merge: does not go")
    with pytest.raises(ConfigError, match="quantize: torchao exchanges the linear layers that adapt.method=lora"):
        train(tiny(tmp_path / "both", *keys, "quantize.format=int8", **LLAMA))
    assert not (tmp_path / "out").exists()
    made = tiny(tmp_path / "run", "quantize={format: int4, group: 64}", "train.steps=1", **LLAMA)
    with pytest.raises(ConfigError, match="quantize.group=64: does not divide the 32 inputs of attention.q; use 32"):
        train(made)


# ------------------------------------------------------------------------------------------ training for it

INT4 = "quantize={format: int4, group: 8}"


def test_trained_for_its_export_a_model_loses_less(tiny: Tiny, llama: Path, tmp_path: Path) -> None:
    """Fine-tuned with rounded weights, the rounded model is better than one fine-tuned without."""

    def loss_rounded(run: Path) -> float:
        loaded = load(run)
        for layer in linears(loaded.model):
            layer.weight.data.copy_(rounded(layer.weight, "int4", 32))
        ids = torch.tensor(text).view(-1, 64)
        with torch.no_grad():
            logits = loaded.model(input_ids=ids)["logits"]
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()

    from shardwright.data.manifest import Manifest
    from shardwright.data.shards import Shard

    keys = ("train.steps=60", f"begin={llama}", "optimizer.lr=3e-3", "checkpoint.every=null")
    made = {
        name: tiny(tmp_path / name, *keys, *more, **LLAMA)
        for name, more in {"plain": (), "aware": ("quantize.format=int4",)}.items()
    }
    manifest = Manifest.load(made["plain"].data.path)
    info = manifest.split("validation").shards[0]
    tokens = Shard(f"{manifest.root}/{info.path}", f"{manifest.root}/{info.index}").tokens(0, 64 * 40)
    text: list[int] = [int(token) for token in tokens]
    for one in made.values():
        train(one)
    assert loss_rounded(Path(made["aware"].run)) < loss_rounded(Path(made["plain"].run))
    exported = export_quantized(made["aware"].run, tmp_path / "out", "int4")
    assert exported.group == 32 and exported.verdict is not None and exported.verdict.passed


@pytest.mark.parametrize("settings", [(), ("precision.compute=bf16",)])
def test_a_resumed_run_is_bit_identical(tiny: Tiny, tmp_path: Path, settings: tuple[str, ...]) -> None:
    given = [INT4, *settings]
    train(tiny(tmp_path / "whole", *given, **LLAMA))
    leg(tiny(tmp_path / "parts", *given, **LLAMA).model_dump(), [], 4)
    train(tiny(tmp_path / "parts", *given, **LLAMA))
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)
    with pytest.raises(ConfigError, match="quantize.format|quantize is"):
        train(tiny(tmp_path / "parts", *settings, **LLAMA))


def test_masters_are_not_rounded(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", INT4, **LLAMA))
    weight: Tensor = weights(tmp_path / "run")["model.blocks.0.mlp.up.weight"]
    assert len(torch.unique(weight)) > 0.9 * weight.numel()


LAYOUTS = {
    "zero0": (2, ["parallel.zero=0"]), "zero1": (2, ["parallel.zero=1"]), "zero2": (2, ["parallel.zero=2"]),
    "zero3": (2, ["parallel.zero=3"]), "context2": (2, ["parallel.context=2"]),
    "pipeline2": (2, ["parallel.pipeline=2"]),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_nothing(ranks: Ranks, prepared: Path, tmp_path: Path, layout: str) -> None:
    """Against one process: where sums are taken in another order, now and then a weight is rounded the other way, which
    moves more than sums do. Hence fewer steps, and the bounds of fp16.
    """
    given = [INT4, "train.clip=0.2", "train.steps=5", "schedule.warmup_steps=1"]
    work, (size, spread) = "tests.equivalence.matrix:train_quietly", LAYOUTS[layout]
    expected = ranks.run(1, work, config(prepared, tmp_path / "one", "llama"), given, None)[0]
    records = ranks.run(size, work, config(prepared, tmp_path / "two", "llama"), [*given, *spread], None)[0]
    found = disagreement(tmp_path / "two", records, tmp_path / "one", expected)
    assert all(value < BOUNDS["fp16"][name] for name, value in found.items()), found
