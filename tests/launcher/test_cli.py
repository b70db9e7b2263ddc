"""The command line as a user meets it: real processes, exit codes, one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardwright.config import to_yaml
from shardwright.launcher import cli


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "shardwright", *arguments]
    environment = {**os.environ, "COLUMNS": "200", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, env=environment)


def refused(capsys, *arguments: str, code: int = 2, says: str) -> None:
    assert cli.run(arguments) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1, said


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory) -> Path:
    """A finished run of a few steps, through the command line."""
    folder = tmp_path_factory.mktemp("cli")
    answer = run("train", "debug/gpt2", f"data.path={prepared}", f"run={folder / 'run'}", "train.steps=3", "--json")
    assert answer.returncode == 0, answer.stderr
    result = json.loads(answer.stdout)
    assert result["step"] == 3 and 0 < result["val_bits_per_byte"] < 9 and 0 < result["xz_bits_per_byte"] < 9
    return folder / "run"


def test_every_command_has_help_with_an_example():
    listing = run("--help").stdout
    for command in ("prepare", "train", "eval", "generate", "report", "doctor", "schema"):
        assert command in listing
        assert "Example: shardwright" in run(command, "--help").stdout


def test_train_again_is_done_and_eval_agrees(trained, prepared):
    answer = run("train", "debug/gpt2", f"data.path={prepared}", f"run={trained}", "train.steps=3")
    assert answer.returncode == 0 and "done:" in answer.stderr + answer.stdout
    answer = run("eval", str(trained), "--json")
    assert answer.stderr == ""
    scored = json.loads(answer.stdout)
    result = json.loads((trained / "result.json").read_text())
    assert scored["val_bits_per_byte"] == pytest.approx(result["val_bits_per_byte"], rel=1e-5)


def test_generate_is_a_function_of_its_seed(trained, capsys):
    def generated(*more: str) -> str:
        assert cli.run(["generate", str(trained), *more]) == 0
        return capsys.readouterr().out

    first, again, other = (generated("--prompt", "The ", "--tokens", "12", "--seed", seed) for seed in ("1", "1", "2"))
    assert first.startswith("The ") and first == again != other
    generated("--tokens", "5", "--temperature", "1e-40")


def test_report_writes_a_page(trained, tmp_path):
    answer = run("report", str(trained), "--output", str(tmp_path / "page.html"))
    assert answer.returncode == 0 and (tmp_path / "page.html").stat().st_size > 1e5


def test_dry_run_prints_batch_size_and_memory_and_makes_nothing(tmp_path, prepared):
    answer = run("train", "debug/llama", f"data.path={prepared}", f"run={tmp_path / 'none'}", "--dry-run")
    assert answer.returncode == 0, answer.stderr
    for words in ("global batch 16 sequences = 8 a micro-batch x 2 micro-batches x 1 data ranks", "parameters:",
                  "FLOPs a token:", "estimated memory:", "family: llama", "20 steps"):  # fmt: skip
        assert words in answer.stdout
    assert not (tmp_path / "none").exists()


def test_a_mistake_ends_the_process_with_its_code_and_one_line(prepared):
    answer = run("train", "debug/gtp2", f"data.path={prepared}")
    assert answer.returncode == 2 and answer.stdout == ""
    assert "did you mean debug/gpt2" in answer.stderr and answer.stderr.count("\n") == 1


def test_mistakes(tmp_path, prepared, trained, capsys):
    data = f"data.path={prepared}"
    refused(
        capsys, "train", "debug/gpt2", data, "train.stepz=3", says="train.stepz: unknown key; did you mean 'steps'?"
    )
    refused(capsys, "train", "debug/gpt2", data, "train.steps=many", says="train.steps: got 'many'")
    refused(capsys, "train", "debug/gpt2", f"data.path={tmp_path}", code=1, says="manifest.json: no such file")
    refused(
        capsys, "train", "debug/gpt2", data, "batch.micro=5", says="batch.micro=5: does not divide batch.sequences=16"
    )
    refused(capsys, "train", "debug/gpt2", data, "data.sequence_length=999", says="longer than the model allows")
    refused(
        capsys, "train", "debug/gpt2", data, f"run={trained}", "optimizer.lr=1", says="holds the run of another config"
    )
    refused(capsys, "train", ".", says=".: is a folder, not a config file; shipped configs:")
    refused(capsys, "train", "debug/gpt2", data, "train=5", says="train: got 5 (int); expected a section of keys")
    refused(capsys, "train", "debug/gpt2", data, "data.allow=[pips]", "--dry-run", says="data.allow.0: got 'pips'")
    refused(capsys, "train", "debug/gpt2", "run=https://u:pw@x/y", "--dry-run", says="run: holds a password or")
    refused(capsys, "generate", str(tmp_path), says="neither a run folder nor a checkpoint")
    refused(capsys, "generate", str(trained), "--prompt", "ab\udcff", says="prompt: character 3 is no valid UTF-8")
    refused(capsys, "generate", str(trained), "--seed", str(2**64), says="seed=18446744073709551616: expected 0 to")
    refused(capsys, "eval", str(trained), "--json", "--data", str(tmp_path), code=1, says="manifest.json: no such file")
    refused(capsys, "report", str(trained), "--output", str(tmp_path), says="is a folder; name the file")
    refused(capsys, "prepare", str(tmp_path / "none.txt"), "--output", str(tmp_path / "o"), says="none.txt")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'? see shardwright --help"),
        (["train"], "Missing argument 'config'; see shardwright train --help"),
        (["train", "debug/gpt2", "--frob"], "No such option: --frob; see shardwright train --help"),
        (["generate", "x", "--temperature", "-1"], "Invalid value for '--temperature'"),
        (["prepare", "x"], "Missing option '--output' / '-o'; see shardwright prepare --help"),
    ],
)
def test_bad_usage_gets_one_line(arguments, says, capsys):
    assert cli.run(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("shardwright: ") and says in said and said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--traceback", "train", "none"], ["train", "none", "--traceback"]])
def test_a_traceback_is_shown_wherever_it_is_asked_for_and_changes_no_code(arguments, capsys):
    assert cli.run(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("shardwright: none: no such config file")


def test_without_a_command_there_is_help(capsys):
    assert cli.run([]) == 2
    assert "Commands" in capsys.readouterr().out


def test_a_tokenizer_that_is_not_the_shards_own(tmp_path, prepared, capsys):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"the"', '"eht"', 1) + "\n")
    refused(capsys, "train", "debug/gpt2", f"data.path={copy}", f"run={tmp_path / 'r'}", says="is not the tokenizer")


@pytest.mark.skipif(os.geteuid() != 0, reason="a small tmpfs needs root")
def test_a_full_disk_during_a_save_says_so_and_keeps_what_was_saved(tmp_path, tiny_disk, prepared):
    arguments = ("train", "debug/gpt2", f"data.path={prepared}", f"run={tiny_disk / 'run'}", "checkpoint.every=1",
                 "train.steps=6", "log.tensorboard=false", "checkpoint.keep_last=9")  # fmt: skip
    answer = run(*arguments)
    assert answer.returncode == 1, answer.stderr
    last = answer.stderr.strip().splitlines()[-1]
    assert "no space" in last.lower() and "Traceback" not in answer.stderr
    assert list((tiny_disk / "run" / "checkpoints").glob("step_*"))


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]).returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_yaml_written_by_hand_trains(tmp_path, tiny_config):
    path = tmp_path / "mine.yaml"
    path.write_text(to_yaml(tiny_config))
    assert run("train", str(path)).returncode == 0


@pytest.fixture
def tiny_config(prepared, tmp_path):
    from shardwright.train.settings import read_config

    return read_config("debug/llama", [f"data.path={prepared}", f"run={tmp_path / 'run'}", "train.steps=2"])
