"""`shardwright import` and `export` between the folders that transformers writes and reads, and those of runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import shardwright
from shardwright.checkpoint import StoredTensors
from shardwright.interop import check
from shardwright.interop.huggingface import Exported
from shardwright.interop.model_config import write_config
from shardwright.interop.weights import INDEX, SINGLE, WeightFiles
from shardwright.launcher.cli import run
from shardwright.train import exports
from shardwright.train.load import load
from tests.interop.commands import done, logits, refused, same
from tests.interop.models import CASES, add_tokenizer, save_theirs

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("case", CASES)
def test_there_and_back_is_bit_equal(case, tmp_path, capsys):
    """In several files, both ways; what we write gives transformers what its own folder gives."""
    theirs = save_theirs(tmp_path / "theirs", case, shard="20KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    said = done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "back", "--max-shard-size", "20KB")
    assert f"logits of transformers' {type(theirs).__name__} differ by" in said
    same(tmp_path / "back", tmp_path / "theirs")
    files = list((tmp_path / "back").glob("*.safetensors"))
    assert len(files) > 1 and {path.stat().st_mode & 0o777 for path in files} == {0o644}
    ids = torch.randint(0, 101, (2, 11))
    with torch.no_grad():
        expected = theirs(ids).logits
    assert torch.equal(logits(tmp_path / "back", ids), logits(tmp_path / "theirs", ids))
    for folder in ("ours", "theirs", "back"):
        found = shardwright.load(tmp_path / folder)(input_ids=ids)["logits"]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_a_format_stays_unless_another_is_asked_for(name, tmp_path, capsys):
    theirs = save_theirs(tmp_path / "theirs", "qwen3")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[name]
    theirs.to(dtype).save_pretrained(tmp_path / "small")
    done(capsys, "import", tmp_path / "small", "--output", tmp_path / "ours")
    stored = StoredTensors(tmp_path / "ours/checkpoints/step_00000000")
    assert {tensor.dtype for tensor in stored.meta.values()} == {dtype}
    done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "back")
    same(tmp_path / "back", tmp_path / "small")
    assert transformers.AutoConfig.from_pretrained(tmp_path / "back").dtype == dtype
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "rounded", "--dtype", name)
    done(capsys, "export", tmp_path / "rounded", "--output", tmp_path / "again")
    same(tmp_path / "again", tmp_path / "small")
    done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "wide", "--dtype", "fp32")
    assert {t.dtype for t in WeightFiles(tmp_path / "wide").meta.values()} == {torch.float32}
    assert load(tmp_path / "ours").model.head_weight.dtype == torch.float32


def test_what_came_with_a_model_goes_on_with_it(prepared, tmp_path, capsys):
    """Tokenizer, its special tokens and the generation config: to the byte, through the imported model."""
    theirs = tmp_path / "theirs"
    save_theirs(theirs, vocab_size=512)
    add_tokenizer(theirs, prepared)
    made = json.loads(done(capsys, "import", theirs, "--output", tmp_path / "ours", "--json"))
    assert (made["output"], made["tensors"], made["tokenizer"]) == (str(tmp_path / "ours"), 30, "tokenizer.json")
    made = json.loads(done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "back", "--json"))
    assert made["files"] == 1 and made["verdict"]["passed"] and made["verdict"]["difference"] < check.BOUND
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (theirs / name).read_bytes()
    text = "It was a dark night; the people\nof these States"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer(text)["input_ids"] == load(tmp_path / "ours").tokenizer.encode(text).tolist()
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0), "as save_theirs has them"


def test_whatever_opens_a_run_opens_them(prepared, tmp_path, capsys):
    save_theirs(tmp_path / "theirs", vocab_size=512)
    add_tokenizer(tmp_path / "theirs", prepared)
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    texts = [done(capsys, "generate", tmp_path / f, "--prompt", "The ", "--tokens", 8) for f in ("theirs", "ours")]
    assert texts[0] == texts[1] and texts[0].startswith("The ")
    figures = [json.loads(done(capsys, "eval", tmp_path / f, "--data", prepared, "--json")) for f in ("theirs", "ours")]
    assert figures[0] == figures[1] and 6 < figures[0]["val_loss"] < 9
    refused(capsys, "eval", tmp_path / "ours", says="names no corpus to evaluate on; name a prepared folder")


def test_a_model_without_a_tokenizer_is_still_a_model(tmp_path, capsys):
    save_theirs(tmp_path / "theirs")
    assert "no tokenizer" in done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    for folder in ("theirs", "ours"):
        ids = torch.ones(1, 3, dtype=torch.int64)
        assert shardwright.load(tmp_path / folder)(input_ids=ids)["logits"].shape == (1, 3, 101)
        assert run(["generate", str(tmp_path / folder)]) == 2
        assert "holds no tokenizer; put the model's tokenizer.json there" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ what is refused


def test_pickled_weights_are_refused_with_the_remedy(tmp_path, capsys):
    save_theirs(tmp_path / "theirs")
    state = load_file(tmp_path / "theirs" / SINGLE)
    (tmp_path / "theirs" / SINGLE).unlink()
    torch.save(state, tmp_path / "theirs/pytorch_model.bin")
    refused(
        capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours",
        says="are pickled (pytorch_model.bin), and reading a pickle can run what its writer put there",
    )  # fmt: skip
    assert not (tmp_path / "ours").exists()


def test_damaged_and_incomplete_folders_are_refused(tmp_path, capsys):
    theirs, output = tmp_path / "theirs", tmp_path / "ours"
    save_theirs(theirs, shard="20KB")
    command = ["import", theirs, "--output", output]
    index = (theirs / INDEX).read_text()
    (theirs / INDEX).write_text(index.replace("model-00001-of", "../model-00001-of"))
    refused(capsys, *command, says="a file of another folder; expected files beside it")
    (theirs / INDEX).write_text(index.replace("model.norm.weight", "model.norm.bias"))
    refused(capsys, *command, says="does not say what its files hold of model.norm.")
    (theirs / INDEX).write_text(index)
    part = next(theirs.glob("model-00002-of-*"))
    part.write_bytes(part.read_bytes()[:-1])
    refused(capsys, *command, says=f"{part.name}: is no whole safetensors file")
    part.unlink()
    refused(capsys, *command, says=f"{part.name}: is missing, and {INDEX} names it; fetch the folder again")
    (theirs / INDEX).unlink()
    refused(capsys, *command, says=f"safetensors files and no {INDEX}")
    for path in theirs.glob("*.safetensors"):
        path.unlink()
    refused(capsys, *command, says=f"holds no weights; expected {SINGLE} or {INDEX}")
    (theirs / "config.json").write_text("{")
    refused(capsys, *command, says="config.json: cannot be read")
    assert not output.exists()


def test_a_model_that_is_none_of_ours_is_refused(tmp_path, capsys):
    theirs, command = tmp_path / "theirs", ["import", tmp_path / "theirs", "--output", tmp_path / "ours"]
    save_theirs(theirs)
    raw = json.loads((theirs / "config.json").read_text())

    def write(**changes: object) -> None:
        (theirs / "config.json").write_text(json.dumps({**raw, **changes}))

    write(model_type="mamba")
    refused(capsys, *command, says="theirs: config.json: model_type='mamba': expected one of")
    write(num_key_value_heads=3)
    refused(capsys, *command, says="config.json: kv_heads=3 does not divide heads=4")
    write(hidden_size=64)
    refused(capsys, *command, says="the config says")
    write(num_hidden_layers=2)
    refused(capsys, *command, says="9 unexpected (model.layers.2.")
    write(quantization_config={"quant_method": "fp8"})
    refused(capsys, *command, says="quantization_config")
    state = load_file(theirs / SINGLE)
    del state["model.norm.weight"]
    save_file(state, theirs / SINGLE)
    write()
    refused(capsys, *command, says="1 missing (model.norm.weight)")


def test_bad_usage_is_one_line(tmp_path, capsys):
    save_theirs(tmp_path / "theirs")
    there, new = tmp_path / "theirs", tmp_path / "new"
    refused(capsys, "import", there, says="a folder is to be named; expected shardwright import SOURCE --output FOLDER")
    refused(capsys, "import", there, "a=b", "--output", new, says="settings and --tag go with --deepspeed")
    refused(capsys, "import", there, "--output", there, says="holds something already; name a new folder with --output")
    refused(capsys, "import", there, "--output", new, "--dtype", "int3", says="--dtype int3: expected one of fp32,")
    refused(capsys, "import", tmp_path, "--output", new, says="is no Hugging Face folder; expected config.json in it")
    refused(capsys, "import", tmp_path / "none", "--output", new, says="none: no such folder")
    refused(capsys, "export", tmp_path, "--output", new, says="is neither a run folder nor a checkpoint")
    done(capsys, "import", there, "--output", new)
    refused(capsys, "export", new, "--output", there, says="holds something already")
    refused(capsys, "export", new, "--output", tmp_path / "x", "--max-shard-size", "5 apples", says="such as 5GB or")
    assert not list(tmp_path.glob("unfinished_*"))


# ------------------------------------------------------------------------------------------ the check of an export


def test_an_export_that_differs_is_refused_and_removed(tmp_path, capsys, monkeypatch):
    save_theirs(tmp_path / "theirs", "llama-grouped")
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    monkeypatch.setattr(
        exports, "write_config", lambda model, folder: {**write_config(model, folder), "rms_norm_eps": 1e-3}
    )
    command = ["export", tmp_path / "ours", "--output", tmp_path / "back"]
    refused(capsys, *command, says="is not written: logits of transformers' LlamaForCausalLM differ by", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]
    assert "not checked" in done(capsys, *command, "--no-check")


def changed(folder: Path, name: str) -> None:
    """One value of a written tensor is another."""
    state = load_file(folder / SINGLE)
    state[name].view(-1)[0] += 0.5
    save_file(state, folder / SINGLE, {"format": "pt"})


@pytest.mark.parametrize("memory", [None, 1 << 20], ids=["logits", "tensors"])
def test_a_changed_value_is_found_with_and_without_memory_for_the_model(memory, tmp_path, capsys, monkeypatch):
    if memory is not None:
        monkeypatch.setattr(check, "memory", lambda: (memory, memory))
    save_theirs(tmp_path / "theirs", "gpt2")
    done(capsys, "import", tmp_path / "theirs", "--output", tmp_path / "ours")
    said = done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "back")
    assert ("logits of transformers'" if memory is None else "all 40 tensors read back") in said
    model = load(tmp_path / "ours").model
    ours = dict(model.named_parameters())
    written = Exported(model.config, ours)
    assert check.check_export(tmp_path / "back", model.config, ours, {"": written}).passed
    changed(tmp_path / "back", "transformer.h.1.attn.c_attn.weight")
    verdict = check.check_export(tmp_path / "back", model.config, ours, {"": written})
    assert not verdict.passed and ("differ" if memory is None else "hold another transformer.h.1.attn") in verdict.text
    (tmp_path / "back" / SINGLE).write_bytes(b"")
    if memory is None:
        verdict = check.check_export(tmp_path / "back", model.config, ours, {"": written})
        assert not verdict.passed and "GPT2LMHeadModel of transformers cannot open it" in verdict.text


# ------------------------------------------------------------------------------------------ memory and the hub

MEASURED = """
import sys
from pathlib import Path
import shardwright.train.exports
from shardwright.launcher.cli import run

