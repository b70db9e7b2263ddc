"""Cleaning: changes to a document's text, each of which can be turned off. Part of `prepare`, run by the workers.

Clean text passes unchanged, Chinese included: widths, quotes, ideographic spaces and compatibility ideographs are
meant by whoever wrote them.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

from shardwright.config import ConfigError
from shardwright.data.prepare.options import CleaningOptions

# C0 but for tab, line feed and carriage return; DEL; C1 but for NEL, a line end; byte order marks and noncharacters.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\ufeff\ufff9-\ufffb\ufffe\uffff]")
_LINE_ENDS = re.compile("\r\n|[\r\x85\u2028\u2029]")
_TRAILING = re.compile("[ \t\u00a0\u3000]+(?=\n|\\Z)")
_BLANK_LINES = re.compile("\n{3,}")
_INNER_SPACES = re.compile("(?<=[^ \t\n])[ \t\u00a0]{2,}(?=[^ \t\n])")
# NFC would replace CJK compatibility ideographs, which Chinese and Japanese texts use on purpose.
_NORMALISED_RUN = re.compile("[^\uf900-\ufaff\U0002f800-\U0002fa1f]+")
# ftfy leaves such text as it is: ASCII without an entity, an escape or a foreign line end.
_NOTHING_TO_FIX = re.compile(r"[\t\n\x20-\x25\x27-\x7e]*")


def clean(text: str, options: CleaningOptions, counts: Counter[str]) -> str:
    """The cleaned text; `counts` gains one under the name of each step that changed it."""
    for name, step in STEPS.items():
        if getattr(options, name):
            changed = step(text)
            if changed != text:
                counts[name] += 1
                text = changed
    return text


def fix_text(text: str) -> str:
    """Undo wrong decoding and HTML entities (ftfy), but for what would rewrite Chinese punctuation."""
    if _NOTHING_TO_FIX.fullmatch(text):
        return text
    return _ftfy().fix_text(
        text,
        fix_character_width=False,
        uncurl_quotes=False,
        normalization=None,
        remove_control_chars=False,
        fix_line_breaks=False,
    )


def normalize(text: str) -> str:
    """NFC, compatibility ideographs aside."""
    if unicodedata.is_normalized("NFC", text):
        return text
    return _NORMALISED_RUN.sub(lambda run: unicodedata.normalize("NFC", run[0]), text)


def remove_controls(text: str) -> str:
    """Without control characters, zero-width spaces, byte order marks and noncharacters."""
    return _CONTROLS.sub("", text)


def tidy_whitespace(text: str) -> str:
    """Line ends are `\\n`; no blanks before them; at most one blank line in a row, none at the ends."""
    text = _TRAILING.sub("", _LINE_ENDS.sub("\n", text))
    return _BLANK_LINES.sub("\n\n", text).strip("\n")


def collapse_spaces(text: str) -> str:
    """One space for several between words."""
    return _INNER_SPACES.sub(" ", text)


STEPS: dict[str, Callable[[str], str]] = {
    "fix_text": fix_text,
    "normalize": normalize,
    "control_characters": remove_controls,
    "whitespace": tidy_whitespace,
    "collapse_spaces": collapse_spaces,
    "lowercase": str.lower,
}


@cache
def _ftfy() -> Any:
    try:
        import ftfy
    except ImportError:
        raise ConfigError(
            "cleaning needs ftfy: pip install 'shardwright[data]', or turn it off with cleaning.fix_text=false"
        ) from None
    return ftfy
