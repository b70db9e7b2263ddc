"""Generation: with a cache as without one, the distribution that was asked for, and the same text for a seed."""

from __future__ import annotations

import pytest
import torch

from shardwright.config import ConfigError, RunError
from shardwright.data.tokenizers import Frame
from shardwright.model.encoder_decoder import EncoderDecoder
from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init
from shardwright.model.transformer import LanguageModel
from shardwright.serve.generate import Sampling, choose, probabilities, stream_text, stream_tokens

V = 300


def make(family: str = "llama", **fields: object) -> LanguageModel:
    raw = {"family": family, "vocab_size": V, "layers": 2, "width": 32, "heads": 4, "max_length": 64, **fields}
    model = build_model(FAMILIES[family].config.model_validate(raw | {"init": "xavier"}))
    apply_init(model, model.config, 0)
    return model


class Bytes:
    """UTF-8 bytes as tokens, and token 256 at the end of a document."""

    end_of_document, vocab_size = 256, 257

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def without_cache(model: LanguageModel, prompt: list[int], sampling: Sampling, count: int) -> list[int]:
    tokens, generator = list(prompt), torch.Generator().manual_seed(sampling.seed)
    for _ in range(count):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))["logits"][0, -1]
        tokens.append(choose(logits, sampling, generator))
    return tokens[len(prompt) :]


DECODERS: dict[str, dict[str, object]] = {
    "llama": {"kv_heads": 2},
    "gpt2": {"family": "gpt2"},
    "gpt3": {"family": "gpt3"},
    "qwen3": {"family": "qwen3", "kv_heads": 2, "head_dim": 16},
    "neox": {"family": "neox"},
    "llama-other": {"positions": "sinusoidal", "qk_norm": True},
}


@pytest.mark.parametrize("sampling", [Sampling(0), Sampling(1.0, 0, 1.0, 3), Sampling(0.7, 20, 0.9, 4)])
@pytest.mark.parametrize("fields", DECODERS.values(), ids=DECODERS)
def test_cache_equals_no_cache(fields: dict[str, object], sampling: Sampling) -> None:
    model = make(**fields)
    prompt = [7, 250, 31, 8]
    found = list(stream_tokens(model, prompt, sampling, max_new_tokens=40))
    assert found == without_cache(model, prompt, sampling, 40)


@pytest.mark.parametrize("family", ["t5", "bart", "transformer"])
def test_an_encoder_decoder_reads_its_source_once(family: str) -> None:
    """As the whole model would each time, also where its cache is made anew; the prompt is the source of a text."""
    model = make(family, max_length=16)
    assert isinstance(model, EncoderDecoder)
    source, tokens, runs = [5, 9, 250, 3], [2], []
    model.embed.encoder.register_forward_hook(lambda *_: runs.append(len(tokens)))  # type: ignore[union-attr]
    found = list(stream_tokens(model, [2], Sampling(0), max_new_tokens=15, source=source))
    assert len(runs) == 1
    for token in found:
        with torch.no_grad():
            logits = model(torch.tensor([source]), decoder_input_ids=torch.tensor([tokens]))["logits"][0, -1]
        assert token == int(logits.argmax())
        tokens.append(token)
    assert len(list(stream_tokens(model, [2], Sampling(0), max_new_tokens=40, source=source))) == 40
    text = "".join(stream_text(model, Bytes(), "ab", Sampling(0), max_new_tokens=9, frame=Frame(3)))
    tokens = list(
        stream_tokens(model, [3], Sampling(0), max_new_tokens=9, stop=256, vocab_size=257, source=[97, 98, 256])
    )
    assert text == Bytes().decode(tokens)
    with pytest.raises(ValueError, match="source: has 17 tokens; expected 1 to 16"):
        next(stream_tokens(model, [2], max_new_tokens=1, source=[1] * 17))


