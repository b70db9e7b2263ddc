"""The same bytes whatever happens on the way: workers, kills, a second run, changed input."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardwright.config import ConfigError, RunError
from shardwright.data.manifest import Manifest
from shardwright.data.prepare import PrepareConfig, prepare, records, state
from shardwright.data.tokenizers import Tokenizer


def run(input_, output, **options):
    options = {"tokenizer": {"vocab_size": 300}, "workers": 1, "validation_every": 5} | options
    return prepare(PrepareConfig(input=[str(input_)], output=str(output), **options), progress=False)


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
    texts = [f"{n} {text}" for n in range(5) for text in english]
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
def test_stopped_while_publishing(tmp_path, jsonl, poems, digests, monkeypatch, moment):
    """An error at each step of moving the result to its place; the next run finishes it."""
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    run(path, tmp_path / "undisturbed")
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
        run(path, output)
    monkeypatch.undo()
    assert not (output / "manifest.json").exists()
    run(path, output)
    assert digests(output) == digests(tmp_path / "undisturbed")


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


def test_changed_files_of_the_same_size_are_noticed(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    evaluation = jsonl(tmp_path / "test.jsonl", ["What is it? " * 9])
    filters = {"decontaminate": [str(evaluation)]}
    run(path, tmp_path / "out", filters=filters)
    run(path, tmp_path / "out", filters=filters)
    was = evaluation.read_text()
    evaluation.write_text(was.replace("What", "That"))
    with pytest.raises(ConfigError, match=r"from other input \(.*test.jsonl has changed"):
        run(path, tmp_path / "out", filters=filters)
    evaluation.write_text(was)
    path.write_text(path.read_text().replace(poems[0][0], poems[1][0]))
    with pytest.raises(ConfigError, match=r"from other input \(.*a.jsonl has changed"):
        run(path, tmp_path / "out", filters=filters)


def test_changed_remote_files_are_noticed_by_what_their_file_system_says(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    os.utime(path, (1, 1))
    url, filters = (
        f"file://{path}",
        {"decontaminate": [f"file://{jsonl(tmp_path / 'test.jsonl', ['What is it? ' * 9])}"]},
    )
    (file,) = run(url, tmp_path / "out", filters=filters).source["files"]
    assert file["tag"] == "1.0"
    run(url, tmp_path / "out", filters=filters)
    os.utime(path, (2, 2))
    with pytest.raises(ConfigError, match=r"from other input \(file:///.*/a.jsonl has changed"):
        run(url, tmp_path / "out", filters=filters)
    os.utime(path, (1, 1))
    os.utime(tmp_path / "test.jsonl", (1, 1))
    with pytest.raises(ConfigError, match=r"from other input \(file:///.*/test.jsonl has changed"):
        run(url, tmp_path / "out", filters=filters)
    (tmp_path / "test.jsonl").unlink()
    path.unlink()
    run(url, tmp_path / "out", filters=filters)  # the corpus may be gone by now


def test_changed_remote_files_are_read_again(tmp_path, jsonl, poems, monkeypatch):
    monkeypatch.setattr(records, "UNIT_BYTES", 1000)
    jsonl(tmp_path / "a.jsonl", poems[:50])
    bad = jsonl(tmp_path / "b.jsonl", poems[50:60])
    whole = bad.read_text()
    bad.write_text(whole + "broken\n")
    url = f"file://{tmp_path}/*.jsonl"
    with pytest.raises(ConfigError, match="on_error=skip"):
        run(url, tmp_path / "out")
    assert len(list((tmp_path / "out").rglob("clean/*/*.part"))) > 3
    jsonl(tmp_path / "a.jsonl", [t[::-1] for t in poems[:50]])
    bad.write_text(whole)
    run(url, tmp_path / "out")
    run(url, tmp_path / "out2")
    assert [s.sha256 for s in Manifest.load(tmp_path / "out").splits["train"].shards] == [
        s.sha256 for s in Manifest.load(tmp_path / "out2").splits["train"].shards
    ]


def test_a_server_out_of_reach_is_no_change(tmp_path, jsonl, poems, capsys):
    import threading
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    jsonl(tmp_path / "a.jsonl", poems[:50])
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/a.jsonl"
    try:
        first = run(url, tmp_path / "out")
        assert first.source["files"][0]["tag"].endswith(" GMT")
    finally:
        server.shutdown()
        server.server_close()
    assert run(url, tmp_path / "out") == first
    assert "believed to be as it was" in capsys.readouterr().err


def test_above_the_limit_only_younger_files_are_hashed(tmp_path, jsonl, poems, monkeypatch):
    monkeypatch.setattr(state, "HASHED_BYTES", 10)
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    run(path, tmp_path / "out")
    run(path, tmp_path / "out")
    path.write_text(path.read_text().replace(poems[0][0], poems[1][0]))
    with pytest.raises(ConfigError, match="a.jsonl has changed"):
        run(path, tmp_path / "out")
    os.utime(path, (0, 0))
    run(path, tmp_path / "out")


def test_parquet_input_is_hashed_too(tmp_path, poems):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": poems[:50]}), path)
    (file,) = run(path, tmp_path / "out").source["files"]
    assert file["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["deleted", "cut", "altered", "index", "tokenizer"])
def test_a_damaged_output_is_made_again(tmp_path, jsonl, poems, digests, damage):
    path, output = jsonl(tmp_path / "a.jsonl", poems[:50]), tmp_path / "out"
    run(path, output)
    whole = digests(output)
    shard = output / "train" / "000" / "00000.tar"
    if damage == "deleted":
        shutil.rmtree(output / "validation")
    elif damage in ("cut", "altered"):
        shard.chmod(0o644)
        data = bytearray(shard.read_bytes())
        data[600] ^= 1
        shard.write_bytes(data[:-1] if damage == "cut" else data)
    else:
        (shard.with_suffix(".idx") if damage == "index" else output / "tokenizer.json").unlink()
    assert digests(output) != whole
    moved = path.rename(tmp_path / "moved")
    with pytest.raises(ConfigError, match="a.jsonl: no such file"):
        run(path, output)  # and nothing of the rest is lost
    assert (output / "manifest.json").exists()
    moved.rename(path)
    run(path, output)
    assert digests(output) == whole


def test_a_manifest_that_is_none_is_refused(tmp_path, jsonl, poems):
    path = jsonl(tmp_path / "a.jsonl", poems[:50])
    run(path, tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="not a shard manifest.*; delete the folder to prepare it again"):
        run(path, tmp_path / "out")
