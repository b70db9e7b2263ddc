"""The page of a run that stood still: who held the others up, where every rank was, and all stacks.

Above train/stall.py, which knows what to say; this is how it looks. The command line hands `write_page` to the run.
"""

from __future__ import annotations

import html
import time
from pathlib import Path

from shardwright import __version__
from shardwright.planner.page import build_page, table, tiles
from shardwright.train.stall import HEADS, Stall, as_text, join, rows

NARROW = ".ranks td { min-width: 0; } .ranks th, .ranks td { white-space: nowrap; padding: .45rem .8rem; }"
OPEN = 3  # groups of stacks that are shown unfolded


def write_page(stall: Stall, folder: Path, name: str) -> Path:
    """Write NAME.txt and NAME.html into a folder; the latter's path."""
    (folder / f"{name}.txt").write_text(as_text(stall), encoding="utf-8")
    path = folder / f"{name}.html"
    path.write_text(build(stall), encoding="utf-8")
    return path


def build(stall: Stall) -> str:
    """The page as text."""
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(stall.now))
    body = [
        '<header><p class="kicker">shardwright stall</p>'
        f"<h1>{html.escape(stall.verdict.partition(';')[0])}</h1>"
        f"<p>{html.escape(stall.verdict.partition(';')[2].strip() or 'it is alone')}</p></header>",
        tiles(_tiles(stall)),
        f'<style>{NARROW}</style><section class="ranks"><h2>Ranks</h2>{table(HEADS, rows(stall))}</section>',
        f"<section><h2>Stacks, innermost frame first</h2>{_stacks(stall)}</section>",
        f"<footer>{html.escape(stall.run)}, {clock}; shardwright {__version__}. A rank is silent when it wrote no word "
        "while the others were asked: its process is stopped or gone, its host or network is, its disk does not "
        "answer, or something holds the interpreter's lock.</footer>",
    ]
    return build_page(f"stall of {Path(stall.run).name} · shardwright", body, [])


def _tiles(stall: Stall) -> list[tuple[str, str, str]]:
    words = stall.words.values()
    waiting = [word.rank for word in words if word.collective and word.rank not in stall.silent]
    still = [word.rank for word in words if not word.collective and not word.left and word.rank not in stall.silent]
    hosts = {word.host for word in words}
    return [
        ("Silent", str(len(stall.silent)), _named(list(stall.silent))),
        ("Stand still by themselves", str(len(still)), _named(still)),
        ("Wait for others", str(len(waiting)), _named(waiting)),
        ("Hosts", str(len(hosts)), ", ".join(sorted(hosts)[:4])),
    ]


def _named(ranks: list[int]) -> str:
    text = join(ranks)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {text[:60]}{'…' * (len(text) > 60)}" if ranks else "none"


def _stacks(stall: Stall) -> str:
    groups = stall.groups()
    blocks = [
        f"<details{' open' * (number < OPEN)}><summary>{html.escape(ranks.capitalize())}</summary>"
        f'<div class="scroll"><pre>{html.escape(text)}</pre></div></details>'
        for number, (ranks, text) in enumerate(groups)
    ]
    return "".join(blocks) or "<p>No rank left any.</p>"
