"""One contender of stream.py: a process that converts the tokens to its format, or reads batches when it is told to.

`python stream_contenders.py NAME convert FOLDER` or `... NAME WORKERS FOLDER` (0, "thread" or 1), by this project's
Python or the peers'. FOLDER holds `tokens.npy` and one folder a format. Every batch is what a model takes: int64
input_ids and labels [8, 512], sequences shuffled; ours has weights, positions, document numbers beside them.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, Channel

BATCH, LENGTH = 8, 512
RAW = LENGTH + 1
SHUFFLE_BUFFER = 1000  # sequences; what webdataset's documentation uses
WARM_BATCHES = 50  # not timed: more than any of them reads ahead
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """How tokens come into a format, and one epoch of batches out of it."""

    convert: Callable[[Path, Path], None] | None
    batches: Callable[[Path, Any], Iterator[Batch]]
    format: str


def ready(tokens: torch.Tensor) -> Batch:
    """What a model takes, from raw sequences [B, T + 1] of any integer type."""
    return {"input_ids": tokens[:, :-1].long(), "labels": tokens[:, 1:].long()}


def blocks_of(folder: Path) -> np.ndarray:
    """The tokens as raw sequences [N, T + 1], a mapped view."""
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    return tokens[: len(tokens) // RAW * RAW].reshape(-1, RAW)


def through_loader(dataset: Any, workers: int) -> Iterator[Any]:
    """Ready batches of an iterable dataset, by torch's DataLoader where there is a worker."""
    if not workers:
        return iter(dataset)
    return iter(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=workers))


# --------------------------------------------------------------------------------------------------- ours


def read_ours(folder: Path, workers: Any, **treatment: bool) -> Iterator[Batch]:
    """This project's loader over a stream that was just opened: every document's checksum is still to be compared."""
    from shardwright.data.loader import Loader
    from shardwright.data.order import Plan
    from shardwright.data.stream import Stream
    from shardwright.objective.causal import Causal, CausalConfig
    from shardwright.objective.setting import Setting

    stream = Stream([str(folder)], raw_length=RAW, stride=LENGTH, seed=0)
    plan = Plan(global_batch=BATCH, micro_batch=BATCH)
    objective = Causal(CausalConfig(), Setting(LENGTH, **treatment))
    with Loader(stream, plan, objective, workers=workers) as loader:
        for step in loader:
            yield step.micro_batches[0]


def read_ours_plain(folder: Path, workers: Any) -> Iterator[Batch]:
    """The same without document numbers and restarting positions."""
    return read_ours(folder, workers, mask_documents=False, reset_positions=False)


# -------------------------------------------------------------------------------------------- memory map


class RandomRows(torch.utils.data.IterableDataset):
    """Random rows of a mapped file: no format, no documents, no mixing, no checks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __iter__(self) -> Iterator[Batch]:
        blocks = blocks_of(self.folder)
        order = np.random.default_rng(0).permutation(len(blocks))
        for first in range(0, len(order) - BATCH + 1, BATCH):
            yield ready(torch.from_numpy(blocks[order[first : first + BATCH]].astype(np.int64)))


def read_map(folder: Path, workers: int) -> Iterator[Batch]:
    """Random rows of tokens.npy."""
    return through_loader(RandomRows(folder), workers)


# --------------------------------------------------------------------------------------------- webdataset


def convert_webdataset(source: Path, target: Path) -> None:
    """A sample a sequence, as webdataset's own documentation writes them."""
    import webdataset

    with webdataset.ShardWriter(f"{target}/%05d.tar", maxsize=256 << 20, verbose=0) as sink:
        for number, block in enumerate(blocks_of(source)):
            sink.write({"__key__": f"{number:08d}", "bin": block.tobytes()})


def read_webdataset(folder: Path, workers: int) -> Iterator[Batch]:
    """webdataset's own pipeline: shuffled shards, a shuffle buffer, decoding, batches."""
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).shuffle(SHUFFLE_BUFFER)
    decoded = dataset.map(lambda sample: np.frombuffer(sample["bin"], np.uint16))
    return through_loader(decoded.batched(BATCH, collation_fn=_stack, partial=False), workers)


def read_our_shards_by_webdataset(folder: Path, workers: int) -> Iterator[Batch]:
    """The same pipeline over this project's shards, whose members hold many documents: cut after reading."""
    import webdataset

    urls = sorted(str(path) for path in folder.rglob("*.tar"))
    dataset = webdataset.WebDataset(urls, shardshuffle=len(urls)).compose(_cut_members).shuffle(SHUFFLE_BUFFER)
    return through_loader(dataset.batched(BATCH, collation_fn=_stack, partial=False), workers)


