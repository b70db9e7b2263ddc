"""What docs/trust.md promises: what listens where, what is never unpickled or run, what is written for whom.

The sockets and files are those of real runs; the calls are found in the source of the package.
"""

from __future__ import annotations

import ast
import http.server
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from shardwright.config import ConfigError, find_secret, is_secret_name
from shardwright.data.prepare import PrepareConfig
from shardwright.train.settings import SCHEMA, read_config
from tests.equivalence.cells import config
from tests.faults.launched import Launch
from tests.faults.test_lost_rank import wait_for
from tests.ranks import free_port

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "shardwright"

#: (file, call) that may stand in the package, and why: docs/trust.md says the same.
ALLOWED = {
    ("data/workers.py", "pickle.dumps"),  # a function for processes that this one starts itself
    ("data/workers.py", "pickle.loads"),
    ("data/prepare/pickled.py", "pickle.loads"),  # members of a tar, which the user has to allow by name
    ("interop/deepspeed.py", "torch.load"),  # `shardwright import --deepspeed`, which a user calls by name
    ("interop/deepspeed.py", "weights_only=False"),
    ("data/remote.py", "shell=True"),  # a pipe: URL, which the user has to allow by name
}
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
CALLS = {"torch.load", "os.system", "os.popen", "eval", "exec", "pandas.read_pickle"}
OBJECTS = re.compile(r"(all_gather|gather|scatter|broadcast|send|recv)_object(_list)?$")


def risky_calls(tree: ast.AST) -> Iterator[str]:
    """Calls that run what they read."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        module, _, last = name.rpartition(".")
        if module in MODULES or name in CALLS or OBJECTS.search(last):
            yield name
        if name == "yaml.load" and not (len(node.args) == 2 and ast.unparse(node.args[1]) == "_Loader"):
            yield "yaml.load without _Loader"
        for keyword in node.keywords:
            text = ast.unparse(keyword.value)
            if (keyword.arg, text) in (("shell", "True"), ("weights_only", "False"), ("allow_pickle", "True")):
                yield f"{keyword.arg}={text}"


def imported_names(tree: ast.AST) -> Iterator[str]:
    """`from pickle import loads` would hide the call."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES | {"os", "torch"}:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_nothing_in_the_package_runs_what_it_reads() -> None:
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree, name = ast.parse(path.read_text("utf-8")), str(path.relative_to(PACKAGE))
        found |= {(name, call) for call in risky_calls(tree)}
        hidden = {n for n in imported_names(tree) if n.split(".")[0] in MODULES or n in CALLS}
        assert not hidden, f"{name}: write {hidden} with its module, so that this test sees it"
    assert found == ALLOWED
    page = (ROOT / "docs/trust.md").read_text("utf-8")
    assert all(f"`shardwright/{file}`" in page for file, _ in ALLOWED)


@pytest.mark.parametrize(
    "source",
    ["torch.load(f)", "os.system(x)", "subprocess.run(x, shell=True)", "eval(x)", "yaml.load(t, yaml.Loader)",
     "dist.all_gather_object(a, b)", "pickle.loads(b)", "np.load(f, allow_pickle=True)"],
)  # fmt: skip
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(risky_calls(ast.parse(source)))
    assert list(imported_names(ast.parse("from pickle import loads"))) == ["pickle.loads"]


# ------------------------------------------------------------------------------------------ sockets, files, secrets


def listening(root: int) -> dict[int, set[str]]:
    """Addresses on which processes below `root` listen, by process id."""
    found: dict[int, set[str]] = {}
    for process in psutil.Process(root).children(recursive=True) + [psutil.Process(root)]:
        with_sockets = process.net_connections("inet")
        found[process.pid] = {c.laddr.ip for c in with_sockets if c.status == psutil.CONN_LISTEN}
    return {pid: places for pid, places in found.items() if places}


SECRETS = {
    "HF_TOKEN": "hf_hunter2trust",
    "AWS_SECRET_ACCESS_KEY": "aws/hunter2trust",
    "WANDB_API_KEY": "wb-hunter2trust",
}


@contextmanager
def umask(value: int) -> Iterator[None]:
    before = os.umask(value)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.in_turn
