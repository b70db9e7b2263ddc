"""Special tokens of an objective: their ids in the tokenizer, or new ids after its last. Part of build.py.

Shards hold plain text alone; what [MASK] and its like are is settled here, once, and stands in the run's config.
"""

from __future__ import annotations

from shardwright.config import Config, ConfigError
from shardwright.data.tokenizers import Tokenizer
from shardwright.log import get_logger, rank

#: The usual names of a token by its use, the first that a tokenizer has is taken.
NAMES = {
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "cls": ("[CLS]", "<cls>", "<s>"),
    "sep": ("[SEP]", "<sep>", "</s>"),
    "pad": ("[PAD]", "<pad>", "<|pad|>"),
    "bos": ("<s>", "[BOS]", "<bos>", "<|startoftext|>"),
}
SENTINEL = "<extra_id_{}>"
SENTINELS = "sentinels:"


def fit_special_tokens(config: Config, tokenizer: Tokenizer) -> int:
    """Fill `objective.special_tokens` with what the objective needs; ids there are then, the tokenizer's included.

    ConfigError where an id was given that the tokenizer uses for something else.
    """
    given = dict(config.objective.special_tokens)
    wanted = config.objective.specials(config.data.sequence_length)
    found: dict[str, int] = {}
    size, added = tokenizer.vocab_size, []
    for use in wanted:
        known = _find_sentinels(tokenizer, use) if use.startswith(SENTINELS) else _find(tokenizer, use)
        if known is None:
            count = int(use.removeprefix(SENTINELS)) if use.startswith(SENTINELS) else 1
            # As T5 has them: the first sentinel is the last id.
            known = {use: size} if count == 1 else _ends(size + count - 1, size)
            size += count
            added += list(known.items())
        found |= known
    _check(given, found, tokenizer)
    if added and not given and rank() == 0:
        text = ", ".join(f"{use}={number}" for use, number in added)
        get_logger().info("the tokenizer has no token for %s: new ids after its %d", text, tokenizer.vocab_size)
    config.objective.special_tokens = found | given
    return max([size, *(number + 1 for number in given.values())])


def trained_ids(config: Config) -> dict[str, int]:
    """What the run was trained with, by the keys of Hugging Face's config.json."""
    end = {} if config.data.end_of_document is None else {"end": config.data.end_of_document}
    known = {**config.objective.special_tokens, **end}
    found = {f"{use}_token_id": known[use] for use in NAMES if use in known}
    start = getattr(config.objective, "start", None)  # what a decoder begins with
    return {**found, "decoder_start_token_id": known[start]} if start in known else found


def _find(tokenizer: Tokenizer, use: str) -> dict[str, int] | None:
    for name in NAMES[use]:
        number = tokenizer.token_id(name)
        if number is not None:
            return {use: number}
    return None


def _find_sentinels(tokenizer: Tokenizer, use: str) -> dict[str, int] | None:
    """All sentinels of a tokenizer, whose ids have to follow one another; None where they are too few."""
    count = int(use.removeprefix(SENTINELS))
    ids = [tokenizer.token_id(SENTINEL.format(n)) for n in range(count)]
    first, last = ids[0], ids[-1]
    if first is None or last is None or abs(last - first) != count - 1:
        return None
    step = 1 if last >= first else -1
    return _ends(first, last) if ids == list(range(first, last + step, step)) else None


def _ends(first: int, last: int) -> dict[str, int]:
    return {"first_sentinel": first, "last_sentinel": last}


def _check(given: dict[str, int], found: dict[str, int], tokenizer: Tokenizer) -> None:
    for use, number in given.items():
        key = f"objective.special_tokens.{use}={number}"
        if use not in found:
            needs = f"it needs {', '.join(found)}" if found else "it needs none"
            raise ConfigError(f"{key}: the objective has no use for it; {needs}; drop the key")
        if found[use] < tokenizer.vocab_size and number != found[use]:
            raise ConfigError(f"{key}: the tokenizer has id {found[use]} for it; drop the key")
    ids = {**found, **given}
    if "mask" in ids and list(ids.values()).count(ids["mask"]) > 1:
        raise ConfigError(f"objective.special_tokens.mask={ids['mask']}: is another special token too; give it its own")
