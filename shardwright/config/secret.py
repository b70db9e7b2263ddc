"""What looks like a secret, by its name or in a URL: refused in configs, and not repeated by what is said of them.

Lowest file of the config room. launcher/manifest.py holds variables against the same names; docs/trust.md says what
cannot be seen.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

#: HF_TOKEN, WANDB_API_KEY, AWS_SECRET_ACCESS_KEY, api_key; tokens, of which there are several, are what a model reads.
#: token_types and key_bias are of models.
_NAME = re.compile(r"(KEYS?|TOKEN|SECRETS?|PASSWORDS?|PASSWDS?|CREDENTIALS?)([-_.](?!types$|bias$)|$)", re.I)
#: What a text gives a value to: `api_key: ...`, `"token"=...`.
_NAMED = re.compile(r"([\w.-]+)[\"']?\s*[:=]")
#: user:password@ in a URL, or a signed query.
_URL = re.compile(
    r"[a-z][\w+.-]*://[^/\s@:]*:[^/\s@]+@|[?&](x-\w+-signature|x-\w+-(security-)?token|sig|signature|\w*token|api_?key|"
    r"password|secret)=[^&\s]",
    re.I,
)
Keys = tuple[str, ...]  # down to a value; the number of a list's entry is one
IN_A_URL = (
    "holds a password or a signature, which would stand in config.yaml and in logs; take it out: credentials belong in "
    "the environment, where fsspec finds those of a URL (such as FSSPEC_HTTPS), or in its file (docs/trust.md)"
)
BY_NAME = (
    "is a secret by its name, and would stand in config.yaml and in logs; take it out, and set the variable that the "
    "library itself reads, such as COMET_API_KEY (docs/trust.md)"
)


def is_secret_name(name: str) -> bool:
    """Whether a key or a variable of this name holds a secret."""
    return _NAME.search(name) is not None


def find_secret(text: str) -> bool:
    """Whether a URL in a text holds a password or a signature."""
    return _URL.search(text) is not None


def secret_text(raw: Any) -> str | None:
    """Dotted key of the first text in a raw config that holds a URL's secret; of its section, where the key does."""
    for path, value in _walk(raw):
        if path and find_secret(path[-1]):
            return ".".join(path[:-1])
        if isinstance(value, str) and find_secret(value):
            return ".".join(path)
    return None


def secret_key(section: Mapping[str, Any]) -> str | None:
    """Dotted key of the first value in a section of free keys that is a secret by its name."""
    for path, value in _walk(section):
        if path and is_secret_name(path[-1]) and value not in (None, ""):
            return ".".join(path)
    return None


def shown(value: Any, key: str = "") -> str:
    """How a message repeats the value of `key`: as it is, or as what it looks like where that may be a secret."""
    hidden = is_secret_name(key) or any(_gives_away(path, inner) for path, inner in _walk(value))
    return "what looks like a secret" if hidden else repr(value)


def _gives_away(path: Keys, value: Any) -> bool:
    if path and is_secret_name(path[-1]):
        return True
    return isinstance(value, str) and (find_secret(value) or any(map(is_secret_name, _NAMED.findall(value))))


def _walk(value: Any, path: Keys = (), seen: set[int] | None = None) -> Iterator[tuple[Keys, Any]]:
    """(keys, value) of all that a raw config holds, sections too; each once, as YAML's aliases may go round."""
    seen = set() if seen is None else seen
    yield path, value
    if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
        return
    seen.add(id(value))
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from _walk(inner, (*path, str(key)), seen)
