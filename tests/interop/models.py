"""Tiny models of every family and choice, ours and Hugging Face's with the same weights. No test of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from shardwright.interop.huggingface import export_tensors
from shardwright.interop.model_config import write_config
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import LanguageModel

SMALL = {"vocab_size": 101, "layers": 3, "width": 32, "heads": 4, "max_length": 64}
CASES = {
    "gpt2": {"family": "gpt2", **SMALL},
    "gpt2-free-head": {"family": "gpt2", **SMALL, "tied": False, "mlp_width": 80, "activation": "relu"},
    "gpt2-exact-gelu": {"family": "gpt2", **SMALL, "activation": "gelu", "norm_eps": 1e-6},
    "gpt3": {"family": "gpt3", **SMALL},
    "llama": {"family": "llama", **SMALL, "mlp_width": 96},
    "llama-grouped": {"family": "llama", **SMALL, "kv_heads": 2, "rope_theta": 500000.0},
    "llama-single": {"family": "llama", **SMALL, "kv_heads": 1, "head_dim": 16, "tied": True},
    "llama-biased": {"family": "llama", **SMALL, "qkv_bias": True, "out_bias": True, "mlp_bias": True},
    "llama-geglu": {"family": "llama", **SMALL, "activation": "geglu"},
    "llama-3.1": {
        "family": "llama",
        **SMALL,
        "kv_heads": 2,
        "head_dim": 16,
        "rope_scaling": {"kind": "llama3", "factor": 4.0, "low": 1.0, "high": 4.0, "length": 24},
    },
    "llama-linear": {"family": "llama", **SMALL, "rope_scaling": {"kind": "linear", "factor": 2.5}},
    "qwen3": {"family": "qwen3", **SMALL, "kv_heads": 2, "head_dim": 16, "mlp_width": 96},
    "neox": {"family": "neox", **SMALL, "norm_eps": 1e-6, "rotary_share": 0.5},
    "qwen3-tied": {"family": "qwen3", **SMALL, "kv_heads": 4, "head_dim": 8, "mlp_width": 96, "tied": True},
}


def build_ours(case: str, seed: int = 0, **fields: object) -> LanguageModel:
    """A model with random biases and norms as well, so that nothing is tested at zero or one."""
    fields = {**CASES[case], **fields}
    config = FAMILIES[str(fields["family"])].config.model_validate(fields)
    model = build_model(config)
    apply_init(model, config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()


def to_theirs(model: LanguageModel) -> torch.nn.Module:
    """Hugging Face's model of the same weights, by its plain implementation of attention."""
    import transformers

    raw = write_config(model.config)
    config = transformers.AutoConfig.for_model(**{**raw, "bos_token_id": 0, "eos_token_id": 0})
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert type(theirs).__name__ == raw["architectures"][0]
    # transformers renames GPT-NeoX's head as it reads a file.
    named = export_tensors(model.config, dict(model.named_parameters()))
    state = {name.replace("embed_out", "lm_head"): tensor for name, tensor in named}
    result = theirs.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) <= ({"lm_head.weight"} if model.config.tied else set())
    return theirs


def save_theirs(folder: Path, case: str = "llama", shard: str = "50GB", **fields: object) -> torch.nn.Module:
    """A folder as transformers writes it, `shard` a file at most; and its model."""
    theirs = to_theirs(build_ours(case, **fields))
    theirs.save_pretrained(folder, max_shard_size=shard)
    return theirs


def add_tokenizer(folder: Path, prepared: Path) -> None:
    """The tokenizer of a prepared corpus as the hub has tokenizers, and a generation config."""
    shutil.copy(prepared / "tokenizer.json", folder)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**special, "model_max_length": 64}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 0, "temperature": 0.6, "top_k": 20}))
