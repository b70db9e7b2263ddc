"""What the ranks of test_pipeline.py do: a few steps of a tiny GPT in a pipeline, and the same in one process."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from shardwright.model.transformer import Inputs, LanguageModel, TransformerConfig
from shardwright.objective.causal import Causal, CausalConfig
from shardwright.objective.cross_entropy import Head
from shardwright.objective.heads import Heads
from shardwright.objective.setting import Setting
from shardwright.parallel import pipeline as pipelines
from shardwright.parallel.mesh import AXES
from shardwright.parallel.pipeline import Pipeline, build_tied_group, check_tied, copy_tied, sum_tied
from shardwright.parallel.recompute import apply_recompute
from shardwright.parallel.stages import SCHEDULES, keep_layers, split_layers, stage_indices
from shardwright.parallel.zero import apply_zero

ROWS, LENGTH, VOCABULARY, WIDTH = 2, 8, 61, 16
LEARNING_RATE = 0.1
EVALUATED = 3


@dataclass(frozen=True)
class Case:
    """One layout and one model."""

    schedule: str
    size: int
    virtual: int = 1
    layers: int = 5
    tied: bool = True
    data: int = 1
    zero: int | None = 1  # None: modules are not wrapped
    recompute: str = "none"
    dropout: float = 0.0
    counts: tuple[int, ...] = (4, 8, 4)  # micro-batches of a data rank in each step
    compute: str = "float32"


class Stage(nn.Module):
    """A stage of a model with its objective, as train/stages.py has it."""

    def __init__(self, model: LanguageModel, *, last: bool = True) -> None:
        super().__init__()
        self.model, self.last, self.objective = model, last, Causal(CausalConfig(), Setting(LENGTH))
        self.scale: Tensor | None = None
        self.calls = 0

    def forward(self, x: Tensor, **batch: Tensor) -> Tensor:
        """Token ids [B, T] or activations [B, T, D] -> activations, or float32 [1] in the last stage."""
        self.calls += 1
        keys = ("input_ids", "position_ids", "documents", "sequence")
        inputs = Inputs(**{key: batch[key] for key in keys}, step=3, seed=11)
        hidden = self.model.hidden(inputs, x if x.is_floating_point() else None)
        if not self.last:
            return hidden
        heads = Heads(Head(self.model.head_weight, self.model.head_bias))
        scales = None if self.scale is None else {"lm": self.scale}
        total = self.objective.loss(hidden, heads, batch, scales)["lm"]
        return torch.stack([total if self.scale is None else total * self.scale])


def build_model(case: Case) -> LanguageModel:
    """The same weights on every rank."""
    torch.manual_seed(0)
    config = TransformerConfig(
        family="gpt2",
        layers=case.layers,
        width=WIDTH,
        heads=2,
        max_length=LENGTH,
        vocab_size=VOCABULARY,
        tied=case.tied,
        residual_dropout=case.dropout,
    )
    model = LanguageModel(config)
    if case.tied:
        nn.init.normal_(model.embed.tokens.weight, std=0.1)
    return model


def build_batches(count: int, step: int) -> list[dict[str, Tensor]]:
    """`count` micro-batches of packed documents with weights."""
    random = torch.Generator().manual_seed(100 + step)
    batches = []
    for number in range(count):
        ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=random)
        cut = torch.randint(1, LENGTH, (ROWS, 1), generator=random)
        index = torch.arange(LENGTH).expand(ROWS, LENGTH)
        documents = (index >= cut).long()
        batches.append(
            {
                "input_ids": ids[:, :-1].contiguous(),
                "labels": ids[:, 1:].contiguous(),
                "weights": torch.rand(ROWS, LENGTH, generator=random).round(decimals=1),
                "position_ids": index - documents * cut,
                "documents": documents,
                "sequence": torch.arange(ROWS) + ROWS * number,
            }
        )
    return batches


def scale_of(batches: list[dict[str, Tensor]]) -> Tensor:
    """What the loss sum is multiplied by: one over the weights of a whole step."""
    return 1 / torch.stack([batch["weights"].sum() for batch in batches]).sum()


def one_process(case: Case) -> dict[str, Any]:
    """The course in one process: losses, gradients, weights, evaluations."""
    stage = Stage(build_model(case))
    model = stage.model
    losses, gradients, evaluations = [], [], []
    for step, count in enumerate(case.counts):
        batches = build_batches(count * case.data, step)
        stage.scale = scale_of(batches)
        model.zero_grad()
        total = torch.zeros(())
        for batch in batches:
            loss = stage(batch["input_ids"], **batch).sum()
            loss.backward()
            total += loss.detach()
        losses.append(float(total))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= LEARNING_RATE * parameter.grad
        stage.scale = None
        stage.eval()
        with torch.no_grad():
            sums = [stage(batch["input_ids"], **batch) for batch in build_batches(EVALUATED, 50 + step)]
        stage.train()
        evaluations.append(float(torch.stack(sums).sum()))
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "evaluations": evaluations, "weights": weights}


def build_mesh(case: Case) -> DeviceMesh:
    """All axes, the data ranks on the shard axis (on replicate for ZeRO 0)."""
    shard = case.data if case.zero else 1
    shape = (case.size, case.data // shard, shard, 1, 1)
    return init_device_mesh("cpu", shape, mesh_dim_names=AXES)


def build_stage(case: Case, index: int, mesh: DeviceMesh) -> Stage:
    """The stage `index`, wrapped."""
    model = build_model(case)
    num_stages = case.size * case.virtual
    names = [name for name, _ in model.layers()]
    parts = split_layers([1.0] * len(names), num_stages)
    keep_layers(model, {names[n] for n in parts[index]}, shared="embed.tokens" if case.tied else None)
    stage = Stage(model, last=index == num_stages - 1)
    blocks = list(model.blocks.values())
    apply_recompute(blocks, case.recompute, compiled=case.recompute != "selective")
    if case.zero is not None:
        compute = getattr(torch, case.compute)
        apply_zero(stage, blocks, mesh["replicate", "shard"], stage=case.zero, compute=compute)
    return stage


def build_stages(case: Case, mesh: DeviceMesh) -> dict[int, Stage]:
    """The stages of this rank."""
    indices = stage_indices(case.schedule, mesh.get_local_rank("pipeline"), case.size, case.virtual)
    return {index: build_stage(case, index, mesh) for index in indices}


def build_pipeline(case: Case, stages: dict[int, Stage], mesh: DeviceMesh) -> Pipeline:
    """What runs them."""
    return Pipeline(
        stages,
        schedule=case.schedule,
        group=mesh.get_group("pipeline"),
        device=torch.device("cpu"),
        dtype=getattr(torch, case.compute),
        activation=lambda ids: (*ids, WIDTH),
    )


def local(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of it, as its own memory."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def course(case: Case) -> dict[str, Any]:
    """The course of `one_process` in a pipeline; what this rank has of it, by name."""
    dist.init_process_group("gloo")
    mesh = build_mesh(case)
    place = mesh.get_local_rank("shard" if case.zero else "replicate")
    stages = build_stages(case, mesh)
    pipeline = build_pipeline(case, stages, mesh)
    tied = tied_parameters(case, stages)
    group = build_tied_group(mesh, case.schedule) if case.tied else None
    answer: dict[str, Any] = {"losses": [], "gradients": [], "evaluations": [], "differences": []}
    for step, count in enumerate(case.counts):
        batches = build_batches(count * case.data, step)
        for stage in stages.values():
            stage.zero_grad()
            stage.scale = scale_of(batches)
        answer["losses"].append(float(pipeline.run(batches[place :: case.data])))
        parameters = [(n, p) for stage in stages.values() for n, p in stage.model.named_parameters()]
        for _, parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        sum_tied([local(p.grad) for p in tied], group)
        answer["gradients"].append([(n, whole(p.grad)) for n, p in parameters])
        with torch.no_grad():
            for _, parameter in parameters:
                local(parameter).sub_(LEARNING_RATE * local(parameter.grad))
        answer["differences"].append(float(check_tied([local(p).detach() for p in tied], group)))
        for stage in stages.values():
            stage.scale = None
            stage.eval()
        answer["evaluations"].append(float(pipeline.evaluate(build_batches(EVALUATED, 50 + step))))
        for stage in stages.values():
            stage.train()
    answer["weights"] = [(n, whole(p)) for n, p in parameters]
    answer["calls"] = [stage.calls for stage in stages.values()]
    return answer


def tied_parameters(case: Case, stages: dict[int, Stage]) -> list[nn.Parameter]:
    """The copies of the token embedding on this rank, the first stage's first."""
    ends = [stages[index] for index in (0, case.size * case.virtual - 1) if index in stages]
    return [stage.model.embed.tokens.weight for stage in ends] if case.tied else []


