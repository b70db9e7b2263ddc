"""A sample of the equivalence matrix, of other cells every day: as many as EQUIVALENCE_MINUTES allow, at least one.

`make sample` gives it 20 minutes, continuous integration 8. EQUIVALENCE_SEED repeats the sample of another day, which
a failure names; benchmarks/equivalence.py --only runs single cells, and all of them without it.
"""

import datetime
import os
import time

import pytest

from shardwright.parallel.refusals import refusals
from shardwright.train.layout import build_facts
from shardwright.train.settings import read_config
from tests.equivalence.cells import LAYOUTS, SCHEDULES, SETTINGS, SHAPES, Cell, config, matrix, sample
from tests.equivalence.matrix import Matrix

MINUTES = float(os.environ.get("EQUIVALENCE_MINUTES", 0))
SEED = int(os.environ.get("EQUIVALENCE_SEED", datetime.date.today().toordinal() if MINUTES else 0))
PATIENCE = 600.0  # seconds that one cell may take


@pytest.mark.timeout(60 * MINUTES + 2 * PATIENCE)
def test_a_sample_of_the_matrix(ranks, prepared, tmp_path, capsys):
    end = time.monotonic() + 60 * MINUTES
    bench, failed = Matrix(ranks, prepared, tmp_path, patience=PATIENCE), []
    for number, cell in enumerate(sample(SEED), 1):
        verdict = bench.check(cell)
        failed += [f"{cell.name}: {verdict.problem}"] if verdict.problem else []
        with capsys.disabled():
            print(f"\n  {number}: {cell.name} {verdict.seconds:.1f} s {verdict.problem or 'ok'}", end="", flush=True)
        if time.monotonic() > end:
            break
    assert not failed, "\n".join([f"EQUIVALENCE_SEED={SEED}", *failed])


@pytest.mark.parametrize("shape", SHAPES)
def test_every_cell_is_a_run_that_its_layout_fits(shape):
    for cell in (cell for cell in matrix() if cell.shape == shape):
        found = read_config(config("prepared", "run", shape), [*cell.meaning, *cell.free, "model.vocab_size=517"])
        assert refusals(build_facts(found, cell.processes)) == [], cell.name


def test_the_matrix_has_what_it_promises():
    cells = set(matrix())
    assert {cell.layout for cell in cells} == set(LAYOUTS) and {cell.shape for cell in cells} == set(SHAPES)
    assert {name for cell in cells for name in cell.setting.split("+")} == set(SETTINGS)
    for shape in ("gpt2", "llama"):
        pipelines = {f"pipeline{degree}_{schedule}" for degree in (2, 4) for schedule in SCHEDULES}
        products = {"data2_tensor2", "tensor2_pipeline2_1f1b", "zero3_tensor2", "data2_tensor2_pipeline2_1f1b"}
        wanted = {"data2", "zero1", "zero2", "zero3", "tensor2", "tensor2_whole", "context2", *pipelines, *products}
        assert {Cell(shape, layout) for layout in wanted} <= cells
    for name in ("sgd", "adafactor", "lamb", "muon"):
        assert {Cell("gpt2", layout, name) for layout in ("zero1", "zero2", "zero3", "tensor2")} <= cells


def test_samples_of_two_days_differ_and_can_be_repeated():
    assert sample(1)[:20] == sample(1)[:20] != sample(2)[:20]
    assert set(sample(1)) == set(matrix())
