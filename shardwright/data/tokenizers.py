"""One `Tokenizer` for every vocabulary file of the field; part of the data room.

`prepare` trains or loads one and writes it beside the shards; `generate`, evaluation and export read it from there.
A Hugging Face `tokenizer.json` and a SentencePiece `.model` are kept as they are; a tiktoken file and GPT-2's
`vocab.json` + `merges.txt` become a `tokenizer.json` that encodes alike.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from shardwright.config import ConfigError
from shardwright.data.manifest import Manifest, write_atomic
from shardwright.data.remote import is_remote, join, read_bytes

END_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[SEP]")

# Regular expressions that cut text before byte-level merges, by the name of the vocabulary they belong to.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # As first published; the later possessive form cuts alike, but its `$` means something else to this library.
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Ranks in a tiktoken file -> (pattern, end of document and its id): the file itself carries neither.
TIKTOKEN_FILES = {
    50256: ("gpt2", "<|endoftext|>", 50256),
    100256: ("cl100k", "<|endoftext|>", 100257),
    199998: ("o200k", "<|endoftext|>", 199999),
    128000: ("cl100k", "<|end_of_text|>", 128001),
}


class Backend(Protocol):
    """What a library that encodes must offer; two implementations below."""

    file: str  # name under which a prepared folder keeps it
    vocab_size: int

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without special tokens around it; special tokens inside it are plain text."""

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """Ids, and for each id the character at which its piece of the text starts."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of these ids; bytes that are no UTF-8 become U+FFFD."""

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text, None where the vocabulary lacks it."""

    def spelling(self, token: int) -> str | None:
        """Text of a token as the vocabulary has it, None where it lacks that id."""


class Tokenizer:
    """A vocabulary with its end-of-document token.

    `data` are the exact bytes of the file that `save` writes, so that `sha256` names the tokenizer everywhere.
    """

    def __init__(self, backend: Backend, data: bytes, end_of_document: int) -> None:
        self.backend, self.data, self.end_of_document = backend, data, end_of_document
        self.vocab_size = backend.vocab_size
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.dtype = np.dtype("<u2" if self.vocab_size <= 65536 else "<u4")

    @property
    def file(self) -> str:
        """Name of its file in a prepared folder: tokenizer.json or tokenizer.model."""
        return self.backend.file

    @classmethod
    def load(
        cls, path: str | Path, *, end_of_document: str | int | None = None, pattern: str | None = None
    ) -> Tokenizer:
        """Read a tokenizer from a file or folder of any known kind.

        A folder is one that `prepare` wrote (its manifest names tokenizer and end-of-document, the hash is checked), a
        Hugging Face folder, or one with GPT-2's pair of files. `pattern` (a name in PATTERNS or an expression) is for
        tiktoken files, which do not carry it. ConfigError names the file, what was found and what was expected.
        """
        path = Path(path)
        if (path / "manifest.json").is_file():
            return load_prepared(Manifest.load(path))
        file = _find(path)
        raw = _read(file)
        if end_of_document is None:
            end_of_document = _configured_end(file.parent / "tokenizer_config.json")
        backend, data, known_end = _open(file, raw, end_of_document, pattern)
        return cls(backend, data, _end_id(backend, end_of_document, known_end, file))

    @classmethod
    def from_json(cls, text: str, end_of_document: str | int) -> Tokenizer:
        """A tokenizer from the text of a Hugging Face tokenizer.json."""
        backend = HuggingFaceBackend(text.encode())
        return cls(backend, text.encode(), _end_id(backend, end_of_document, None, Path(backend.file)))

    def save(self, path: str | Path) -> Path:
        """Write the tokenizer's file, whole or not at all; into `path` when that is a folder. Returns where."""
        path = Path(path)
        target = path / self.file if path.is_dir() else path
        write_atomic(target, self.data)
        return target

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids (uint16 or uint32) of each text: nothing is added, and a special token's name stays plain text."""
        return [np.array(ids, self.dtype) for ids in self.backend.encode(texts)]

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text."""
        return self.encode_batch([text])[0]

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """As `encode_batch`, with the character (int64) at which each token's piece of the text starts."""
        pairs = self.backend.encode_with_starts(texts)
        return [(np.array(ids, self.dtype), np.array(starts, np.int64)) for ids, starts in pairs]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of these ids. Special tokens vanish, or show as their names with `skip_special=False`."""
        return self.backend.decode([int(i) for i in ids], skip_special)

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that is fed one token at a time."""
        return StreamDecoder(lambda ids: self.backend.decode(ids, skip_special))

    def token_id(self, token: str) -> int | None:
        """Id of a token by its text ("[MASK]", "<pad>"), None where the vocabulary lacks it."""
        return self.backend.token_id(token)

    def spelling(self, token: int) -> str | None:
        """Text of a token as the vocabulary has it ("</s>", "Ġthe"), None where it lacks that id."""
        return self.backend.spelling(token)


