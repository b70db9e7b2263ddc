"""A checkpoint of a user's own DeepSpeed program becomes the beginning of a run, at every ZeRO stage."""

import pytest
import torch
import yaml

from shardwright.interop.deepspeed import our_names, read_weights
from shardwright.launcher.cli import run
from shardwright.model.families import build_model
from shardwright.model.gpt2 import GPT2Config
from shardwright.train.load import load
from shardwright.train.metrics import read_metrics
from tests.equivalence.cells import config

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'shardwright[deepspeed]'")
transformers = pytest.importorskip("transformers", reason="pip install 'shardwright[hf]'")

GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64, "vocab_size": 512, "attn_implementation": "eager"}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_a_deepspeed_folder_becomes_a_run(zero, ranks, prepared, tmp_path, capsys):
    theirs = ranks.run(2, "tests.train.engines.work:saved_by_deepspeed", tmp_path / "old", zero, GPT2)[0]
    raw = config(prepared, tmp_path / "run")
    raw["model"] = {"family": "gpt2", "layers": 2, "width": 32, "heads": 4, "max_length": 64}
    raw["train"] |= {"steps": 3}
    raw["schedule"] = {"warmup_steps": 1}
    raw["optimizer"] |= {"fused": "apex"}  # of the machine that trains, not of the one that imports
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert run(["import", "--deepspeed", str(tmp_path / "old"), str(path)]) == 0, capsys.readouterr().err
    assert "step_00000000" in capsys.readouterr().out
    loaded = load(tmp_path / "run")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).eval()
    model.load_state_dict(theirs, strict=False)
    model.tie_weights()
    tokens = torch.arange(40).reshape(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=tokens)["logits"], model(tokens).logits, atol=2e-6, rtol=1e-5)
    assert run(["train", str(path), "optimizer.fused=auto"]) == 0, capsys.readouterr().err
    assert [r["step"] for r in read_metrics(tmp_path / "run") if "loss" in r] == [1, 2, 3]
    assert run(["import", "--deepspeed", str(tmp_path / "old"), str(path)]) == 2
    assert "holds a run already, at step_0000000" in capsys.readouterr().err


def test_what_does_not_fit_is_said_in_one_line(prepared, tmp_path, capsys):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config(prepared, tmp_path / "run")))
    assert run(["import", "--deepspeed", str(tmp_path), str(path)]) == 2
    assert "latest: no such file; name the folder that save_checkpoint was given" in capsys.readouterr().err
    (tmp_path / "global_step1").mkdir()
    assert run(["import", "--deepspeed", str(tmp_path), "--tag", "global_step1", str(path)]) == 2
    assert "no *model_states.pt in it" in capsys.readouterr().err
    module = {"transformer.wte.weight": torch.zeros(3, 4)}
    torch.save({"module": module}, tmp_path / "global_step1" / "mp_rank_00_model_states.pt")
    assert run(["import", "--deepspeed", str(tmp_path), "--tag", "global_step1", str(path)]) == 2
    said = capsys.readouterr().err
    assert "do not fit the config" in said and said.count("\n") == 1


def test_our_own_names_behind_a_wrapper():
    model = GPT2Config(family="gpt2", vocab_size=512, layers=2, width=32, heads=4)
    own = {name: torch.zeros(parameter.shape) for name, parameter in build_model(model).named_parameters()}
    assert our_names(model, {f"module._orig_mod.{name}": tensor for name, tensor in own.items()}).keys() == own.keys()


def test_the_whole_folder_is_read_without_a_tag(tmp_path):
    (tmp_path / "global_step7").mkdir()
    (tmp_path / "latest").write_text("global_step7")
    torch.save(
        {"module": {"a": torch.ones(2, dtype=torch.bfloat16)}}, tmp_path / "global_step7" / "mp_rank_00_model_states.pt"
    )
    assert read_weights(tmp_path)["a"].dtype == torch.float32
