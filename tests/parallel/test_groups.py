"""Who a process is under every launcher, and what is said when ranks do not come together."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from worlds import free_port

from xlmega.errors import ConfigError, RendezvousError
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


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("", ""), ("n1,n2", "n1"), ("gpu[7,9]-ib,x", "gpu7-ib"), ("rack[0-1]node[02-3],x1", "rack0node02")],
)
def test_the_first_of_slurms_nodes(nodes: str, first: str) -> None:
    assert groups._first_slurm_node(nodes) == first


def test_srun_that_speaks_pmi_2_is_not_mpirun() -> None:
    """Its ranks would all be local rank 0, on one GPU; an mpirun that srun started sets the local rank itself."""
    pmi = {"PMI_RANK": "3", "PMI_SIZE": "4"}
    assert discover({**SRUN, **pmi}) == discover(SRUN)
    started_by_srun = {**SRUN, **pmi, "MPI_LOCALRANKID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}
    assert discover(started_by_srun) == Process(3, 4, 0, "gpu003", 29623, "mpirun")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"RANK": "1"}, "RANK=1 is set without WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without RANK"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, "SLURM_NTASKS=2 is set without SLURM_PROCID"),
    ],
)
def test_half_of_what_a_launcher_sets_is_not_one_process(environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        discover(environ)
    assert caught.value.of_one_rank
    assert discover({**SRUN, "WORLD_SIZE": "2"}) == discover(SRUN)  # exported for something else: srun tells all


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
    with pytest.raises(ConfigError, match=words) as caught:
        discover({**TORCHRUN, **changes})
    assert caught.value.of_one_rank  # the others may be told of nothing wrong


@pytest.mark.parametrize("environ", [{}, TORCHRUN])
def test_a_master_port_that_is_none(environ: dict[str, str]) -> None:
    for port in (0, -5, 65536):
        with pytest.raises(ConfigError, match=f"master port {port} is not a port"):
            discover(environ, master_port=port)


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


STORES: list[torch.distributed.Store] = []  # rank 0's serves the others for as long as it lives


def roll_call(rank: int, size: int, port: int, seconds: float, *, late_seconds: float = 0.0) -> str:
    """What a rank is told when the others do not come; '' when all have."""
    time.sleep(late_seconds)
    try:
        STORES.append(groups._roll_call(Process(rank, size, rank, "127.0.0.1", port, "test"), seconds))
    except RendezvousError as error:
        return str(error)
    return ""


def together(*calls: tuple[int, int, int, float], late_seconds: float = 0.0) -> list[str]:
    """The roll calls of several ranks at once, each a thread here; all but the first come late."""
    with ThreadPoolExecutor() as pool:
        ranks = [pool.submit(roll_call, *call, late_seconds=late_seconds * (k > 0)) for k, call in enumerate(calls)]
        return [rank.result(timeout=60) for rank in ranks]


def test_all_ranks_come() -> None:
    port = free_port()
    assert together(*((rank, 3, port, 30.0) for rank in range(3)), late_seconds=0.3) == ["", "", ""]
    port = free_port()
    assert together(*((rank, 2, port, 30.0) for rank in (1, 0)), late_seconds=0.3) == ["", ""]  # rank 0 comes last


def test_ranks_that_never_come_are_named_by_all_that_came() -> None:
    port = free_port()
    words = f"2 of 4 ranks did not come to 127.0.0.1:{port} in 2 s: rank 1, 3. Look at their logs, or wait longer with"
    for said in together((0, 4, port, 2.0), (2, 4, port, 60.0)):  # rank 2 would wait longer, but it is over
        assert said == f"{words} --rendezvous_timeout_seconds."


def test_ranks_that_were_told_of_other_numbers_or_layouts_are_named_at_once() -> None:
    began, port = time.monotonic(), free_port()
    for said in together((0, 2, port, 60.0), (1, 3, port, 60.0), late_seconds=0.3):
        assert said.startswith("rank 1 on ") and "was started for 3 ranks, but rank 0 on " in said
    port = free_port()
    for said in together((0, 3, port, 60.0), (1, 3, port, 60.0), (1, 3, port, 60.0), late_seconds=0.3):
        assert "rank 1 on" in said and "comes twice" in said and "another run may use the same port" in said
    assert time.monotonic() - began < 30


def test_many_missing_ranks_are_counted() -> None:
    (said,) = together((0, 40, free_port(), 0.2))
    assert said.startswith("39 of 40 ranks did not come") and "rank 1, 2, 3, " in said and ", 16 ..." in said


def test_rank_0_that_never_comes() -> None:
    (said,) = together((1, 2, free_port(), 0.5))
    assert said.startswith("rank 1 cannot reach rank 0 at 127.0.0.1:") and "in 0.5 s" in said and "MASTER_ADDR" in said


@pytest.mark.multiprocess
def test_a_port_in_use_is_one_line_and_an_exit_code() -> None:
    command = """
import os
from xlmega.errors import run_main
from xlmega.parallel import groups
run_main(lambda: groups._roll_call(groups.discover(os.environ), 5.0) and None)
"""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        told = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        process = subprocess.run(
            [sys.executable, "-c", command], env={**os.environ, **told}, text=True, capture_output=True, timeout=120
        )
    assert process.returncode == 4
    assert process.stderr.startswith(f"RendezvousError: port {port} of this machine is in use")
    assert "--master_port" in process.stderr and len(process.stderr.splitlines()) == 1
