"""Every family with a Hugging Face counterpart: a folder that transformers wrote, imported, exported, opened again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardwright
from shardwright.interop.check import check_export
from shardwright.interop.huggingface import Exported, Imported
from shardwright.interop.model_config import folders_beside, write_config
from shardwright.interop.model_config import read_config as read_model
from shardwright.interop.weights import WeightFiles, write_weights
from shardwright.model.encoder import Encoder
from shardwright.model.families import FAMILIES
from shardwright.train.exports import export_model
from shardwright.train.imports import import_model
from shardwright.train.settings import read_config
from tests.interop.commands import done, refused, same
from tests.interop.masked import build_ours

transformers = pytest.importorskip("transformers")

BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
BERT |= {"max_position_embeddings": 64}
LLAMA = {**BERT, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
BART = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
BART |= {"decoder_attention_heads": 4, "decoder_ffn_dim": 48, "max_position_embeddings": 64}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4}
DISENTANGLED = {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
DISENTANGLED |= {"type_vocab_size": 0, "legacy": False}
ENDS = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}

#: Their architecture -> (family, objective that its import names, what their config is told).
CASES: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "GPT2LMHeadModel": (
        "gpt2", {"name": "causal"},
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0},
    ),
    "LlamaForCausalLM": ("llama", {"name": "causal"}, LLAMA),
    "Qwen3ForCausalLM": ("qwen3", {"name": "causal"}, {**LLAMA, "head_dim": 16}),
    "GPTNeoXForCausalLM": ("neox", {"name": "causal"}, {**BERT, "bos_token_id": 0, "eos_token_id": 0}),
    "BertForPreTraining": ("bert", {"name": "masked", "sentence": "next"}, BERT),
    "BertForMaskedLM": ("bert", {"name": "masked", "sentence": "none"}, BERT),
    "RobertaForMaskedLM": ("roberta", {"name": "masked"}, {**BERT, "type_vocab_size": 1}),
    "AlbertForPreTraining": ("albert", {"name": "masked", "sentence": "order"}, {**BERT, "embedding_size": 16}),
    "AlbertForMaskedLM": ("albert", {"name": "masked", "sentence": "none"}, {**BERT, "embedding_size": 16}),
    "DebertaForMaskedLM": ("deberta", {"name": "masked"}, DISENTANGLED),
    "DebertaV2ForMaskedLM": (
        "deberta_v2", {"name": "masked"},
        {
            **DISENTANGLED, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm",
            "conv_kernel_size": 3, "conv_act": "gelu",
        },
    ),
    "ModernBertForMaskedLM": (
        "modernbert", {"name": "masked"}, {**BERT, **ENDS, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8}
    ),
    "ElectraForPreTraining": ("electra", {"name": "replaced"}, {**BERT, "embedding_size": 16}),
    "XLNetLMHeadModel": (
        "xlnet", {"name": "permuted"}, {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}
    ),
    "T5ForConditionalGeneration": ("t5", {"name": "span"}, {**T5, "decoder_start_token_id": 0}),
    "BartForConditionalGeneration": ("bart", {"name": "denoise"}, BART),
    "MarianMTModel": (
        "transformer", {"name": "pairs"},
        {**BART, "pad_token_id": 0, "decoder_start_token_id": 0, "eos_token_id": 1, "forced_eos_token_id": None},
    ),
}  # fmt: skip


def make_theirs(architecture: str, told: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """Tiny and random, biases and norms too, so that nothing is tested at zero or one; what is tied stays so."""
    torch.manual_seed(seed)
    kind = getattr(transformers, architecture)
    model = kind(kind.config_class(**{"vocab_size": 101, **told})).eval()
    fixed = (model.get_input_embeddings().weight, *(p for p in model.parameters() if not p.requires_grad))
    with torch.no_grad():
        for parameter in model.parameters():
            if not any(parameter is one for one in fixed):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def save_theirs(folder: Path, architecture: str, told: dict[str, Any]) -> None:
    """A folder as transformers writes it; with ELECTRA's discriminator the generator that shares its embedding."""
    model = make_theirs(architecture, told)
    model.save_pretrained(folder)
    if architecture == "ElectraForPreTraining":
        narrow = {**told, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
        generator = make_theirs("ElectraForMaskedLM", narrow, seed=1)
        generator.electra.embeddings.load_state_dict(model.electra.embeddings.state_dict())
        generator.save_pretrained(folder / "generator")


def opened(folder: Path) -> torch.nn.Module:
    """Their model as its users open it."""
    kind = getattr(transformers, json.loads((folder / "config.json").read_text())["architectures"][0])
    model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


@torch.no_grad()
def answers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All logits of two rows, whose tokens are none that is special somewhere."""
    ids = torch.randint(5, 101, (2, 13), generator=torch.Generator().manual_seed(2))
    given = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids.flip(1)[:, :7]
    return {name: value for name, value in model(**given).items() if name.endswith("logits")}


def test_every_family_is_here() -> None:
    counterparts = {family.huggingface.model_type for family in FAMILIES.values() if family.huggingface}
    assert {FAMILIES[family].huggingface.model_type for family, _, _ in CASES.values()} == counterparts  # type: ignore[union-attr]


@pytest.mark.parametrize("architecture", CASES)
def test_there_and_back_is_bit_equal(architecture: str, tmp_path: Path) -> None:
    family, objective, told = CASES[architecture]
    theirs, ours, back = tmp_path / "theirs", tmp_path / "ours", tmp_path / "back"
    save_theirs(theirs, architecture, told)
    import_model(str(theirs), ours)
    config = read_config(ours / "config.yaml")
    assert config.model.family == family
    assert {key: getattr(config.objective, key) for key in objective} == objective
    verdict = export_model(ours, back).verdict
    assert verdict is not None and verdict.difference is not None, "logits were compared"

    folders = ["", *folders_beside(config.model)]  # type: ignore[arg-type]
    assert folders == (["", "generator"] if family == "electra" else [""])
    for folder in folders:
        before, after = opened(theirs / folder), opened(back / folder)
        states = before.state_dict(), after.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        expected, found = answers(before), answers(after)
        assert expected and expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    expected = answers(opened(theirs))
    for place in (theirs, ours, back):
        found = answers(Called(shardwright.load(place), before.config))
        for name, logits in expected.items():
            torch.testing.assert_close(found[name.removeprefix("prediction_")], logits, atol=1e-5, rtol=1e-5)


class Counting(Mapping[str, torch.Tensor]):
    """Tensors, and the names of those that were asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors, self.asked = tensors, list[str]()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.asked.append(name)
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


@pytest.mark.parametrize("architecture", CASES)
def test_one_tensor_is_read_at_a_time(architecture: str) -> None:
    """Nothing but copies and zeros is read before it is asked for, and then what one tensor is made of."""
    model = make_theirs(architecture, CASES[architecture][2])
    raw = {**model.config.to_dict(), "architectures": [architecture]}
    head = {"lm_head.weight": "embed_out.weight"} if architecture == "GPTNeoXForCausalLM" else {}  # as files have it
    config, state = read_model(raw), Counting({head.get(name, name): x for name, x in model.state_dict().items()})
    meta = {name: tensor.to("meta") for name, tensor in state.tensors.items()}
    ours = Imported(config, state, meta)
    table = FAMILIES[config.family].huggingface
    assert table is not None
    assert set(state.asked) <= {*table.tied, *table.copies, *table.zero}, "these are checked"
    state.asked.clear()
    for count, name in enumerate(ours, 1):
        assert ours[name].shape == ours.meta[name].shape
        assert len(state.asked) == count
    kept = Counting(dict(ours))
    theirs = Exported(config, kept, ours.meta)
    assert not kept.asked
    for name in theirs:
        kept.asked.clear()
        assert torch.equal(theirs[name], state.tensors[name])
        assert theirs.meta[name].shape == theirs[name].shape
        assert len(set(kept.asked)) <= 3, "q, k and v are the most that theirs joins"


class Called:
    """Our model, called as theirs is."""

    def __init__(self, model: Any, config: Any) -> None:
        self.model, self.config = model, config

    def __call__(self, **given: torch.Tensor) -> Any:
        return self.model(**given)


def test_a_discriminator_alone_goes_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_theirs("ElectraForPreTraining", CASES["ElectraForPreTraining"][2]).save_pretrained(tmp_path / "theirs")
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    said = done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "back")
    assert "ElectraForPreTraining" in said and "ElectraForMaskedLM" not in said
    assert not (tmp_path / "back/generator").exists()


