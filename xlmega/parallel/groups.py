"""Joining a launcher and giving the ranks their groups; the only file that knows how a run was started.

In come environment variables (deepspeed, torchrun, srun, mpirun or nothing at all) and a Layout; out go initialised
torch.distributed and Megatron-core groups, the device to work on, and the `mpu` that DeepSpeed asks for.
Guaranteed: every rank has answered a roll-call before any collective is issued, so a rank that never comes is named
after `timeout_seconds`; and where there is no CUDA, Megatron-core's few calls to it answer with the CPU.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from xlmega.errors import ConfigError, LostRankError, RendezvousError
from xlmega.parallel.layout import Layout

# Megatron-core warns in every process that the optional packages are missing; the start-up line says what is used.
warnings.filterwarnings("ignore", message=".*Apex (is|are) not installed.*")
warnings.filterwarnings("ignore", message="full scope is deprecated.*")
warnings.filterwarnings("ignore", message=".*_(into|scatter)_tensor. is deprecated.*")


@dataclass(frozen=True)
class Process:
    """Who this process is among those of the run."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    launcher: str
    """deepspeed, torchrun, srun, mpirun or single."""


# (launcher, rank, world size, local rank), in the order in which they are asked.
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("mpirun", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("mpirun", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


def discover(environ: Mapping[str, str], *, master_port: int | None = None) -> Process:
    """The launcher's view of this process; one process when no launcher is found.

    An sbatch script's own shell has SLURM_* variables too: only a task of srun has SLURM_STEP_ID.
    """
    if master_port is not None and not 0 < master_port < 65536:
        raise ConfigError(f"master port {master_port} is not a port: those are 1 to 65535.")
    for launcher, rank, world, local in _LAUNCHERS:
        if not _started_by(launcher, local, environ) or (rank not in environ and world not in environ):
            continue
        if rank not in environ or world not in environ:
            there, missing = (rank, world) if rank in environ else (world, rank)
            if rank == "SLURM_PROCID" or not _is_a_task(environ):  # else srun tells what a half-set pair does not
                raise _of_this_rank(
                    f"{there}={environ[there]} is set without {missing}, so how many ranks there are, or which of "
                    f"them this is, is not known. Set both, as launchers do, or neither to train in one process."
                )
            continue
        try:
            numbers = int(environ[rank]), int(environ[world]), int(environ.get(local, "0"))
            if not 0 <= numbers[0] < numbers[1]:
                raise ValueError("ranks count from 0 to one less than the world's size")
            port = int(environ.get("MASTER_PORT") or _default_port(environ)) if master_port is None else master_port
        except ValueError as error:
            names = (rank, world, local, "MASTER_PORT", "SLURM_JOB_ID")
            told = [f"{name}={environ[name]}" for name in names if name in environ]
            raise _of_this_rank(f"{launcher} set {', '.join(told)}: {error}.") from None
        if not 0 < port < 65536:
            raise _of_this_rank(f"master port {port} is not a port: those are 1 to 65535.")
        address = environ.get("MASTER_ADDR") or _first_slurm_node(environ.get("SLURM_STEP_NODELIST", ""))
        if launcher == "mpirun" and not address:
            address = _address_through_mpi()
        name = "deepspeed" if launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ else launcher
        return Process(*numbers, address or "127.0.0.1", port, name)
    return Process(0, 1, 0, "127.0.0.1", master_port or _free_port(), "single")


def _is_a_task(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process, or what started it."""
    return "SLURM_STEP_ID" in environ


def _started_by(launcher: str, local: str, environ: Mapping[str, str]) -> bool:
    """Whether the variables of a launcher, where they are set, are its own."""
    if launcher == "srun":
        return _is_a_task(environ)
    # Where a site's srun speaks PMI-2 it sets PMI_RANK too, but the local rank only in its own variable.
    return local != "MPI_LOCALRANKID" or local in environ or not _is_a_task(environ)


def _of_this_rank(words: str) -> ConfigError:
    """An error that the other ranks need not have, so this one tells it."""
    error = ConfigError(words)
    error.of_one_rank = True
    return error


def local_rank(environ: Mapping[str, str]) -> int:
    """Which rank of its node this process is, as far as the environment says; never an error."""
    told = next((environ[local] for *_, local in _LAUNCHERS if local in environ), "0")
    return int(told) if told.isdigit() else 0


def _default_port(environ: Mapping[str, str]) -> int:
    """Two jobs of one cluster meet on one node with different ports."""
    return 29500 + int(environ.get("SLURM_JOB_ID", "0")) % 1000


def _first_slurm_node(node_list: str) -> str:
    """'gpu[003-004,9],x1' -> 'gpu003'; 'rack[0-1]node[2-3]-ib' -> 'rack0node2-ib'."""
    first = re.match(r"(?:[^\[,]|\[[^\]]*\])*", node_list)
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0]) if first else ""


def _address_through_mpi() -> str:
    """mpirun tells no address: rank 0's host name, broadcast through mpi4py."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise ConfigError(
            "started by mpirun without MASTER_ADDR, and mpi4py is not installed. "
            "Export MASTER_ADDR and MASTER_PORT, or install the extra: pip install -e .[mpi]"
        ) from None
    return str(MPI.COMM_WORLD.bcast(socket.gethostname(), root=0))


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def device_of(process: Process) -> torch.device:
    """The CUDA device of this process's local rank, or the CPU."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and process.launcher == "srun":  # --gpus-per-task=1: each task is shown its own
        return torch.device("cuda", 0)
    if process.local_rank >= count:
        raise _of_this_rank(
            f"local rank {process.local_rank} has no GPU: this node shows {count}. "
            "Start at most that many ranks per node, or set DS_ACCELERATOR=cpu."
        )
    return torch.device("cuda", process.local_rank)


def device_name(device: torch.device) -> str:
    """'NVIDIA H200' or 'CPU'."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@contextlib.contextmanager
def joined(
    process: Process,
    layout: Layout,
    *,
    timeout_seconds: float = 600.0,
    collective_timeout_seconds: float = 600.0,
) -> Iterator[torch.device]:
    """The groups of a run for the length of a `with` block; all ranks must enter. Gives the device to work on.

    `timeout_seconds` is how long ranks await each other at the start. Whoever watches over the run gives
    `collective_timeout_seconds` above his own limits, since what torch does at its end names nobody.
    """
    device = device_of(process)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed guesses from what is installed, not from what there is
        stand_in_for_cuda()
        if process.world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // _ranks_on_this_node(process)))
    else:
        torch.cuda.set_device(device)
    for name, value in (("RANK", process.rank), ("WORLD_SIZE", process.world_size), ("LOCAL_RANK", process.local_rank)):
        os.environ[name] = str(value)  # DeepSpeed reads them whatever the launcher
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # Megatron's overlap of communication counts on it
    store = _roll_call(process, timeout_seconds, layout.describe())
    with _connecting(process, timeout_seconds):
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
            store=dist.PrefixStore("xlmega", store),
            rank=process.rank,
            world_size=process.world_size,
            timeout=timedelta(seconds=max(collective_timeout_seconds, 60.0)),
        )
        from megatron.core import parallel_state

        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            layout.virtual_stages if layout.virtual_stages > 1 else None,
            distributed_timeout_minutes=math.ceil(max(collective_timeout_seconds, 60.0) / 60),
        )
    try:
        yield device
    finally:
        if sys.exc_info()[0] is None:  # after an error the peers may be gone, and tear-down would wait for them
            dist.barrier()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


