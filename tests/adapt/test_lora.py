"""LoRA against peft with the same weights: what it computes, its files, what theirs joins, merging, the way back."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.adapt import adapter_names, trained_names
from shardwright.adapt.build import first_value
from shardwright.adapt.lora import LEAVES, merged
from shardwright.config import AdaptConfig, ConfigError
from shardwright.interop.huggingface import export_tensors
from shardwright.interop.peft import lora_files, lora_pairs, write_adapter
from tests.adapt.models import difference, inputs_of, logits, pair

peft = pytest.importorskip("peft")

ALL = ["q", "k", "v", "out", "up", "down"]
#: Those that theirs has linear layers for.
LINEAR = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "GPTNeoXForCausalLM", "BertForPreTraining",
    "RobertaForMaskedLM", "AlbertForMaskedLM", "DebertaForMaskedLM", "DebertaV2ForMaskedLM", "ModernBertForMaskedLM",
    "T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel",
]  # fmt: skip


def lora(**fields: Any) -> AdaptConfig:
    return AdaptConfig.model_validate({"method": "lora", "rank": 3, "alpha": 12.0, **fields})


def pairs_of(model: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    found = dict(model.named_parameters())
    layers = [name.removesuffix(f".{LEAVES[0]}") for name in found if name.endswith(LEAVES[0])]
    return {n: (found[f"{n}.{LEAVES[0]}"].detach(), found[f"{n}.{LEAVES[1]}"].detach()) for n in layers}


def as_peft(theirs: Any, ours: Any, adapt: AdaptConfig, folder: Path) -> Any:
    folder.mkdir(exist_ok=True)
    write_adapter(folder, *lora_files(ours.config, adapt, pairs_of(ours), None, {}))
    return peft.PeftModel.from_pretrained(theirs, str(folder)).eval()


@pytest.mark.parametrize("fields", [{}, {"targets": ALL, "rslora": True}], ids=["q and v", "all, rslora"])
@pytest.mark.parametrize("architecture", LINEAR)
def test_peft_computes_the_same(architecture: str, fields: dict[str, Any], tmp_path: Path) -> None:
    adapt = lora(**fields)
    theirs, ours = pair(architecture, adapt)
    given = inputs_of(ours)
    plain = logits(theirs, given)
    found, expected = logits(as_peft(theirs, ours, adapt, tmp_path), given), logits(ours, given)
    assert difference(found, expected, given) < 1e-5
    assert difference(plain, expected, given) > 1e-2, "the adapter does something"


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "DebertaForMaskedLM", "T5ForConditionalGeneration"])
def test_what_peft_trains_is_taken_in(architecture: str, tmp_path: Path) -> None:
    """Written by peft itself, with its own rank and scale; ours has a greater rank."""
    adapt = lora(rank=5, targets=["q", "k", "v"])
    theirs, ours = pair(architecture, adapt)
    names = {"GPT2LMHeadModel": ["c_attn"], "DebertaForMaskedLM": ["in_proj"]}.get(architecture, ["q", "k", "v"])
    torch.manual_seed(5)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=False)
    other = peft.get_peft_model(theirs, config).eval()
    other.save_pretrained(str(tmp_path))
    layers = pairs_of(ours)
    with torch.no_grad():
        for layer in layers:
            ours.get_parameter(f"{layer}.lora_b").zero_()
        for layer, (a, b) in lora_pairs(ours.config, adapt, tmp_path, list(layers)).items():
            ours.get_parameter(f"{layer}.lora_a")[: len(a)] = a
            ours.get_parameter(f"{layer}.lora_b")[:, : len(a)] = b
    given = inputs_of(ours)
    assert difference(logits(ours, given), logits(other, given), given) < 1e-5


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "ModernBertForMaskedLM", "BartForConditionalGeneration"])
def test_files_come_back_to_the_bit(architecture: str, tmp_path: Path) -> None:
    adapt = lora(targets=["q", "v"])
    _, ours = pair(architecture, adapt)
    given = pairs_of(ours)
    write_adapter(tmp_path, *lora_files(ours.config, adapt, given, None, {}))
    back = lora_pairs(ours.config, adapt, tmp_path, list(given))
    assert back.keys() == given.keys()
    for layer, (a, b) in back.items():
        assert torch.equal(a, given[layer][0]) and torch.equal(b, given[layer][1])


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM", "XLNetLMHeadModel"])
def test_merged_is_the_same_model(architecture: str) -> None:
    adapt = lora(targets=["q", "v", "out"])
    theirs, ours = pair(architecture, adapt)
    given = inputs_of(ours, padded=False)
    expected, state = logits(ours, given), {n: p.detach() for n, p in ours.named_parameters()}
    for layer, (a, b) in pairs_of(ours).items():
        state[f"{layer}.weight"] = merged(state[f"{layer}.weight"], a, b, adapt.scale)
    own = {name: tensor for name, tensor in state.items() if name.rpartition(".")[2] not in LEAVES}
    theirs.load_state_dict(dict(export_tensors(ours.config, own)), strict=False)
    assert difference(logits(theirs, given), expected, given) < 1e-5


def test_the_first_step_sees_the_model_as_it_was() -> None:
    _, ours = pair("LlamaForCausalLM", lora())
    for name, parameter in ours.named_parameters():
        if name.rpartition(".")[2] in LEAVES:
            parameter.data = first_value(ours.config, name, parameter.shape, 1)
    plain, _ = pair("LlamaForCausalLM", lora())
    given = inputs_of(ours)
    assert difference(logits(ours, given), logits(plain, given), given) < 1e-6
    assert all(a.std() > 0 for a, _ in pairs_of(ours).values())


def test_trained_is_the_adapter_alone() -> None:
    _, ours = pair("T5ForConditionalGeneration", lora())
    added = adapter_names(ours.config, lora())
    assert trained_names(ours.config, lora()) == added
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in added} == {"q", "v"}
    assert any(".cross.q." in name for name in added), "attention to the source has adapters too"
    assert trained_names(ours.config, lora(train=["final_norm.*"])) == added | {"final_norm.weight"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"targets": ["gate"]}, "adapt.targets: no layer .* gate"), ({"train": ["lm_head"]}, "adapt.train: 'lm_head'")],
)
def test_mistakes(fields: dict[str, Any], said: str) -> None:
    _, ours = pair("GPT2LMHeadModel", lora())
    with pytest.raises(ConfigError, match=said):
        trained_names(ours.config, lora(**fields))


def test_an_adapter_of_a_model_of_another_width_is_refused(tmp_path: Path) -> None:
    _, ours = pair("LlamaForCausalLM", lora())
    written = pairs_of(ours)
    for side in (0, 1):
        cut = {name: (a[:, :-8], b) if side else (a, b[:-8]) for name, (a, b) in written.items()}
        write_adapter(tmp_path, *lora_files(ours.config, lora(), cut, None, {}))
        with pytest.raises(ConfigError, match=r"self_attn.q_proj is a matrix of \[.*\] there and of \[32, 32\]"):
            lora_pairs(ours.config, lora(), tmp_path, list(written))


def test_theirs_has_no_place(tmp_path: Path) -> None:
    adapt = lora()
    _, ours = pair("XLNetLMHeadModel", adapt)
    with pytest.raises(ConfigError, match="no linear layer .* --merge"):
        lora_files(ours.config, adapt, pairs_of(ours), None, {})
    _, other = pair("GPT2LMHeadModel", adapt)
    write_adapter(tmp_path, *lora_files(other.config, adapt, pairs_of(other), None, {}))
    with pytest.raises(ConfigError, match="put v into adapt.targets"):
        lora_pairs(other.config, adapt, tmp_path, [name for name in pairs_of(other) if name.endswith("q")])
    with pytest.raises(ConfigError, match="set adapt.rank"):
        lora_pairs(other.config, lora(rank=2), tmp_path, list(pairs_of(other)))
