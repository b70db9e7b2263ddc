"""`shardwright launch --kubernetes`: a Kubeflow Trainer job as YAML for `kubectl apply`; nothing is sent anywhere.

Beside sky.py, over manifest.py. The current API of Kubeflow is the TrainJob (trainer.kubeflow.org/v1alpha1); PyTorchJob
belongs to the training operator that it replaced. The TrainJob comes with a TrainingRuntime of its own, so that restart
policy, volumes and permissions do not depend on what an administrator has put into a runtime of the cluster. Both are
plain data: Kubeflow's typed models (kubeflow-trainer-api) check them in tests, and are not needed here.

The operator gives torchrun its place by PET_* variables; what runs is a list of arguments, and no shell.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from shardwright.config import ConfigError
from shardwright.launcher.manifest import Wanted, to_yaml

API = "trainer.kubeflow.org/v1alpha1"
FOLDER = "/workspace"  # where the shared volume lies; runs and data are relative to it
CONFIG = "/etc/shardwright"
USER = 1000  # of the Dockerfile
GRACE_S, MARGIN_S = 120, 10  # from SIGTERM to SIGKILL; torchrun passes SIGTERM on, and kills its ranks before that
NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
Document = dict[str, Any]


def write_manifest(wanted: Wanted, *, image: str | None, claim: str | None) -> str:
    """The YAML of a run; ConfigError where the image or the volume is missing.

    `claim` names a PersistentVolumeClaim that all nodes can write.
    """
    if not image:
        raise ConfigError("--kubernetes: needs --image NAME:TAG, an image with shardwright (see docs/kubernetes.md)")
    if not claim:
        raise ConfigError("--kubernetes: needs --claim NAME, a ReadWriteMany volume claim for data and runs")
    for option, name in (("--claim", claim), *(("--secret", name) for name in wanted.secrets)):
        if not NAME.fullmatch(name):
            raise ConfigError(f"{option} {name}: is no name of Kubernetes; small letters, digits, - and .")
    head = f"By shardwright launch --kubernetes: kubectl apply -f FILE; kubectl get trainjob {wanted.name}"
    return to_yaml(build_documents(wanted, image, claim), head)


def build_documents(wanted: Wanted, image: str, claim: str) -> list[Document]:
    """Config (where it is a file), runtime, job."""
    config = [] if wanted.file is None else [build_config(wanted)]
    return [*config, build_runtime(wanted, image, claim), build_job(wanted, image)]


def build_config(wanted: Wanted) -> Document:
    """The config file, for all nodes to read."""
    assert wanted.file is not None
    text = wanted.file.read_text(encoding="utf-8")
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": wanted.name},
        "data": {wanted.file.name: text},
    }


def build_job(wanted: Wanted, image: str) -> Document:
    """What runs, on how many nodes."""
    config = wanted.config if wanted.file is None else f"{CONFIG}/{wanted.file.name}"
    trainer: Document = {
        "image": image,
        "command": ["torchrun"],
        "args": [f"--shutdown-timeout={GRACE_S - MARGIN_S}", *map(literal, wanted.command(config))],
        "numNodes": wanted.nodes,
        "numProcPerNode": wanted.processes,
    }
    if wanted.environment:
        trainer["env"] = [{"name": name, "value": literal(value)} for name, value in wanted.environment.items()]
    if wanted.gpus:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": str(wanted.gpus)}}
    return {
        "apiVersion": API,
        "kind": "TrainJob",
        "metadata": {"name": wanted.name},
        "spec": {
            "runtimeRef": {"apiGroup": API.partition("/")[0], "kind": "TrainingRuntime", "name": wanted.name},
            "trainer": trainer,
        },
    }


def literal(text: str) -> str:
    """So that Kubernetes takes it as it is: it would put variables in place of $(NAME)."""
    return text.replace("$(", "$$(")


def build_runtime(wanted: Wanted, image: str, claim: str) -> Document:
    """How nodes are made. A failed pod fails its job, and then all start again, from the newest checkpoint."""
    node = {
        "name": "node",
        "template": {
            "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
            "spec": {"backoffLimit": 0, "template": {"spec": build_pod(wanted, image, claim)}},
        },
    }
    return {
        "apiVersion": API,
        "kind": "TrainingRuntime",
        "metadata": {"name": wanted.name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
        "spec": {
            "mlPolicy": {"numNodes": wanted.nodes, "torch": {}},
            "template": {"spec": {"failurePolicy": {"maxRestarts": wanted.restarts}, "replicatedJobs": [node]}},
        },
    }


def build_pod(wanted: Wanted, image: str, claim: str) -> Document:
    """One node: an ordinary user, the shared volume, and memory in which loader processes and NCCL meet."""
    volumes: Mapping[str, tuple[str, Document]] = {
        "shared": (FOLDER, {"persistentVolumeClaim": {"claimName": claim}}),
        "memory": ("/dev/shm", {"emptyDir": {"medium": "Memory"}}),
    } | ({} if wanted.file is None else {"config": (CONFIG, {"configMap": {"name": wanted.name}})})
    container: Document = {
        "name": "node",  # the name by which the operator finds it
        "image": image,
        "workingDir": FOLDER,
        "volumeMounts": [
            {"name": name, "mountPath": path} | ({"readOnly": True} if name == "config" else {})
            for name, (path, _) in volumes.items()
        ],
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if wanted.secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in wanted.secrets]
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_S,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumes": [{"name": name, **source} for name, (_, source) in volumes.items()],
        "containers": [container],
    }
