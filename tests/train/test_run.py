"""The loop as a whole, on real text: it learns, resumes bit for bit, and says what is wrong in one line."""

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from shardwright.checkpoint import CheckpointError, find_newest
from shardwright.config import ConfigError, RunError, to_yaml
from shardwright.train.load import load
from shardwright.train.metrics import read_metrics
from shardwright.train.run import train


def losses(folder: str | Path) -> dict[int, float]:
    """Loss by step, as logged."""
    return {r["step"]: r["loss"] for r in read_metrics(Path(folder)) if "loss" in r}


def test_a_run_learns_and_a_second_call_says_that_it_is_done(tiny, caplog):
    config = tiny("train.steps=30")
    first = train(config)
    curve = losses(config.run)
    assert len(curve) == 30 and curve[30] < curve[1] - 0.5
    assert first.val_bits_per_byte == pytest.approx(first.val_loss / 0.6931 * _tokens_per_byte(config), rel=1e-3)
    before = (Path(config.run) / "metrics.jsonl").read_bytes()
    second = train(tiny("train.steps=30"))
    assert second == first
    assert (Path(config.run) / "metrics.jsonl").read_bytes() == before


def _tokens_per_byte(config) -> float:
    from shardwright.data.manifest import Manifest

    split = Manifest.load(config.data.path).split("validation")
    return split.tokens / split.text_bytes


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("precision.compute=fp16", "model.residual_dropout=0.1"),
        ("precision.compute=bf16", "optimizer.name=muon"),
        ("optimizer.name=adafactor", "batch.ramp={start: 2, increment: 2, sequences: 12}"),
    ],
)
def test_a_run_stopped_at_any_step_and_resumed_is_bit_identical(tiny, tmp_path, settings):
    whole = tiny(*settings, f"run={tmp_path / 'whole'}")
    train(whole)
    parts = tiny(*settings, f"run={tmp_path / 'parts'}")
    for stop in (1, 3, 4):
        _train_until(parts, stop)
    train(parts)
    assert losses(parts.run) == losses(whole.run)
    ours, theirs = (load(c.run).model.state_dict() for c in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _train_until(config, step: int) -> None:
    """Ask the run to stop, as SIGTERM does, once it has finished `step`."""
    from shardwright.train import run as module

    class Stopping(module.Run):
        def _after_step(self) -> None:
            if self.position.step == step:
                os.kill(os.getpid(), signal.SIGTERM)
            super()._after_step()

    original, module.Run = module.Run, Stopping
    try:
        assert module.train(config).stopped
    finally:
        module.Run = original


def test_kill_9_in_mid_run_loses_nothing(tiny, tmp_path):
    """Twice, at different moments, while checkpoints are being written at every step."""
    settings = ("train.steps=40", "checkpoint.every=1", "model.width=64")
    whole = tiny(*settings, f"run={tmp_path / 'whole'}")
    train(whole)
    config = tiny(*settings, f"run={tmp_path / 'killed'}")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    for lines in (3, 17):
        process = _start(path)
        _wait_for(lambda n=lines: len(losses(config.run)) >= n, process)
        process.kill()
        assert process.wait(30) == -signal.SIGKILL
    assert _start(path).wait(120) == 0
    assert losses(config.run) == losses(whole.run)


def _start(config: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "shardwright", "train", str(config)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def _wait_for(condition, process: subprocess.Popen, limit: float = 90) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.005)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_and_exits_with_its_own_code(tiny, tmp_path, name):
    config = tiny("train.steps=100000", "checkpoint.every=null")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    process = _start(path)
    _wait_for(lambda: len(losses(config.run)) >= 2, process)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    newest, _ = find_newest(Path(config.run) / "checkpoints")
    assert newest is not None and newest.name == f"step_{max(losses(config.run)):08d}"


def test_an_fp16_overflow_skips_names_the_module_and_goes_on(tiny, caplog):
    config = tiny("precision.compute=fp16", "precision.loss_scale.initial=1.0e+9", "train.steps=20")
    train(config)
    records = [r for r in read_metrics(Path(config.run)) if "loss" in r]
    assert records[0]["loss_scale"] == 1e9 and records[-1]["loss_scale"] < 1e6
    assert "(backward), micro-batch 0; skipped" in caplog.text
    assert records[-1]["loss"] < records[0]["loss"]


def test_a_scale_at_its_floor_stops_with_advice(tiny):
    scale = "precision.loss_scale={initial: 1.0e+30, floor: 1.0e+29}"
    with pytest.raises(RunError, match="smallest loss scale.*lower optimizer.lr"):
        train(tiny("precision.compute=fp16", scale, "train.steps=20"))


def _poison(monkeypatch, at_step: int, factor: float = float("inf")) -> None:
    """Make the data of one step give a loss that is `factor` times what it should be, once."""
    from shardwright.train import run as module

    done = []

    class Poisoned(module.Run):
        def _one_step(self) -> None:
            if self.position.step + 1 == at_step and not done:
                done.append(True)
                model = self.step.stages.models[0]
                forward = model.forward
                model.forward = lambda *a, **k: forward(*a, **k) * factor
                super()._one_step()
                model.forward = forward
                return
            super()._one_step()

    monkeypatch.setattr(module, "Run", Poisoned)


def test_skip_leaves_the_weights_and_moves_on(tiny, monkeypatch, caplog):
    _poison(monkeypatch, at_step=3)
    config = tiny()
    result = train(config)
    assert result.step == 6 and "step 3 (sequences 8 to 11)" in caplog.text and "skipped" in caplog.text
    records = [r for r in read_metrics(Path(config.run)) if "loss" in r or "nonfinite" in r]
    assert [r["loss"] is None for r in records] == [False, False, True, False, False, False]
    assert records[-1]["loss"] < records[0]["loss"]


def test_rollback_excludes_the_step_and_survives_a_resume(tiny, monkeypatch, caplog, tmp_path):
    _poison(monkeypatch, at_step=4)
    config = tiny("guard.nonfinite=rollback")
    train(config)
    assert "back to step 2, without sequences 12 to 16" in caplog.text
    manifest = json.loads((find_newest(Path(config.run) / "checkpoints")[0] / "manifest.json").read_text())
    assert manifest["state"]["position"]["excluded"] == [[12, 16]]
    assert manifest["state"]["position"]["drawn"] == 24
    assert list(losses(config.run)) == [1, 2, 3, 4, 5, 6] and None not in losses(config.run).values()


def test_stop_names_step_and_sequences(tiny, monkeypatch):
    _poison(monkeypatch, at_step=2)
    with pytest.raises(RunError, match=r"step 2 \(sequences 4 to 7\).*stopped, as guard.nonfinite=stop"):
        train(tiny("guard.nonfinite=stop"))


def test_a_spike_is_skipped_and_training_goes_on(tiny, monkeypatch, caplog):
    _poison(monkeypatch, at_step=7, factor=3.0)
    config = tiny("train.steps=10", "guard={spike: skip, window: 8}", "optimizer.lr=1e-4")
    train(config)
    assert "step 7 (sequences 24 to 27): the loss" in caplog.text and "is a spike; skipped" in caplog.text
    assert caplog.text.count("is a spike") == 1


def test_a_spike_sends_the_run_back_without_its_sequences(tiny, monkeypatch, caplog):
    _poison(monkeypatch, at_step=7, factor=3.0)
    config = tiny("train.steps=10", "guard={spike: rollback, window: 8}", "optimizer.lr=1e-4")
    train(config)
    assert "back to step 6, without sequences 24 to 28" in caplog.text
    assert list(losses(config.run)) == list(range(1, 11))


def test_micro_batch_size_and_accumulation_change_nothing_but_rounding(tiny, tmp_path):
    curves = []
    for micro in (1, 2, 4):
        config = tiny(f"batch.micro={micro}", f"run={tmp_path / str(micro)}", "data.cross_document_targets=false")
        train(config)
        curves.append(torch.tensor(list(losses(config.run).values())))
    for curve in curves[1:]:
        torch.testing.assert_close(curve, curves[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("workers", ["thread", "1", "2"])
def test_workers_change_nothing(tiny, tmp_path, workers):
    plain, other = tiny(f"run={tmp_path / 'plain'}"), tiny(f"run={tmp_path / 'other'}", f"data.workers={workers}")
    train(plain)
    train(other)
    assert losses(other.run) == losses(plain.run)


@pytest.mark.parametrize("mode", ["full", "2", "selective"])
@pytest.mark.parametrize("compiled", ["false", pytest.param("true", marks=pytest.mark.in_turn)])
def test_recomputation_is_equal_bit_for_bit_with_dropout(tiny, tmp_path, mode, compiled):
    dropout = ("model.residual_dropout=0.2", "model.embed_dropout=0.1", f"train.compile={compiled}", "train.steps=3")
    plain = tiny(*dropout, f"run={tmp_path / 'plain'}")
    again = tiny(*dropout, f"run={tmp_path / 'again'}", f"train.recompute={mode}")
    train(plain)
    train(again)
    assert losses(again.run) == losses(plain.run)


def test_a_wall_clock_budget_ends_with_the_rate_at_its_floor(tiny):
    """However fast the machine is just now: the last step stands within a few steps' share of the end."""
    config = tiny("train.steps=null", "train.budget=3s", "schedule.floor=0.0", "checkpoint.every=null")
    train(config)
    records = [r for r in read_metrics(Path(config.run)) if "loss" in r]
    assert all(r["lr"] > 0 for r in records[:3]), "no step is spent before the clock is known"
    assert 0.5 < records[-1]["progress"] <= 1.0
    share = 1 / len(records)
    assert records[-1]["lr"] <= max(r["lr"] for r in records) * max(10 * share, 0.01)
    assert train(config).step == records[-1]["step"], "a finished run takes no further step"


def test_a_killed_budget_replays_the_positions_that_it_had(tiny, tmp_path):
    config = tiny("train.steps=null", "train.budget=60s", "checkpoint.every=5", "schedule.floor=0.0")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    process = _start(path)
    _wait_for(lambda: len(losses(config.run)) >= 13, process)
    process.kill()
    process.wait(30)
    before = {r["step"]: r["lr"] for r in read_metrics(Path(config.run))}
    resumed = int(find_newest(Path(config.run) / "checkpoints")[0].name.removeprefix("step_"))
    _train_until(config, max(before) + 3)
    after = {r["step"]: r["lr"] for r in read_metrics(Path(config.run))}
    assert resumed < max(before)
    assert {step: after[step] for step in before} == before


def test_attention_dropout_survives_a_resume_too(tiny, tmp_path):
    dropout = "model.attention_dropout=0.2"
    whole, parts = tiny(dropout, f"run={tmp_path / 'whole'}"), tiny(dropout, f"run={tmp_path / 'parts'}")
    train(whole)
    _train_until(parts, 3)
    train(parts)
    assert losses(parts.run) == losses(whole.run)


def _train_until_an_evaluation(config, monkeypatch) -> None:
    """SIGTERM at the beginning of the first evaluation."""
    from shardwright.train import evaluate as module

    original = module.Validation.batches

    def interrupted(self, most=None, at_once=1):
        os.kill(os.getpid(), signal.SIGTERM)
        yield from original(self, most, at_once)

    with monkeypatch.context() as patch:
        patch.setattr(module.Validation, "batches", interrupted)
        assert train(config).stopped


def test_a_signal_in_the_last_evaluation_stops_it_and_the_next_start_makes_it(tiny, monkeypatch):
    config = tiny("evaluate.batch=1")
    _train_until_an_evaluation(config, monkeypatch)
    assert not (Path(config.run) / "result.json").exists()
    assert train(config).val_loss is not None


def test_an_evaluation_that_a_signal_cut_short_is_made_after_the_resume(tiny, monkeypatch):
    config = tiny("evaluate.every=2", "evaluate.batch=1")
    _train_until_an_evaluation(config, monkeypatch)
    assert [r for r in read_metrics(Path(config.run)) if "val_loss" in r] == []
    for stop in (3, 4):  # the second start owes nothing
        _train_until(config, stop)
    train(config)
    assert [r["step"] for r in read_metrics(Path(config.run)) if "val_loss" in r] == [2, 4, 6]


def test_the_last_evaluation_is_there_once_whatever_was_lost(tiny):
    config = tiny()
    first = train(config)
    (Path(config.run) / "result.json").unlink()
    assert train(config) == first
    newest, _ = find_newest(Path(config.run) / "checkpoints")
    shutil.rmtree(newest)
    assert train(config) == first
    for text in ("", "{}", "[1]", '{"of": "another version"}'):
        (Path(config.run) / "result.json").write_text(text)
        assert train(config) == first
    assert [r["step"] for r in read_metrics(Path(config.run)) if "val_loss" in r] == [6]


def test_training_from_a_url(tiny, prepared, tmp_path):
    handler = functools.partial(_Quiet, directory=str(prepared))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        remote = tiny(f"data.path={url}", f"data.cache={tmp_path / 'cache'}", f"run={tmp_path / 'remote'}")
        train(remote)
    finally:
        server.shutdown()
    local = tiny(f"run={tmp_path / 'local'}")
    train(local)
    assert losses(remote.run) == losses(local.run)


def test_training_through_a_pipe_that_is_allowed(tiny, prepared, tmp_path):
    piped = (f"data.path=pipe:cat {prepared}", f"data.cache={tmp_path / 'cache'}", f"run={tmp_path / 'piped'}")
    with pytest.raises(ConfigError, match=r"runs a command; allow it with data\.allow=\[pipe\]"):
        train(tiny(*piped))
    allowed, local = tiny(*piped, "data.allow=[pipe]"), tiny(f"run={tmp_path / 'local'}")
    assert train(allowed).val_loss == train(local).val_loss
    assert losses(allowed.run) == losses(local.run)


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


# ------------------------------------------------------------------------------------------ bad input


def test_another_corpus_in_place_of_the_runs_own_is_refused(tiny, prepared, bundled, tmp_path):
    from shardwright.config import parse
    from shardwright.data.prepare import PrepareConfig, prepare

    train(tiny())
    other = tmp_path / "other"
    raw = {"input": [str(bundled / "chinese_poems.jsonl")], "output": str(other), "validation_every": 10}
    prepare(parse(PrepareConfig, {**raw, "tokenizer": {"vocab_size": 512}}, "prepare"), progress=False)
    with pytest.raises(ConfigError, match="data.corpus"):
        train(tiny(f"data.path={other}"))


def test_a_run_whose_checkpoints_are_all_torn_is_not_taken_over(tiny):
    train(tiny())
    for marker in Path(tiny().run).rglob("complete.json"):
        marker.unlink()
    with pytest.raises(ConfigError, match="holds the run of another config"):
        train(tiny("model.width=16"))


def test_another_config_in_the_run_folder_is_refused(tiny):
    train(tiny())
    with pytest.raises(ConfigError, match=r"optimizer.lr is 0.003 there and 0.01 here; start a new run"):
        train(tiny("optimizer.lr=0.01"))


def test_free_settings_may_change_between_starts(tiny):
    train(tiny())
    assert train(tiny("log.every=3", "data.workers=thread", "batch.micro=4")).step == 6


def test_a_missing_corpus(tiny):
    with pytest.raises(RunError, match="nowhere/manifest.json: no such file"):
        train(tiny("data.path=nowhere"))


def test_a_sequence_longer_than_the_model_allows(tiny):
    with pytest.raises(ConfigError, match="data.sequence_length=128: is longer than the model allows"):
        train(tiny("data.sequence_length=128"))


def test_a_vocabulary_smaller_than_the_tokenizers(tiny):
    with pytest.raises(ConfigError, match="model.vocab_size=100: the tokenizer has 512 tokens"):
        train(tiny("model.vocab_size=100"))


def test_a_flipped_byte_falls_back_to_the_checkpoint_before(tiny, caplog):
    config = tiny()
    train(config)
    newest, _ = find_newest(Path(config.run) / "checkpoints")
    file = next(newest.rglob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    before = losses(config.run)
    train(config)
    assert str(file) in caplog.text and "going on from" in caplog.text
    assert losses(config.run) == before


@pytest.mark.parametrize("damage", ["truncate", "manifest"])
def test_a_run_whose_only_checkpoint_is_damaged_does_not_begin_again(tiny, damage):
    config = tiny("checkpoint.every=null")
    train(config)
    (folder,) = (Path(config.run) / "checkpoints").glob("step_*")
    if damage == "manifest":
        (folder / "manifest.json").unlink()
    else:
        file = next(folder.rglob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-10])
    before = (Path(config.run) / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=rf"{folder}: this run has no whole checkpoint.*start a new run with run=PATH"):
        train(config)
    assert (Path(config.run) / "metrics.jsonl").read_bytes() == before and folder.is_dir()


def test_an_unfinished_save_alone_begins_again(tiny):
    config = tiny()
    (Path(config.run) / "checkpoints" / "unfinished_step_00000002").mkdir(parents=True)
    assert train(config).step == 6


def test_a_second_process_is_kept_out_of_a_run_folder(tiny, tmp_path):
    config = tiny("train.steps=100000", "checkpoint.every=null")
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(config))
    process = _start(path)
    try:
        _wait_for(lambda: len(losses(config.run)) >= 2, process)
        with pytest.raises(ConfigError, match=f"{config.run}: process {process.pid} trains in it; wait for it or"):
            train(config)
    finally:
        process.kill()
        process.wait(30)
    _train_until(config, 1)  # the lock has died with its process


def test_a_save_that_failed_in_the_background_ends_the_run_before_the_next_save(tiny, monkeypatch):
    from shardwright.train import run as module

    every = 200
    config = tiny(f"checkpoint.every={every}", "train.steps=400")

    class Broken(module.Run):
        def _after_step(self) -> None:
            if self.position.step == every:
                folder = Path(config.run) / "checkpoints"
                folder.rmdir()
                folder.write_text("")
            super()._after_step()

    monkeypatch.setattr(module, "Run", Broken)
    with pytest.raises(CheckpointError, match=f"step {every} was not saved"):
        train(config)
    assert every <= max(losses(config.run)) < 2 * every - 1


def test_a_run_folder_that_cannot_be_made(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        train(tiny(f"run={tmp_path / 'file' / 'run'}"))
