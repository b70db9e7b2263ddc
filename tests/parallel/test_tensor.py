"""Tensor and sequence parallelism against one process, with real ranks (see work_tensor.py)."""

from types import SimpleNamespace
from typing import Any

import pytest

from shardwright.model.gpt2 import GPT2Config
from shardwright.model.llama import LlamaConfig
from shardwright.parallel.tensor import check_tensor
from tests.parallel.work_tensor import GPT2, LLAMA

WORK = "tests.parallel.work_tensor"
# Every choice of the stack that GPT-2 and Llama do not make.
ODD = {
    **GPT2,
    "norm_placement": "post",
    "embed_norm": True,
    "positions": "sinusoidal",
    "qk_norm": True,
    "activation": "geglu_tanh",
    "mlp_width": 40,
    "head_dim": 6,
    "tied": False,
    "head_bias": True,
    "scale_embedding": True,
    "logit_softcap": 3.0,
}


def check(answers: list[dict[str, Any]], bound: float) -> None:
    """Every rank saw the same, within the bound."""
    for answer in answers:
        assert answer["loss"] <= bound and answer["free"] <= bound, answer
        assert max(answer["grads"].values()) <= bound, answer["grads"]


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize(
    "model",
    [GPT2, LLAMA, {**LLAMA, "qk_norm": True, "residual_dropout": 0.1, "embed_dropout": 0.1}, ODD],
    ids=["gpt2", "llama", "dropout", "odd"],
)
def test_two_ranks_equal_one_process(ranks, model, sequence):
    check(ranks.run(2, f"{WORK}:compare", {"model": model, "sequence": sequence}), 1e-6)


def test_without_documents_the_kernels_own_causal_rule_is_used(ranks):
    check(ranks.run(2, f"{WORK}:compare", {"model": GPT2, "packed": False}), 1e-6)


@pytest.mark.parametrize("sequence", [True, False])
@pytest.mark.parametrize("model", [GPT2, {**LLAMA, "positions": "learned", "qk_norm": True, "residual_dropout": 0.1}])
def test_two_ranks_equal_one_process_in_float64(ranks, model, sequence):
    """With a loss that keeps it; rotary angles are float32 by design and stay out."""
    check(ranks.run(2, f"{WORK}:compare", {"model": model, "sequence": sequence, "linear": True}), 1e-12)


@pytest.mark.parametrize("sequence", [True, False])
def test_four_ranks_on_a_vocabulary_of_509(ranks, sequence):
    case = {"model": {**GPT2, "residual_dropout": 0.1}, "sequence": sequence}
    check(ranks.run(4, f"{WORK}:compare", case), 1e-6)


