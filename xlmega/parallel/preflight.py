"""What can be known to be wrong with a cluster, in seconds and before a model is built.

In come what each rank knows of itself (versions, hashes of code, recipe and data) and the directory of the run; out
goes nothing, or one RendezvousError that lists every finding with its rank and host. Checked: that all ranks run the
same code and versions on the same recipe and data; that the run's directory is one and the same for all and has room
for a checkpoint; that each device multiplies and each pair of ranks adds up as it should. Clocks that differ and
devices that are slow are told and not refused: nothing here depends on them.

Every rank calls `preflight` with the same arguments but its own facts; all get the same answer.
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import shutil
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xlmega.errors import ConfigError, RendezvousError

PACKAGE = Path(__file__).resolve().parents[1]
CLOCK_SKEW_SECONDS = 5.0
SLOW_FACTOR = 1.5
TOKEN = ".xlmega-"
"""How the names of files begin that the ranks look for together."""
_SIDE = 384


def code_hash(package: Path = PACKAGE) -> str:
    """sha256 over the package's own files: what `git pull` on one node and not the other changes."""
    digest = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.toml")]):
        digest.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def preflight(
    store: dist.Store, facts: Mapping[str, str], output: Path, device: torch.device, *, needs_bytes: float
) -> list[str]:
    """Compare all ranks and try their devices and the run's directory; returns what is merely worth telling."""
    rank, size = dist.get_rank(), dist.get_world_size()
    place = _existing(output)
    if rank == 0:
        store.set("preflight/token", _leave_token(place))
    token = store.get("preflight/token").decode()
    mine: dict[str, Any] = {"host": socket.gethostname(), "facts": {**facts, "python": platform.python_version()}}
    mine["shared"] = not token or (place / token).is_file()
    mine["free_bytes"] = shutil.disk_usage(place).free
    mine["device"], mine["seconds"] = try_device(device)
    total = torch.tensor([float(rank + 1)], device=device)
    dist.all_reduce(total)
    mine["sum"] = float(total)
    dist.barrier()  # all leave it within a moment: what their clocks then say can be compared
    mine["clock"] = time.time()
    store.set(f"preflight/{rank}", json.dumps(mine))
    told = [json.loads(store.get(f"preflight/{other}")) for other in range(size)] if rank == 0 else []
    if rank == 0:
        if token:
            (place / token).unlink(missing_ok=True)
        verdict = {"problems": list(_problems(told, needs_bytes, place)), "remarks": list(_remarks(told))}
        store.set("preflight/verdict", json.dumps(verdict))
    verdict = json.loads(store.get("preflight/verdict"))
    if verdict["problems"]:
        store.add("preflight/read", 1)
        deadline = time.monotonic() + 10.0
        while rank == 0 and store.add("preflight/read", 0) < size and time.monotonic() < deadline:
            time.sleep(0.02)  # the store is here, and goes with this process
        error = RendezvousError("\n  ".join(["these ranks cannot train together:", *verdict["problems"]]))
        error.of_one_rank = False
        error.exit_code = ConfigError.exit_code  # starting again would not help
        raise error
    return list(verdict["remarks"])


def try_device(device: torch.device) -> tuple[str, float]:
    """('' or what is wrong, seconds of a product): an exact integer product, so any wrong bit shows."""
    left = (torch.arange(_SIDE * _SIDE) % 7).view(_SIDE, _SIDE)
    right = (torch.arange(_SIDE * _SIDE) % 5).view(_SIDE, _SIDE)
    due = left @ right  # int64, on the CPU
    ours, theirs = left.float().to(device), right.float().to(device)
    begun = time.perf_counter()
    for _ in range(4):
        found = ours @ theirs
    found = found.cpu()
    seconds = (time.perf_counter() - begun) / 4
    wrong = int((found.long() != due).sum())
    return (f"{wrong} of {due.numel()} entries of a product are wrong" if wrong else ""), seconds


def _problems(told: list[dict[str, Any]], needs_bytes: float, place: Path) -> Iterator[str]:
    size = len(told)
    for name in dict.fromkeys(name for one in told for name in one["facts"]):
        values = [one["facts"].get(name, "none") for one in told]
        usual, count = Counter(values).most_common(1)[0]
        if count < size:
            others = [rank for rank in range(size) if values[rank] != usual]
            shown = values[others[0]]
            yield f"{_ranks(others, told)}: {name} is {shown}, but {usual} on the other {count} of {size}."
    apart = [rank for rank, one in enumerate(told) if not one["shared"]]
    if apart:
        yield f"{_ranks(apart, told)}: '{place}' is not what rank 0 sees there. --output must be on a shared disk."
    full = [rank for rank, one in enumerate(told) if one["free_bytes"] < needs_bytes]
    if full:
        free = min(told[rank]["free_bytes"] for rank in full)
        yield (
            f"{_ranks(full, told)}: '{place}' has {_size(free)} free, and one checkpoint takes {_size(needs_bytes)}. "
            "Make room, or choose another --output."
        )
    for rank, one in enumerate(told):
        if one["device"]:
            yield f"{_ranks([rank], told)}: {one['device']}: the device is broken. Take that node out."
        if one["sum"] != size * (size + 1) / 2:
            yield f"{_ranks([rank], told)}: a sum over all ranks gave {one['sum']} instead of {size * (size + 1) / 2}."


def _remarks(told: list[dict[str, Any]]) -> Iterator[str]:
    clocks = [one["clock"] for one in told]
    middle = statistics.median(clocks)
    off = [rank for rank, clock in enumerate(clocks) if abs(clock - middle) > CLOCK_SKEW_SECONDS]
    if off:
        yield f"{_ranks(off, told)}: the clock is {clocks[off[0]] - middle:+.0f} s off; times in logs will not agree"
    usual = statistics.median(one["seconds"] for one in told)
    slow = [rank for rank, one in enumerate(told) if one["seconds"] > SLOW_FACTOR * usual and one["seconds"] > 1e-3]
    if slow:
        factor = max(told[rank]["seconds"] for rank in slow) / usual
        yield f"{_ranks(slow, told)}: a product takes {factor:.1f} times as long as elsewhere, and all wait for it"


def _ranks(ranks: list[int], told: list[dict[str, Any]]) -> str:
    hosts = sorted({told[rank]["host"] for rank in ranks})
    return f"rank {', '.join(map(str, ranks[:16]))} on {', '.join(hosts[:8])}"


def _size(number: float) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.2f} MB"


def _existing(output: Path) -> Path:
    place = output.resolve()
    while not place.exists():
        place = place.parent
    return place


def _leave_token(place: Path) -> str:
    """A file that the others look for; '' where none can be left, which the check of the output tells better."""
    token = f"{TOKEN}{secrets.token_hex(8)}"
    try:
        (place / token).touch()
    except OSError:
        return ""
    return token