class Frame(NamedTuple):
    """Special tokens around a text, as a model was trained with them."""

    start: int | None = None  # what a text comes after; None is the end of a document
    first: int | None = None  # <s>, with which both texts of an encoder-decoder begin


class StreamDecoder:
    """Text of a growing list of tokens, piece by piece; the pieces joined are `decode` of the whole list.

    A piece never ends within a UTF-8 character: its tokens wait for the rest. Only a short window is decoded again for
    each token, since a decoder may treat the first token of a list in its own way (SentencePiece drops its space).
    """

    HELD = 3  # most signs of broken bytes that the beginning of one UTF-8 character may show as

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._read = 0  # tokens of the window that were whole characters
        self._text = ""  # of the window, what is out

    def push(self, token: int) -> str:
        """Text that is certain once this token is known; empty while a character is not whole."""
        self._window.append(int(token))
        text = self._decode(self._window)
        held = min(len(text) - len(text.rstrip("\ufffd")), self.HELD)
        if not held:
            return self._emit(text)
        certain = text[len(self._text) : len(text) - held]
        self._text += certain
        return certain

    def finish(self) -> str:
        """What still waited when the tokens ended: a broken character shows as U+FFFD."""
        return self._emit(self._decode(self._window)) if self._read < len(self._window) else ""

    def _emit(self, text: str) -> str:
        piece = text[len(self._text) :]
        tail = self._window[self._read :]
        shorter = self._decode(tail)
        if self._text and shorter:  # the window may shrink: its rest shows text of its own
            self._window, text = tail, shorter
        self._read, self._text = len(self._window), text
        return piece


class HuggingFaceBackend:
    """A tokenizer.json through the `tokenizers` library."""

    file = "tokenizer.json"

    def __init__(self, data: bytes) -> None:
        from tokenizers import Tokenizer as Library

        self.library = Library.from_buffer(data)
        # Files made for fine-tuning often carry these two; in pretraining text they would cut documents silently.
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True
        vocabulary = self.library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.library.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        encoded = self.library.encode_batch(list(texts), add_special_tokens=False)
        return [(e.ids, [start for start, _ in e.offsets]) for e in encoded]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.library.decode(ids, skip_special_tokens=skip_special)

    def token_id(self, token: str) -> int | None:
        return self.library.token_to_id(token)

    def spelling(self, token: int) -> str | None:
        return self.library.id_to_token(token)


