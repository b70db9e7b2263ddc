"""Prompt tuning, p-tuning and prefix tuning against peft with the same weights; packed documents, caches, mistakes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.adapt import trained_names, virtual_parts, virtual_vectors
from shardwright.config import AdaptConfig, ConfigError
from shardwright.interop.peft import virtual_files, write_adapter
from shardwright.interop.peft import virtual_vectors as read_vectors
from shardwright.model.transformer import Inputs
from tests.adapt.models import difference, inputs_of, logits, pair

peft = pytest.importorskip("peft")

TOKENS = 4
PROMPTED = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "BertForPreTraining", "RobertaForMaskedLM", "AlbertForMaskedLM",
    "DebertaV2ForMaskedLM", "ModernBertForMaskedLM", "T5ForConditionalGeneration", "BartForConditionalGeneration",
]  # fmt: skip
PREFIXED = [
    "GPT2LMHeadModel", "LlamaForCausalLM", "Qwen3ForCausalLM", "BertForPreTraining", "RobertaForMaskedLM",
    "T5ForConditionalGeneration", "BartForConditionalGeneration",
]  # fmt: skip


def adapt(method: str, **fields: Any) -> AdaptConfig:
    return AdaptConfig.model_validate({"method": method, "tokens": TOKENS, **fields})


def as_peft(theirs: Any, ours: Any, config: AdaptConfig, folder: Path) -> Any:
    with torch.no_grad():
        write_adapter(folder, *virtual_files(ours.config, config, virtual_vectors(ours, config), None))
    return peft.PeftModel.from_pretrained(theirs, str(folder)).eval()


def compare(architecture: str, config: AdaptConfig, folder: Path) -> float:
    theirs, ours = pair(architecture, config)
    given = inputs_of(ours)
    plain, expected = logits(theirs, given), logits(ours, given)
    found = logits(as_peft(theirs, ours, config, folder), given)
    length = expected.shape[1]
    assert difference(plain, expected, given) > 1e-2, "virtual tokens do something"
    return difference(found[:, found.shape[1] - length :], expected, given)


@pytest.mark.parametrize("architecture", PROMPTED)
def test_prompt_is_pefts(architecture: str, tmp_path: Path) -> None:
    assert compare(architecture, adapt("prompt"), tmp_path) < 1e-5


@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "BertForPreTraining", "T5ForConditionalGeneration"])
def test_p_tuning_is_pefts(architecture: str, tmp_path: Path) -> None:
    assert compare(architecture, adapt("p_tuning", encoder_width=24), tmp_path) < 1e-5


@pytest.mark.parametrize("projection", [None, 24])
@pytest.mark.parametrize("architecture", PREFIXED)
def test_prefix_is_pefts(architecture: str, projection: int | None, tmp_path: Path) -> None:
    assert compare(architecture, adapt("prefix", projection=projection), tmp_path) < 1e-5


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_files_come_back_to_the_bit(method: str, tmp_path: Path) -> None:
    config = adapt(method)
    theirs, ours = pair("GPT2LMHeadModel", config)
    as_peft(theirs, ours, config, tmp_path)
    for name, value in virtual_parts(ours.config, config, read_vectors(ours.config, config, tmp_path)).items():
        assert torch.equal(ours.get_parameter(name), value)
    with pytest.raises(ConfigError, match="adapt.tokens"):
        read_vectors(ours.config, adapt(method, tokens=5), tmp_path)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize("architecture", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_packed_documents_are_as_alone(architecture: str, method: str) -> None:
    _, ours = pair(architecture, adapt(method))
    ids = inputs_of(ours)["input_ids"][:1]
    places = torch.tensor([[*range(5), *range(7)]])
    documents = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32)
    with torch.no_grad():
        packed = ours.hidden(Inputs(ids, places, documents))
        alone = [ours.hidden(Inputs(part)) for part in (ids[:, :5], ids[:, 5:])]
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
@pytest.mark.parametrize(
    "architecture",
    ["GPT2LMHeadModel", "LlamaForCausalLM", "T5ForConditionalGeneration", "BartForConditionalGeneration"],
)
def test_a_cache_changes_nothing(architecture: str, method: str) -> None:
    _, ours = pair(architecture, adapt(method))
    given = inputs_of(ours, padded=False)
    read = given["input_ids"] if "decoder_input_ids" in given else None
    ids = given.get("decoder_input_ids", given["input_ids"])
    cache = ours.build_cache(ids.shape[1])
    with torch.no_grad():
        whole = ours.hidden(Inputs(ids, encoder_ids=read))
        parts = [
            ours.hidden(Inputs(part, encoder_ids=read), cache=cache)
            for part in ids.split([6, 1, 1, ids.shape[1] - 8], 1)
        ]
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "method", "said"),
    [
        ("XLNetLMHeadModel", "prompt", "XLNet predicts"),
        ("XLNetLMHeadModel", "prefix", "XLNet predicts"),
        ("AlbertForMaskedLM", "prefix", "all blocks are one"),
        ("DebertaForMaskedLM", "prefix", "distance"),
        ("ModernBertForMaskedLM", "prefix", "takes no keys from outside"),
    ],
)
def test_refused(architecture: str, method: str, said: str) -> None:
    _, ours = pair(architecture, AdaptConfig())
    with pytest.raises(ConfigError, match=f"adapt.method={method}: .*{said}"):
        trained_names(ours.config, adapt(method))
