"""What each rank does in test_tensor.py: one model whole and one spread over the tensor axis, compared.

Cases are plain dicts, since they travel to the ranks; `case` fills in what is left out.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from shardwright.model.families import FAMILIES, build_model
from shardwright.model.init import apply_init, initial_value
from shardwright.model.transformer import Inputs, LanguageModel, TransformerConfig
from shardwright.objective.cross_entropy import KERNEL, Head, linear_cross_entropy
from shardwright.objective.heads import Heads
from shardwright.parallel.recompute import apply_recompute
from shardwright.parallel.tensor import apply_tensor, localize_heads

GPT2 = {"family": "gpt2", "vocab_size": 509, "layers": 2, "width": 32, "heads": 4, "max_length": 16}
LLAMA = {**GPT2, "family": "llama", "kv_heads": 2, "mlp_width": 48}
BATCH, LENGTH, SEED = 4, 16, 7


def build_config(**fields: Any) -> TransformerConfig:
    """A family's config by its name."""
    return FAMILIES[fields["family"]].config(**fields)


def build(config: TransformerConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """A model whose norms and biases are not at their trivial first values."""
    model = build_model(config)
    apply_init(model, config, SEED)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).train()


def batch(vocab_size: int, *, packed: bool) -> dict[str, Tensor]:
    """BATCH sequences with labels and weights, of three documents each where packed."""
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(vocab_size, (BATCH, LENGTH + 1), generator=generator)
    ids[0, 0], ids[1, 3] = vocab_size - 1, 0  # the ends of the vocabulary
    rows = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "weights": torch.rand(BATCH, LENGTH, generator=generator)}
    rows["weights"][:, ::5] = 0
    rows["sequence"] = torch.arange(BATCH) + 1000
    if packed:
        index = torch.arange(LENGTH).expand(BATCH, LENGTH)
        rows |= {"documents": index // 6, "position_ids": index % 6}
    return rows


class Loss(nn.Module):
    """A model with its loss, the weighted mean over `count`; spread where it is given a mesh."""

    def __init__(self, model: LanguageModel, count: Tensor, mesh: DeviceMesh | None = None, **options: bool) -> None:
        super().__init__()
        self.model, self.count, self.mesh = model, count, mesh
        self.sequence, self.linear = options.get("sequence", False), options.get("linear", False)
        self.kernel = KERNEL.compiled() if options.get("compile") else KERNEL

    def forward(self, rows: dict[str, Tensor]) -> Tensor:
        names = ("input_ids", "position_ids", "documents", "sequence")
        hidden = self.model.hidden(Inputs(**{name: rows.get(name) for name in names}, step=3, seed=11))
        head = Head(self.model.head_weight, self.model.head_bias, self.model.config.logit_softcap)
        heads = Heads(head, self.model.transform)
        if self.mesh is not None:
            hidden, heads = localize_heads(hidden, heads, self.mesh, self.sequence)
        head, transform = heads.vocabulary, heads.transform
        hidden = hidden if transform is None else transform(hidden)
        if self.linear:
            return linear_in_logits(hidden, head) / self.count
        scale = 1 / self.count
        return linear_cross_entropy(hidden, head, rows["labels"], rows["weights"], scale, self.kernel) * scale


def linear_in_logits(hidden: Tensor, head: Head) -> Tensor:
    """A loss that keeps float64: every rank gives the summand of its own rows of the vocabulary."""
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    start = 0 if head.vocabulary is None else head.vocabulary.start
    factors = torch.cos(torch.arange(start, start + logits.shape[-1], dtype=logits.dtype))
    return (logits * factors).sum()


def wrap(loss: Loss, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """FSDP over each block, then over the rest; sums, not means."""
    for block in loss.model.blocks.values():
        fully_shard(block, mesh=mesh["replicate", "shard"], mp_policy=policy)
    fully_shard(loss, mesh=mesh["replicate", "shard"], mp_policy=policy)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def spread(model: LanguageModel, mesh: DeviceMesh, count: Tensor, case: dict[str, Any]) -> Loss:
    """The model under the layout and the wrappers of a case."""
    sequence = case.get("sequence", True)
    apply_tensor(model, mesh["tensor"], sequence=sequence)
    blocks = list(model.blocks.values())
    recompute, compiler = case.get("recompute", "none"), case.get("compile")
    apply_recompute(blocks, recompute, compiled=False)
    if compiler:
        for block in blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, backend=compiler)
    apply_recompute(blocks, recompute, compiled=True)
    options = {"sequence": sequence, "linear": case.get("linear", False), "compile": compiler == "inductor"}
    loss = Loss(model, count, mesh["tensor"], **options)
    low = getattr(torch, case.get("compute", "float32"))
    policy = MixedPrecisionPolicy(
        param_dtype=None if low == torch.float32 else low,
        reduce_dtype=None if case.get("linear") else torch.float32,
        cast_forward_inputs=False,
    )
    wrap(loss, mesh, policy)
    return loss


def build_mesh(data: int) -> DeviceMesh:
    """(1, data, rest) ranks."""
    dist.init_process_group("gloo")
    shape = (1, data, dist.get_world_size() // data)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard", "tensor"))


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Relative errors against one process: of the loss, of the loss without gradients, and of each gradient.

    An error is relative to the tensor's own gradient, or to 1e-3 of the norm of all where that is larger (a key's bias
    has none but rounding). `one` are the same errors of one process in the compute format.
    """
    torch._dynamo.reset()
    mesh = build_mesh(case.get("data", 1))
    config = build_config(**case["model"])
    rows = batch(config.vocab_size, packed=case.get("packed", True))
    count = rows["weights"].sum()
    dtype = torch.float64 if case.get("linear") else torch.float32
    whole = Loss(build(config, dtype), count, linear=case.get("linear", False))
    expected = whole(rows)
    expected.backward()

    loss = spread(build(config, dtype), mesh, count, case)
    got = run(loss, rows, mesh, case)
    found = gradients(loss.model)
    with torch.no_grad():
        free = total(loss.eval()(own(rows, mesh)[0]), mesh, case) if case.get("data", 1) == 1 else None
        exact = whole.eval()(rows)
    answer = {
        "loss": error(got, expected),
        "free": 0.0 if free is None else error(free, exact),
        "grads": errors(found, gradients(whole.model)),
    }
    if "compute" in case:
        low = Loss(build(config).to(getattr(torch, case["compute"])), count)
        low(rows).backward()
        answer["one"] = errors(gradients(low.model), gradients(whole.model))
    return answer


def own(rows: dict[str, Tensor], mesh: DeviceMesh, micro: int = 1) -> list[dict[str, Tensor]]:
    """This data rank's sequences, in micro-batches."""
    data, index = mesh["shard"].size(), mesh["shard"].get_local_rank()
    cut = [{name: x.chunk(data * micro)[n * data + index] for name, x in rows.items()} for n in range(micro)]
    return cut


def run(loss: Loss, rows: dict[str, Tensor], mesh: DeviceMesh, case: dict[str, Any]) -> Tensor:
    """Forward and backward of all micro-batches; the loss of the whole batch."""
    micro = case.get("micro", 1)
    losses = []
    for n, part in enumerate(own(rows, mesh, micro), 1):
        assert isinstance(loss, FSDPModule)
        loss.set_requires_gradient_sync(n == micro or case.get("reduces_each", False))
        losses.append(loss(part))
        losses[-1].backward()
    return total(torch.stack(losses).sum().detach(), mesh, case)


def total(value: Tensor, mesh: DeviceMesh, case: dict[str, Any]) -> Tensor:
    """The sum over data ranks, and over tensor ranks where each has a summand."""
    value = value.detach().clone()
    dist.all_reduce(value, group=mesh.get_group("shard"))
    if case.get("linear"):
        dist.all_reduce(value, group=mesh.get_group("tensor"))
    return value


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name."""
    found = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        assert gradient is not None, name
        if isinstance(gradient, DTensor):
            assert gradient.placements == parameter.placements, name
            gradient = gradient.full_tensor()
        found[name] = gradient
    return found


def errors(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """By name."""
    assert got.keys() == expected.keys()
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm().item()
    return {
        name: ((got[name] - g).double().norm() / max(g.double().norm().item(), 1e-3 * norm)).item()
        for name, g in expected.items()
    }


def error(got: Tensor, expected: Tensor) -> float:
    """Relative."""
    return ((got - expected).abs() / expected.abs()).item()


def count_collectives(case: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Collectives by name, of a forward and of a backward pass; those of FSDP are on axes of size 1."""
    mesh = build_mesh(1)
    config = build_config(**case["model"])
    rows = batch(config.vocab_size, packed=True)
    loss = spread(build(config), mesh, rows["weights"].sum(), case)
    loss(rows).backward()  # FSDP sets itself up
    with CommDebugMode() as forward:
        value = loss(rows)
    with CommDebugMode() as backward:
        value.backward()
    return {
        phase: {str(op): n for op, n in mode.get_comm_counts().items() if n}
        for phase, mode in (("forward", forward), ("backward", backward))
    }


def count_graphs(layers: int, sequence: bool) -> tuple[int, dict[str, float]]:
    """How often a model of many equal blocks is compiled, and its errors."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    model = {**LLAMA, "layers": layers, "qk_norm": True, "residual_dropout": 0.1}
    answer = compare({"model": model, "sequence": sequence, "compile": counter})
    return counter.frame_count, answer


def compare_stages(sequence: bool) -> tuple[float, tuple[int, ...]]:
    """Error of the logits' loss of two stages, each spread by itself, and the shape of what travels between them."""
    mesh = build_mesh(1)["tensor"]
    config = build_config(**{**LLAMA, "layers": 3, "residual_dropout": 0.1})
    model = build(config)
    rows = batch(config.vocab_size, packed=True)
    expected = Loss(model, rows["weights"].sum())(rows)
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    first.final_norm = first.head = last.embed = None
    del first.blocks["2"], last.blocks["0"], last.blocks["1"]
    for stage in (first, last):
        apply_tensor(stage, mesh, sequence=sequence)
    inputs = Inputs(**{n: rows[n] for n in ("input_ids", "position_ids", "documents", "sequence")}, step=3, seed=11)
    between = first.hidden(inputs)
    hidden, heads = localize_heads(last.hidden(inputs, between), Heads(Head(last.head_weight)), mesh, sequence)
    loss = linear_cross_entropy(hidden, heads.vocabulary, rows["labels"], rows["weights"]) / rows["weights"].sum()
    return error(loss, expected), tuple(between.shape)


def compare_meta() -> tuple[bool, float]:
    """A model spread on the meta device and filled afterwards: nothing was there before, and the error of its loss."""
    mesh = build_mesh(1)
    config = build_config(**GPT2)
    with torch.device("meta"):
        model = build_model(config)
    rows = batch(config.vocab_size, packed=True)
    count = rows["weights"].sum()
    loss = spread(model, mesh, count, {})
    empty = all(parameter.to_local().is_meta for parameter in model.parameters())
    loss.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = initial_value(config, name, parameter.shape, SEED)
            local = distribute_tensor(value, mesh["tensor"], parameter.placements[-1:], src_data_rank=None).to_local()
            parameter.to_local().copy_(local)
    whole = build_model(config)
    apply_init(whole, config, SEED)
    return empty, error(loss(rows), Loss(whole, count)(rows))


def held_rows(vocab_size: int) -> tuple[int, int]:
    """(first row, rows) of the vocabulary that this rank holds."""
    mesh = build_mesh(1)["tensor"]
    model = build(build_config(**{**GPT2, "vocab_size": vocab_size}))
    apply_tensor(model, mesh, sequence=True)
    _, heads = localize_heads(torch.zeros(1, 4, 32), Heads(Head(model.head_weight)), mesh, True)
    head = heads.vocabulary
    assert head.vocabulary is not None
    return head.vocabulary.start, head.weight.shape[0]


def complaints() -> dict[str, str]:
    """What is said of models that the plan does not fit, by what is wrong; each is left as it was."""
    mesh = build_mesh(1)["tensor"]
    said = {}
    for fault in (add_parameter, rename, replace, widen, odd_heads, spread_before):
        model = build(build_config(**GPT2))
        fault(model, mesh)
        before = {name: type(parameter) for name, parameter in model.named_parameters()}
        classes = [type(module) for module in model.modules()]
        try:
            apply_tensor(model, mesh, sequence=True)
        except ValueError as problem:
            said[fault.__name__] = str(problem)
        assert before == {name: type(parameter) for name, parameter in model.named_parameters()}
        assert classes == [type(module) for module in model.modules()]
    model = build(build_config(**GPT2))
    apply_tensor(model, mesh, sequence=True)
    try:
        model.hidden(Inputs(torch.zeros(1, 7, dtype=torch.int64)))
    except ValueError as problem:
        said["length"] = str(problem)
    return said


def add_parameter(model: LanguageModel, mesh: DeviceMesh) -> None:
    """A parameter that no rule knows."""
    model.blocks["1"].register_parameter("gain", nn.Parameter(torch.ones(3)))


def rename(model: LanguageModel, mesh: DeviceMesh) -> None:
    """A module that the plan lists has another name."""
    attention = model.blocks["1"].attention
    attention.query = attention.q
    del attention.q


def replace(model: LanguageModel, mesh: DeviceMesh) -> None:
    """A module that the plan lists has no weight."""
    model.blocks["1"].mlp.down = nn.Identity()


def widen(model: LanguageModel, mesh: DeviceMesh) -> None:
    """A weight cannot be cut into equal parts."""
    model.blocks["1"].mlp.up = nn.Linear(32, 129)


def odd_heads(model: LanguageModel, mesh: DeviceMesh) -> None:
    """Heads cannot be dealt to the ranks."""
    model.config = model.config.model_copy(update={"heads": 3})


def spread_before(model: LanguageModel, mesh: DeviceMesh) -> None:
    """The plan was applied already."""
    apply_tensor(model, mesh, sequence=True)