@pytest.mark.parametrize("reduces_each", [True, False])
@pytest.mark.parametrize("model", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_data_times_tensor_with_accumulation(ranks, model, reduces_each):
    """Rows of a weight are cut twice here, by 2 tensor and by 2 data ranks, into uneven parts."""
    case = {"model": model, "data": 2, "micro": 2, "reduces_each": reduces_each}
    check(ranks.run(4, f"{WORK}:compare", case), 1e-6)


@pytest.mark.parametrize(("recompute", "compiler"), [("full", None), ("selective", None), ("selective", "aot_eager")])
def test_recomputed_activations_change_nothing(ranks, recompute, compiler):
    """Collectives of the forward pass are among what is repeated."""
    case = {"model": {**LLAMA, "residual_dropout": 0.1}, "recompute": recompute, "compile": compiler}
    check(ranks.run(2, f"{WORK}:compare", case), 1e-6)


@pytest.mark.parametrize("micro", [1, 2])
def test_bf16_is_as_near_to_float32_as_one_process_is(ranks, micro):
    """The bound: 1.5 times the error of one process in bf16. Two ranks round their summands before they add them."""
    answers = ranks.run(2, f"{WORK}:compare", {"model": LLAMA, "compute": "bfloat16", "micro": micro})
    for answer in answers:
        assert answer["loss"] < 1e-3
        assert worst(answer["grads"]) <= 1.5 * worst(answer["one"]), answer
        assert worst(answer["one"]) > 1e-3  # it was bf16


def worst(errors: dict[str, float]) -> float:
    """The largest."""
    return max(errors.values())


def test_equal_blocks_are_one_graph(ranks):
    """One with gradients and one without. torch gives up at 8 graphs of one function."""
    for graphs, answer in ranks.run(2, f"{WORK}:count_graphs", 9, True):
        assert graphs == 2
        check([answer], 5e-6)  # nine layers of rounding


@pytest.mark.in_turn
@pytest.mark.slow
def test_compiled_blocks_and_loss_equal_one_process(ranks):
    case = {"model": {**LLAMA, "residual_dropout": 0.1}, "compile": "inductor"}
    check(ranks.run(2, f"{WORK}:compare", case, timeout=280), 1e-6)


@pytest.mark.in_turn
@pytest.mark.slow
def test_compiled_blocks_in_bf16(ranks):
    """CPU kernels of bf16 training run inside; the bound is as without a compiler."""
    case = {"model": GPT2, "compile": "inductor", "compute": "bfloat16"}
    for answer in ranks.run(2, f"{WORK}:compare", case, timeout=280):
        assert answer["loss"] < 1e-3
        assert worst(answer["grads"]) <= 1.5 * worst(answer["one"]), answer


GATHER, SCATTER = "c10d._allgather_base_", "c10d._reduce_scatter_base_"
REDUCE, DTENSORS = "c10d.allreduce_", "c10d_functional.all_reduce"


def test_collectives_are_those_of_the_theory(ranks):
    """Korthikanti et al. 2022, with L blocks.

    With sequence parallelism, forward: 2 gathers and 2 reduce-scatters a block, one reduce-scatter after the embedding
    and one gather before the head; backward is the mirror. Without, each gather and reduce-scatter pair is one
    all-reduce: 2 a block forward and backward, one after the embedding, one for the gradient of hidden. The loss takes
    2 all-reduces of a number or two a row. Gradients of what is replicated are summed once where tokens are cut:
    GPT-2 has 4 norm tensors and 2 biases a block, the final norm's 2, and positions. FSDP reduces each of its groups
    over the replicate axis, of size 1 here.
    """
    layers, groups = GPT2["layers"], GPT2["layers"] + 1
    for counts in ranks.run(2, f"{WORK}:count_collectives", {"model": GPT2, "sequence": True}):
        assert counts["forward"] == {GATHER: 2 * layers + 1, SCATTER: 2 * layers + 1, REDUCE: 2}
        mirror = {GATHER: 2 * layers + 1, SCATTER: 2 * layers + 1}
        assert counts["backward"] == {**mirror, DTENSORS: 6 * layers + 3, REDUCE: groups}
    for counts in ranks.run(2, f"{WORK}:count_collectives", {"model": GPT2, "sequence": False}):
        assert counts["forward"] == {REDUCE: 2 * layers + 1 + 2}
        assert counts["backward"] == {REDUCE: 2 * layers + 1 + groups}


@pytest.mark.parametrize("sequence", [True, False])
def test_stages_of_a_pipeline_are_spread_by_themselves(ranks, sequence):
    for error, shape in ranks.run(2, f"{WORK}:compare_stages", sequence):
        assert error <= 1e-6
        assert shape == (4, 8 if sequence else 16, 32)


def test_a_model_is_spread_before_it_has_weights(ranks):
    for empty, error in ranks.run(2, f"{WORK}:compare_meta"):
        assert empty and error <= 1e-6


def test_every_row_of_the_vocabulary_has_one_holder(ranks):
    assert ranks.run(4, f"{WORK}:held_rows", 509) == [(0, 128), (128, 128), (256, 128), (384, 125)]
    assert ranks.run(4, f"{WORK}:held_rows", 10) == [(0, 3), (3, 3), (6, 3), (9, 1)]


def test_nothing_is_left_out_silently(ranks):
    for said in ranks.run(2, f"{WORK}:complaints"):
        assert said == {
            "add_parameter": "tensor plan: no rule covers blocks.1.gain; add one to PLAN",
            "rename": "tensor plan: no rule covers blocks.1.attention.query.weight, blocks.1.attention.query.bias; "
            "add one to PLAN",
            "replace": "tensor plan: blocks.1.mlp.down has no parameter 'weight' to shard (Row)",
            "widen": "tensor plan: blocks.1.mlp.up.weight [129, 32] does not divide by 2",
            "odd_heads": "tensor=2: 3 query heads do not divide by 2; nearest that fits: tensor=1",
            "spread_before": "tensor plan: embed.tokens.weight is spread already; apply the plan once, "
            "and before fully_shard",
            "length": "7 tokens do not divide by tensor=2; change their number or set sequence off",
        }


def test_a_config_that_fits_has_no_reason_against_it():
    assert check_tensor(GPT2Config(family="gpt2", vocab_size=50257), 4, 1024) == []
    assert check_tensor(LlamaConfig(family="llama", size="3-8B", vocab_size=128256), 8, 8192) == []
    assert check_tensor(LlamaConfig(family="llama", size="3-8B"), 8) == []  # vocabulary not known yet


def test_reasons_name_what_does_not_fit_and_the_nearest_degree_that_does():
    llama = LlamaConfig(family="llama", size="3-8B", vocab_size=128256)
    assert check_tensor(llama, 16) == ["tensor=16: 8 key heads are fewer than the ranks; nearest that fits: tensor=8"]
    assert check_tensor(llama, 4, 8190) == [
        "tensor=4: 8190 tokens of a sequence do not divide by 4; nearest that fits: tensor=2"
    ]
    assert check_tensor(GPT2Config(family="gpt2", size="1558M"), 4) == [
        "tensor=4: 25 query heads do not divide by 4; nearest that fits: tensor=5"
    ]
    shape = SimpleNamespace(heads=4, num_kv_heads=4, hidden_width=10, vocab_size=5)
    assert check_tensor(shape, 4) == [
        "tensor=4: 10 feed-forward channels do not divide by 4; nearest that fits: tensor=2",
        "tensor=4: a vocabulary of 5 leaves a rank without a row; nearest that fits: tensor=2",
    ]
