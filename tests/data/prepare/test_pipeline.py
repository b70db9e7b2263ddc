"""prepare from end to end: what comes out, that it is the same bytes always, and what a user is told."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from shardwright.config import ConfigError, RunError
from shardwright.data.manifest import Manifest
from shardwright.data.prepare import PrepareConfig, prepare, state
from shardwright.data.prepare.starts import sentence_starts
from shardwright.data.shards import Shard
from shardwright.data.tokenizers import Tokenizer

SMALL = {"vocab_size": 300}


def run(input_, output, **options):
    inputs = [str(item) for item in (input_ if isinstance(input_, list) else [input_])]
    options = {"tokenizer": SMALL, "workers": 1, "validation_every": 5} | options
    return prepare(PrepareConfig(input=inputs, output=str(output), **options), progress=False)


def documents(output: Path, split: str = "train"):
    """Decoded documents of a split, read through the index."""
    manifest, tokenizer = Manifest.load(output), Tokenizer.load(output)
    for info in manifest.split(split).shards:
        shard = Shard(output / info.path, output / info.index, info.index_sha256)
        for n in range(len(shard.document_bytes)):
            tokens = shard.tokens(int(shard.document_offsets[n]), int(shard.document_offsets[n + 1]))
            assert tokens[-1] == manifest.end_of_document
            text = tokenizer.decode(tokens[:-1])
            assert shard.document_bytes[n] == len(text.encode())
            yield text


# --- what comes out -------------------------------------------------------------------------------------------------


def test_documents_come_back_from_the_shards(tmp_path, jsonl, english, poems):
    texts = [t[:3000].strip() for t in english] + poems[:80]
    manifest = run(jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", shard_tokens=8192)
    train, validation = list(documents(tmp_path / "out")), list(documents(tmp_path / "out", "validation"))
    from shardwright.data.prepare.units import is_validation

    assert validation == [t for t in texts if is_validation(t, 5)]
    assert train == [t for t in texts if not is_validation(t, 5)]
    assert len(manifest.splits["train"].shards) > 3
    assert manifest.counts["documents"] == manifest.counts["records"] == len(texts)
    assert Manifest.load(tmp_path / "out") == manifest
    with tarfile.open(tmp_path / "out" / manifest.splits["train"].shards[0].path) as tar:
        names = tar.getnames()
    assert names[0].endswith(".json") and names[1].endswith(".tokens")
    assert not (tmp_path / "out" / ".prepare").exists()


@pytest.mark.slow
def test_bundled_english_has_17_validation_documents(tmp_path):
    manifest = run("bundled:english", tmp_path / "out", validation_every=20, tokenizer={**SMALL, "sample_mib": 1})
    assert (manifest.splits["validation"].documents, manifest.splits["train"].documents) == (17, 351)
    assert manifest.source["files"][0]["name"] == "bundled:english"
    assert len(manifest.source["files"][0]["sha256"]) == 64


def test_every_record_is_accounted_for(tmp_path, english, poems):
    lines = [{"text": t} for t in english[:20]]
    lines += [{"text": english[0]}, {"text": english[1] + " More."}, {"text": "  \n"}, {"text": "tiny"}, {"body": "x"}]
    lines += [{"text": poems[0]}, {"text": english[2].replace("Congress", "Congress (me@x.org)", 1)}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = tmp_path / "quiz.jsonl"
    evaluation.write_text(json.dumps({"q": english[5][500:700]}))
    manifest = run(
        path,
        tmp_path / "out",
        on_error="skip",
        dedup={"near": True},
        filters={
            "languages": ["en"], "language_confidence": 0.2, "min_characters": 10, "mask_emails": "<email>",
            "decontaminate": [str(evaluation)],
        },
    )  # fmt: skip
    counts = manifest.counts
    assert counts["broken"] == 1 and counts["empty"] == 1
    assert counts["filtered"] == {"length": 1, "language": 1, "contamination": 1}
    assert counts["duplicates"] == {"exact": 1, "near": 2}
    assert counts["changed_by_cleaning"]["masked_emails"] == 1
    left_out = sum([counts["broken"], counts["empty"], *counts["filtered"].values(), *counts["duplicates"].values()])
    assert counts["records"] == len(lines) == counts["documents"] + left_out
    (skipped,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(skipped) == {
        "file": "a.jsonl",
        "where": "line 25",
        "reason": "no field 'text'; it has body: say text_field=",
    }
    assert manifest.source["evaluation"][0]["name"] == "quiz.jsonl"


def test_starts(tmp_path, jsonl, english, poems):
    texts = [t[:2000].strip() for t in english[:8]] + poems[:8]
    manifest = run(jsonl(tmp_path / "a.jsonl", texts), tmp_path / "out", starts=True, validation_every=0)
    info = manifest.splits["train"].shards[0]
    shard = Shard(tmp_path / "out" / info.path, tmp_path / "out" / info.index)
    tokenizer = Tokenizer.load(tmp_path / "out")
    for n, text in enumerate(texts):
        begin, end = (int(x) for x in shard.document_offsets[n : n + 2])
        marks = shard.sentence_starts[(shard.sentence_starts >= begin) & (shard.sentence_starts < end)]
        assert len(marks) == len(sentence_starts(text))
        places = [*marks, end - 1]
        pieces = [tokenizer.decode(shard.tokens(int(a), int(b))) for a, b in zip(places, places[1:], strict=False)]
        starts = [*sentence_starts(text), len(text)]
        assert [p.strip() for p in pieces] == [text[a:b].strip() for a, b in zip(starts, starts[1:], strict=False)]
    assert len(shard.word_starts) > len(shard.sentence_starts)


def test_given_tokenizers(tmp_path, jsonl, english):
    first = run(jsonl(tmp_path / "a.jsonl", english[:6]), tmp_path / "one", validation_every=0)
    again = run(tmp_path / "a.jsonl", tmp_path / "two", validation_every=0, tokenizer={"path": str(tmp_path / "one")})
    assert again.tokenizer == first.tokenizer
    assert again.splits["train"].shards[0].sha256 == first.splits["train"].shards[0].sha256


# --- the same bytes always ------------------------------------------------------------------------------------------

RECIPE = {
    "tokenizer": {"vocab_size": 400, "sample_mib": 1},
    "shard_tokens": 65536,
    "dedup": {"exact": True, "near": False},
}
SCRIPT = """
import sys, json
from shardwright.data.prepare import PrepareConfig, prepare
if __name__ == "__main__":
    prepare(PrepareConfig.model_validate_json(sys.argv[1]), progress=False)
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, english):
    """5 MB in three files, one of them compressed: several units, of which some go across files."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [f"{n} {text}" for n in range(6) for text in english]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines[:60]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[60:]).encode(), mtime=0))
    (folder / "c.jsonl").write_text("".join(lines[:5]))
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory, digests):
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run(corpus, output, **RECIPE)
    return digests(output)


def start(config, folder):
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return subprocess.Popen(
        [sys.executable, str(script), config.model_dump_json()],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process, condition):
    """kill -9 of the whole process group as soon as the condition holds; False if it ended before."""
    while process.poll() is None:
        if condition():
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return False


def test_workers_do_not_show(corpus, undisturbed, tmp_path, digests):
    run(corpus, tmp_path / "out", workers=3, **RECIPE)
    assert digests(tmp_path / "out") == undisturbed
    assert len([name for name in undisturbed if name.endswith(".tar")]) > 10


@pytest.mark.faults
def test_kills_do_not_show(corpus, undisturbed, tmp_path, digests):
    """kill -9 of the process group in the middle of cleaning, of tokenising and of writing shards, then to the end."""
    output = tmp_path / "out"
    work = output / ".prepare"
    config = PrepareConfig(input=[str(corpus)], output=str(output), workers=2, validation_every=5, **RECIPE)
    moments = [
        lambda: any(work.glob("clean/*/*.part")),
        lambda: any(work.glob("tokens/*/*.part")),
        lambda: len(list(work.glob("shards/*/*/*.idx"))) > 2,
    ]
    killed = [kill_when(start(config, tmp_path), moment) for moment in moments]
    assert killed[:2] == [True, True]
    assert not (output / "manifest.json").exists() or not killed[2]
    kill_when(start(config, tmp_path), lambda: False)
    assert digests(output) == undisturbed


@pytest.mark.faults
def test_workers_die_with_a_killed_parent(corpus, tmp_path):
    config = PrepareConfig(input=[str(corpus)], output=str(tmp_path / "out"), workers=2, **RECIPE)
    process = start(config, tmp_path)
    children: list[int] = []
    while len(children) < 2 and process.poll() is None:
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not listed.exists():
            pytest.skip("this system does not list child processes")
        children = [int(c) for c in listed.read_text().split() if b"spawn_main" in cmdline(int(c))]
    while not any((tmp_path / "out" / ".prepare").glob("clean/*/*.part")):
        assert process.poll() is None
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while any(cmdline(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(cmdline(child) for child in children)


@pytest.mark.faults
def test_a_dead_worker_is_told(corpus, tmp_path):
    config = PrepareConfig(input=[str(corpus)], output=str(tmp_path / "out"), workers=2, **RECIPE)
    process = start(config, tmp_path)
    workers: list[int] = []
    while not workers:
        assert process.poll() is None
        listed = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        if not listed.exists():
            pytest.skip("this system does not list child processes")
        workers = [int(c) for c in listed.read_text().split() if b"spawn_main" in cmdline(int(c))]
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "RunError: a worker process of prepare died" in errors


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("moment", range(4))
def test_stopped_while_publishing(corpus, undisturbed, tmp_path, digests, monkeypatch, moment):
    """An error at each step of moving the result to its place; the next run finishes it."""
    output, calls = tmp_path / "out", []

    def counted(function):
        def call(*arguments, **options):
            calls.append(function)
            if len(calls) == moment + 1:
                raise OSError("stopped")
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(state.os, "rename", counted(os.rename))
    monkeypatch.setattr(Tokenizer, "save", counted(Tokenizer.save))
    monkeypatch.setattr(state.Manifest, "load", counted(Manifest.load))
    with pytest.raises(RunError, match="stopped; run again to go on"):
        run(corpus, output, **RECIPE)
    monkeypatch.undo()
    assert not (output / "manifest.json").exists()
    run(corpus, output, **RECIPE)
    assert digests(output) == undisturbed


# --- again, and otherwise -------------------------------------------------------------------------------------------


def test_a_second_run_is_done_at_once(tmp_path, jsonl, poems, digests):
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    first = run(path, tmp_path / "out")
    before = digests(tmp_path / "out")
    assert dataclasses.asdict(run(path, tmp_path / "out", workers=2))["splits"] == dataclasses.asdict(first)["splits"]
    assert digests(tmp_path / "out") == before
    path.unlink()
    run(path, tmp_path / "out")  # the corpus may be gone by now


def test_another_recipe_or_input_is_refused(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    run(path, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"recipe \(tokenizer.vocab_size was 300, now 400\); choose another output="):
        run(path, tmp_path / "out", tokenizer={"vocab_size": 400})
    jsonl(path, poems[:49])
    with pytest.raises(ConfigError, match=r"is prepared from other input \(a.jsonl of \d+ bytes then"):
        run(path, tmp_path / "out")


def test_unfinished_work_of_another_recipe_is_refused(tmp_path, jsonl, english, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [t * 4 for t in english])
    path.write_text(path.read_text() + "broken\n")
    with pytest.raises(ConfigError, match="on_error=skip"):
        run(path, tmp_path / "out")
    with pytest.raises(ConfigError, match="on_error=skip"):  # a few seconds' work starts over
        run(path, tmp_path / "out", filters={"min_characters": 2})
    with pytest.raises(ConfigError, match="on_error=skip"):
        run(path, tmp_path / "out")
    monkeypatch.setattr(state, "WORTH_KEEPING", 1)
    with pytest.raises(ConfigError, match="unfinished preparation is of another recipe .tokenizer.vocab_size was 300"):
        run(path, tmp_path / "out", tokenizer={"vocab_size": 400})
    assert run(path, tmp_path / "out", on_error="skip").counts["broken"] == 1


def test_mended_input_goes_on(tmp_path, jsonl, english, poems, digests):
    jsonl(tmp_path / "a.jsonl", [t * 4 for t in english])
    path = jsonl(tmp_path / "b.jsonl", poems[:200])
    whole = path.read_text()
    path.write_text(whole + "broken\n")
    with pytest.raises(ConfigError, match="b.jsonl: line 201: not valid JSON.*on_error=skip"):
        run(tmp_path, tmp_path / "out")
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("clean/*/*.part")}
    assert kept
    path.write_text(whole)
    run(tmp_path / "*.jsonl", tmp_path / "out2")
    run(tmp_path, tmp_path / "out")
    assert digests(tmp_path / "out")["train/000/00000.tar"] == digests(tmp_path / "out2")["train/000/00000.tar"]


def test_two_at_once_are_refused(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    with state.locked(tmp_path / "out"), pytest.raises(ConfigError, match="another prepare is at work there"):
        run(path, tmp_path / "out")
    run(path, tmp_path / "out")


def test_foreign_output_is_left_alone(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="holds files that prepare did not write"):
        run(path, tmp_path / "out")
    with pytest.raises(ConfigError, match="expected a local folder"):
        run(path, "s3://bucket/x")


# --- what the user is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_input_is_fatal_with_file_line_and_remedy(tmp_path, jsonl, poems, workers):
    jsonl(tmp_path / "a.jsonl", poems[:5])
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    (tmp_path / "c.jsonl").touch()
    with pytest.raises(ConfigError) as error:
        run(tmp_path, tmp_path / "out", workers=workers)
    assert str(error.value) == (
        "b.jsonl: line 2: field 'text' is of type int, expected text "
        "(or leave such input out, counted, with on_error=skip)"
    )


def test_truncated_gzip_is_skipped_with_what_came_before(tmp_path, poems):
    data = "".join(json.dumps({"text": t}) + "\n" for t in poems)
    packed = gzip.compress(data.encode(), mtime=0)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    manifest = run(tmp_path / "a.jsonl.gz", tmp_path / "out", on_error="skip")
    assert manifest.counts["broken"] == 1 and manifest.counts["documents"] > 50
    assert "cut off" in (tmp_path / "out" / "skipped.jsonl").read_text()


def test_nothing_left_and_no_training_text(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    with pytest.raises(ConfigError, match="no document is left; counts:"):
        run(path, tmp_path / "out", filters={"min_characters": 10**6})
    with pytest.raises(ConfigError, match="validation_every=1: no document is left for training"):
        run(path, tmp_path / "out2", validation_every=1)


def test_wrong_tokenizer_is_told_before_any_work(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    with pytest.raises(ConfigError, match="no such tokenizer file or folder"):
        run(path, tmp_path / "out", tokenizer={"path": str(tmp_path / "none.json")})
    with pytest.raises(ValidationError, match="give either train or path, not both"):
        run(path, tmp_path / "out", tokenizer={"path": "x", "train": "bpe"})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        run(path, tmp_path / "locked" / "out")


def test_full_disk_is_one_line(tmp_path, jsonl, poems, monkeypatch):
    import errno

    from shardwright.data.prepare import units

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    path = jsonl(tmp_path / "a.jsonl", poems[:3])
    monkeypatch.setattr(units, "write_atomic", full)
    with pytest.raises(RunError, match="the disk is full .* make room and run again"):
        run(path, tmp_path / "out")
    monkeypatch.undo()
    assert run(path, tmp_path / "out", validation_every=0).counts["documents"] == 3


def test_dtype_of_tokens(tmp_path, jsonl, poems):
    manifest = run(jsonl(tmp_path / "a.jsonl", poems[:9]), tmp_path / "out", validation_every=0)
    info = manifest.splits["train"].shards[0]
    assert manifest.dtype == "uint16"
    assert Shard(tmp_path / "out" / info.path, tmp_path / "out" / info.index).tokens(0, 3).dtype == np.dtype("<u2")
