"""The report page: of a real training run, in a real browser, at both widths, in both schemes and on paper."""

import json
import logging
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shardwright.config import ConfigError, RunError
from shardwright.log import get_logger
from shardwright.planner.report import report, smooth, thin
from shardwright.planner.runs import load_run
from shardwright.train.metrics import MetricsLog, record_start
from tests.pages import Browser, open_browser

STEPS, BATCH = 120, 1024
PLOTS = "[...document.querySelectorAll('.plot')]"


@pytest.fixture(autouse=True, scope="module")
def _quiet() -> Iterator[None]:
    level = get_logger().level
    get_logger().setLevel(logging.WARNING)
    yield
    get_logger().setLevel(level)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as running:
        yield running


def train_bigram(folder: Path, text: bytes, lr: float) -> Path:
    """A byte bigram model on real text, logged as a run logs: its losses are nats a byte."""
    cut = int(0.9 * len(text))
    train, held_out = (torch.tensor(list(part)) for part in (text[:cut], text[cut:]))
    table = torch.zeros(256, 256, requires_grad=True)
    optimizer = torch.optim.Adam([table], lr=lr)
    folder.mkdir(parents=True)
    config = {
        "run": str(folder), "model": {"family": "bigram", "layers": 1}, "data": {"path": "english"},
        "train": {"steps": STEPS, "seed": 0}, "optimizer": {"name": "adam", "lr": lr},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    facts = {"parameters": table.numel(), "device": "CPU", "num_devices": 1, "versions": {"torch": torch.__version__}}
    record_start(folder, 0, **facts)
    record_start(folder, 60, **facts)
    generator = torch.Generator().manual_seed(0)
    with MetricsLog(folder, tensorboard=False) as log:
        for step in range(1, STEPS + 1):
            at = torch.randint(len(train) - 1, (BATCH,), generator=generator)
            loss = torch.nn.functional.cross_entropy(table[train[at]], train[at + 1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            fields = {"tokens": step * BATCH, "loss": loss.item(), "grad_norm": table.grad.norm().item(), "lr": lr}
            speed = {"tokens_per_s": 1e4 + step % 7, "step_s": 0.1, "data_s": 0.001, "mfu": 0.25, "mem_gib": 1.0}
            if step % 40 == 0:
                loss = torch.nn.functional.cross_entropy(table[held_out[:-1]], held_out[1:]).item()
                fields |= {"val_loss": loss, "val_perplexity": math.exp(loss), "val_bits_per_byte": loss / math.log(2)}
            log.log(step, fields | speed)
    return folder


@pytest.fixture(scope="module")
def text(bundled: Path) -> bytes:
    lines = (bundled / "english.jsonl").read_text(encoding="utf-8").splitlines()
    return "".join(json.loads(line)["text"] for line in lines).encode()


@pytest.fixture(scope="module")
def runs(text: bytes, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [train_bigram(folder / name, text, lr) for name, lr in (("slow", 0.02), ("fast", 0.05))]


@pytest.mark.parametrize(("width", "dark"), [(390, False), (390, True), (1440, False), (1440, True)])
def test_the_page_is_whole_at_every_width_and_scheme(
    runs: list[Path], browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    page = browser.open(report(runs[0], tmp_path / "report.html"), width=width, dark=dark)
    assert page.errors == []
    assert page.requests == []
    assert page.evaluate("document.documentElement.scrollWidth") == width, "nothing hangs over the edge"
    titles = page.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert titles == [
        "Loss", "Validation", "Throughput", "MFU", "Learning rate", "Gradient norm", "Waiting for data", "Summary",
    ]  # fmt: skip
    points = page.evaluate(f"{PLOTS}.map(p => p.data.reduce((n, t) => n + t.y.filter(y => y !== null).length, 0))")
    assert points == [2 * STEPS + 3, 3, 2 * STEPS, 2 * STEPS, STEPS, 2 * STEPS, 2 * STEPS]
    drawn = page.evaluate(f"{PLOTS}.every(p => p.querySelectorAll('.scatterlayer path').length > 0)")
    assert drawn, "the plots are drawn, not only given data"
    widths = page.evaluate(f"{PLOTS}.map(p => p.querySelector('svg').clientWidth / p.clientWidth)")
    assert all(0.99 < share <= 1.01 for share in widths)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, light[4:-1].split(","))) < 200) == dark
    assert page.screenshot(tmp_path / "page.png").stat().st_size > 10_000


def test_the_page_says_what_the_run_says(runs: list[Path], browser: Browser, tmp_path: Path) -> None:
    run = load_run(runs[1])
    best = run.best_validation()
    assert best is not None
    assert best[:2] == ("val_bits_per_byte", min(r["val_bits_per_byte"] for r in run.records if "val_loss" in r))
    page = browser.open(report(runs[1], tmp_path / "report.html"))
    words = page.evaluate("document.querySelector('main').innerText")
    for expected in (
        f"{best[1]:.4f}", "65,536", "65.5k parameters", "adam, peak rate 0.05", "then from step 60", "MFU 25.0%",
        f"torch {torch.__version__}", "120 steps, 123k tokens, of 120 steps", "0:12 in steps, 1.00 GiB at most",
    ):  # fmt: skip
        assert expected in words
    shown = page.evaluate("document.getElementById('chart-0').data.find(t => t.name === 'validation').y")
    assert shown == [pytest.approx(r["val_loss"], rel=1e-5) for r in run.records if "val_loss" in r]
    assert page.evaluate("document.getElementById('chart-0').layout.shapes.map(s => s.x0)") == [60], "the resume"


def test_the_axis_switch_changes_every_plot(runs: list[Path], browser: Browser, tmp_path: Path) -> None:
    page = browser.open(report(runs[0], tmp_path / "report.html"))
    ends = f"{PLOTS}.map(p => Math.max(...p.data[0].x))"
    assert page.evaluate(ends) == [STEPS] * 7
    page.evaluate("document.querySelector('[data-axis=tokens]').click()")
    assert page.evaluate(ends) == [STEPS * BATCH] * 7
    assert page.evaluate("document.querySelector('[aria-pressed=true]').textContent") == "Tokens"
    assert page.evaluate("document.getElementById('chart-0').layout.shapes.map(s => s.x0)") == [60 * BATCH]
    assert page.errors == []


def test_it_prints_in_light_and_returns_to_the_screen(runs: list[Path], browser: Browser, tmp_path: Path) -> None:
    page = browser.open(report(runs[0], tmp_path / "report.html"), dark=True)
    before = page.evaluate("getComputedStyle(document.body).color")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    widths = page.evaluate(f"{PLOTS}.map(p => p.querySelector('svg').clientWidth - p.clientWidth)")
    assert all(abs(difference) <= 1 for difference in widths), "the plots follow the paper"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("getComputedStyle(document.body).color") == before
    assert page.pdf(tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert page.errors == []


def test_several_runs_lie_over_each_other(
    runs: list[Path], browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    place = report(runs)
    assert place == Path("report.html")
    for width in (390, 1440):
        page = browser.open(place, width=width)
        assert (page.errors, page.requests) == ([], [])
        assert page.evaluate("document.documentElement.scrollWidth") == width
        names = page.evaluate("[...new Set(document.getElementById('chart-1').data.map(t => t.name))]")
        assert names == ["slow", "fast"]
        colours = page.evaluate("document.getElementById('chart-1').data.map(t => t.line.color)")
        assert len(set(colours)) == 2
    differing = page.evaluate("[...document.querySelectorAll('section')].find(s => s.innerText.startsWith('What'))"
                              ".querySelector('tbody').innerText")  # fmt: skip
    assert differing.split() == ["optimizer.lr", "0.02", "0.05"]


def test_the_page_carries_plotly_once_and_escapes_what_it_is_told(
    text: bytes, browser: Browser, tmp_path: Path
) -> None:
    name = "a<img src=x onerror=alert(1)>&"
    run = train_bigram(tmp_path / name, text[:4000], 0.05)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["family"] = "</script><script>throw new Error('out')</script>"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    place = report(run)
    assert place == run / "report.html"
    html = place.read_text(encoding="utf-8")
    assert html.count("plotly.js v") == 1
    assert "<script src" not in html
    page = browser.open(place)
    assert (page.errors, page.requests) == ([], [])
    assert page.evaluate("document.querySelector('h1').textContent") == name
    assert page.evaluate("document.querySelectorAll('img').length") == 0


def test_a_young_or_hurt_run_still_has_a_page(browser: Browser, tmp_path: Path) -> None:
    run = tmp_path / "young"
    with MetricsLog(run, tensorboard=False):
        pass
    page = browser.open(report(run))
    assert page.errors == []
    assert "No step has been logged yet" in page.evaluate("document.body.innerText")
    with MetricsLog(run, tensorboard=False) as log:
        log.log(1, {"loss": 5.0, "tokens": 10})
        log.log(2, {"loss": math.nan, "tokens": 20, "loss_scale": 512.0, "grad_norm": 0.0})
        log.log(2, {"val_loss": 4.0})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    page = browser.open(report(run))
    assert page.errors == []
    assert page.evaluate("document.getElementById('chart-0').data.map(t => [t.name, t.y.length])") == [
        ["training", 1], ["validation", 1], ["not finite", 1],
    ]  # fmt: skip
    assert "step 2" in page.evaluate("document.querySelector('section:last-of-type').innerText")


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent: no such folder; expected the folder of a run"):
        report(tmp_path / "absent")
    with pytest.raises(ConfigError, match=r"holds no metrics.jsonl"):
        report(tmp_path)
    with pytest.raises(ConfigError, match=r"at least one run"):
        report([])


def test_a_folder_in_place_of_the_page_is_named_and_stays_as_it_was(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "place"
    with MetricsLog(run, tensorboard=False):
        pass
    place.mkdir()
    with pytest.raises(ConfigError, match=r"place: is a folder; name the file, as in --output .*place/report.html"):
        report(run, place)
    (place / "file").touch()
    with pytest.raises(RunError, match=r"place/file/page.html: cannot be written: "):
        report(run, place / "file" / "page.html")
    assert sorted(tmp_path.iterdir()) == [place, run] and list(place.iterdir()) == [place / "file"]


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / side / "run" for side in ("a", "b")]
    for folder in folders:
        with MetricsLog(folder, tensorboard=False) as log:
            log.log(1, {"loss": 1.0})
    html = report(folders, tmp_path / "two.html").read_text(encoding="utf-8")
    assert all(f"</i>{folder}</th>" in html for folder in folders)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_the_ends_and_the_extremes(values: list[float], limit: int) -> None:
    kept = thin(values, limit)
    assert kept == sorted(set(kept))
    assert len(kept) <= max(limit + 2, 1)
    assert {0, len(values) - 1} <= set(kept)
    assert {min(values), max(values)} <= {values[i] for i in kept}


def test_smoothing_follows_a_line_and_calms_noise() -> None:
    line = [3.0 - 0.01 * i for i in range(600)]
    assert smooth(line)[:590] == pytest.approx(line[:590])
    noise = random.Random(0)
    noisy = [1 + noise.gauss(0, 0.1) for _ in range(6000)]
    calm = smooth(noisy)[1000:5000]
    assert max(abs(v - 1) for v in calm) < 0.04
