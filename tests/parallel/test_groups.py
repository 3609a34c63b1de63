"""Who a process is under every launcher, and what is said when ranks do not come together."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import worlds

from xlmega.errors import ConfigError
from xlmega.parallel import groups
from xlmega.parallel.groups import Process, discover, local_rank

pytestmark = pytest.mark.torch

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "1234",
    "TORCHELASTIC_RUN_ID": "x",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[003-004,9],x1", "SLURM_JOB_ID": "70123",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "MASTER_ADDR": "n7"
}  # fmt: skip


def test_torchrun_and_deepspeed() -> None:
    assert discover(TORCHRUN) == Process(5, 8, 1, "n1", 1234, "torchrun")
    deepspeed = {name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}
    assert discover(deepspeed) == Process(5, 8, 1, "n1", 1234, "deepspeed")


def test_srun() -> None:
    assert discover(SRUN) == Process(3, 4, 1, "gpu003", 29623, "srun")
    assert discover({**SRUN, "SLURM_STEP_NODELIST": "alone", "MASTER_PORT": "99"}) == Process(
        3, 4, 1, "alone", 99, "srun"
    )
    # In an sbatch script's own shell there is no step: plain python there is one process.
    script = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}
    assert discover(script).launcher == "single"


def test_mpirun() -> None:
    assert discover(MPIRUN) == Process(2, 4, 0, "n7", 29500, "mpirun")
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MASTER_ADDR": "n7"}
    assert discover(hydra) == Process(1, 2, 1, "n7", 29500, "mpirun")


def test_mpirun_without_address_asks_mpi4py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match=r"Export MASTER_ADDR and MASTER_PORT, or install the extra"):
        discover({name: value for name, value in MPIRUN.items() if name != "MASTER_ADDR"})


def test_single_process_and_a_port_of_ones_own() -> None:
    process = discover({})
    assert (process.rank, process.world_size, process.launcher) == (0, 1, "single") and process.master_port > 1023
    assert discover({}, master_port=4321).master_port == 4321
    assert discover(TORCHRUN, master_port=4321).master_port == 4321


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "x"}, "torchrun set RANK=x, WORLD_SIZE=8"),
        ({"RANK": "8"}, "ranks count from 0 to one less"),
        ({"RANK": "-1"}, "ranks count from 0"),
        ({"WORLD_SIZE": "0"}, "ranks count from 0"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK="),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc"),
        ({"MASTER_PORT": "70000"}, "master port 70000 is not a port: those are 1 to 65535"),
    ],
)
def test_an_environment_that_cannot_be(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        discover({**TORCHRUN, **changes})


def test_local_rank_before_anything_is_known_to_be_right() -> None:
    assert [local_rank(one) for one in (TORCHRUN, SRUN, MPIRUN, {}, {"LOCAL_RANK": "x"})] == [1, 1, 0, 0, 0]


def test_a_local_rank_without_gpu_says_so_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert groups.device_of(Process(1, 4, 1, "n", 1, "srun")) == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU: this node shows 2") as caught:
        groups.device_of(Process(2, 4, 2, "n", 1, "srun"))
    assert caught.value.of_one_rank
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert groups.device_of(Process(2, 4, 2, "n", 1, "srun")).type == "cpu"


# A roll call alone: it comes before megatron-core, which takes seconds to import.
CALL = """
import os, sys
from xlmega.errors import run_main
from xlmega.parallel import groups
run_main(lambda: groups._roll_call(groups.discover(os.environ), float(sys.argv[1])) and None)
"""


def start(rank: int, size: int, port: int, seconds: float) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TORCHELASTIC", "SLURM"))}
    environment |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", CALL, str(seconds)], env=environment, text=True, stderr=subprocess.PIPE
    )


@pytest.mark.multiprocess
def test_ranks_that_never_come_are_named_and_a_lone_one_gives_up() -> None:
    port = worlds.free_port()
    ranks = [start(rank, 4, port, 10) for rank in (0, 2)]
    lone = start(1, 2, worlds.free_port(), 1)
    said = [one.communicate(timeout=120)[1] for one in (*ranks, lone)]
    assert [one.returncode for one in (*ranks, lone)] == [4, 4, 4]
    # Rank 2 may find rank 0 gone before it has counted itself; rank 0 always names who is missing.
    assert said[0].startswith(f"RendezvousError: 2 of 4 ranks did not come to 127.0.0.1:{port} in 10 s: rank 1, 3.")
    assert "--rendezvous_timeout_seconds" in said[0]
    assert said[1].startswith("RendezvousError: ")
    assert "rank 1 cannot reach rank 0" in said[2] and "in 1 s" in said[2]
    assert [len(words.splitlines()) for words in said] == [1, 1, 1]


@pytest.mark.multiprocess
def test_a_port_in_use_is_one_line() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(0, 1, port, 5)
        words = process.communicate(timeout=120)[1]
    assert process.returncode == 4
    assert words.startswith(f"RendezvousError: port {port} of this machine is in use") and "--master_port" in words
    assert len(words.splitlines()) == 1
