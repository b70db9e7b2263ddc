"""Training of tokenizers, so that the same text gives the same bytes. Part of `prepare`.

Byte-level BPE by the `tokenizers` library is reproducible as it is. Its WordPiece is not: ids of word-inner characters
follow the order of a hash table, ties between merges follow the ids, and so even the set of tokens changes from run to
run; here a first pass finds these characters and the second is given them in a fixed order. Its Unigram sums floats in
hash order; here SentencePiece trains it, which keeps the order of the text, and the result becomes a tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.prepare.options import TokenizerOptions
from shardwright.data.tokenizers import PATTERNS, Tokenizer

Texts = Callable[[], Iterable[str]]  # the training text, from its beginning, as often as asked

SPECIAL_TOKENS = {
    "bpe": ["<|endoftext|>"],
    "wordpiece": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "unigram": ["<pad>", "</s>", "<unk>", "<s>", "<mask>"],
}
_NEVER = -1000.0  # score of pieces that text must not be cut into


def train_tokenizer(texts: Texts, options: TokenizerOptions) -> Tokenizer:
    """Train what `options` ask for; ConfigError where the vocabulary cannot hold the special tokens and the bytes."""
    special = list(dict.fromkeys(options.special_tokens or SPECIAL_TOKENS[options.kind]))
    end = options.end_of_document
    if end is not None and end not in special:
        special.append(end)
    least = len(special) + (0 if options.kind == "wordpiece" else 257)
    if options.vocab_size < least:
        raise ConfigError(
            f"tokenizer.vocab_size={options.vocab_size}: a {options.kind} needs at least {least} tokens for its "
            "special tokens and the 256 bytes"
        )
    library = TRAINERS[options.kind](texts, options, special)
    usual = {"bpe": "<|endoftext|>", "wordpiece": "[SEP]", "unigram": "</s>"}[options.kind]
    return Tokenizer.from_json(library.to_str(), end or (usual if usual in special else special[0]))


def check_pattern(pattern: str | None) -> None:
    """ConfigError for a pattern that is neither a name nor an expression that the library can read."""
    if pattern is None or pattern in PATTERNS:
        return
    from tokenizers import Regex, pre_tokenizers

    try:
        pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # the library raises plain Exception
        reason = str(error).splitlines()[0]
        known = ", ".join(PATTERNS)
        raise ConfigError(
            f"tokenizer.pattern={pattern!r}: is no expression ({reason}); expected {known}, or an expression"
        ) from None


def _train_bpe(texts: Texts, options: TokenizerOptions, special: list[str]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    pattern = options.pattern or "gpt2"
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    if pattern == "gpt2":
        library.pre_tokenizer = plain
    else:
        split = pre_tokenizers.Split(Regex(PATTERNS.get(pattern, pattern)), "isolated")
        library.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=options.vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    library.train_from_iterator(texts(), trainer)
    return library


def _train_wordpiece(texts: Texts, options: TokenizerOptions, special: list[str]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if "[UNK]" not in special:
        raise ConfigError("tokenizer.special_tokens: a WordPiece needs [UNK] among them")
    frame = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    frame.normalizer = normalizers.BertNormalizer(lowercase=options.lowercase, strip_accents=False)
    frame.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    frame.decoder = decoders.WordPiece()
    counter = _CharacterCount(frame.normalizer.normalize_str)
    pieces = _wordpiece_vocabulary(frame, counter.watch(texts()), len(special), special, None)
    letters, spelling = _spelling(counter, set(pieces), options, options.vocab_size - len(special))
    vocabulary = _wordpiece_vocabulary(frame, texts(), options.vocab_size, special + spelling, letters)
    frame.model = models.WordPiece(vocabulary, unk_token="[UNK]")
    frame.add_special_tokens(special)
    return frame


def _spelling(
    counter: _CharacterCount, pieces: set[str], options: TokenizerOptions, room: int
) -> tuple[list[str], list[str]]:
    """The most frequent letters, and the pieces of one letter that occur; at most three quarters of the vocabulary."""
    letters: list[str] = []
    spelling: list[str] = []
    for letter in counter.most_frequent(options.limit_alphabet):
        forms = [form for form in (letter, f"##{letter}") if form in pieces]
        if len(spelling) + len(forms) > room * 3 // 4:
            break
        letters.append(letter)
        spelling += forms
    return sorted(letters), sorted(spelling)


def _wordpiece_vocabulary(
    frame: Any, texts: Iterable[str], size: int, first: list[str], letters: list[str] | None
) -> dict[str, int]:
    """Train a throw-away tokenizer; its pieces, those of `first` numbered first."""
    from tokenizers import Tokenizer, models, trainers

    library = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    library.normalizer, library.pre_tokenizer = frame.normalizer, frame.pre_tokenizer
    limits: dict[str, Any] = {} if letters is None else {"initial_alphabet": letters, "limit_alphabet": len(letters)}
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=first, show_progress=False, **limits)
    library.train_from_iterator(texts, trainer)
    return library.get_vocab(with_added_tokens=True)


def _train_unigram(texts: Texts, options: TokenizerOptions, special: list[str]) -> Any:
    """Kudo 2018, with bytes for characters outside the alphabet and a token for the line end."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    if "<unk>" not in special:
        raise ConfigError("tokenizer.special_tokens: a Unigram needs <unk> among them")
    given = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\n"]
    pieces = [pair for pair in _unigram_pieces(texts, options, given) if pair[0] not in given]
    vocabulary = [(piece, _NEVER) for piece in given] + pieces[: options.vocab_size - len(given)]
    library = Tokenizer(models.Unigram(vocabulary, unk_id=given.index("<unk>"), byte_fallback=True))
    line_ends = pre_tokenizers.Split("\n", "isolated")
    library.normalizer = normalizers.Prepend("▁")  # always, so that a leading space of the text is not lost
    library.pre_tokenizer = pre_tokenizers.Sequence([line_ends, pre_tokenizers.Metaspace(prepend_scheme="never")])
    spaces = decoders.Replace("▁", " ")
    library.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    library.add_special_tokens(special)
    return library