class SentencePieceBackend:
    """A SentencePiece model through its own library: conversions differ from it in corner cases."""

    file = "tokenizer.model"

    def __init__(self, data: bytes) -> None:
        try:
            import sentencepiece
        except ImportError:
            raise ConfigError("SentencePiece models need sentencepiece: pip install 'shardwright[data]'") from None
        self.library = sentencepiece.SentencePieceProcessor(model_proto=data)
        self.vocab_size = self.library.vocab_size()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.library.encode(text) for text in texts]  # a list would start threads in every worker

    def encode_with_starts(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        found = [self.library.encode(text, return_type="offset_mapping") for text in texts]
        return [(mapping["ids"], [start for start, _ in mapping["offsets"]]) for mapping in found]

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        return self.library.decode(list(ids))

    def token_id(self, token: str) -> int | None:
        number = self.library.piece_to_id(token)
        return number if self.library.id_to_piece(number) == token else None

    def spelling(self, token: int) -> str | None:
        return self.library.id_to_piece(token) if 0 <= token < self.vocab_size else None


def files_of(path: str | Path) -> list[dict[str, str]]:
    """Name and sha256 of each file that `Tokenizer.load(path)` would read."""
    file = _find(Path(path))
    pair = ("vocab.json", "merges.txt")
    files = [file]
    if file.name.endswith(pair):
        stem = file.name.removesuffix(pair[0]).removesuffix(pair[1])
        files = [file.with_name(stem + name) for name in pair]
    return [{"name": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files if f.is_file()]


def load_prepared(manifest: Manifest, allow: Collection[str] = ()) -> Tokenizer:
    """The tokenizer of a prepared folder or URL, held against the hash in its manifest. `allow`: see Manifest.load."""
    facts, name = manifest.tokenizer, join(manifest.root, manifest.tokenizer["file"])
    raw = read_bytes(name, sha256=facts["sha256"], allow=allow) if is_remote(name) else _read(Path(name))
    found = hashlib.sha256(raw).hexdigest()
    if found != facts["sha256"]:
        raise ConfigError(
            f"{name}: is not the tokenizer that {manifest.root}/manifest.json names (sha256 {found[:12]}..., "
            f"expected {facts['sha256'][:12]}...); restore the file or prepare the folder again"
        )
    end = int(facts["end_of_document"])
    backend, data, _ = _open(Path(facts["file"]), raw, end, None)
    return Tokenizer(backend, data, end)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read: {error.strerror}") from None


def _find(path: Path) -> Path:
    """The tokenizer's file: the path itself, or the one a folder holds."""
    names = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json")
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        found += sorted(path.glob("*.tiktoken"))
        if found:
            return found[0]
        raise ConfigError(f"{path}: holds no tokenizer; expected one of {', '.join(names)} or a .tiktoken file")
    raise ConfigError(f"{path}: no such tokenizer file or folder")


def _open(
    file: Path, raw: bytes, end: str | int | None, pattern: str | None
) -> tuple[Backend, bytes, int | str | None]:
    """(backend, bytes to keep, end of document if the format implies one), by what the file holds."""
    if file.name in ("merges.txt", "vocab.json") or file.name.endswith(("-vocab.json", "-merges.txt")):
        raw = _gpt2_json(file)
    elif raw[:1] != b"{" and _looks_like_tiktoken(raw):
        raw, end_token = _tiktoken_json(file, raw, end, pattern)
        return HuggingFaceBackend(raw), raw, end_token
    elif raw[:1] != b"{":
        return _open_sentencepiece(file, raw)
    try:
        return HuggingFaceBackend(raw), raw, None
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{file}: is not a Hugging Face tokenizer.json: {str(error).splitlines()[0]}") from None


def _open_sentencepiece(file: Path, raw: bytes) -> tuple[Backend, bytes, int | None]:
    if not raw.strip():
        raise ConfigError(f"{file}: is empty; expected a tokenizer; fetch the file again")
    try:
        backend = SentencePieceBackend(raw)
    except RuntimeError:
        raise ConfigError(
            f"{file}: is no known tokenizer; expected a tokenizer.json, a SentencePiece .model, a tiktoken file, "
            "or GPT-2's vocab.json beside merges.txt"
        ) from None
    end = backend.library.eos_id()
    return backend, raw, end if end >= 0 else None


def _end_id(backend: Backend, wanted: str | int | None, known: str | int | None, file: Path) -> int:
    """Id of the end-of-document token: as asked, as the format says, or the first customary name."""
    choice = known if wanted is None else wanted
    if isinstance(choice, int):
        if not 0 <= choice < backend.vocab_size:
            raise ConfigError(f"{file}: end_of_document={choice} is outside its {backend.vocab_size} tokens")
        return choice
    for name in [choice] if choice is not None else END_OF_DOCUMENT:
        number = backend.token_id(name)
        if number is not None:
            return number
    tried = choice if choice is not None else ", ".join(END_OF_DOCUMENT)
    raise ConfigError(f"{file}: has no token {tried}; name one of its tokens, as in tokenizer.end_of_document='</s>'")


def _configured_end(file: Path) -> str | None:
    """`eos_token` of a Hugging Face tokenizer_config.json, where one lies beside the tokenizer."""
    try:
        token = json.loads(file.read_text("utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    return token.get("content") if isinstance(token, dict) else token


def _gpt2_json(file: Path) -> bytes:
    """GPT-2's vocab.json and merges.txt as one tokenizer.json."""
    vocab = file.with_name(file.name.replace("merges.txt", "vocab.json"))
    merges = file.with_name(file.name.replace("vocab.json", "merges.txt"))
    try:
        ids = json.loads(vocab.read_text("utf-8"))
        lines = merges.read_text("utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{vocab} and {merges.name} beside it are both needed: {error}") from None
    pairs = [line.partition(" ")[::2] for line in lines if line and not line.startswith("#version")]
    if not isinstance(ids, dict) or any(not right or " " in right for _, right in pairs):
        raise ConfigError(f"{merges}: expected two pieces a line, as GPT-2's merges.txt has them")
    special = {name: ids[name] for name in ("<|endoftext|>", "<s>", "<pad>", "</s>", "<unk>", "<mask>") if name in ids}
    try:
        return byte_level_json(ids, pairs, special, None)
    except Exception as error:  # the library raises plain Exception
        raise ConfigError(f"{merges}: does not fit {vocab.name}: {str(error).splitlines()[0]}") from None


def byte_level_json(
    vocab: dict[str, int], merges: Sequence[tuple[str, str]], special: dict[str, int], pattern: str | None
) -> bytes:
    """tokenizer.json of a byte-level BPE; `pattern` None is GPT-2's own, `special` holds names and ids."""
    from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Library

    whole_first = pattern is not None  # tiktoken takes a word that is a token before it tries any merge
    library = Library(models.BPE(vocab, list(merges), ignore_merges=whole_first))
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern is not None else []
    library.pre_tokenizer = pre_tokenizers.Sequence([*split, plain]) if split else plain
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    text = json.loads(library.to_str())
    for token in text["added_tokens"]:  # the library numbers them by arrival, the vocabulary knows better
        token["id"] = special[token["content"]]
    return json.dumps(text, ensure_ascii=False, separators=(",", ":")).encode()


def _looks_like_tiktoken(raw: bytes) -> bool:
    parts = raw.split(b"\n", 1)[0].split()
    return len(parts) == 2 and parts[1].isdigit()


def _tiktoken_json(file: Path, raw: bytes, end: str | int | None, pattern: str | None) -> tuple[bytes, str]:
    """A tiktoken rank file as a tokenizer.json, and its end-of-document token."""
    try:
        lines = [line.split() for line in raw.splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except (ValueError, binascii.Error):
        raise ConfigError(f"{file}: expected lines of a base64 token and its rank, as tiktoken writes them") from None
    known = TIKTOKEN_FILES.get(len(ranks))
    if pattern is None and known is None:
        raise ConfigError(
            f"{file}: {len(ranks)} ranks are no vocabulary known here, and the file does not carry its pattern; "
            f"say tokenizer.pattern= one of {', '.join(PATTERNS)}, or the expression itself"
        )
    name, number = (known[1], known[2]) if known else ("<|endoftext|>", max(ranks.values()) + 1)
    name = end if isinstance(end, str) else name
    letters = _byte_letters()
    vocab = {_spell(token, letters): rank for token, rank in ranks.items()}
    merges = [(_spell(left, letters), _spell(right, letters)) for left, right in _merges(ranks)]
    chosen = pattern if pattern is not None else known[0] if known else "gpt2"
    return byte_level_json(vocab, merges, {name: number}, PATTERNS.get(chosen, chosen)), name


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that makes a token, in the order in which tiktoken would merge them."""
    merges: list[tuple[bytes, bytes]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        cuts = [(token[:i], token[i:]) for i in range(1, len(token))]
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return merges


def _spell(token: bytes, letters: list[str]) -> str:
    return "".join(letters[byte] for byte in token)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte: Latin-1's printable characters are themselves, the rest from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    rest = (byte for byte in range(256) if byte not in letters)
    letters.update((byte, chr(256 + n)) for n, byte in enumerate(rest))
    return [letters[byte] for byte in range(256)]