def attempt(case: Case) -> str:
    """What one step raises, or nothing."""
    dist.init_process_group("gloo")
    mesh = build_mesh(case)
    stages = build_stages(case, mesh)
    try:
        build_pipeline(case, stages, mesh).run(build_batches(case.counts[0], 0))
    except (RuntimeError, ValueError) as error:
        return f"{error} {error.__cause__}"
    return ""


def lengths(case: Case, cuts: tuple[int, ...]) -> list[tuple[float, float]]:
    """Losses of steps whose sequences end at other places, in the pipeline (0 on other ranks) and in one process."""
    dist.init_process_group("gloo")
    mesh = build_mesh(case)
    pipeline, alone = build_pipeline(case, build_stages(case, mesh), mesh), Stage(build_model(case))
    answer = []
    for cut in cuts:
        batches = [
            {name: value[:, :cut] if value.ndim == 2 else value for name, value in batch.items()}
            for batch in build_batches(case.counts[0], 0)
        ]
        expected = sum(float(alone(batch["input_ids"], **batch).sum()) for batch in batches)
        answer.append((float(pipeline.run(batches)), expected))
    return answer


def mixed_shapes(case: Case) -> str:
    """What every rank says to micro-batches of two shapes."""
    dist.init_process_group("gloo")
    mesh = build_mesh(case)
    pipeline = build_pipeline(case, build_stages(case, mesh), mesh)
    batches = build_batches(case.counts[0], 0)
    batches[1] = {name: value[:1] for name, value in batches[1].items()}
    try:
        pipeline.run(batches)
    except ValueError as error:
        return str(error)
    return ""


