"""Wiki markup to plain text, for Wikipedia dumps. Part of `prepare`.

Not a full parser: templates and tables are dropped (their text is mostly boxes and notes), links, lists and headings
keep their words. What is nested is removed from the inside out.
"""

from __future__ import annotations

import html
import re

_DROPPED = "ref|gallery|timeline|math|chem|score|syntaxhighlight|source|imagemap|templatestyles|graph|mapframe"
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_SELF_CLOSED = re.compile(rf"<(?:{_DROPPED})\b[^<>]*/>", re.I)
_ELEMENT = re.compile(rf"<({_DROPPED})\b[^<>]*>.*?</\1\s*>", re.S | re.I)
_BREAK = re.compile(r"<br\s*/?>", re.I)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_KEPT_TEMPLATE = re.compile(r"\{\{\s*(?:lang\s*\|[^{}|]*|nowrap|nobold|small|transl?\s*\|[^{}|]*)\|([^{}|]*)\}\}", re.I)
_TEMPLATE = re.compile(r"\{\{[^{}]*\}\}|\{\{\{[^{}]*\}\}\}")
_TABLE = re.compile(r"^[ :]*\{\|(?:(?!^[ :]*\{\|).)*?^\s*\|\}", re.S | re.M)
_OPEN_TABLE = re.compile(r"^[ :]*\{\|.*?(?=^\s*$|\Z)", re.S | re.M)
_VARIANT = re.compile(r"-\{([^{}]*)\}-")
_FLAGS = re.compile(r"[A-Za-z;\s-]*\|")  # letters or languages; the bar of a link is another
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_MEDIA = re.compile(
    r"\s*:?(?:file|image|category|media|datei|bild|kategorie|fichier|catégorie|archivo|categoría"
    r"|文件|檔案|档案|图像|圖像|分类|分類)\s*:",
    re.I,
)
_INTERWIKI = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*:[^|]*$")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]+\s*([^\]]*)\]|\[mailto:[^\s\]]+\s*([^\]]*)\]")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(={1,6})\s*(.*?)\s*\1\s*$", re.M)
_LIST = re.compile(r"^[*#:;]+\s*", re.M)
_RULE = re.compile(r"^-{4,}", re.M)
_MAGIC_WORD = re.compile(r"__[A-Z]+__")
_MANY_BLANKS = re.compile(r"\n\s*\n\s*")
_EMPTY_BRACKETS = re.compile(r"[ ]?(?:\(\s*[;,]?\s*\)|（\s*[；，]?\s*）)")


def article_text(title: str, markup: str) -> str:
    """The title, a blank line and the article as plain text."""
    return f"{title}\n\n{strip_markup(markup)}".strip()


def strip_markup(markup: str) -> str:
    """Plain text of an article's markup."""
    text, verbatim = _set_aside(_COMMENT.sub("", markup))
    text = _SELF_CLOSED.sub("", text)
    text = _until_stable(_ELEMENT, "", text)
    text = _until_stable(_KEPT_TEMPLATE, r"\1", text)
    text = _until_stable(_TEMPLATE, "", text)
    text = _until_stable(_TABLE, "", text)
    text = _OPEN_TABLE.sub("", text)
    text = _VARIANT.sub(lambda found: _variant(found[1]), text)
    text = _until_stable(_LINK, lambda found: _link(found[1]), text)
    text = _EXTERNAL.sub(lambda found: found[1] or found[2] or "", text)
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = _QUOTES.sub("", text)
    text = _HEADING.sub(r"\2", text)
    text = _MAGIC_WORD.sub("", _RULE.sub("", _LIST.sub("", text)))
    text = _EMPTY_BRACKETS.sub("", html.unescape(text))
    for mark, words in verbatim.items():
        text = text.replace(mark, words)
    return _MANY_BLANKS.sub("\n\n", text).strip()


def _set_aside(text: str) -> tuple[str, dict[str, str]]:
    """Replace <nowiki> passages by marks, since their words must not be read as markup."""
    kept: dict[str, str] = {}

    def mark(found: re.Match[str]) -> str:
        key = f"\x00{len(kept)}\x00"
        kept[key] = html.unescape(found[1])
        return key

    return re.sub(r"<nowiki>(.*?)</nowiki>", mark, text, flags=re.S | re.I), kept


def _until_stable(pattern: re.Pattern[str], replacement: object, text: str) -> str:
    """Replace again and again, so that what is nested goes from the inside out."""
    count = 1
    while count:
        text, count = pattern.subn(replacement, text)  # type: ignore[call-overload]
    return text


def _link(inside: str) -> str:
    """Words that a link shows: none for media, categories and other languages."""
    if _MEDIA.match(inside) and not inside.startswith(":"):
        return ""
    if _INTERWIKI.fullmatch(inside):
        return ""
    return inside.rpartition("|")[2].lstrip(":")


def _variant(inside: str) -> str:
    """First reading of a Chinese conversion mark: -{zh-hans:计算机; zh-hant:電腦}- and -{干}-.

    Flags before a bar: R shows the rest as it stands, A what follows; T, H and - show nothing.
    """
    head, bar, rest = inside.partition("|") if _FLAGS.match(inside) else (inside, "", "")
    flags = {flag.strip() for flag in head.split(";")}
    if bar and "R" in flags:
        return rest
    if bar and (flags & {"-", "H"} or flags == {"T"}):
        return ""
    if bar:
        inside = rest
    first = inside.partition(";")[0]
    return first.partition(":")[2].strip() if ":" in first else first
