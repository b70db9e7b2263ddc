"""All benchmarks on the GPU that is here, and one report of them: what `make bench-gpu` runs.

The step in two shapes (that of the other reports, and GPT-2 124M), the loader and its share of a real run, and the
speedrun. A benchmark that fails is named in the report with its last words; the others go on.

Example: python benchmarks/gpu.py --minutes 10
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import HERE, facts_table, machine, parser, publish, say


def main() -> int:
    """Run everything, write the report; 1 where a benchmark failed."""
    options = arguments()
    facts = machine(options.device)
    parts = [facts_table(facts)]
    figures: dict[str, Any] = {"benchmark": "gpu", **facts}
    for name, script, settings in jobs(options):
        say(f"{name}: {script} {' '.join(settings)}")
        found, page = run(script, settings, options.smoke)
        figures[name] = found
        parts.append(page)
    publish(None if options.smoke else options.out, "Benchmarks on a GPU", parts, figures)
    return int(any("failed" in figures[name] for name, _, _ in jobs(options)))


def arguments() -> Any:
    """The command line."""
    p = parser(__doc__, "gpu.md")
    p.add_argument("--minutes", type=float, default=10.0, help="of the speedrun, for each side")
    p.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    p.add_argument("--steps", type=int, default=20, help="steps of a turn")
    p.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is of use with --smoke alone")
    return p.parse_args()


def jobs(options: Any) -> list[tuple[str, str, list[str]]]:
    """(name, script, settings) of every benchmark."""
    device = ["--device", options.device]
    turns = ["--rounds", str(options.rounds), "--steps", str(options.steps)]
    return [
        ("step_small", "step.py", [*device, *turns]),
        ("step_124m", "step.py", [*device, *turns, "--shape", "124m", "--precision", "bf16"]),
        ("stream", "stream.py", ["--train-steps", "60"]),
        ("speedrun", "speedrun.py", [*device, "--minutes", str(options.minutes)]),
    ]


def run(script: str, settings: list[str], smoke: bool) -> tuple[dict[str, Any], str]:
    """Figures of a benchmark and its page as a part of the report, or why there are none."""
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.md"
        command = [sys.executable, str(HERE / script), "--out", str(page), *settings, *(["--smoke"] if smoke else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    *shown, last = done.stdout.rstrip().splitlines() or [""]
    if done.returncode:
        return {"failed": done.returncode}, f"## {script} failed with code {done.returncode}\n\n{last}"
    return json.loads(last), re.sub(r"^(#+ )", r"#\1", "\n".join(shown).strip(), flags=re.MULTILINE)


if __name__ == "__main__":
    sys.exit(main())