@contextlib.contextmanager
def _connecting(process: Process, timeout_seconds: float) -> Iterator[None]:
    """A LostRankError where the ranks cannot connect; the end of this process where that takes too long.

    torch has no limit that holds against a store whose host no longer answers.
    """
    why = f"rank {process.rank} could not connect to the others, though all had come: one has left or stands still, or "
    why += "the network lets nothing through. Look at the other ranks' logs, and start again with --resume."

    def give_up() -> None:
        print(f"{LostRankError.__name__}: after {timeout_seconds:g} s {why}", file=sys.stderr, flush=True)
        os._exit(LostRankError.exit_code)

    late = threading.Timer(timeout_seconds, give_up)
    late.daemon = True
    late.start()
    try:
        yield
    except RuntimeError as error:  # DistError is one
        raise LostRankError(f"{why} ({str(error).splitlines()[0][:200]})") from None
    finally:
        late.cancel()


def _ranks_on_this_node(process: Process) -> int:
    told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    told = told or os.environ.get("SLURM_NTASKS_PER_NODE") or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE")
    return max(1, int(told)) if told and told.isdigit() else process.world_size


def _roll_call(process: Process, timeout_seconds: float, layout: str = "") -> dist.Store:
    """A store in which every rank has written its name; a RendezvousError that names those that did not.

    Ranks that were told of other numbers, or one that comes twice, would wait for each other without end: it is told
    which, with the code of what starting again does not help.
    """
    place = f"{process.master_addr}:{process.master_port}"
    agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    deadline = time.monotonic() + timeout_seconds
    unreachable = f"rank {process.rank} cannot reach rank 0 at {place} in {timeout_seconds:g} s."
    try:
        if process.rank or agent_has_store:
            _await_listener(process, deadline)  # the store would wait too, but tells of it in fifty lines
        store: dist.Store = _open_store(process, timeout_seconds, is_master=process.rank == 0 and not agent_has_store)
    except (dist.DistError, OSError) as error:
        if process.rank == 0 and "EADDRINUSE" in str(error):
            raise RendezvousError(
                f"port {process.master_port} of this machine is in use, so the ranks cannot meet at {place}. "
                "Choose another with --master_port (given to the launcher, where there is one)."
            ) from None
        raise RendezvousError(f"{unreachable} Is it running, and are MASTER_ADDR and MASTER_PORT its own?") from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"roll_call_{attempt}", store)
    try:
        if problem := _disagreement(store, process, layout):
            store.set("gave_up", json.dumps([problem, ConfigError.exit_code]))
        else:
            store.add("arrived", 1)
        while problem or store.add("arrived", 0) < process.world_size or store.check(["gave_up"]):
            if time.monotonic() > deadline and not store.check(["gave_up"]):
                missing = [rank for rank in range(process.world_size) if not store.check([str(rank)])]
                words = (
                    f"{len(missing)} of {process.world_size} ranks did not come to {place} in {timeout_seconds:g} s: "
                    f"rank {', '.join(map(str, missing[:16]))}{' ...' if len(missing) > 16 else ''}. "
                    "Look at their logs, or wait longer with --rendezvous_timeout_seconds."
                )
                store.set("gave_up", json.dumps([words, RendezvousError.exit_code]))
            if store.check(["gave_up"]):  # one that gives up ends the run: all say why
                words, code = json.loads(store.get("gave_up"))
                if process.rank == 0:
                    time.sleep(0.5)  # the store is here, and the others are reading it
                ended = RendezvousError(words)
                ended.exit_code = code
                raise ended
            time.sleep(0.05)
    except dist.DistError:
        raise RendezvousError(
            f"rank {process.rank} reached rank 0 at {place}, but it left before all ranks had come. Look at its log."
        ) from None
    return store


