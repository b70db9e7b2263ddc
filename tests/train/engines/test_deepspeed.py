"""DeepSpeed in the place of our own sharding: the same run, in real processes over gloo, at every ZeRO stage."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from shardwright.config import ConfigError
from shardwright.parallel.refusals import refusals
from shardwright.train.layout import build_facts
from shardwright.train.settings import read_config
from tests.equivalence.cells import BOUNDS, config, disagreement
from tests.equivalence.work import leg, run
from tests.ranks import VARIABLES

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'shardwright[deepspeed]'")

ROOT = Path(__file__).parents[3]
ENGINE = "engine=deepspeed"
CLIP = "train.clip=0.2"  # acts in every step
BF16 = [CLIP, "precision.compute=bf16", "model.qkv_bias=false"]
CASES = {
    "zero0": ["parallel.zero=0"],
    "zero1": ["parallel.zero=1"],
    "zero2": ["parallel.zero=2", "train.recompute=full"],
    "zero3": ["parallel.zero=3"],
    "zero3_selective": ["parallel.zero=3", "train.recompute=selective"],
    "zero1_offload": ["parallel.zero=1", "parallel.offload=true"],
    "zero3_offload": ["parallel.zero=3", "parallel.offload=true", "deepspeed.offload_parameters=cpu"],
}


@pytest.fixture(scope="module")
def oracle(prepared, tmp_path_factory):
    """One process, natively; its last step is one sequence short, so that a rank has a padded micro-batch."""
    folder = tmp_path_factory.mktemp("oracle") / "run"
    return folder, run(config(prepared, folder), [CLIP, "batch.sequences=7"])


@pytest.mark.in_turn
@pytest.mark.parametrize("name", CASES)
def test_deepspeed_changes_nothing(name, oracle, ranks, prepared, tmp_path):
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
    records = ranks.run(2, "tests.equivalence.work:run", raw, [*settings, ENGINE, "parallel.zero=1"])[0]
    found = disagreement(tmp_path / "run", records, tmp_path / "alone", expected)
    assert all(found[key] < bound for key, bound in BOUNDS["fp32"].items()), found


@pytest.mark.in_turn
def test_what_deepspeed_puts_in_torchs_place_goes_with_its_passes(ranks, prepared, tmp_path):
    """On as many ranks as the tests here: DeepSpeed counts modules over runs, and wants the same count on all."""
    settings = [ENGINE, "parallel.zero=3", "train.steps=6"]
    found = ranks.run(2, "tests.train.engines.work:left_behind", config(prepared, tmp_path / "run"), settings)
    assert found == [(3, 0)] * 2


@pytest.fixture(scope="module")
def rounded(prepared, tmp_path_factory):
    """One process in bf16."""
    folder = tmp_path_factory.mktemp("rounded") / "run"
    return folder, run(config(prepared, folder), BF16)


@pytest.mark.in_turn
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_has_float32_masters_and_stays_within_its_bound(zero, rounded, ranks, prepared, tmp_path):
    raw = config(prepared, tmp_path / "run")
    records = ranks.run(2, "tests.equivalence.work:run", raw, [*BF16, ENGINE, f"parallel.zero={zero}"])[0]
    found = disagreement(tmp_path / "run", records, *rounded)
    assert all(found[key] < bound for key, bound in BOUNDS["bf16"].items()), found


@pytest.mark.in_turn
@pytest.mark.parametrize("zero", [1, 3])
def test_the_norm_is_deepspeeds(zero, ranks, prepared, tmp_path):
    settings = [CLIP, ENGINE, f"parallel.zero={zero}", "train.steps=6"]
    for pairs in ranks.run(2, "tests.train.engines.work:norms", config(prepared, tmp_path / "run"), settings):
        assert all(ours == pytest.approx(theirs, rel=1e-5) for ours, theirs in pairs), pairs


@pytest.mark.in_turn
@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_by_all(zero, ranks, prepared, tmp_path):
    steps = [CLIP, "train.steps=6"]
    settings = [*steps, ENGINE, f"parallel.zero={zero}"]
    raw, alone = config(prepared, tmp_path / "run"), config(prepared, tmp_path / "alone")
    found = ranks.run(2, "tests.train.engines.work:spoiled", raw, settings, 3, 1)[0]
    expected = ranks.run(1, "tests.train.engines.work:spoiled", alone, steps, 3, 0)[0]
    assert [r["loss"] for r in found if "loss" in r] == pytest.approx([r["loss"] for r in expected if "loss" in r])
    assert [r["grad_norm"] for r in found if "loss" in r][2] is None


@pytest.mark.in_turn
@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_roll_back_forgets_the_gradients_that_are_there(zero, ranks, prepared, tmp_path):
    """The step after a bad one is under way when the bad one is judged."""
    steps = [CLIP, "train.steps=8", "guard.nonfinite=rollback", "checkpoint.every=3"]
    settings = [*steps, ENGINE, f"parallel.zero={zero}"]
    raw, alone = config(prepared, tmp_path / "run"), config(prepared, tmp_path / "alone")
    found = ranks.run(2, "tests.train.engines.work:spoiled", raw, settings, 5, 1)[0]
    expected = ranks.run(1, "tests.train.engines.work:spoiled", alone, steps, 5, 0)[0]
    assert [r["loss"] for r in found if "loss" in r] == pytest.approx([r["loss"] for r in expected if "loss" in r])
    assert len(found) == len(expected) >= 8


@pytest.mark.in_turn
def test_tensors_that_the_ranks_do_not_divide(ranks, prepared, tmp_path):
    """DeepSpeed pads the last rank's part at ZeRO 3: masters are set at the start in bf16, and all when resuming."""
    settings = [*BF16, "model.mlp_width=97", "train.steps=8", "checkpoint.every=4"]
    expected = run(config(prepared, tmp_path / "alone"), settings)
    raw = config(prepared, tmp_path / "run")
    sharded = [*settings, ENGINE, "parallel.zero=3"]
    ranks.run(2, "tests.equivalence.work:leg", raw, sharded, 4)
    records = ranks.run(2, "tests.equivalence.work:run", raw, sharded)[0]
    found = disagreement(tmp_path / "run", records, tmp_path / "alone", expected)
    assert all(found[key] < bound for key, bound in BOUNDS["bf16"].items()), found


