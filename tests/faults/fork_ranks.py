"""Ranks of a run as forks of one process, so that torch is imported once: `python fork_ranks.py N PORT CONFIG [K=V]`.

Each is a real process with a launcher's variables and runs the command line's `train`. Prints `rank R ended with C` for
each, and ends with 0; whoever ends first does not end the others, who have to find that out. What is to go wrong says
the environment: SPOIL=hang:R:I has the loader of rank R wait for ever at step I, SPOIL=stick:R:I a layer of it in the
second micro-batch there, SPOIL=raise:R:I has a layer of it raise there.
"""

import os
import sys
import threading
from collections.abc import Callable
from importlib import import_module

from torch import Tensor

from shardwright.data.loader import Loader
from shardwright.model.layers import MLP
from shardwright.train.stages import LossModel

for name in ("shardwright.train.run", "shardwright.launcher.cli", "shardwright.planner.stall_page"):
    import_module(name)  # before the fork


def spoil(rank: int) -> None:
    """Have this rank go wrong, where SPOIL says so."""
    kind, who, step = os.environ.get("SPOIL", "none:-1:0").split(":")
    if int(who) != rank:
        return
    if kind == "hang":
        before = Loader.__next__

        def wait(loader: Loader) -> object:
            batch = before(loader)
            if batch.step == int(step):
                threading.Event().wait()
            return batch

        Loader.__next__ = wait
    if kind == "raise":
        spoil_layer(int(step), give_up)
    if kind == "stick":
        spoil_layer(int(step), stick)


def give_up(_passes: int) -> None:
    """As a kernel does that fails."""
    raise ArithmeticError("a kernel gave up")


def stick(passes: int) -> None:
    """As a kernel does that never ends, in the second micro-batch."""
    if passes == 2:
        threading.Event().wait()


def spoil_layer(step: int, fault: Callable[[int], None] = give_up) -> None:
    """From now on the feed-forward parts have this fault in that step; it is told how many passes were begun."""
    begin, forward = LossModel.begin, MLP.forward
    here: list[tuple[int, LossModel]] = []

    def begin_and_note(model: LossModel, at: Tensor, scales: object = None) -> None:
        here[:] = [(int(at), model)]
        begin(model, at, scales)

    def spoiled(layer: MLP, *given: Tensor) -> Tensor:
        if here and here[0][0] == step:
            fault(here[0][1].passes)
        return forward(layer, *given)

    LossModel.begin, MLP.forward = begin_and_note, spoiled


def main() -> None:
    """Fork, run, wait."""
    size, port, *arguments = sys.argv[1:]
    ranks = {}
    for rank in range(int(size)):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": "0",
            }  # fmt: skip
            from shardwright.launcher.cli import run

            spoil(rank)
            code = 1
            try:
                code = run(["train", *arguments])
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks[pid] = rank
    while ranks:
        pid, status = os.wait()
        print(f"rank {ranks.pop(pid)} ended with {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