def _disagreement(store: dist.Store, process: Process, layout: str) -> str:
    """What keeps this rank from meeting the others, '' for nothing; puts its name into the store."""
    me = f"rank {process.rank} on {socket.gethostname()}"
    mine = f"{process.world_size} ranks{layout and f' as {layout}'}"
    told = store.compare_set("agreed", "", f"{mine} ({me})").decode()
    if told.rpartition(" (")[0] != mine:
        first, _, who = told.rpartition(" (")
        return f"{me} was started for {mine}, but {who[:-1]} for {first}. Start all with the same command."
    if store.add(f"came/{process.rank}", 1) > 1:
        first = store.get(str(process.rank)).decode()
        return f"{me} comes twice: {first} is here already. Start each once; another run may use the same port."
    store.set(str(process.rank), f"process {os.getpid()} on {socket.gethostname()}")
    return ""


def meeting_store(process: Process, name: str, *, timeout_seconds: float = 60.0) -> dist.Store:
    """Another connection to the store in which the ranks met, with keys of its own; for threads and for checks."""
    try:
        _await_listener(process, time.monotonic() + 5.0)  # it was there a moment ago
        store = _open_store(process, 10.0)
        store.set_timeout(timedelta(seconds=timeout_seconds))
    except (dist.DistError, OSError):
        raise LostRankError(
            f"rank 0 at {process.master_addr}:{process.master_port} was there and is gone: rank {process.rank} cannot "
            "reach it any more. Look at its log, and start again with --resume."
        ) from None
    return dist.PrefixStore(f"{name}_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _open_store(process: Process, timeout_seconds: float, *, is_master: bool = False) -> dist.TCPStore:
    """The store at the master's address; an OSError or DistError when it does not answer in time.

    A client is made by a thread: torch (2.13) waits without end for the answer of a listener that is no store.
    """
    made: list[dist.TCPStore | Exception] = []

    def make() -> None:
        try:
            made.append(
                dist.TCPStore(
                    process.master_addr,
                    process.master_port,
                    is_master=is_master,
                    timeout=timedelta(seconds=timeout_seconds),
                    wait_for_workers=False,
                )
            )
        except (dist.DistError, OSError, RuntimeError) as error:
            made.append(error)

    if is_master:
        make()
    else:
        thread = threading.Thread(target=make, name="xlmega-meeting", daemon=True)
        thread.start()
        thread.join(timeout_seconds + 1.0)
    if not made:
        raise TimeoutError(f"no answer in {timeout_seconds:g} s")
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]