def peak():
    (line,) = [l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")]
    return int(line.split()[1]) * 1024

before = peak()
assert run(sys.argv[1:]) == 0
print("growth", peak() - before)
"""


def growth(*arguments: object) -> int:
    """By how much a command raises the most memory that its process has had, in bytes, mapped files included."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=240,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    return int(answer.stdout.split()[-1])


def write_large(folder: Path, layers: int) -> int:
    """A Llama of 38 MB a layer, in files of 100 MB at most; its bytes."""
    from shardwright.interop.weights import write_weights
    from shardwright.model.families import FAMILIES, build_model

    fields = {"vocab_size": 512, "layers": layers, "width": 1024, "heads": 8, "kv_heads": 2, "mlp_width": 2048}
    config = FAMILIES["llama"].config.model_validate({"family": "llama", **fields})
    with torch.device("meta"):
        meta = dict(build_model(config).named_parameters())
    written = Exported(config, meta, meta)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(write_config(config)))
    write_weights(folder, written.meta, lambda name: torch.randn(written.meta[name].shape), 10**8)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.in_turn
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc, which Linux has")
def test_a_large_model_is_never_in_memory(tmp_path):
    """Either way takes a few of its largest tensors, of 8 MB, and what Python imports meanwhile; 43 and 60 MB of 361
    when this was written, and as much of 111."""
    size = write_large(tmp_path / "theirs", 10)
    assert size > 350e6
    ours, back = tmp_path / "ours", tmp_path / "back"
    for command in (
        ("import", tmp_path / "theirs", "--output", ours),
        ("export", ours, "--output", back, "--no-check", "--max-shard-size", "100MB"),
    ):
        taken = growth(*command)
        assert taken < size / 3, f"{command[0]}: {taken / 1e6:.0f} MB for a model of {size / 1e6:.0f} MB"
    same(back, tmp_path / "theirs")