def _unigram_pieces(texts: Texts, options: TokenizerOptions, given: list[str]) -> list[tuple[str, float]]:
    """(piece, log probability) by SentencePiece, most probable first, beside the pieces that are given."""
    count = options.vocab_size - len(given)
    try:
        import sentencepiece
    except ImportError:
        raise ConfigError("training a Unigram needs sentencepiece: pip install 'shardwright[data]'") from None
    import io

    counter = _CharacterCount(str)
    for _ in counter.watch(texts()):
        pass
    coverage = counter.coverage(min(options.limit_alphabet, count * 3 // 4))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts()),
            model_writer=model,
            model_type="unigram",
            vocab_size=count + 1,  # <unk> is one of them
            hard_vocab_limit=False,
            required_chars="".join(sorted(set("".join(given)) - {"\n"})),  # text like <unk> must have other pieces
            character_coverage=max(coverage, 0.98),
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            max_sentence_length=1 << 20,
            num_threads=4,  # sums are made per thread: the number belongs to the result
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][-160:]
        raise ConfigError(f"tokenizer.train=unigram: SentencePiece cannot train on this text: {reason}") from None
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(trained.id_to_piece(n), trained.get_score(n)) for n in range(1, trained.vocab_size())]


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines as the tokenizer will meet them: the first of a document behind a space, the others bare."""
    most = 1 << 16  # SentencePiece takes time that grows with the square of a line in places
    for text in texts:
        for line in f" {text}".split("\n"):
            yield from (line[start : start + most] for start in range(0, len(line), most))


class _CharacterCount:
    """Counts characters of texts as they pass by."""

    def __init__(self, normalise: Callable[[str], str]) -> None:
        self._normalise, self._counts = normalise, np.zeros(0x110000, np.int64)

    def watch(self, texts: Iterable[str]) -> Iterator[str]:
        """The same texts, counted."""
        for text in texts:
            codes, counts = np.unique(
                np.frombuffer(self._normalise(text).encode("utf-32-le"), np.uint32), return_counts=True
            )
            self._counts[codes] += counts
            yield text

    def most_frequent(self, count: int) -> list[str]:
        """The most frequent visible characters in their order, of equally frequent ones the smaller code first."""
        order = np.argsort(-self._counts, kind="stable")[: np.count_nonzero(self._counts)]
        return [chr(code) for code in order if not chr(code).isspace()][:count]

    def coverage(self, count: int) -> float:
        """Share of the text that the `count` most frequent characters make."""
        ordered = np.sort(self._counts)[::-1]
        return float(ordered[:count].sum() / max(ordered.sum(), 1))


TRAINERS: dict[str, Callable[[Texts, TokenizerOptions, list[str]], Any]] = {
    "bpe": _train_bpe,
    "wordpiece": _train_wordpiece,
    "unigram": _train_unigram,
}


def describe(tokenizer: Tokenizer) -> str:
    """One line about a tokenizer for the log."""
    kind = json.loads(tokenizer.data)["model"]["type"] if tokenizer.file.endswith(".json") else "SentencePiece"
    return f"{kind} of {tokenizer.vocab_size} tokens, sha256 {tokenizer.sha256[:12]}"