def most_buffers(case: Case) -> int:
    """The most activations and gradients received from other ranks that are held at once, in the second step."""
    dist.init_process_group("gloo")
    mesh = build_mesh(case)
    pipeline = build_pipeline(case, build_stages(case, mesh), mesh)
    received: list[weakref.ref[Tensor]] = []
    most = 0
    allocate = pipelines._allocate

    def count(infos: Any, device: torch.device) -> None:
        nonlocal most
        allocate(infos, device)
        received.extend(weakref.ref(info.buffer) for info in infos if not info.is_root_arg)
        most = max(most, sum(reference() is not None for reference in received))

    pipelines._allocate = count
    try:
        for _ in range(2):
            most = 0
            pipeline.run(build_batches(case.counts[0], 0))
    finally:
        pipelines._allocate = allocate
    return most


def tie(schedule: str, size: int) -> dict[str, Any]:
    """Sums, copies and differences of a tied weight's parts on this rank; they differ by place on the shard axis."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (size, 1, 2, 1, 1), mesh_dim_names=AXES)
    group = build_tied_group(mesh, schedule)
    rank, place = mesh.get_local_rank("pipeline"), mesh.get_local_rank("shard")
    if SCHEDULES[schedule].placement == "v":
        copies = [0, 1] if rank == 0 else []
    else:
        copies = {0: [0], size - 1: [1]}.get(rank, [])
    empty = [torch.zeros(0, 2) for _ in copies]
    gradients = [torch.full((3, 2), 1.0 + place + 10.0 * copy) for copy in copies]
    sum_tied(gradients, group)
    sum_tied(empty, group)
    weights = [torch.full((3, 2), 0.5 + place + 0.25 * copy) for copy in copies]
    before = float(check_tied(weights, group))
    copy_tied(weights, group)
    copy_tied(empty, group)
    return {
        "gradients": [g.unique().tolist() for g in gradients],
        "weights": [w.unique().tolist() for w in weights],
        "differences": (before, float(check_tied(weights, group)), float(check_tied(empty, group))),
        "place": place,
    }