def test_same_seed_same_tokens() -> None:
    model = make(residual_dropout=0.5)  # training mode: generation turns it off and on again
    runs = [list(stream_tokens(model, [1], Sampling(1.0, 0, 1.0, seed), max_new_tokens=30)) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert model.training


def test_goes_on_past_the_longest_sequence() -> None:
    model = make("gpt2", max_length=16)
    tokens = list(stream_tokens(model, list(range(40)), Sampling(0), max_new_tokens=50))
    assert len(tokens) == 50
    # The first token sees the last 16; a re-reading sees the last 8.
    assert tokens[0] == without_cache(model, list(range(24, 40)), Sampling(0), 1)[0]
    assert tokens[1] == without_cache(model, [*range(33, 40), tokens[0]], Sampling(0), 1)[0]


def test_stops_and_stays_in_the_vocabulary() -> None:
    model = make()
    tokens = list(stream_tokens(model, [1], Sampling(5.0, 0, 1.0), max_new_tokens=60, vocab_size=10))
    assert max(tokens) < 10
    stop = tokens[5]
    again = list(stream_tokens(model, [1], Sampling(5.0, 0, 1.0), max_new_tokens=60, vocab_size=10, stop=stop))
    assert again == tokens[: tokens.index(stop)]


def test_distribution_of_draws() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    sampling = Sampling(0.5, 0, 1.0)
    expected = (logits / 0.5).softmax(-1)
    torch.testing.assert_close(probabilities(logits, sampling), expected)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(logits, sampling, generator) for _ in range(4000)])
    found = torch.bincount(draws, minlength=4) / 4000
    assert (found - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert choose(logits, Sampling(0), generator) == 2


def test_top_k_and_top_p() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()

    def kept(top_k: int = 0, top_p: float = 1.0) -> list[float]:
        return [round(x, 4) for x in probabilities(logits, Sampling(1.0, top_k, top_p)).tolist()]

    assert kept() == [0.1, 0.4, 0.2, 0.3]
    assert kept(top_k=2) == [0, 0.5714, 0, 0.4286]
    assert kept(top_k=9) == kept()
    assert kept(top_p=0.65) == [0, 0.5714, 0, 0.4286]
    assert kept(top_p=0.75) == [0, 0.4444, 0.2222, 0.3333]
    assert kept(top_p=0.0) == [0, 1, 0, 0]
    # top_p counts within what top_k left: 0.4 / 0.7 is under 0.6.
    assert kept(top_k=2, top_p=0.6) == kept(top_k=2)


def test_a_tiny_temperature_takes_the_likeliest() -> None:
    logits = torch.tensor([1000.0, 1000.0 + 1e-4, -5.0, 1000.0])
    for temperature in (1e-12, 1e-40, 5e-324):
        assert probabilities(logits, Sampling(temperature, 0, 1.0)).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_numbers_that_are_not_finite_are_said(temperature: float) -> None:
    model = make()
    with torch.no_grad():
        model.get_parameter("blocks.1.mlp.down.weight")[0, 0] = float("nan")
    with pytest.raises(RunError, match="numbers that are not finite"):
        list(stream_tokens(model, [1], Sampling(temperature), max_new_tokens=1))


def test_text_comes_in_whole_characters() -> None:
    model = make()
    says = iter([*"é中".encode(), 256])
    model.logits = lambda hidden: torch.nn.functional.one_hot(torch.tensor(next(says)), V)  # type: ignore[method-assign]
    assert list(stream_text(model, Bytes(), "", Sampling(0))) == ["é", "中"]


def test_prompt_is_read_after_the_end_of_the_document_before() -> None:
    model, tokenizer = make(), Bytes()
    sampling = Sampling(1.0, 0, 1.0, 5)
    tokens = stream_tokens(model, [256, *b"ab"], sampling, max_new_tokens=12, stop=256, vocab_size=257)
    text = "".join(stream_text(model, tokenizer, "ab", sampling, max_new_tokens=12))
    assert text == tokenizer.decode(list(tokens))


def test_bad_sampling_is_named() -> None:
    for fields, message in [({"temperature": -1.0}, "temperature=-1.0"), ({"top_k": -1}, "top_k=-1"),
                            ({"top_p": 1.5}, "top_p=1.5"), ({"temperature": float("nan")}, "temperature=nan"),
                            ({"seed": -1}, "seed=-1"), ({"seed": 2**63}, "seed=9223372036854775808")]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Sampling(**fields)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="prompt: character 3 is no valid UTF-8"):
        list(stream_text(make(), Bytes(), b"ab\xff".decode(errors="surrogateescape")))
    with pytest.raises(ValueError, match="prompt: is empty"):
        list(stream_tokens(make(), [], max_new_tokens=1))


@pytest.mark.parametrize("family", ["bert", "deberta", "electra", "xlnet"])
def test_what_sees_both_sides_is_refused(family: str) -> None:
    with pytest.raises(ConfigError, match=f"model.family={family}: sees both sides of a token and cannot generate"):
        next(stream_tokens(make(family), [1], max_new_tokens=1))
