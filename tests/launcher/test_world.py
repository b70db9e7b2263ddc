"""Every launcher's variables mean the same world; what contradicts itself is refused with the reason."""

import pytest

from shardwright.config import ConfigError
from shardwright.launcher.world import enter_world, first_host

TORCH = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1",
         "MASTER_PORT": "29400"}  # fmt: skip
TORCHRUN = {**TORCH, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "4"}
DEEPSPEED = {**{k: v for k, v in TORCH.items() if k != "LOCAL_WORLD_SIZE"}, "CROSS_RANK": "1", "CROSS_SIZE": "4",
             "LOCAL_SIZE": "2"}  # fmt: skip
SRUN = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
        "SLURM_STEP_NODELIST": "gpu[03-06]"}  # fmt: skip
OPENMPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
ADDRESS = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [(TORCH, "RANK and WORLD_SIZE"), (TORCHRUN, "torchrun"), (DEEPSPEED, "deepspeed"), (SRUN | ADDRESS, "srun"),
     (OPENMPI | ADDRESS, "mpirun"), (MPICH | ADDRESS, "mpirun"), (SRUN | MPICH | ADDRESS, "mpirun")],
    ids=["torch", "torchrun", "deepspeed", "srun", "openmpi", "mpich", "srun with pmi"],
)  # fmt: skip
def test_every_launcher_means_the_same_world(environment, launcher):
    """Afterwards torch's own variables are there, whoever started the process."""
    entered = dict(environment)
    place = enter_world(entered)
    assert place is not None and place.launcher == launcher
    assert {name: entered[name] for name in TORCH} == TORCH


def test_srun_needs_no_address():
    """Rank 0 is on the first node of the step; the port is the job's own."""
    entered = dict(SRUN)
    enter_world(entered)
    assert entered["MASTER_ADDR"] == "gpu03"
    assert entered["MASTER_PORT"] == str(20000 + 41 * 7 + 2)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-07,12],login", "gpu03"), ("r1-n[2,4].x,b", "r1-n2.x"), ("h[0-1]", "h0")],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_one_process_is_no_world():
    for environment in ({}, {"SLURM_JOB_ID": "4", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, {"MASTER_ADDR": "x"}):
        entered = dict(environment)
        assert enter_world(entered) is None
        assert entered == environment


BATCH = {"SLURM_JOB_ID": "41", "SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
LOOPBACK = {"MASTER_ADDR": "127.0.0.1"}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (SRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, ["two launchers", "rank 0 of 1", "rank 3 of 8"]),
        (OPENMPI | {"WORLD_SIZE": "1"} | ADDRESS, ["two launchers", "rank 0 of 1", "mpirun says rank 3 of 8"]),
        (TORCHRUN | SRUN | {"GROUP_WORLD_SIZE": "1"}, ["srun started 8 torchruns", "--nnodes 8"]),
        (DEEPSPEED | SRUN | {"CROSS_SIZE": "1"}, ["srun started 8 deepspeeds"]),
        (BATCH, ["SLURM_NTASKS=8", "put srun in front"]),
        ({"PET_NNODES": "4"}, ["PET_NNODES=4", "torchrun -m shardwright"]),
        ({"SLURM_JOB_ID": "41", "SLURM_JOB_NUM_NODES": "2"}, ["SLURM_JOB_NUM_NODES=2", "put srun in front"]),
        (ALONE | BATCH, ["SLURM_NTASKS=8", "rank 0 of 1", "put srun in front"]),
        (ALONE | {"TORCHELASTIC_RUN_ID": "x", "PET_NNODES": "4"}, ["PET_NNODES=4", "torchrun says rank 0 of 1"]),
        (OPENMPI | ADDRESS | {"OMPI_COMM_WORLD_RANK": "9"}, ["rank 9 of 8"]),
        (TORCH | LOOPBACK, ["MASTER_ADDR=127.0.0.1", "4 hosts"]),
        (TORCH | {"MASTER_ADDR": "localhost"}, ["MASTER_ADDR=localhost"]),
        (OPENMPI, ["mpirun says rank 3 of 8", "set MASTER_ADDR"]),
        ({"RANK": "1"}, ["RANK=1", "WORLD_SIZE and LOCAL_RANK are not set"]),
        ({"WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "RANK and LOCAL_RANK"]),
        (TORCH | {"RANK": "8"}, ["RANK=8", "expected 0 to 7"]),
        (TORCH | {"RANK": "two"}, ["RANK=two", "no whole number"]),
    ],
)
def test_contradictions_are_refused(environment, words):
    """In one line that says what to do."""
    with pytest.raises(ConfigError) as refused:
        enter_world(dict(environment))
    text = str(refused.value)
    assert "\n" not in text and all(word in text for word in words), text


def test_torchrun_inside_of_srun_is_right():
    """One torchrun a node, all of one world."""
    place = enter_world(TORCHRUN | SRUN | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1"})
    assert place is not None and (place.launcher, place.rank, place.size) == ("torchrun", 3, 8)


def test_mpirun_in_a_job_of_slurm_is_right():
    """On every host but its own mpirun starts a daemon by srun, whose place the ranks there inherit."""
    daemon = SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    place = enter_world(OPENMPI | ADDRESS | daemon | {"SLURM_STEP_TASKS_PER_NODE": "1"})
    assert place is not None and (place.launcher, place.rank, place.size) == ("mpirun", 3, 8)


def test_one_task_of_a_job_of_many_is_meant():
    """Where srun was told so."""
    one = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    place = enter_world(SRUN | one)
    assert place is not None and place.size == 1


def test_two_jobs_of_mpirun_on_one_host_meet_at_ports_of_their_own():
    found = []
    for job in ("1318125569", "2635661313"):
        entered = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "PMIX_NAMESPACE": job}
        enter_world(entered)
        found.append(int(entered["MASTER_PORT"]))
    assert found[0] != found[1] and all(20000 <= port < 30000 for port in found)


def test_one_host_may_meet_at_loopback():
    entered = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8"}
    enter_world(entered)
    assert entered["MASTER_ADDR"] == "127.0.0.1"
