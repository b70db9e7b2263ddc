"""What an imported model writes is what transformers writes from the same text, special tokens around it included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwright.serve.generate import Sampling, stream_text
from shardwright.train.imports import import_model
from shardwright.train.load import load
from tests.interop.models import add_tokenizer

transformers = pytest.importorskip("transformers")

END, BEGIN, PAD = 0, 300, 301  # of a byte-level BPE of 512 tokens; the last two are tokens like any other there
SMALL = {"vocab_size": 512, "eos_token_id": END, "bos_token_id": BEGIN, "pad_token_id": PAD}
STACKS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
          "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
          "max_position_embeddings": 64}  # fmt: skip
LLAMA = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 64}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
BART = {**STACKS, "forced_bos_token_id": BEGIN, "forced_eos_token_id": None}
#: name: (class, its choices, what a decoder's text comes after, whether both texts of a pair begin with <s>).
MODELS: dict[str, tuple[str, dict[str, Any], int, bool]] = {
    "llama": ("LlamaForCausalLM", LLAMA, BEGIN, False),
    "t5": ("T5ForConditionalGeneration", T5, PAD, False),
    "bart": ("BartForConditionalGeneration", BART, END, True),
}
PROMPT, NEW = "The people of the", 12


@pytest.mark.parametrize("imported", [True, False], ids=["imported", "as it is"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_theirs(name: str, imported: bool, prepared: Path, tmp_path: Path) -> None:
    kind, fields, start, begins = MODELS[name]
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(name, **SMALL, **fields, decoder_start_token_id=start)
    theirs = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path / "theirs"
    theirs.save_pretrained(folder)
    add_tokenizer(folder, prepared)
    ids = {key: value for key, value in SMALL.items() if key.endswith("_id")}
    (folder / "generation_config.json").write_text(json.dumps({**ids, "decoder_start_token_id": start}))
    if imported:
        import_model(str(folder), tmp_path / "ours")
    ours = load(tmp_path / "ours" if imported else folder, device="cpu")
    text = ours.tokenizer.encode(PROMPT).tolist()
    alone = name == "llama"
    given = [BEGIN, *text] if alone else [*([BEGIN] if begins else []), *text, END]
    length = {"max_new_tokens": NEW + begins, "min_new_tokens": NEW + begins}
    found = theirs.generate(torch.tensor([given]), do_sample=False, num_beams=1, **length)[0].tolist()
    expected = found[len(given) :] if alone else found[1 + begins :]
    pieces = stream_text(ours.model, ours.tokenizer, PROMPT, Sampling(0), max_new_tokens=NEW, frame=ours.frame)
    assert "".join(pieces) == ours.tokenizer.decode(expected)
