"""The training loop: draw a step's data, step, look at what it was, log, evaluate, save; until done or stopped.

Everything that decides (data order, progress, verdicts) is a pure function of counts or of numbers
all ranks share; the loop only walks. State that a restart needs is `Position` and the tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shardwright.adapt import adapter_names
from shardwright.checkpoint import CheckpointError, CheckpointWriter, discard_newer
from shardwright.checkpoint.ranks import Ranks, open_ranks
from shardwright.config import Config, RunError
from shardwright.data.loader import Loader, StepBatch
from shardwright.log import get_logger
from shardwright.parallel.mesh import World, join_world, world_size
from shardwright.parallel.peers import watch_peers
from shardwright.parallel.proposals import check_layout
from shardwright.parallel.refusals import layout_warnings
from shardwright.train.adapters import take_adapter
from shardwright.train.begin import check_begin, keep_companions, take_special_tokens, take_weights
from shardwright.train.build import (
    Corpus,
    build_corpus,
    build_loader,
    build_plan,
    build_step,
    build_validation,
    fit_to_corpus,
    has_validation,
)
from shardwright.train.capsule import Kind, Scene, keep_verdict, keeping
from shardwright.train.clock import Clock
from shardwright.train.compiler import compiling
from shardwright.train.course import Course
from shardwright.train.diagnose import describe
from shardwright.train.ending import Ending, tell
from shardwright.train.engines import check_engine
from shardwright.train.evaluate import Validation, evaluate
from shardwright.train.folder import CHECKPOINTS, FolderLock, find_run_folder, open_run_folder
from shardwright.train.guard import DelayedRead
from shardwright.train.layout import build_facts
from shardwright.train.optim.apex import check_apex
from shardwright.train.position import Position, checkpoint_tensors
from shardwright.train.profile import StepProfiler
from shardwright.train.restore import newest_checkpoint, restore
from shardwright.train.result import Result, read_result
from shardwright.train.signals import Signals, lingering
from shardwright.train.step import Outcome
from shardwright.train.steplog import StepLog
from shardwright.train.verdict import Verdict, judge
from shardwright.train.watch import Tell, Watch
from shardwright.train.writing import naming, writing

LAST_SAVE_S = 30.0  # for a save in flight while a step fails: its checkpoint is the one to begin again from

log = get_logger()


def train(config: Config, tell_stall: Tell | None = None, settled: Callable[[], None] | None = None) -> Result:
    """Train as `config` says, from the newest whole checkpoint of its run folder if there is one.

    `tell_stall` writes the page of a run that stands still; a text without it. `settled` is called once all is saved
    and the result is known, before what was opened is closed.
    Raises ConfigError for what the user has to mend and RunError where the run cannot go on.
    """
    corpus = build_corpus(config)
    take_special_tokens(config)
    fit_to_corpus(config, corpus)
    check_begin(config, corpus.tokenizer)
    facts = build_facts(config, world_size())
    check_layout(facts)
    check_engine(config)
    check_apex(config)
    with (
        join_world(config.train.device, config.train.threads, config.parallel) as world,
        lingering(world.size),
        # Around what follows: who reports a lost rank is not stopped by the launcher's SIGTERM.
        Signals(settled) as signals,
        watch_peers(world),
        open_ranks() as ranks,
        FolderLock() as lock,
        naming(Path(config.run or "")),
    ):
        checkpoint = _open_folder(config, corpus, ranks, lock)
        for warning in layout_warnings(facts) if world.leads else ():
            log.warning("%s", warning)
        with (
            Watch(config, world, ranks, tell_stall) as watch,
            Run(config, world, ranks, corpus, signals, watch) as run,
        ):
            run.begin(checkpoint)
            run.loop()
            return run.finish()


def _open_folder(config: Config, corpus: Corpus, ranks: Ranks, lock: FolderLock) -> Path | None:
    """Make or enter the run folder, on rank 0; the checkpoint to go on from, on every rank."""

    def enter() -> str:
        lock.take(Path(config.run or ""))
        folder, checkpoint = open_run_folder(config)
        with writing(folder):
            corpus.tokenizer.save(folder)
            if checkpoint is None:
                keep_companions(folder, config, corpus.tokenizer)
        return str(checkpoint or "")

    found = ranks.share(ranks.together("opening the run folder", enter if ranks.rank == 0 else None) or "")
    ranks.together("looking for the run folder", lambda: find_run_folder(Path(config.run or "")))
    return Path(found) if found else None


class Run:
    """One run as one rank sees it, between its start and its end."""

    def __init__(
        self, config: Config, world: World, ranks: Ranks, corpus: Corpus, signals: Signals, watch: Watch
    ) -> None:
        self.config, self.world, self.ranks, self.corpus, self.signals = config, world, ranks, corpus, signals
        self.folder = folder = Path(config.run or "")
        self.ending = Ending(folder, corpus, world)
        self.position = Position()
        self.stopped = False  # by a signal on any rank, and known to all of them
        self.course = Course(config)
        self.clock = Clock(folder, self.course.progress, world)
        self.loader: Loader = build_loader(config, world, self.course.ramp)
        self.step = build_step(config, world)
        self.pending = DelayedRead()
        self.steplog = StepLog(config, world, self.course, folder)
        self.last: StepBatch | None = None
        self.batch: StepBatch | None = None  # of the step under way
        self._saved_step = -1
        self._validation: Validation | None = None
        self._stack = ExitStack()
        self.watch = watch
        watch.where = self._where

    def __enter__(self) -> Run:
        enter = self._stack.enter_context
        options = self.config.checkpoint
        enter(self.loader)
        self.profiler = StepProfiler(self.folder, self.config.log.profile)
        self._stack.callback(self.profiler.close)
        self.writer = enter(
            CheckpointWriter(
                self.folder / CHECKPOINTS,
                keep_last=options.keep_last,
                keep_every=options.keep_every,
                asynchronous=options.asynchronous,
            )
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    # ------------------------------------------------------------------------------------------ start

    def begin(self, checkpoint: Path | None) -> None:
        """Restore `checkpoint`, open the outputs and place the loader."""
        if checkpoint is not None:
            self._restore(checkpoint)
        elif self.config.begin is not None:
            added = adapter_names(self.config.model, self.config.adapt)  # type: ignore[arg-type]
            take_weights(self.step, self.config.begin, added)
            if self.config.adapt.begin is not None:
                take_adapter(self.step, self.config)
            self._save()  # so that a replay, too, begins there
        elif "rollback" in (self.config.guard.nonfinite, self.config.guard.spike):
            self._save()  # the place that a roll-back before the first checkpoint goes to
        if self.world.leads:
            read_result(self.folder, self.position.step)  # one of another end is removed
        self.steplog.open(self.position.step)
        self._stack.callback(self.steplog.close)
        self._start_clock()
        self._place_loader()
        self.steplog.introduce(self.position.step)

    def _restore(self, checkpoint: Path) -> None:
        self.position = restore(self.step, checkpoint, self.folder, self.ranks)
        self._saved_step = self.position.step
        self.course.progress.load_state(self.position.progress)

    def _place_loader(self) -> None:
        plan = build_plan(self.config, self.world, self.course.ramp, self.position.excluded)
        self.loader.start(self.position.step, self.position.drawn, plan)

    def _start_clock(self, *, replay: bool = True) -> None:
        self.clock.start(self.position, replay=replay)
        self.steplog.mark(self.position)

    # ------------------------------------------------------------------------------------------ loop

    def loop(self) -> None:
        """Steps until the run is done or asked to stop; first the evaluation that the last start was stopped in."""
        if self._owes_evaluation():
            self._evaluate(self.config.evaluate.max_tokens)
        while not self._is_over():
            with self.profiler.step(self.position.step + 1), keeping(self._scene):
                self._one_step()
            self._after_step()

    def _is_over(self) -> bool:
        """Whether to leave the loop; the last step is then judged, logged and saved."""
        if self.world.size == 1:
            self.stopped = self.signals.received is not None
        if not self._is_done() and not self.stopped:
            return False
        if self._judge():
            return self.stopped
        if self.steplog.step != self.position.step:
            self._write_line()
        if self._saved_step != self.position.step:
            self._save()
        return True

    def _one_step(self) -> None:
        begin = time.monotonic()
        self.watch.enter("data")
        self.batch = None
        self.batch = batch = next(self.loader)
        self.watch.enter("step")
        self.steplog.data_seconds += time.monotonic() - begin
        # Only attention's own dropout draws from this generator: keyed by the step, it survives a restart.
        torch.manual_seed((self.config.train.seed * 1_000_003 + self.position.step) % 2**63)
        # Filled on the device: a copy from the host would wait for it.
        number = torch.full((), self.position.step, dtype=torch.int64, device=self.world.device)
        with compiling(lambda: self.signals.received is not None):
            self.step.accumulate(batch.micro_batches, number)
        # The step before is judged here: its weights are still in place, and the device is busy with this one.
        if self._judge():
            return
        self.lr_factor = self.course.factor(self.position, batch.count, self.clock.step_seconds)
        self.clock.record(self.position.step)
        self.pending.put(self.step.update(self.lr_factor, stop=self.signals.received is not None))
        self.last = batch
        self.position.step += 1
        self.position.drawn += batch.count
        self.clock.finish_step(self.position, begin)
        self.watch.steps += 1
        self.watch.enter("between")

    def _where(self) -> tuple[int, int, tuple[int, int] | None]:
        """For the watch: the step under way, forward passes begun in it, and its sequences."""
        drawn, step, plan = self.position.drawn, self.position.step, self.loader.plan
        numbers = plan.numbers(drawn, plan.count(step, drawn))
        return step + 1, max(m.passes for m in self.step.stages.models.values()), (int(numbers[0]), int(numbers[-1]))

    def _after_step(self) -> None:
        config, step = self.config, self.position.step
        self.writer.check()
        due_log = step == 1 or _due(step, config.log.every)
        due_eval = _due(step, config.evaluate.every) and not self._is_done()
        due_save = _due(step, config.checkpoint.every)
        self.steplog.advance(self.position)
        if _due(step, config.parallel.check_tied):
            self._check_tied()
        if not (due_log or due_eval or due_save):
            return
        if self._judge():
            return
        if due_log:
            self._write_line()
        if due_eval:
            self._evaluate(self.config.evaluate.max_tokens)
        if due_save:
            self._save()

    def _owes_evaluation(self) -> bool:
        """Whether the step that the run goes on from lacks the evaluation that is due at it."""
        step = self.position.step
        if step == 0 or not _due(step, self.config.evaluate.every) or self._is_done():
            return False
        return self.world.any(self.world.leads and self.ending.evaluated(step) is None)

    def _check_tied(self) -> None:
        """What several stages of a pipeline use is copies of one weight: RunError where they have parted."""
        for weight in getattr(self.step.masters, "tied", ()):
            if self.world.any(bool(weight.difference() > 0)):
                raise RunError(
                    f"step {self.position.step}: the copies of {weight.name} on stages of the pipeline differ; go back "
                    "to a checkpoint from before, and report this with the config"
                )

    def _is_done(self) -> bool:
        position = self.position
        position.done = position.done or self.course.is_done(position, self.clock.step_seconds)
        return position.done

    # ------------------------------------------------------------------------------------------ verdicts

    def _judge(self) -> bool:
        """Look at the step whose outcome is due; True where it sent the run back to a checkpoint."""
        numbers = self.pending.take()
        if numbers is None:
            return False
        self.outcome = outcome = Outcome.read(numbers)
        self.stopped = self.stopped or outcome.stop
        if not (outcome.overflow or outcome.spike):
            return False
        return self._intervene(outcome)

    def _intervene(self, outcome: Outcome) -> bool:
        what = self._describe(outcome)
        try:
            verdict = judge(outcome, self.config, interventions=self.position.interventions, what=what)
        except RunError:
            self._keep("nonfinite" if outcome.overflow else "spike", what)
            raise
        if verdict is Verdict.NORMAL:
            log.warning("%s; skipped, normal now and then; the loss scale was %g", what, outcome.loss_scale)
            return False
        self.position.interventions += 1
        if verdict is Verdict.ROLL_BACK:
            self._roll_back(what)
            return True
        log.warning("%s; skipped", what)
        return False

    def _scene(self) -> Scene | None:
        """The step under way, for a capsule; None where none is wanted, or where it has no data yet."""
        if self.batch is None or not self.config.watch.capsules:
            return None
        deadline = time.monotonic() + LAST_SAVE_S
        while self.writer.is_saving and time.monotonic() < deadline:
            time.sleep(0.05)
        return Scene(self.config, self.world, self.step, self.position, self.batch)

    def _keep(self, kind: Kind, what: str) -> None:
        """Keep the step before, which the run is stopped for; every rank comes here."""
        if self.last is None or not self.config.watch.capsules:
            return
        with suppress(CheckpointError):  # it was logged when it happened
            self.writer.wait()
        progress = self.course.progress.state()
        before = replace(self.position, step=self.position.step - 1, drawn=self.last.drawn, progress=progress)
        scene = Scene(self.config, self.world, self.step, before, self.last)
        with self.watch.during("save"):
            keep_verdict(scene, kind, what, newest_checkpoint(self.folder, self.ranks))

    def rerun(self) -> str | None:
        """One step as a replay takes it, without logs and verdicts; what was wrong with it, if anything."""
        self._one_step()
        self.outcome = Outcome.read(self.pending.take() or ())
        bad = self.outcome.overflow or self.outcome.spike
        return self._describe(self.outcome) if bad else None

    def _describe(self, outcome: Outcome) -> str:
        assert self.last is not None
        return describe(self.step, self.position.step, self.last, outcome)

    def _roll_back(self, what: str) -> None:
        """Return to the newest checkpoint; the sequences from the bad step to now are never taken again."""
        assert self.last is not None
        self.writer.wait()
        checkpoint = newest_checkpoint(self.folder, self.ranks)
        if checkpoint is None:
            raise RunError(f"{what}: no checkpoint to roll back to; set checkpoint.every")
        excluded = (self.last.first, self.last.last + 1)
        interventions, elapsed = self.position.interventions, self.position.elapsed
        self._restore(checkpoint)
        self.position.interventions, self.position.elapsed = interventions, elapsed
        self.position.excluded.append(excluded)
        self.course.progress.rewind(self.position.step)
        if self.world.leads:
            discard_newer(self.folder / CHECKPOINTS, self.position.step)
        log.warning("%s; back to step %d, without sequences %d to %d", what, self.position.step, *excluded)
        self.steplog.close()
        self.steplog.open(self.position.step)
        self._start_clock(replay=False)
        self._place_loader()
        self._save()  # so that a kill from here on does not bring the excluded range back

    # ------------------------------------------------------------------------------------------ outputs

    def _write_line(self) -> None:
        self.steplog.write(self.position, self.outcome, self.lr_factor)

    def _evaluate(self, most: int | None) -> dict[str, float] | None:
        begin = time.monotonic()
        self.watch.enter("evaluate")
        if self._validation is None:
            self._validation = build_validation(self.config, self.world)
        with compiling(lambda: self.signals.received is not None):
            figures = evaluate(self.step.stages, self._validation, most, self._is_asked_to_stop)
        if figures is not None:
            self.steplog.write_figures(self.position.step, figures)
        self.watch.enter("between")
        self.steplog.pause(time.monotonic() - begin)
        return figures

    def _save(self) -> None:
        self.position.progress = self.course.progress.state()
        state = {"position": self.position.state()}
        with self.watch.during("save"):
            self.writer.save(checkpoint_tensors(self.step), state, step=self.position.step)
        self._saved_step = self.position.step

    def finish(self) -> Result:
        """The last evaluation, unless it was made before, and what to tell the user."""
        step, tokens = self.position.step, self.course.tokens(self.position)
        result = None if self.stopped else self._conclude(step, tokens)
        with self.watch.during("save"):
            self.writer.wait()
        self.signals.settle()
        if result is None:
            reason = self.signals.received or "a rank"
            log.info("stopped by %s after step %d, all saved; the same command goes on", reason, step)
            return Result(str(self.folder), step, tokens, stopped=True)
        tell(result)
        return result

    def _conclude(self, step: int, tokens: int) -> Result | None:
        """The result that is there already, or that of a last evaluation; None where that was asked to stop."""
        known = self.ending.known(step, tokens) if self.world.leads else None
        if self.world.any(known is not None):
            return known or Result(str(self.folder), step, tokens, stopped=False)
        figures = self._evaluate(None) if has_validation(self.corpus) else {}
        if figures is None:
            self.stopped = True
            return None
        self.watch.enter("end")
        return self.ending.conclude(step, tokens, figures)

    def _is_asked_to_stop(self) -> bool:
        """Whether a signal came to any rank; every rank has to ask."""
        return self.world.any(self.signals.received is not None)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