def _cut_members(samples: Iterator[dict[str, bytes]]) -> Iterator[np.ndarray]:
    for sample in samples:
        tokens = np.frombuffer(sample["tokens"], np.uint16)
        yield from tokens[: len(tokens) // RAW * RAW].reshape(-1, RAW)


def _stack(rows: list[np.ndarray]) -> Batch:
    return ready(torch.from_numpy(np.stack(rows).astype(np.int64)))


# ------------------------------------------------------------------------------------------------ litdata


def convert_litdata(source: Path, target: Path) -> None:
    """Tokens as litdata's TokensLoader reads them, optimised by litdata."""
    import litdata

    count = len(blocks_of(source))
    starts = list(range(0, count, 4096))
    litdata.optimize(
        fn=_Pieces(source),
        inputs=starts,
        output_dir=str(target),
        chunk_bytes="64MB",
        num_workers=1,
        item_loader=litdata.TokensLoader(block_size=RAW),
    )


class _Pieces:
    """What litdata asks for an input: tokens from one start on, as a tensor."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __call__(self, start: int) -> Iterator[torch.Tensor]:
        yield torch.from_numpy(blocks_of(self.source)[start : start + 4096].reshape(-1).copy())


def read_litdata(folder: Path, workers: int) -> Iterator[Batch]:
    """litdata's dataset of token blocks, shuffled, through its own loader."""
    import litdata

    dataset = litdata.StreamingDataset(
        str(folder), item_loader=litdata.TokensLoader(block_size=RAW), shuffle=True, drop_last=True
    )
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers)
    return map(ready, loader)


# ------------------------------------------------------------------------------------- mosaicml-streaming


def convert_mosaic(source: Path, target: Path) -> None:
    """A sample a sequence in MDS shards."""
    streaming = import_streaming()
    with streaming.MDSWriter(out=str(target), columns={"tokens": f"ndarray:uint16:{RAW}"}) as sink:
        for block in blocks_of(source):
            sink.write({"tokens": np.ascontiguousarray(block)})


def read_mosaic(folder: Path, workers: int) -> Iterator[Batch]:
    """mosaicml-streaming's dataset, shuffled, through torch's DataLoader."""
    streaming = import_streaming()
    streaming.base.util.clean_stale_shared_memory()
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=BATCH, num_workers=workers, collate_fn=_stack_samples, drop_last=True
    )
    return iter(loader)


def _stack_samples(samples: list[dict[str, np.ndarray]]) -> Batch:
    return _stack([sample["tokens"] for sample in samples])


class EmptyVision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for torchvision, which mosaicml-streaming imports for its images and token reading never calls.

    PyPI's torchvision does not load beside a CPU build of torch.
    """

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        named = name.split(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if named else None

    def exec_module(self, module: Any) -> None:
        module.__getattr__ = lambda name: type(name, (), {})


def import_streaming() -> Any:
    """mosaicml-streaming, beside an empty torchvision."""
    sys.meta_path.insert(0, EmptyVision())
    import streaming

    return streaming


# ------------------------------------------------------------------------------------------------- turns

CONTENDERS = {
    "ours": Contender(None, read_ours, "ours"),
    "ours-plain": Contender(None, read_ours_plain, "ours"),
    "memory-map": Contender(None, read_map, "."),
    "litdata": Contender(convert_litdata, read_litdata, "litdata"),
    "webdataset": Contender(convert_webdataset, read_webdataset, "webdataset"),
    "webdataset-our-shards": Contender(None, read_our_shards_by_webdataset, "ours/train"),
    "mosaicml-streaming": Contender(convert_mosaic, read_mosaic, "mosaic"),
}


def one_turn(batches: Iterator[Batch], seconds: float) -> tuple[int, float]:
    """(tokens, seconds) of reading for some time, or to the end of the epoch."""
    for _ in range(WARM_BATCHES):
        check(next(batches))
    count, begin = 0, time.perf_counter()
    for _ in batches:
        count += 1
        if time.perf_counter() - begin >= seconds:
            break
    return count * BATCH * LENGTH, time.perf_counter() - begin


def check(batch: Batch) -> None:
    """That a batch is what a model takes, its labels being its inputs one later."""
    inputs, labels = batch["input_ids"], batch["labels"]
    assert inputs.shape == labels.shape == (BATCH, LENGTH), inputs.shape
    assert inputs.dtype == labels.dtype == torch.int64, inputs.dtype
    assert torch.equal(inputs[:, 1:], labels[:, :-1])


def main() -> None:
    """Convert, or serve turns until the parent closes the pipe."""
    name, what, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    sys.path.insert(0, str(ROOT))
    contender = CONTENDERS[name]
    place = folder / contender.format
    if what == "convert":
        assert contender.convert is not None
        contender.convert(folder, place)
        return
    channel = Channel()
    channel.send()
    workers = what if what == "thread" else json.loads(what)
    while True:
        seconds = channel.receive()["seconds"]
        batches = contender.batches(place, workers)
        tokens, spent = one_turn(batches, seconds)
        channel.send(tokens_per_s=tokens / spent, tokens=tokens, seconds=spent)
        del batches


if __name__ == "__main__":
    main()
