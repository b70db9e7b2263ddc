"""launch --kubernetes: what is written is what Kubeflow's own typed models hold, and what torchrun is started with.

No cluster is here: whether an operator accepts it is not tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shardwright.config import ConfigError
from shardwright.launcher.cli import run
from shardwright.launcher.kubernetes import write_manifest
from shardwright.launcher.manifest import build_wanted
from tests.test_docs import commands

ROOT = Path(__file__).resolve().parents[2]
SIZE: Any = {"nodes": 2, "processes": 8}
PLACE: Any = {"image": "registry.example/shardwright:cuda", "claim": "shared"}
TINY = [str(ROOT / "configs/debug/gpt2.yaml"), ["batch.micro=1", "train.steps=5"]]


def documents(*given: Any, **options: Any) -> dict[str, dict[str, Any]]:
    """The manifest by kind."""
    text = write_manifest(build_wanted(*(given or TINY), **{**SIZE, **options}), **PLACE)
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


@pytest.mark.parametrize("secrets", [(), ("hugging-face", "wandb")])
def test_kubeflows_models_hold_all_of_it(secrets: tuple[str, ...]) -> None:
    """They drop keys that they do not know, so that a misspelt one makes a difference."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api")
    found = documents(environment=["NCCL_DEBUG=INFO"], secrets=secrets)
    for kind in ("TrainJob", "TrainingRuntime"):
        typed = getattr(models, f"TrainerV1alpha1{kind}").from_dict(found[kind])
        assert typed.to_dict() == found[kind]
    found["TrainJob"]["spec"]["trainer"]["numNode"] = 2
    assert models.TrainerV1alpha1TrainJob.from_dict(found["TrainJob"]).to_dict() != found["TrainJob"]


def test_the_config_comes_along_and_is_where_the_command_looks_for_it() -> None:
    found = documents()
    (name, text) = next(iter(found["ConfigMap"]["data"].items()))
    assert text == Path(TINY[0]).read_text()
    pod = found["TrainingRuntime"]["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"][
        "spec"
    ]
    (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "config"]
    assert f"{mount['mountPath']}/{name}" in found["TrainJob"]["spec"]["trainer"]["args"]
    assert {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}} in pod["volumes"]
    assert pod["restartPolicy"] == "Never" and pod["securityContext"]["runAsNonRoot"]
    assert "ConfigMap" not in documents("debug/gpt2", ["batch.micro=1"]), "a shipped one is in the image"


def test_torchrun_takes_its_place_from_the_operators_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pkg/runtime/framework/plugins/torch of kubeflow/trainer sets them, in the container called `node`."""
    from torch.distributed import run

    trainer = documents()["TrainJob"]["spec"]["trainer"]
    given = {"NNODES": "2", "NPROC_PER_NODE": "8", "NODE_RANK": "1", "MASTER_ADDR": "gpt2-node-0-0.gpt2",
             "MASTER_PORT": "29400"}  # fmt: skip
    for name, value in given.items():
        monkeypatch.setenv(f"PET_{name}", value)
    assert trainer["command"] == ["torchrun"]
    options = run.parse_args(trainer["args"])
    config, _, words = run.config_from_args(options)
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (2, 2, 8)
    assert config.shutdown_timeout == 110, "less than the pod has"
    assert (options.master_addr, options.node_rank) == ("gpt2-node-0-0.gpt2", 1)
    assert words[1:5] == ["-m", "shardwright", "train", "/etc/shardwright/gpt2.yaml"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"] == {"limits": {"nvidia.com/gpu": "8"}}


@pytest.mark.parametrize("page", ["kubernetes.md", "clouds.md"])
def test_the_commands_of_the_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand there, in a folder with what a checkout has."""
    for name in ("configs", "setup.py", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for words in commands(ROOT / "docs" / page):
        assert run(words) == 0
        written = Path(words[words.index("--output") + 1])
        assert len(list(yaml.safe_load_all(written.read_text()))) == {"kubernetes.md": 3, "clouds.md": 1}[page]


def test_nothing_is_expanded_and_a_cpu_asks_for_no_gpu() -> None:
    trainer = documents(TINY[0], ["run=runs/$(HOME)", "train.device=cpu", "batch.micro=1"])["TrainJob"]["spec"][
        "trainer"
    ]
    assert "run=runs/$$(HOME)" in trainer["args"]
    assert "resourcesPerNode" not in trainer


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"environment": ["HF_TOKEN=hf_abc"]}, "--env HF_TOKEN: looks like a secret"),
        ({"environment": ["PROXY=http://me:hunter2@proxy"]}, "a URL here holds a password"),
        ({"environment": ["NOT_SET_HERE"]}, "--env NOT_SET_HERE: is not set here"),
        ({"overrides": ["data.path=https://me:hunter2@host/x"]}, "data.path: holds a password or a signature"),
        ({"overrides": ["run=/home/me/runs/x", "batch.micro=1"]}, "run=/home/me/runs/x: give a path relative"),
        ({"overrides": ["batch.micro=1", "parallel.tensor=3"]}, "does not make the world of 16 processes"),
    ],
)
def test_refusals_repeat_no_secret(change: dict[str, Any], words: str) -> None:
    given = {"overrides": TINY[1], **SIZE, **change}
    with pytest.raises(ConfigError, match=words) as caught:
        build_wanted(TINY[0], **given)
    assert "hunter2" not in str(caught.value) and "hf_abc" not in str(caught.value)


@pytest.mark.parametrize("option", ["image", "claim"])
def test_what_is_needed_is_asked_for(option: str) -> None:
    with pytest.raises(ConfigError, match=f"--kubernetes: needs --{option}"):
        write_manifest(build_wanted(*TINY, **SIZE), **{**PLACE, option: None})