def test_launch_listens_on_loopback_keeps_secrets_and_writes_for_nobody_else(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    raw = config(prepared, tmp_path / "run")
    raw["train"]["steps"], raw["schedule"]["warmup_steps"] = 3, 1
    raw["checkpoint"]["every"], raw["log"]["tensorboard"] = 2, True
    with umask(0), Launch(tmp_path, raw, "--nproc", "2", hold=[2]) as launch:
        launch.wait_held(2)
        places = listening(launch.process.pid)
        assert len(places) >= 2, "two ranks listen for gloo, and one agent for its store"
        assert set().union(*places.values()) == {"127.0.0.1"}
        launch.release(2)
        assert launch.finish() == 0, launch.text
    files = [path for path in (tmp_path / "run").rglob("*") if not path.is_symlink()]
    assert {"config.yaml", "metrics.jsonl", "checkpoints"} <= {path.name for path in files}
    assert not [path for path in files if path.stat().st_mode & stat.S_IWOTH], "umask 0, and still not for everybody"
    written = [path.read_bytes() for path in files if path.is_file()] + [launch.text.encode()]
    assert not [text for text in written if b"hunter2" in text]


@pytest.mark.in_turn
def test_under_torchrun_only_its_own_store_listens_outside(prepared: Path, tmp_path: Path) -> None:
    """torchrun's agent opens its store on every interface, which docs/trust.md says; no rank does such a thing."""
    raw = config(prepared, tmp_path / "run")
    raw["train"]["steps"], raw["schedule"]["warmup_steps"] = 3, 1
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    environment = os.environ | {"SHARDWRIGHT_TEST_RECORDS": str(tmp_path), "SHARDWRIGHT_TEST_HOLD": "2"}
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-id", "1", f"--master-port={free_port()}"]
    command = [sys.executable, *start, "-m", "tests.faults.recorded", "train", str(tmp_path / "config.yaml")]
    with umask(0o077), (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: len(list(tmp_path.glob("held-2-*"))) == 2 or agent.poll() is not None, 60)
        assert agent.poll() is None, (tmp_path / "log").read_text()
        places = listening(agent.pid)
        outside = {pid for pid, found in places.items() if found != {"127.0.0.1"}}
        assert outside <= {agent.pid}
        assert len(places) - len(outside) == 2, "each rank listens for gloo"
        (tmp_path / "go-2").touch()
        assert agent.wait(60) == 0
    finally:
        if agent.poll() is None:
            os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    modes = {path.stat().st_mode & 0o077 for path in (tmp_path / "run").rglob("*") if not path.is_symlink()}
    assert modes == {0}, "the user's umask is followed"


@pytest.mark.parametrize(
    "place",
    ["s3://key:hunter2@bucket/x", "https://host/x?X-Amz-Signature=hunter2", "https://host/x?a=1&token=hunter2"],
)
def test_a_secret_in_a_place_is_kept_out_of_any_config(place: str) -> None:
    for override in (f"data.path={place}", f"data.sources=[{{path: '{place}'}}]"):
        with pytest.raises(ConfigError, match="holds a password or a signature") as caught:
            read_config("debug/gpt2", ["data.path=null", override])
        assert "hunter2" not in str(caught.value)
    command = [sys.executable, "-m", "shardwright", "prepare", place, "--output", os.devnull]
    if "token" in place:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "hunter2" not in done.stdout + done.stderr
    assert not find_secret("https://me@host:8080/x?version=2")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("log.wandb={token: hunter2}", "log.wandb: got what looks like a secret (dict); input should be a valid str"),
        ("log.every=[{a: {API_KEY: hunter2}}]", "log.every: got what looks like a secret (list); input should be a v"),
        ("log.every='api_key: hunter2'", "log.every: got what looks like a secret (str); input should be a valid int"),
        ("train=[password: hunter2]", "train: got what looks like a secret (list); expected a section of keys"),
        ("model.family={secret: hunter2}", "got what looks like a secret"),
        ("log.wandb={token: hunter2", "what looks like a secret: the value is not valid YAML"),
        ("log.wandb_api_key=[hunter2", "'log.wandb_api_key=...': the value is not valid YAML"),
        ("https://me:hunter2@host/x", "what looks like a secret: expected key=value"),
        ("run=https://me:hunter2@host/x", "run: holds a password or a signature, which would stand in config.yaml"),
        ("log.wandb=s3://b/x?token=hunter2", "log.wandb: holds a password or a signature"),
        ("deepspeed.extra={csv_monitor: {job_name: 'http://me:hunter2@x'}}", "deepspeed.extra.csv_monitor.job_name: h"),
        ("log={'http://me:hunter2@x': 1}", "log: holds a password or a signature"),
        ("deepspeed.extra.comet.api_key=hunter2", "deepspeed.extra.comet.api_key: is a secret by its name"),
        ("deepspeed.extra={a: [{b: {credentials: {c: hunter2}}}]}", "deepspeed.extra.a.0.b.credentials: is a secret"),
    ],
)
def test_a_secret_in_a_config_is_refused_and_not_repeated(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_config("debug/gpt2", [override])
    said = str(caught.value)
    assert says in said and "hunter2" not in said and "\n" not in said


def test_no_key_of_ours_is_taken_for_a_secret() -> None:
    def names(part: object) -> Iterator[str]:
        if isinstance(part, dict):
            yield from part.get("properties", {})
        for inner in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            yield from names(inner)

    ours = {name for schema in (SCHEMA, PrepareConfig) for name in names(schema.model_json_schema())}
    assert {"max_tokens", "tokenizer", "extra"} <= ours
    assert not [name for name in ours if is_secret_name(name)]
    assert read_config("debug/gpt2", ["deepspeed.extra={comet: {api_key: null}, a: &a [*a]}"]).deepspeed.extra["comet"]


def test_the_secret_that_fsspec_has_is_sent(tmp_path: Path) -> None:
    """The way that the refusal names."""

    class Guarded(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            good = self.headers.get("Authorization") == "Bearer hunter2"
            self.send_response(200 if good else 401)
            self.send_header("Content-Length", "3" if good else "0")
            self.end_headers()
            self.wfile.write(b"yes" if good else b"")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Guarded)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "import sys; from shardwright.data.remote import Retry, read_bytes as r; print(r(sys.argv[1], retry=Retry(1)))"
    )
    kept = json.dumps({"client_kwargs": {"headers": {"Authorization": "Bearer hunter2"}}})
    try:
        for given, answer in ({"FSSPEC_HTTP": kept}, "b'yes'\n"), ({}, ""):
            command = [sys.executable, "-c", code, f"http://127.0.0.1:{server.server_port}/x"]
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | given
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
            assert done.stdout == answer, done.stderr
    finally:
        server.shutdown()
        server.server_close()