@pytest.mark.in_turn
def test_checkpoints_go_from_native_to_deepspeed_and_back(ranks, prepared, tmp_path):
    steps = [CLIP, "checkpoint.every=4", "train.steps=16"]
    raw = config(prepared, tmp_path / "chain")
    expected = run(config(prepared, tmp_path / "oracle"), steps)
    leg(raw, steps, 4)
    ranks.run(2, "tests.equivalence.work:leg", raw, [*steps, ENGINE, "parallel.zero=3"], 8)
    ranks.run(2, "tests.equivalence.work:leg", raw, [*steps, "parallel.zero=2"], 12)
    records = ranks.run(1, "tests.equivalence.work:run", raw, [*steps, ENGINE, "parallel.zero=1"])[0]
    found = disagreement(tmp_path / "chain", records, tmp_path / "oracle", expected)
    assert all(found[key] < bound for key, bound in BOUNDS["fp32"].items()), found


@pytest.mark.in_turn
def test_verify_looks_into_deepspeed(ranks, prepared, tmp_path):
    settings = [ENGINE, "parallel.zero=3"]
    answers = ranks.run(2, "tests.train.engines.work:verified", config(prepared, tmp_path / "run"), settings)
    assert all(passed for passed, _ in answers), answers


def test_one_process_without_a_launcher_at_zero_3(prepared, tmp_path):
    """And nothing of DeepSpeed's goes to stdout, where answers go."""
    raw = config(prepared, tmp_path / "run") | {"engine": "deepspeed", "parallel": {"zero": 3}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(raw))
    command = [sys.executable, "-m", "shardwright", "train", str(file), "optimizer.name=sgd", "train.steps=6"]
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert found.returncode == 0, found.stderr
    assert "DeepSpeed" not in found.stdout and "untested" not in found.stdout, found.stdout


# ------------------------------------------------------------------------------------------ what is refused


