"""What config.json of published models says, as far as it shapes the model, and how many parameters those have."""

from typing import Any, NamedTuple


class Published(NamedTuple):
    """A model on the hub, or in a paper, and the preset that it is here."""

    family: str
    size: str
    parameters: int
    config: dict[str, Any]


def _gpt2(size: str, parameters: int, layers: int, width: int, heads: int) -> Published:
    raw = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_positions": 1024, "resid_pdrop": 0.1,
        "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
        "summary_type": "cls_index", "summary_use_proj": True, "vocab_size": 50257,
    }  # fmt: skip
    return Published("gpt2", size, parameters, raw | {"n_layer": layers, "n_embd": width, "n_head": heads})


def _gpt3(size: str, parameters: int, layers: int, width: int, heads: int) -> Published:
    """Never published: the paper's shapes as Hugging Face's GPT-2 would hold them."""
    found = _gpt2(size, parameters, layers, width, heads)
    longer = {"n_ctx": 2048, "n_positions": 2048}
    return found._replace(family="gpt3", config=found.config | longer)


def _llama(
    size: str, parameters: int, layers: int, width: int, heads: int, kv_heads: int, inner: int, three: bool = False
) -> Published:
    raw = {
        "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "initializer_range": 0.02, "model_type": "llama",
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "use_cache": True, "num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "intermediate_size": inner,
    }  # fmt: skip
    two = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096, "vocab_size": 32000}
    if not three:
        return Published("llama", size, parameters, raw | two | {"torch_dtype": "float16"})
    raw |= {"attention_bias": False, "attention_dropout": 0.0, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
    return Published(
        "llama",
        size,
        parameters,
        raw | {"bos_token_id": 128000, "eos_token_id": 128001, "max_position_embeddings": 8192, "vocab_size": 128256},
    )


def _llama_long(
    size: str, parameters: int, layers: int, width: int, heads: int, inner: int, factor: float, tied: bool
) -> Published:
    """3.1 and 3.2."""
    found = _llama(size, parameters, layers, width, heads, 8, inner, three=True)
    scaling = {
        "factor": factor, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip
    more = {"max_position_embeddings": 131072, "rope_scaling": scaling, "tie_word_embeddings": tied, "mlp_bias": False}
    return found._replace(config=found.config | more | {"head_dim": width // heads})


def _qwen3(size: str, parameters: int, layers: int, width: int, heads: int, inner: int, tied: bool) -> Published:
    raw = {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
        "initializer_range": 0.02, "max_position_embeddings": 40960, "model_type": "qwen3", "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
        "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    }  # fmt: skip
    shape = {"num_hidden_layers": layers, "max_window_layers": layers, "hidden_size": width}
    shape |= {"num_attention_heads": heads, "intermediate_size": inner, "tie_word_embeddings": tied}
    return Published("qwen3", size, parameters, raw | shape)


def _neox(size: str, parameters: int, layers: int, width: int, heads: int, vocab_size: int) -> Published:
    raw = {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0, "hidden_act": "gelu",
        "initializer_range": 0.02, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "model_type": "gpt_neox",
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_cache": True, "use_parallel_residual": True, "vocab_size": vocab_size,
    }  # fmt: skip
    shape = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": heads}
    return Published("neox", size, parameters, raw | shape | {"intermediate_size": 4 * width})


PUBLISHED = (
    _gpt2("124M", 124_439_808, 12, 768, 12),
    _gpt2("355M", 354_823_168, 24, 1024, 16),
    _gpt2("774M", 774_030_080, 36, 1280, 20),
    _gpt2("1558M", 1_557_611_200, 48, 1600, 25),
    _gpt3("125M", 125_226_240, 12, 768, 12),
    _gpt3("350M", 355_871_744, 24, 1024, 16),
    _gpt3("760M", 760_300_032, 24, 1536, 16),
    _gpt3("1.3B", 1_315_723_264, 24, 2048, 16),
    _gpt3("2.7B", 2_651_553_280, 32, 2560, 32),
    _gpt3("6.7B", 6_658_404_352, 32, 4096, 32),
    _gpt3("13B", 12_853_386_240, 40, 5120, 40),
    _gpt3("175B", 174_604_259_328, 96, 12288, 96),
    _llama("2-7B", 6_738_415_616, 32, 4096, 32, 32, 11008),
    _llama("2-13B", 13_015_864_320, 40, 5120, 40, 40, 13824),
    _llama("2-70B", 68_976_648_192, 80, 8192, 64, 8, 28672),
    _llama("3-8B", 8_030_261_248, 32, 4096, 32, 8, 14336, three=True),
    _llama("3-70B", 70_553_706_496, 80, 8192, 64, 8, 28672, three=True),
    _llama_long("3.1-8B", 8_030_261_248, 32, 4096, 32, 14336, 8.0, tied=False),
    _llama_long("3.1-70B", 70_553_706_496, 80, 8192, 64, 28672, 8.0, tied=False),
    _llama_long("3.1-405B", 405_853_388_800, 126, 16384, 128, 53248, 8.0, tied=False),
    _llama_long("3.2-1B", 1_235_814_400, 16, 2048, 32, 8192, 32.0, tied=True),
    _llama_long("3.2-3B", 3_212_749_824, 28, 3072, 24, 8192, 32.0, tied=True),
    _qwen3("0.6B", 596_049_920, 28, 1024, 16, 3072, tied=True),
    _qwen3("1.7B", 1_720_574_976, 28, 2048, 16, 6144, tied=True),
    _qwen3("4B", 4_022_468_096, 36, 2560, 32, 9728, tied=True),
    _qwen3("8B", 8_190_735_360, 36, 4096, 32, 12288, tied=False),
    _qwen3("14B", 14_768_307_200, 40, 5120, 40, 17408, tied=False),
    _qwen3("32B", 32_762_123_264, 64, 5120, 64, 25600, tied=False),
    _neox("70M", 70_426_624, 6, 512, 8, 50304),
    _neox("160M", 162_322_944, 12, 768, 12, 50304),
    _neox("410M", 405_334_016, 24, 1024, 16, 50304),
    _neox("1B", 1_011_781_632, 16, 2048, 8, 50304),
    _neox("1.4B", 1_414_647_808, 24, 2048, 16, 50304),
    _neox("2.8B", 2_775_208_960, 32, 2560, 32, 50304),
    _neox("6.9B", 6_857_302_016, 32, 4096, 32, 50432),
    _neox("12B", 11_846_072_320, 36, 5120, 40, 50688),
    _neox("20B", 20_554_567_680, 44, 6144, 64, 50432),
)
