"""The preparation from end to end, in five passes, each of which goes on where it was killed.

clean (units in parallel) -> duplicates (partitions in parallel) -> tokenizer -> tokens (units in parallel) -> shards
(in parallel). What runs in parallel are tasks for a `Pool`: processes of this machine, or Ray's. Units are cut from the
input at fixed places, every intermediate file is a pure function of its unit and the recipe and stands under its name
only when whole; so the result is the same bytes for any pool, number of workers and kills. Intermediate files lie in
OUTPUT/.prepare, which takes about as much room as the uncompressed text.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from shardwright.config import ConfigError, RunError
from shardwright.data.manifest import Manifest, ShardInfo, SplitInfo, write_atomic
from shardwright.data.prepare import duplicates, state, units
from shardwright.data.prepare.dedup import check_dedup
from shardwright.data.prepare.examples import prepare_examples
from shardwright.data.prepare.filters import check_languages, contamination_of
from shardwright.data.prepare.inputs import list_inputs
from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.pool import Pool, build_pool, num_workers
from shardwright.data.prepare.ray_pool import RayPool, check_ray, ray_pool
from shardwright.data.prepare.records import Stretch, cut_stretches
from shardwright.data.prepare.summary import Summary
from shardwright.data.prepare.units import SPLITS, Job
from shardwright.data.prepare.vocabulary import check_pattern, describe, train_tokenizer
from shardwright.data.tokenizers import Tokenizer, files_of
from shardwright.log import Bar, get_logger
from shardwright.log import progress as show

BROKEN_SHOWN = 10
Kept = Callable[[], Iterator[tuple[int, np.ndarray]]]  # each unit, and which of its documents are removed


def prepare(config: PrepareConfig, *, progress: bool = True) -> Manifest:
    """Turn text into token shards at `config.output` and return their manifest.

    A finished output of the same recipe and input is returned at once; an unfinished one goes on. ConfigError for
    anything the user has to change (one line with file, line and remedy), RunError for what running again may cure.
    """
    output = Path(config.output)
    if "://" in config.output:
        raise ConfigError(f"output={config.output}: expected a local folder; copy the result afterwards")
    finished = state.find_finished(output, config)
    if finished is not None:
        get_logger().info(f"{output}: already prepared ({_totals(finished)}); nothing to do")
        return finished
    with state.locked(output) as work, _explained(output):
        if config.makes_examples:
            manifest = prepare_examples(config, output)
            shutil.rmtree(work, ignore_errors=True)
            return manifest
        return _Preparation(config, output, work, quiet=None if progress else True).run()


class _Preparation:
    """One run over one output folder."""

    def __init__(self, config: PrepareConfig, output: Path, work: Path, quiet: bool | None) -> None:
        self.config, self.output, self.work, self.quiet = config, output, work, quiet
        check_languages(config.filters.languages)
        check_dedup(config.dedup)
        if config.engine == "ray":
            check_ray(config.ray_address)
        check_pattern(config.tokenizer.pattern)
        if config.tokenizer.path is not None:  # before hours of cleaning, not after
            _open_tokenizer(config)
        self.files = list_inputs(config.input, output)
        self.source: dict[str, Any] = {}
        contamination = self._read_evaluation()
        if config.tokenizer.path is not None:
            self.source["tokenizer"] = files_of(config.tokenizer.path)
        state.begin(work, config, self.files, self.source)
        if contamination is not None:
            state.save_array(work / "contamination.npy", contamination)

    def run(self) -> Manifest:
        """All passes, then the result moves to its place, the manifest last."""
        if not (self.work / "manifest.json").exists():
            self._work()
        tokenizer = units.load_tokenizer(self.work)
        manifest = state.publish(self.work, self.output, tokenizer)
        get_logger().info(f"{self.output}: {_totals(manifest)}; tokenizer: {describe(tokenizer)}")
        if self.config.validation_every and not manifest.splits["validation"].documents:
            get_logger().warning(
                f"validation_every={self.config.validation_every}: of {manifest.counts['documents']} documents none is "
                "in the validation split, so that training cannot be evaluated; lower validation_every"
            )
        return manifest

    def _work(self) -> None:
        job = Job(str(self.work.resolve()), self.config.for_workers(), json.dumps(self.source))
        with self._pool() as pool:
            cleaned = self._clean(pool, job)
            removed = self._find_duplicates(pool, job, cleaned)
            kept = partial(_by_unit, cleaned["units"], removed)
            tokenizer = self._tokenizer(pool, job, kept)
            job = job._replace(key=tokenizer.sha256)
            tokens = self._encode(pool, job, kept)
            splits = self._write_shards(pool, job, [unit for unit, _ in cleaned["units"]], tokens)
        state.save_skipped(self.work, self._broken_lines(cleaned))
        self._manifest(tokenizer, splits, cleaned, removed).save(self.work)

    def _pool(self) -> AbstractContextManager[Pool]:
        if self.config.engine == "ray":
            return ray_pool(self.config, self.work)
        return build_pool(num_workers(self.config.workers))

    # -- pass 0: evaluation files -----------------------------------------------------------------------------------

    def _read_evaluation(self) -> np.ndarray | None:
        """Numbers of the evaluation files' runs of words, which the workers look for."""
        named = self.config.filters.decontaminate
        if not named:
            return None
        self.source["evaluation"] = []
        runs = contamination_of(list_inputs(named), self.config, self.source["evaluation"])
        return runs

    # -- pass 1: records to cleaned documents -----------------------------------------------------------------------

    def _clean(self, pool: Pool, job: Job) -> dict[str, Any]:
        """Clean every unit; returns the summary that the other passes work from."""
        marker = self.work / "cleaned.json"
        if marker.exists():
            cleaned = json.loads(marker.read_text("utf-8"))
        else:
            cleaned = self._clean_units(pool, job)
            write_atomic(marker, json.dumps(cleaned).encode())
        if cleaned["broken"] and self.config.on_error == "fatal":
            self._fail(cleaned["broken"][0])
        if not any(count for _, count in cleaned["units"]):
            raise ConfigError(f"input={', '.join(self.config.input)}: no document is left; counts: {cleaned['counts']}")
        return cleaned

    def _clean_units(self, pool: Pool, job: Job) -> dict[str, Any]:
        stretches = cut_stretches([file.size for file in self.files])
        done = [units.done_units(stretch, job) for stretch in stretches]
        summary = Summary()
        for facts in chain.from_iterable(done):
            summary.add(facts)
        if summary.num_units:
            get_logger().info(f"{self.output}: going on after {summary.num_units} finished units")
        sizes = [file.size for file in self.files]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        with self._bar(total, "bytes", "clean", sum(sizes[file] or 0 for file in summary.files)) as bar:
            spread = self._read_there if self._workers_read(pool, stretches) else self._read_here
            for facts in spread(pool, job, stretches, done, bar):
                if facts["broken"] and self.config.on_error == "fatal":
                    self._fail(facts["broken"][0])
                summary.add(facts)
        return self._told(summary)

    def _workers_read(self, pool: Pool, stretches: list[Stretch]) -> bool:
        """Whether the workers read the input themselves: on Ray, where each has a stretch to read and can open it."""
        return (
            isinstance(pool, RayPool)
            and len(stretches) >= pool.num_cores
            and pool.can_open([self.files[0].location, self.files[-1].location])
        )

    def _read_here(
        self, pool: Pool, job: Job, stretches: list[Stretch], done: list[list[dict[str, Any]]], bar: Bar
    ) -> Iterator[dict[str, Any]]:
        """This process reads and cuts units, the workers clean them."""
        left = (
            units.units_left(stretch, self.files[stretch.start : stretch.stop], facts, self.config, bar.advance)
            for stretch, facts in zip(stretches, done, strict=True)
        )
        yield from pool(units.clean_unit, ((unit, job) for unit in chain.from_iterable(left)))

    def _read_there(
        self, pool: Pool, job: Job, stretches: list[Stretch], done: list[list[dict[str, Any]]], bar: Bar
    ) -> Iterator[dict[str, Any]]:
        """A worker reads a stretch and cleans it."""
        left = [(s, len(facts)) for s, facts in zip(stretches, done, strict=True) if not units.is_done(s, facts)]
        tasks = ((s, self.files[s.start : s.stop], known, job) for s, known in left)
        for (stretch, _), found in zip(left, pool(units.clean_stretch, tasks), strict=True):
            bar.advance(sum(file.size or 0 for file in self.files[stretch.start : stretch.stop]))
            yield from found

    def _told(self, summary: Summary) -> dict[str, Any]:
        """The summary, its warnings said."""
        cleaned = summary.as_dict()
        _warn([f"left out: {self._describe(e)}" for e in cleaned["broken"]], "broken records; skipped.jsonl lists them")
        barren = [self.files[file].shown for file in summary.barren]
        _warn([f"{name}: holds no record (line, row, member, page); take it out" for name in barren], "such files")
        return cleaned

    def _fail(self, entry: list[Any]) -> None:
        raise ConfigError(f"{self._describe(entry)} (or leave such input out, counted, with on_error=skip)")

    def _describe(self, entry: list[Any]) -> str:
        file, where, reason = entry
        return f"{self.files[file].shown}: {where}: {reason}"

    def _broken_lines(self, cleaned: dict[str, Any]) -> list[dict[str, str]]:
        return [{"file": self.files[f].shown, "where": where, "reason": why} for f, where, why in cleaned["broken"]]

    # -- pass 2: duplicates -----------------------------------------------------------------------------------------

    def _find_duplicates(self, pool: Pool, job: Job, cleaned: dict[str, Any]) -> np.ndarray:
        """uint8 [documents] in input order: 0 stays, 1 an exact duplicate, 2 a near one."""
        path = self.work / "duplicates.npy"
        if not path.exists():
            removed = duplicates.find_duplicates(pool, job, cleaned["units"], self.config, self._bar)
            state.save_array(path, removed)
            duplicates.forget(self.work)
        return np.load(path)

    # -- pass 3: tokenizer ------------------------------------------------------------------------------------------

    def _tokenizer(self, pool: Pool, job: Job, kept: Kept) -> Tokenizer:
        facts = self.work / "tokenizer.facts"
        if not facts.exists():
            if self.config.tokenizer.path is not None:
                tokenizer = _open_tokenizer(self.config)
            else:
                tokenizer = self._train_tokenizer(pool, job, kept)
            tokenizer.save(self.work / tokenizer.file)
            end = {"file": tokenizer.file, "end_of_document": tokenizer.end_of_document}
            write_atomic(facts, json.dumps(end).encode())
        return units.load_tokenizer(self.work)

    def _train_tokenizer(self, pool: Pool, job: Job, kept: Kept) -> Tokenizer:
        get_logger().info(f"training a {self.config.tokenizer.kind} of {self.config.tokenizer.vocab_size} tokens")
        total = sum(pool(units.training_bytes, ((unit, removed, job) for unit, removed in kept())))
        if not total:
            raise ConfigError(
                f"validation_every={self.config.validation_every}: no document is left for training, so that no "
                "tokenizer can be trained; give more text, or validation_every=0"
            )
        share = min(self.config.tokenizer.sample_mib * 2**20 / total, 1.0)
        passes = 1 if self.config.tokenizer.kind == "bpe" else 2

        def texts() -> Iterator[str]:
            """The training split in input order, or a sample of it."""
            for found in pool(units.training_sample, ((unit, removed, share, job) for unit, removed in kept())):
                for text in found:
                    bar.advance(len(text.encode()))
                    yield text

        with self._bar(passes * total * share, "bytes", "read for the tokenizer") as bar:
            return train_tokenizer(texts, self.config.tokenizer)

    # -- pass 4: tokens ---------------------------------------------------------------------------------------------

    def _encode(self, pool: Pool, job: Job, kept: Kept) -> dict[str, int]:
        """Tokenise every unit; returns the tokens of each split."""
        totals = dict.fromkeys(SPLITS, 0)
        documents = (len(removed) for _, removed in kept())
        results = pool(units.encode_unit, ((unit, removed, job) for unit, removed in kept()))
        with self._bar(sum(len(removed) for _, removed in kept()), "documents", "tokenise") as bar:
            for count, found in zip(documents, results, strict=True):
                for split, (_, tokens) in found.items():
                    totals[split] += tokens
                bar.advance(count)
        return totals

    # -- pass 5: shards ---------------------------------------------------------------------------------------------

    def _write_shards(self, pool: Pool, job: Job, numbers: list[int], tokens: dict[str, int]) -> dict[str, SplitInfo]:
        splits: dict[str, SplitInfo] = {}
        with self._bar(sum(tokens.values()), "tokens", "write shards") as bar:
            for split in SPLITS:
                infos = []
                lengths = pool(units.token_lengths, ((unit, split, job) for unit in numbers))
                plan = units.plan_shards(zip(numbers, lengths, strict=True), self.config.shard_tokens)
                tasks = ((split, number, pieces, job) for number, pieces in enumerate(plan))
                for info in pool(units.write_shard, tasks):
                    infos.append(ShardInfo(**info))
                    bar.advance(info["tokens"])
                splits[split] = SplitInfo.of(infos)
        return splits

    # -- the manifest -----------------------------------------------------------------------------------------------

    def _manifest(
        self, tokenizer: Tokenizer, splits: dict[str, SplitInfo], cleaned: dict[str, Any], removed: np.ndarray
    ) -> Manifest:
        counts = cleaned["counts"]
        return Manifest(
            tokenizer={
                "file": tokenizer.file,
                "sha256": tokenizer.sha256,
                "vocab_size": tokenizer.vocab_size,
                "end_of_document": tokenizer.end_of_document,
            },
            dtype=tokenizer.dtype.name,
            splits=splits,
            source=self.source | {"files": self._file_facts(cleaned)},
            recipe=self.config.recipe(),
            counts={
                "records": counts["all"].get("records", 0),
                "broken": len(cleaned["broken"]),
                "files_without_records": cleaned["barren"],
                "empty": counts["all"].get("empty", 0),
                "filtered": counts["filters"],
                "duplicates": {"exact": int((removed == 1).sum()), "near": int((removed == 2).sum())},
                "documents": sum(split.documents for split in splits.values()),
                "changed_by_cleaning": counts["cleaning"],
            },
            versions=state.versions(self.config, self.files, tokenizer),
        )

    def _file_facts(self, cleaned: dict[str, Any]) -> list[dict[str, Any]]:
        hashes = {int(number): sha256 for number, sha256 in cleaned["sha256"].items()}
        return [
            {"name": f.name, "bytes": f.size, "sha256": hashes.get(number) or None} | ({"tag": f.tag} if f.tag else {})
            for number, f in enumerate(self.files)
        ]

    def _bar(
        self, total: float | None, unit: str, description: str, completed: float = 0
    ) -> AbstractContextManager[Bar]:
        return show(total, unit, description, completed=completed, quiet=self.quiet)