def _await_listener(process: Process, deadline: float) -> None:
    """Return once rank 0 listens; an OSError when it does not by the deadline."""
    while True:
        try:
            socket.create_connection((process.master_addr, process.master_port), timeout=5.0).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def words_of_all(words: str) -> list[str]:
    """What each rank has to say (the first 512 bytes), in rank order; every rank calls it."""
    told = torch.zeros(512, dtype=torch.uint8)
    data = words.encode()[:512]
    if data:
        told[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    gathered = [torch.empty_like(told) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, told)
    return [bytes(one.tolist()).rstrip(b"\0").decode(errors="replace") for one in gathered]


class Mpu:
    """What DeepSpeed asks of a model-parallel unit; Megatron-core answers, except for the model-parallel rank.

    To DeepSpeed, model-parallel means tensor times pipeline: gradient norms and overflow flags go over both.
    """

    def __getattr__(self, name: str) -> Any:
        from megatron.core import parallel_state

        return getattr(parallel_state, name)

    def get_model_parallel_world_size(self) -> int:
        return int(self.get_tensor_model_parallel_world_size() * self.get_pipeline_model_parallel_world_size())

    def get_model_parallel_rank(self) -> int:
        tp_size = self.get_tensor_model_parallel_world_size()
        return int(self.get_pipeline_model_parallel_rank() * tp_size + self.get_tensor_model_parallel_rank())


_stands_in = False


def stand_in_for_cuda() -> None:
    """Let Megatron-core's calls to torch.cuda answer with the CPU; done once, and only where CUDA is not used.

    Met in Megatron-core 0.16.1: tensors placed on `torch.cuda.current_device()` (mappings, point-to-point), a
    `device="cuda"` literal for the token count in the schedules, and synchronisation around point-to-point.
    """
    global _stands_in
    if _stands_in:
        return
    _stands_in = True
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    from megatron.core.pipeline_parallel import schedules

    schedules.torch = _TorchOnCpu()


class _TorchOnCpu:
    """The `torch` that the schedules module sees: the same, but "cuda" means the CPU in `zeros`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **keywords: Any) -> torch.Tensor:
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **keywords)
