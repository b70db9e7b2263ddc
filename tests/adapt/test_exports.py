"""Exports of adapters are proven by logits: peft's model of what was written gives ours, or nothing is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from shardwright.adapt import apply_adapter
from shardwright.checkpoint import save_streamed
from shardwright.config import Config, RunError, to_yaml
from shardwright.interop import check
from shardwright.interop.folder import copy_companions
from shardwright.interop.peft import saved_tensors
from shardwright.launcher.cli import run
from shardwright.model.families import build_model
from shardwright.train import exports
from shardwright.train.exports import export_model
from shardwright.train.folder import CHECKPOINTS, CONFIG
from shardwright.train.imports import import_model
from shardwright.train.load import load
from shardwright.train.settings import read_config
from tests.adapt.models import shake
from tests.interop.test_every_family import CASES, save_theirs

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LORA = ("adapt.method=lora", "adapt.rank=3", "adapt.targets=[q, v, up]")
NETWORK = ("adapt.method=p_tuning", "adapt.tokens=4", "adapt.encoder_width=24")
PREFIX = ("adapt.method=prefix", "adapt.tokens=4", "adapt.projection=24")


def adapted(folder: Path, architecture: str, *overrides: str) -> Path:
    """A run folder: a tiny model of theirs with an adapter of random values."""
    save_theirs(folder / "theirs", architecture, CASES[architecture][2])
    import_model(str(folder / "theirs"), folder / "ours")
    base = dict(load(folder / "ours", device="cpu").model.named_parameters())
    config = read_config(folder / "ours" / CONFIG, overrides)
    return write_run(folder / "run", config, base)


def write_run(place: Path, config: Config, base: dict[str, Any]) -> Path:
    """A run folder whose checkpoint holds `base`, and random values in all else."""
    model: Any = build_model(config.model)  # type: ignore[arg-type]
    apply_adapter(model, config.adapt)
    shake(model, set(base))
    held: dict[str, Tensor] = {name: p.detach() for name, p in (dict(model.named_parameters()) | base).items()}
    meta = {f"model.{name}": tensor.to("meta") for name, tensor in held.items()}
    place.mkdir()
    save_streamed(place / CHECKPOINTS, meta, lambda name: held[name.removeprefix("model.")], {}, step=0)
    (place / CONFIG).write_text(to_yaml(config), "utf-8")
    return place


PROMPT = ("adapt.method=prompt", "adapt.tokens=4")
VIRTUAL = ("GPT2LMHeadModel", "BertForPreTraining", "T5ForConditionalGeneration", "ElectraForPreTraining")
CHECKED = [
    *((name, LORA) for name in CASES if name not in ("XLNetLMHeadModel", "BertForMaskedLM")),
    *((name, settings) for name in VIRTUAL for settings in (PROMPT, NETWORK, PREFIX)),
]


@pytest.mark.parametrize(("architecture", "settings"), CHECKED)
def test_logits_of_peft_are_compared(architecture: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    made = export_model(adapted(tmp_path, architecture, *settings), tmp_path / "adapter")
    assert made.verdict is not None and made.verdict.passed
    assert made.verdict.difference is not None and "by peft" in made.verdict.text
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


@pytest.mark.parametrize("settings", [LORA, NETWORK, PREFIX], ids=["lora", "p_tuning", "prefix"])
def test_rounded_values_are_compared_with_rounded_ones(settings: tuple[str, ...], tmp_path: Path) -> None:
    made = export_model(adapted(tmp_path, "LlamaForCausalLM", *settings), tmp_path / "adapter", dtype="bf16")
    assert made.verdict is not None and made.verdict.difference is not None
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("settings", [LORA, PREFIX], ids=["lora", "prefix"])
def test_a_spoiled_tensor_is_refused(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exports.write_adapter

    def spoiled(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        last = sorted(tensors)[-1]
        write(folder, raw, {**tensors, last: tensors[last] * 1.01})

    run = adapted(tmp_path, "GPT2LMHeadModel", *settings)
    monkeypatch.setattr(exports, "write_adapter", spoiled)
    with pytest.raises(RunError, match="is not written: logits of transformers' GPT2LMHeadModel .* more than"):
        export_model(run, tmp_path / "adapter")
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "ours", "run"}
    export_model(run, tmp_path / "adapter", check=False)


def test_a_scale_that_is_misread_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What reading the tensors back cannot find."""
    write = exports.write_adapter

    def spoiled(folder: Path, raw: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        write(folder, {**raw, "alpha_pattern": {}}, tensors)

    run = adapted(tmp_path, "GPT2LMHeadModel", *LORA)
    monkeypatch.setattr(exports, "write_adapter", spoiled)
    with pytest.raises(RunError, match="logits of transformers' GPT2LMHeadModel"):
        export_model(run, tmp_path / "adapter")


def test_without_memory_tensors_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = adapted(tmp_path, "GPT2LMHeadModel", *LORA)
    monkeypatch.setattr(check, "memory", lambda: (1, 1))
    made = export_model(run, tmp_path / "adapter")
    assert made.verdict is not None and made.verdict.passed and made.verdict.difference is None
    assert "tensors read back" in made.verdict.text and "logits are not compared" in caplog.text


def test_the_command_tells_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapted(tmp_path, "GPT2LMHeadModel", *LORA)
    assert run(["export", str(folder), "--output", str(tmp_path / "one")]) == 0
    assert "logits of transformers' GPT2LMHeadModel with this adapter by peft differ by" in capsys.readouterr().out
    assert run(["export", str(folder), "--output", str(tmp_path / "two"), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)["verdict"]
    assert verdict["passed"] and 0 <= verdict["difference"] < 5e-5


CLASSIFIERS = {
    "gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "bert": "BertForMaskedLM", "roberta": "RobertaForMaskedLM",
    "albert": "AlbertForMaskedLM", "modernbert": "ModernBertForMaskedLM", "deberta_v2": "DebertaV2ForMaskedLM",
    "electra": "ElectraForPreTraining", "bart": "BartForConditionalGeneration",
}  # fmt: skip
OF = [(family, of) for family in CLASSIFIERS for of in ("text", "tokens") if (family, of) != ("bart", "tokens")]


def classifier(folder: Path, family: str, of: str, *overrides: str) -> Path:
    """As `adapted`, of a model that had no classifier and has a random one now."""
    save_theirs(folder / "theirs", CLASSIFIERS[family], CASES[CLASSIFIERS[family]][2])
    import_model(str(folder / "theirs"), folder / "ours")
    raw = yaml.safe_load((folder / "ours" / CONFIG).read_text("utf-8"))
    raw["objective"] = {"name": "classify", "of": of, "classes": 3, "special_tokens": {"end": 2, "sep": 2, "cls": 1}}
    raw["model"].pop("generator_layers", None)
    config = read_config(raw, (*LORA, *overrides))
    base = dict(load(folder / "ours", device="cpu").model.named_parameters())
    own = {name for name, _ in build_model(config.model).named_parameters()}  # type: ignore[arg-type]
    run = write_run(folder / "run", config, {n: p for n, p in base.items() if n in own and not n.startswith("head.")})
    copy_companions(folder / "ours", run)  # whose end of texts BART's classifier needs
    return run


@pytest.mark.parametrize(("family", "of"), OF)
def test_peft_has_the_head_of_a_classifier(family: str, of: str, tmp_path: Path) -> None:
    """On a model of theirs without one: what `from_pretrained` puts there is random."""
    run = classifier(tmp_path, family, of)
    verdict = export_model(run, tmp_path / "adapter").verdict
    assert verdict is not None and verdict.difference is not None
    kind = {"text": "AutoModelForSequenceClassification", "tokens": "AutoModelForTokenClassification"}[of]
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "theirs", num_labels=3)
    raw = json.loads((tmp_path / "adapter/adapter_config.json").read_text("utf-8"))
    assert raw["task_type"] == {"text": "SEQ_CLS", "tokens": "TOKEN_CLS"}[of] and raw["modules_to_save"]
    both = peft.PeftModel.from_pretrained(theirs, str(tmp_path / "adapter")).eval()
    ids = torch.randint(5, 101, (1, 12), generator=torch.Generator().manual_seed(3))
    given = {"input_ids": ids}
    if family == "bart":
        ids[:, -1] = theirs.config.eos_token_id
        given["decoder_input_ids"] = ids
    expected = load(run, device="cpu")(**given)["logits"]
    with torch.no_grad():
        assert torch.allclose(both(**given).logits, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "bert", "bart"])
def test_the_head_comes_back(family: str, tmp_path: Path) -> None:
    run = classifier(tmp_path, family, "text")
    export_model(run, tmp_path / "adapter", check=False)
    held = load(run, device="cpu")
    found = saved_tensors(held.config.model, tmp_path / "adapter")  # type: ignore[arg-type]
    expected = {name: p for name, p in held.model.named_parameters() if name.startswith("head.label.")}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], p) for name, p in expected.items())