def test_a_generator_alone_is_half_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_theirs("ElectraForMaskedLM", CASES["ElectraForPreTraining"][2]).save_pretrained(tmp_path / "theirs")
    refused(
        capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours",
        says="ElectraForMaskedLM is half a model here; put it into a folder generator inside that of its Electra",
    )  # fmt: skip


def test_a_generator_that_is_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, told = tmp_path / "theirs", CASES["ElectraForPreTraining"][2]
    save_theirs(theirs, "ElectraForPreTraining", told)
    narrow = {**told, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    make_theirs("ElectraForMaskedLM", narrow, seed=3).save_pretrained(theirs / "generator")
    refused(capsys, "import", theirs, "--output", tmp_path / "ours", says="generator: embed.tokens.weight differs from")


def test_names_and_heads_of_published_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As bert-base-uncased has them: norms of old, and beside the head that it names the one for pairs."""
    told = CASES["BertForPreTraining"][2]
    both = make_theirs("BertForPreTraining", told)
    masked = transformers.BertForMaskedLM(both.config).eval()
    masked.load_state_dict(both.state_dict(), strict=False)
    masked.save_pretrained(tmp_path / "theirs")
    endings = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    state = {}
    for name, tensor in both.state_dict().items():
        old = next((new for new in endings if name.endswith(new)), None)
        state[name if old is None else name.replace(old, endings[old])] = tensor.clone()
    save_file(state, tmp_path / "theirs/model.safetensors", {"format": "pt"})
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "back")
    expected, found = answers(masked), answers(opened(tmp_path / "back"))
    assert torch.equal(found["logits"], expected["logits"])


@pytest.mark.parametrize("value", [0.5, float("nan")])
def test_the_head_for_pairs_is_compared_too(value: float, tmp_path: Path) -> None:
    save_theirs(tmp_path / "theirs", "BertForPreTraining", CASES["BertForPreTraining"][2])
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    export_model(tmp_path / "ours", tmp_path / "back")
    model = shardwright.load(tmp_path / "ours").model
    ours = dict(model.named_parameters())
    written = {"": Exported(model.config, ours)}
    assert check_export(tmp_path / "back", model.config, ours, written).passed
    state = load_file(tmp_path / "back/model.safetensors")
    state["cls.seq_relationship.bias"][0] += value
    save_file(state, tmp_path / "back/model.safetensors", {"format": "pt"})
    verdict = check_export(tmp_path / "back", model.config, ours, written)
    assert not verdict.passed and "BertForPreTraining differ by" in verdict.text


#: What begins a run in a test, of objectives that add tokens of their own to the tokenizer's 512.
TRAINED = {
    "BertForMaskedLM": 516,
    "RobertaForMaskedLM": 516,
    "ElectraForPreTraining": 516,
    "XLNetLMHeadModel": 515,
    "T5ForConditionalGeneration": 613,
}


@pytest.mark.parametrize("architecture", TRAINED)
def test_a_run_begins_from_it_and_goes_out_again(
    architecture: str,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    told = {**CASES[architecture][2], "vocab_size": TRAINED[architecture]}
    save_theirs(tmp_path / "theirs", architecture, told)
    shutil.copy(prepared / "tokenizer.json", tmp_path / "theirs")
    ours, own, back = tmp_path / "ours", tmp_path / "run", tmp_path / "back"
    done(capsys, "import", tmp_path / "theirs", "--output", ours)
    figures = json.loads(done(capsys, "eval", ours, "--data", prepared, "--json"))
    assert 0 < figures["val_loss"] < 60
    for path in ours.glob("*config.json"):
        path.unlink()  # so that the run says what its special tokens are
    small = ["data.sequence_length=48", "batch.sequences=4", "batch.micro=2", "train.compile=false", "train.steps=1"]
    done(capsys, "train", ours / "config.yaml", f"begin={ours}", f"run={own}", f"data.path={prepared}", *small)
    done(capsys, "export", own, "--output", back)
    if architecture == "RobertaForMaskedLM":
        assert "takes token 1 for padding, and the run 515" in caplog.text
        return
    raw, special = json.loads((back / "config.json").read_text()), read_config(own / "config.yaml").objective
    assert raw["pad_token_id"] == special.special_tokens["pad"] and raw["eos_token_id"] == 0
    assert raw.get("decoder_start_token_id") == (raw["pad_token_id"] if raw.get("is_encoder_decoder") else None)
    expected = answers(Called(shardwright.load(own), opened(back).config))
    for name, logits in answers(opened(back)).items():
        torch.testing.assert_close(logits, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["deberta", "deberta_v2"])
def test_a_part_that_their_code_lacks_is_written_and_not_compared(family: str, tmp_path: Path) -> None:
    """DeBERTa's mask decoder: its absolute positions are in the files, and the rest computes what theirs does."""
    model = build_ours({"family": family})
    write_ours(tmp_path / "theirs", model)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    verdict = export_model(tmp_path / "ours", tmp_path / "back").verdict
    assert verdict is not None and verdict.difference is not None
    same(tmp_path / "back", tmp_path / "theirs")
    assert "deberta.embeddings.position_embeddings.weight" in WeightFiles(tmp_path / "back")
    again = shardwright.load(tmp_path / "back").model
    assert again.config.mask_decoder  # type: ignore[attr-defined]
    assert all(torch.equal(again.get_parameter(name), p) for name, p in model.named_parameters())


def write_ours(folder: Path, model: Encoder) -> None:
    """A Hugging Face folder of our model, without any check."""
    written = Exported(model.config, {name: p.detach() for name, p in model.named_parameters()})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(model.config)))
    write_weights(folder, written.meta, written.__getitem__, 10**9)