def _open_tokenizer(config: PrepareConfig) -> Tokenizer:
    options = config.tokenizer
    assert options.path is not None
    return Tokenizer.load(options.path, end_of_document=options.end_of_document, pattern=options.pattern)


def _warn(lines: list[str], what: str) -> None:
    """The first of many warnings, and how many there are."""
    for line in lines[:BROKEN_SHOWN]:
        get_logger().warning(line)
    if len(lines) > BROKEN_SHOWN:
        get_logger().warning(f"... {len(lines)} {what}")


def _by_unit(documents: list[tuple[int, int]], removed: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(unit, which of its documents are removed, bool) for each unit, of which `documents` gives number and count."""
    first = 0
    for unit, count in documents:
        yield unit, removed[first : first + count] > 0
        first += count


def _totals(manifest: Manifest) -> str:
    parts = [f"{name} {s.documents:,} documents, {s.tokens:,} tokens" for name, s in sorted(manifest.splits.items())]
    return "; ".join(parts)


@contextmanager
def _explained(output: Path) -> Iterator[None]:
    """One line in place of a traceback for what the file system refuses, and for Ctrl-C."""
    try:
        yield
    except PermissionError as error:
        raise ConfigError(f"{error.filename or output}: no write permission; choose another output=") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise RunError(f"{error.filename or output}: {error.strerror or error}; run again to go on") from None
        free = shutil.disk_usage(output).free >> 20
        raise RunError(
            f"{output}: the disk is full ({free} MiB free); make room and run again: it goes on where it stopped"
        ) from None
    except KeyboardInterrupt:
        raise RunError(f"{output}: interrupted; run again to go on where it stopped") from None