def cached(home: Path, name: str, theirs: Path) -> None:
    """What huggingface_hub keeps of a model that it has fetched."""
    commit = "0" * 40
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    shutil.copytree(theirs, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)


def test_a_name_on_the_hub_comes_from_its_cache(tmp_path):
    save_theirs(tmp_path / "theirs", "gpt2")
    cached(tmp_path / "home", "somebody/tiny", tmp_path / "theirs")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)

    code = "import sys; from shardwright.launcher.cli import run; print(*[run(['import', name, '-o', 'ours'])"
    code += " for name in sys.argv[1:]])"
    answer = subprocess.run(
        [sys.executable, "-c", code, "somebody/other", "somebody/tiny"],
        capture_output=True, text=True, env=environment, timeout=240, cwd=tmp_path,
    )  # fmt: skip
    assert answer.stdout.split()[-2:] == ["2", "0"], answer.stderr
    assert "shardwright: somebody/other: no such folder, and the hub did not give it: " in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert load(tmp_path / "ours").model.config.family == "gpt2"


def test_electra_goes_out_as_two_models_and_comes_back(tmp_path, capsys):
    """The discriminator, with the generator in a folder of its own; without that folder, the discriminator alone."""
    theirs = tmp_path / "theirs"
    shape = {"vocab_size": 101, "embedding_size": 16, "num_hidden_layers": 2, "max_position_embeddings": 64}
    judge = transformers.ElectraConfig(**shape, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    draft = transformers.ElectraConfig(**shape, hidden_size=8, num_attention_heads=2, intermediate_size=32)
    judge, draft = transformers.ElectraForPreTraining(judge), transformers.ElectraForMaskedLM(draft)
    draft.electra.embeddings.load_state_dict(judge.electra.embeddings.state_dict())
    judge.save_pretrained(theirs)
    draft.save_pretrained(theirs / "generator")
    done(capsys, "import", theirs, "--output", tmp_path / "ours")
    done(capsys, "export", tmp_path / "ours", "--output", tmp_path / "back")
    for folder in ("", "generator"):
        one, two = (WeightFiles(place / folder) for place in (theirs, tmp_path / "back"))
        assert set(two) == set(one) and all(torch.equal(one[name], two[name]) for name in two)
    shutil.rmtree(theirs / "generator")
    done(capsys, "import", theirs, "--output", tmp_path / "alone")
    done(capsys, "export", tmp_path / "alone", "--output", tmp_path / "again")
    assert not (tmp_path / "again" / "generator").exists()
