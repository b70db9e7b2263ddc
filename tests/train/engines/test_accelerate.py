"""Accelerate in the place of our own wrapping: the same run, in real processes, by its DDP and its FSDP2."""

import pytest

from shardwright.config import ConfigError
from shardwright.train.engines import check_engine
from shardwright.train.settings import read_config
from tests.equivalence.cells import BOUNDS, config, disagreement
from tests.equivalence.work import leg, run

pytest.importorskip("accelerate", reason="Accelerate is not installed: pip install 'shardwright[accelerate]'")

ENGINE = "engine=accelerate"
CLIP = "train.clip=0.2"
CASES = {
    "ddp": ["parallel.zero=0"],
    "fsdp_zero1": ["parallel.zero=1"],
    "fsdp_zero3": ["parallel.zero=3", "train.recompute=full"],
}


@pytest.fixture(scope="module")
def oracle(prepared, tmp_path_factory):
    """One process, natively, with a step that the ranks do not divide."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    return folder, run(config(prepared, folder), [CLIP, "batch.sequences=7"])


@pytest.mark.in_turn
@pytest.mark.parametrize("name", CASES)
def test_accelerate_changes_nothing(name, oracle, ranks, prepared, tmp_path):
    raw = config(prepared, tmp_path / "run")
    settings = [CLIP, "batch.sequences=7", ENGINE, *CASES[name]]
    records = ranks.run(2, "tests.equivalence.work:run", raw, settings)[0]
    found = disagreement(tmp_path / "run", records, *oracle)
    assert all(found[key] < bound for key, bound in BOUNDS["fp32"].items()), found


@pytest.mark.in_turn
def test_electras_generator_has_its_whole_gradient(ranks, prepared, tmp_path):
    """Its loss goes back from the activations, not from the loss that the engine multiplies."""
    settings = [CLIP, "train.steps=6"]
    expected = run(config(prepared, tmp_path / "alone", "electra"), settings)
    raw = config(prepared, tmp_path / "run", "electra")
    records = ranks.run(2, "tests.equivalence.work:run", raw, [*settings, ENGINE, "parallel.zero=0"])[0]
    found = disagreement(tmp_path / "run", records, tmp_path / "alone", expected)
    assert all(found[key] < bound for key, bound in BOUNDS["fp32"].items()), found


@pytest.mark.in_turn
@pytest.mark.parametrize("zero", [0, 2])
def test_muon_has_the_format_of_products_that_is_asked_for(zero, ranks, prepared, tmp_path):
    settings = [CLIP, "optimizer.name=muon", "optimizer.matmul=fp32"]
    expected = run(config(prepared, tmp_path / "alone"), settings)
    raw = config(prepared, tmp_path / "run")
    records = ranks.run(2, "tests.equivalence.work:run", raw, [*settings, ENGINE, f"parallel.zero={zero}"])[0]
    found = disagreement(tmp_path / "run", records, tmp_path / "alone", expected)
    assert all(found[key] < bound for key, bound in BOUNDS["fp32"].items()), found


@pytest.mark.in_turn
def test_bf16_casts_where_one_process_does(ranks, prepared, tmp_path):
    settings = [CLIP, "precision.compute=bf16", "model.qkv_bias=false"]
    expected = run(config(prepared, tmp_path / "alone"), settings)
    raw = config(prepared, tmp_path / "run")
    records = ranks.run(2, "tests.equivalence.work:run", raw, [*settings, ENGINE, "parallel.zero=2"])[0]
    found = disagreement(tmp_path / "run", records, tmp_path / "alone", expected)
    assert all(found[key] < bound for key, bound in BOUNDS["bf16"].items()), found


@pytest.mark.in_turn
def test_checkpoints_go_from_native_to_accelerate_and_back(ranks, prepared, tmp_path):
    steps = [CLIP, "checkpoint.every=4", "train.steps=16"]
    raw = config(prepared, tmp_path / "chain")
    expected = run(config(prepared, tmp_path / "oracle"), steps)
    leg(raw, steps, 4)
    ranks.run(2, "tests.equivalence.work:leg", raw, [*steps, ENGINE, "parallel.zero=3"], 8)
    ranks.run(2, "tests.equivalence.work:leg", raw, [*steps, ENGINE, "parallel.zero=0"], 12)
    records = ranks.run(1, "tests.equivalence.work:run", raw, [*steps, ENGINE])[0]
    found = disagreement(tmp_path / "chain", records, tmp_path / "oracle", expected)
    assert all(found[key] < bound for key, bound in BOUNDS["fp32"].items()), found


@pytest.mark.in_turn
def test_verify_looks_into_accelerate(ranks, prepared, tmp_path):
    for zero in (0, 3):
        raw = config(prepared, tmp_path / f"run{zero}")
        answers = ranks.run(2, "tests.train.engines.work:verified", raw, [ENGINE, f"parallel.zero={zero}"])
        assert all(passed for passed, _ in answers), answers


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "contradicts precision.compute=fp32"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "engine=deepspeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "engine=native"),
        ({"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "batch.micro"),
        ({"ACCELERATE_USE_FSDP": "true"}, "--fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "ZERO": "0"}, "parallel.zero=0"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "train.compile"),
    ],
)
def test_an_environment_that_contradicts_is_refused(variables, said, prepared, monkeypatch):
    zero = variables.pop("ZERO", "1") if "ZERO" in variables else "1"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    raw = read_config(config(prepared, "runs/none"), [ENGINE, f"parallel.zero={zero}"])
    with pytest.raises(ConfigError) as error:
        check_engine(raw)
    assert said in str(error.value) and "\n" not in str(error.value)