def settled(prepared: Path, *overrides: str):
    return read_config(config(prepared, "runs/none"), [ENGINE, "train.device=cpu", *overrides])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["deepspeed.extra={gradient_clipp1ng: 1.0}"], "gradient_clipping is decided by train.clip"),
        (["deepspeed.extra={gradient_clipping: 1.0}"], "decided by train.clip"),
        (["deepspeed.extra={zero_optimization: {stage: 2}}"], "decided by parallel.zero"),
        (["deepspeed.extra={zero_optimization: {sub_group_sise: 5}}"], "did you mean sub_group_size"),
        (["deepspeed.extra={zero_optimization: {sub_group_size: many}}"], "sub_group_size"),
        (["deepspeed.extra={flops_profiler: {profile_stp: 5}}"], "did you mean profile_step"),
        (["deepspeed.extra={wall_clock_breakdown: 3}"], "expected bool"),
        (["deepspeed.extra={bf16: {immediate_grad_update: true}}"], "precision.compute"),
        (["deepspeed.extra={zero_optimization: 3}"], "is a section"),
        (["deepspeed.extra={zero_optimization: {offload_optimizer: null}}", "parallel.offload=true"], "is a section"),
        (["deepspeed.extra={zero_optimization: {cpu_offload: true}}"], "decided by deepspeed.offload_optimizer"),
        (["deepspeed.extra={zero_optimization: {round_robin_gradients: true}}"], "by which checkpoints find them"),
        (["deepspeed.extra={zero_optimization: {stage3_max_live_parameter: 5}}"], "mean stage3_max_live_parameters"),
        (["deepspeed.extra={aio: {block_size: big}}"], "block_size='big': expected int"),
        (["deepspeed.extra={flops_profiler: {recompute_fwd_factor: much}}"], "expected float"),
        (["deepspeed.extra={communication_data_type: fp99}"], "expected one of fp32, fp16, bf16"),
        (["deepspeed.extra={gradient_predivide_factor: 0}"], "expected more than 0"),
        (["deepspeed.offload_optimizer=nvme"], "deepspeed.nvme_path: is missing"),
        (["deepspeed.nvme_path=/tmp"], "nothing goes there"),
        (["deepspeed.extra={zero_optimization: {memory_efficient_linear: true}}"], "decided by train.recompute"),
        (["deepspeed.offload_optimizer=nvme", "parallel.offload=true"], "contradicts parallel.offload"),
        (["precision.compute=fp16"], "no fp16 on a CPU"),
    ],
)
def test_what_contradicts_is_refused_in_one_line(overrides, said, prepared, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from shardwright.train.engines import check_engine

    with pytest.raises(ConfigError) as error:
        check_engine(settled(prepared, *overrides))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_nvme_without_its_operator_is_refused(prepared, monkeypatch):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from shardwright.train.engines import check_engine

    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda _self: False)
    nvme = ["parallel.zero=3", "deepspeed.offload_optimizer=nvme", "deepspeed.nvme_path=/tmp"]
    with pytest.raises(ConfigError, match=r"apt-get install g\+\+ libaio-dev"):
        check_engine(settled(prepared, *nvme))


@pytest.mark.in_turn
def test_what_deepspeed_itself_refuses_is_one_line(prepared, tmp_path):
    settings = [ENGINE, "parallel.zero=2", "deepspeed.extra={gradient_predivide_factor: 2.0}", "train.device=cpu"]
    with pytest.raises(ConfigError, match="DeepSpeed refuses these settings: gradient_predivide_factor != 1.0"):
        run(config(prepared, tmp_path / "run"), settings)


def test_what_deepspeed_knows_is_passed_on(prepared, monkeypatch):
    """The example of docs/deepspeed.md; the second key is the alias that DeepSpeed's own pages use."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from shardwright.train.engines.deepspeed_config import engine_config

    page = (ROOT / "docs/deepspeed.md").read_text("utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    raw = config(prepared, "runs/none") | yaml.safe_load(example)
    found = engine_config(read_config(raw, ["train.device=cpu"]), 2, gpu=False)
    zero = found["zero_optimization"]
    assert (zero["sub_group_size"], zero["stage3_param_persistence_threshold"], zero["stage"]) == (10**8, 10**4, 3)
    assert found["communication_data_type"] == "bf16" and found["gradient_accumulation_steps"] == 4


def test_settings_of_another_engine_are_refused(prepared):
    from shardwright.train.engines import check_engine

    with pytest.raises(ConfigError, match=r"deepspeed\.overlap: has no effect under engine=native"):
        check_engine(read_config(config(prepared, "runs/none"), ["deepspeed.overlap=true"]))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor=2"], "carries data parallelism and ZeRO alone"),
        (["parallel.zero=0", "precision.compute=bf16"], "parallel.zero=0"),
        (["optimizer.name=muon"], "optimizer.name=muon"),
        (["parallel.shard=2"], "shards over all data ranks"),
        (["parallel.zero=3", "train.compile=true"], "train.compile"),
        (["parallel.zero=1", "deepspeed.offload_parameters=cpu"], "offload_parameters=cpu"),
        (["parallel.zero=0", "parallel.offload=true"], "offload_optimizer=cpu"),
        (["precision.compute=fp64"], "float64"),
    ],
)
def test_layouts_that_it_does_not_carry_are_in_the_table(overrides, said, prepared):
    found = refusals(build_facts(settled(prepared, *overrides), 4))
    assert any(said in reason for reason in found), found
