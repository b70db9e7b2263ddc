"""The preparation from end to end, in five passes, each of which goes on where it was killed.

clean (units in parallel) -> duplicates (one process, input order) -> tokenizer -> tokens (units in parallel) -> shards
(in parallel). Units are cut from the input at fixed places, every intermediate file is a pure function of its unit and
the recipe and stands under its name only when whole; so the result is the same bytes for any number of workers and
kills. Intermediate files lie in OUTPUT/.prepare, which takes about as much room as the uncompressed text.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from shardwright.config import ConfigError, RunError
from shardwright.data.manifest import Manifest, ShardInfo, SplitInfo, write_atomic
from shardwright.data.prepare import state, units
from shardwright.data.prepare.dedup import check_dedup, exact_duplicates, near_duplicates
from shardwright.data.prepare.filters import check_languages, contamination_of
from shardwright.data.prepare.inputs import list_inputs
from shardwright.data.prepare.options import PrepareConfig
from shardwright.data.prepare.pool import Pool, build_pool, num_workers
from shardwright.data.prepare.readers import read_inputs
from shardwright.data.prepare.records import cut_units
from shardwright.data.prepare.units import SPLITS, Job
from shardwright.data.prepare.vocabulary import check_pattern, describe, train_tokenizer
from shardwright.data.tokenizers import Tokenizer, files_of
from shardwright.log import Bar, get_logger
from shardwright.log import progress as show

BROKEN_SHOWN = 10


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
        return _Preparation(config, output, work, quiet=None if progress else True).run()


class _Preparation:
    """One run over one output folder."""

    def __init__(self, config: PrepareConfig, output: Path, work: Path, quiet: bool | None) -> None:
        self.config, self.output, self.work, self.quiet = config, output, work, quiet
        check_languages(config.filters.languages)
        check_dedup(config.dedup)
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
        job = Job(str(self.work), self.config.for_workers(), json.dumps(self.source))
        with build_pool(num_workers(self.config.workers)) as pool:
            cleaned = self._clean(pool, job)
            removed = self._find_duplicates(job, cleaned)
            tokenizer = self._tokenizer(job, cleaned, removed)
            job = job._replace(key=tokenizer.sha256)
            self._encode(pool, job, cleaned, removed)
            splits = self._write_shards(pool, job, cleaned)
        state.save_skipped(self.work, self._broken_lines(cleaned))
        self._manifest(tokenizer, splits, cleaned, removed).save(self.work)

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
        if not sum(cleaned["documents"]):
            raise ConfigError(f"input={', '.join(self.config.input)}: no document is left; counts: {cleaned['counts']}")
        return cleaned

    def _clean_units(self, pool: Pool, job: Job) -> dict[str, Any]:
        done, file, behind = state.cleaned_units(job, self.files)
        facts: list[dict[str, Any]] = [*done]
        sizes = [f.size for f in self.files]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        skipped = sum(f.size or 0 for f in self.files[:file])
        if done:
            get_logger().info(f"{self.output}: going on after {len(done)} finished units")
        with self._bar(total, "bytes", "clean", skipped) as bar:
            records = read_inputs(self.files, self.config, first_file=file, behind=behind, advance=bar.advance)
            tasks = ((unit, job) for unit in cut_units(records, len(done), file, behind))
            for unit_facts in pool(units.clean_unit, tasks):
                if unit_facts["broken"] and self.config.on_error == "fatal":
                    self._fail(unit_facts["broken"][0])
                facts.append(unit_facts)
        return self._summarise(facts)

    def _summarise(self, facts: list[dict[str, Any]]) -> dict[str, Any]:
        """One summary of all units: counts added up, broken records and hashes of files in input order."""
        counts: dict[str, Counter[str]] = {}
        for unit in facts:
            for group, values in unit["counts"].items():
                counts.setdefault(group, Counter()).update(values)
        broken = [entry for unit in facts for entry in unit["broken"]]
        _warn([f"left out: {self._describe(entry)}" for entry in broken], "broken records; skipped.jsonl lists them")
        with_records = {file for unit in facts for file, _ in unit["records"]}
        barren = [self.files[file].shown for unit in facts for file, _ in unit["ends"] if file not in with_records]
        _warn([f"{name}: holds no record (line, row, member, page); take it out" for name in barren], "such files")
        return {
            "documents": [unit["documents"] for unit in facts],
            "counts": {group: dict(sorted(values.items())) for group, values in sorted(counts.items())},
            "broken": broken,
            "barren": len(barren),
            "sha256": dict(entry for unit in facts for entry in unit["ends"]),
        }

    def _fail(self, entry: list[Any]) -> None:
        raise ConfigError(f"{self._describe(entry)} (or leave such input out, counted, with on_error=skip)")

    def _describe(self, entry: list[Any]) -> str:
        file, where, reason = entry
        return f"{self.files[file].shown}: {where}: {reason}"

    def _broken_lines(self, cleaned: dict[str, Any]) -> list[dict[str, str]]:
        return [{"file": self.files[f].shown, "where": where, "reason": why} for f, where, why in cleaned["broken"]]

    # -- pass 2: duplicates -----------------------------------------------------------------------------------------

    def _find_duplicates(self, job: Job, cleaned: dict[str, Any]) -> np.ndarray:
        """uint8 [documents] in input order: 0 stays, 1 an exact duplicate, 2 a near one."""
        path = self.work / "duplicates.npy"
        count = sum(cleaned["documents"])
        if path.exists():
            return np.load(path)
        removed = np.zeros(count, np.uint8)
        if self.config.dedup.exact:
            prints = [a["fingerprints"] for a in self._parts(job, cleaned, ("fingerprints",))]
            removed[exact_duplicates(np.concatenate(prints))] = 1
        if self.config.dedup.near:
            with self._bar(count, "documents", "near-duplicates") as bar:
                signatures = self._signatures(job, cleaned, removed, bar)
                removed[near_duplicates(signatures, count, self.config.dedup, self.config.seed)] = 2
        state.save_array(path, removed)
        return removed

    def _signatures(self, job: Job, cleaned: dict[str, Any], removed: np.ndarray, bar: Bar) -> Iterator[Any]:
        number = 0
        for arrays in self._parts(job, cleaned, ("signatures",)):
            for values in arrays["signatures"]:
                yield None if removed[number] else values
                number += 1
                bar.advance()

    @staticmethod
    def _parts(job: Job, cleaned: dict[str, Any], names: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
        for unit in range(len(cleaned["documents"])):
            yield units.read_part(job.part("clean", unit), names)[0]

    # -- pass 3: tokenizer ------------------------------------------------------------------------------------------

    def _tokenizer(self, job: Job, cleaned: dict[str, Any], removed: np.ndarray) -> Tokenizer:
        facts = self.work / "tokenizer.facts"
        if not facts.exists():
            if self.config.tokenizer.path is not None:
                tokenizer = _open_tokenizer(self.config)
            else:
                tokenizer = self._train_tokenizer(job, cleaned, removed)
            tokenizer.save(self.work / tokenizer.file)
            end = {"file": tokenizer.file, "end_of_document": tokenizer.end_of_document}
            write_atomic(facts, json.dumps(end).encode())
        return units.load_tokenizer(self.work)

    def _train_tokenizer(self, job: Job, cleaned: dict[str, Any], removed: np.ndarray) -> Tokenizer:
        get_logger().info(f"training a {self.config.tokenizer.kind} of {self.config.tokenizer.vocab_size} tokens")
        total = sum(int(sizes.sum()) for sizes in self._training_sizes(job, cleaned, removed))
        if not total:
            raise ConfigError(
                f"validation_every={self.config.validation_every}: no document is left for training, so that no "
                "tokenizer can be trained; give more text, or validation_every=0"
            )
        share = min(self.config.tokenizer.sample_mib * 2**20 / total, 1.0)
        passes = 1 if self.config.tokenizer.kind == "bpe" else 2
        with self._bar(passes * total * share, "bytes", "read for the tokenizer") as bar:
            texts = partial(self._training_texts, job, cleaned, removed, share, bar)
            return train_tokenizer(texts, self.config.tokenizer)

    def _training_sizes(self, job: Job, cleaned: dict[str, Any], removed: np.ndarray) -> Iterator[np.ndarray]:
        """UTF-8 bytes of the training documents, unit by unit."""
        offsets = np.cumsum([0, *cleaned["documents"]])
        for unit, arrays in enumerate(self._parts(job, cleaned, ("offsets", "validation"))):
            stays = removed[offsets[unit] : offsets[unit + 1]] == 0
            yield np.diff(arrays["offsets"])[stays & (arrays["validation"] == 0)]

    def _training_texts(
        self, job: Job, cleaned: dict[str, Any], removed: np.ndarray, share: float, bar: Bar | None = None
    ) -> Iterator[str]:
        """Texts of the training split in input order; a share below 1 is a sample by the texts' hashes."""
        offsets = np.cumsum([0, *cleaned["documents"]])
        for unit, arrays in enumerate(self._parts(job, cleaned, ("text", "offsets", "validation"))):
            arrays["removed"] = removed[offsets[unit] : offsets[unit + 1]] > 0
            for text in units.split_texts(arrays, "train"):
                if share < 1 and not _in_sample(text, share, self.config.seed):
                    continue
                if bar is not None:
                    bar.advance(len(text.encode()))
                yield text

    # -- pass 4: tokens ---------------------------------------------------------------------------------------------

    def _encode(self, pool: Pool, job: Job, cleaned: dict[str, Any], removed: np.ndarray) -> None:
        offsets = np.cumsum([0, *cleaned["documents"]])
        tasks = (
            (unit, removed[offsets[unit] : offsets[unit + 1]] > 0, job) for unit in range(len(cleaned["documents"]))
        )
        with self._bar(int(offsets[-1]), "documents", "tokenise") as bar:
            for count, _ in zip(cleaned["documents"], pool(units.encode_unit, tasks), strict=True):
                bar.advance(count)

    # -- pass 5: shards ---------------------------------------------------------------------------------------------

    def _write_shards(self, pool: Pool, job: Job, cleaned: dict[str, Any]) -> dict[str, SplitInfo]:
        plans = {split: self._plan(split, job, len(cleaned["documents"])) for split in SPLITS}
        splits: dict[str, SplitInfo] = {}
        with self._bar(sum(map(len, plans.values())), "shards", "write shards") as bar:
            for split, plan in plans.items():
                infos = []
                tasks = ((split, number, pieces, job) for number, pieces in enumerate(plan))
                for info in pool(units.write_shard, tasks):
                    infos.append(ShardInfo(**info))
                    bar.advance()
                splits[split] = SplitInfo.of(infos)
        return splits

    def _plan(self, split: str, job: Job, num_units: int) -> list[list[units.Piece]]:
        name = f"{split}.lengths"
        lengths = [units.read_part(job.part("tokens", unit), (name,))[0][name] for unit in range(num_units)]
        return units.plan_shards(lengths, self.config.shard_tokens)

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


def _in_sample(text: str, share: float, seed: int) -> bool:
    digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
    return int.from_bytes(digest[:8], "little") < share * 2**64


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
