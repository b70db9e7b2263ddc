"""What a stalled run is said to be held up by, and its page in a real browser."""

import dataclasses

import pytest

from shardwright.planner.stall_page import write_page
from shardwright.train.stall import Stack, Stall, Word, as_text, collective_of, join
from tests.pages import open_browser

NOW = 1_800_000_000.0
WAITING = Stack("MainThread", ("torch/distributed/distributed_c10d.py:3 all_reduce: work.wait()", "a.py:1 <step>"))
LOADING = Stack("MainThread", ("shardwright/data/loader.py:249 __next__: kind, value = self._items.get()",))


def word(rank: int, **changed) -> Word:
    """A rank that waits in all_reduce of step 6."""
    asked = {"collective": "all_reduce", "stacks": (WAITING,), "stalled": True, "phase": "step", **changed}
    return Word(
        rank=rank, host=f"node{rank // 4}", pid=100 + rank, beat=9, since=NOW - 312, written=NOW, step=6, passes=2,
        sequences=(40, 47), **asked,
    )  # fmt: skip


def stall(*words: Word, silent: tuple[int, ...] = ()) -> Stall:
    return Stall("runs/english", 8, {w.rank: w for w in words}, frozenset(silent), NOW)


@pytest.fixture
def loading() -> Stall:
    held = word(5, phase="data", collective=None, stacks=(LOADING,))
    return stall(*(held if rank == 5 else word(rank) for rank in range(8)))


def test_the_rank_in_no_collective_holds_the_others_up(loading):
    assert loading.verdict == (
        "rank 5 on node1 (pid 105) is in data loading of step 6 since 312 s, at sequences 40 to 47; "
        "the other 7 wait in all_reduce"
    )


def test_a_silent_rank_comes_before_all_others(loading):
    gone = dataclasses.replace(loading.words[3], written=NOW - 400, stalled=False, stacks=())
    found = dataclasses.replace(loading, words={**loading.words, 3: gone}, silent=frozenset({3}))
    assert found.verdict.startswith("rank 3 on node0 (pid 103) is silent since 400 s, last seen in step 6")
    never = dataclasses.replace(loading, words={r: w for r, w in loading.words.items() if r}, silent=frozenset({0}))
    assert never.verdict.startswith("rank 0 has not written since the start; of the others")


def test_of_ranks_that_all_wait_the_one_furthest_back_is_named():
    back = dataclasses.replace(word(2, collective="broadcast"), passes=1)
    found = stall(*(back if rank == 2 else word(rank) for rank in range(8)))
    assert found.verdict.startswith(
        "rank 2 on node0 (pid 102) is in step 6 at micro-batch 1 since 312 s, waiting in bro"
    )
    alike = stall(*map(word, range(8))).verdict
    assert alike.startswith("all 8 ranks stand still since 312 s, waiting in all_reduce, in step 6")


def test_of_one_micro_batch_a_forward_pass_is_further_back_than_a_backward_pass():
    """Ranks under DDP wait for each other within C++, where no frame of Python's names a collective."""
    waiting = dataclasses.replace(word(0, collective=None), backward=True)
    held = word(2, collective=None)
    found = stall(*(held if rank == 2 else dataclasses.replace(waiting, rank=rank) for rank in range(8)))
    assert found.verdict == (
        "rank 2 on node0 (pid 102) is in step 6 at micro-batch 2 since 312 s, at sequences 40 to 47; "
        "the other 7 are in the backward pass of step 6 at micro-batch 2"
    )
    assert (found.state(0), found.state(2)) == ("in the backward pass", "stands still")


def test_ranks_of_one_process_and_ranks_that_left():
    alone = Stall("r", 1, {0: word(0, phase="save", collective=None)}, now=NOW)
    assert alone.verdict == "rank 0 on node0 (pid 100) is saving a checkpoint after step 5 since 312 s"
    found = stall(dataclasses.replace(word(0), left=True), *map(word, range(1, 8)))
    assert found.verdict.startswith("rank 0 on node0 (pid 100) has left; the other 7 wait in all_reduce")


def test_ranks_are_joined():
    assert join([7, 0, 1, 2, 3, 4, 6]) == "0-4, 6, 7" and join([]) == ""


@pytest.mark.parametrize(
    ("frames", "found"),
    [
        ([("x/torch/distributed/distributed_c10d.py", "all_reduce"), ("x/torch/distributed/c10d_logger.py", "wrapper")],
         "all_reduce"),
        ([("x/torch/_ops.py", "__call__"), ("x/torch/distributed/_functional_collectives.py", "wait_tensor")],
         "a collective"),
        ([("x/torch/distributed/pipelining/schedules.py", "_wait_batch_p2p")], "send and receive"),
        ([("model/attention.py", "forward"), ("x/torch/distributed/pipelining/schedules.py", "step")], None),
        ([("x/python3.11/queue.py", "get"), ("shardwright/data/loader.py", "__next__")], None),
        ([("x/deepspeed/utils/nvtx.py", "wrapped_fn"), ("x/deepspeed/runtime/zero/partition_parameters.py", "wait"),
          ("x/deepspeed/runtime/zero/partitioned_param_coordinator.py", "fetch_sub_module")], "a collective"),
        ([("x/deepspeed/runtime/zero/linear.py", "forward"), ("model/layers.py", "forward")], None),
    ],
)  # fmt: skip
def test_a_collective_is_known_by_its_innermost_frame(frames, found):
    assert collective_of(frames) == found


def test_the_text_has_the_verdict_first_and_merges_equal_stacks(loading):
    text = as_text(loading)
    assert text.startswith(loading.verdict + "\n")
    assert text.index("==== rank 5\n") < text.index("==== ranks 0-4, 6, 7\n") and text.count("a.py:1 <step>") == 1


def test_the_page_stands_alone_and_reads_at_both_widths(loading, tmp_path):
    path = write_page(loading, tmp_path, "stall")
    assert (tmp_path / "stall.txt").read_text() == as_text(loading)
    with open_browser() as browser:
        for width in (1300, 390):
            page = browser.open(path, width=width)
            assert page.errors == [] and page.requests == []
            assert page.evaluate("document.querySelector('h1').textContent") == loading.verdict.partition(";")[0]
            assert page.evaluate("document.querySelectorAll('tbody tr').length") == 8
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            page.screenshot(tmp_path / f"stall{width}.png")
