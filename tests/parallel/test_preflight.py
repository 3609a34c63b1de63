"""Pre-flight: what differs between ranks is named with rank and host, before anything is built."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds

from xlmega.errors import RendezvousError
from xlmega.parallel import groups, layout, preflight

pytestmark = pytest.mark.multiprocess


def attempts(rank: int, folder: Path) -> dict[str, Any]:
    """preflight's answers, healthy first, then with one thing wrong on rank 1 (of 3)."""
    process = groups.Process(rank, 3, rank, "127.0.0.1", worlds.meet(folder, "p", rank), "test")
    told: dict[str, Any] = {}
    cpu = torch.device("cpu")
    with groups.joined(process, layout.choose(3), timeout_seconds=120):

        def attempt(name: str, facts: dict[str, str], output: Path, needs_bytes: float = 0.0) -> None:
            store = groups.meeting_store(process, name)
            try:
                told[name] = preflight.preflight(store, facts, output, cpu, needs_bytes=needs_bytes)
            except RendezvousError as error:
                told[name] = str(error)

        same = {"code": preflight.code_hash(), "recipe": "r", "torch": torch.__version__}
        attempt("healthy", same, folder / "run" / "deep")
        attempt("version", {**same, "torch": "1.0" if rank == 1 else "2.0"}, folder)
        attempt("package", {**same, "apex": "0.1"} if rank == 1 else same, folder)
        attempt("disk", same, folder, needs_bytes=1e18)
        own = folder / f"own{rank}"
        own.mkdir()
        attempt("shared", same, own)
        if rank == 1:
            real = time.time
            time.time = lambda: real() + 100
        attempt("clock", same, folder)
        if rank == 1:
            time.time = real
            preflight.try_device = lambda device: ("3 of 9 entries of a product are wrong", 9.0)  # type: ignore[assignment]
        attempt("device", same, folder)
    return told


def test_each_fault_is_named_with_its_rank(tmp_path: Path) -> None:
    told = worlds.run(3, attempts, folder=tmp_path)
    assert not list(tmp_path.rglob(".xlmega-*"))
    for found in told:
        assert isinstance(found["healthy"], list) and not any("clock" in remark for remark in found["healthy"])
        for name, words in {
            "version": ("rank 1 on", "torch is 1.0, but 2.0 on the other 2 of 3"),
            "package": ("rank 1 on", "apex is 0.1, but none on the other 2 of 3"),
            "disk": ("rank 0, 1, 2 on", "one checkpoint takes 1000000000.00 GB"),
            "shared": ("rank 1, 2 on", "is not what rank 0 sees there", "shared disk"),
            "device": ("rank 1 on", "entries of a product are wrong", "Take that node out"),
        }.items():
            assert all(word in found[name] for word in words), found[name]
        assert any("rank 1 on" in remark and "+100 s" in remark for remark in found["clock"])


def test_the_code_hash_knows_every_file(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = preflight.code_hash(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.py").write_text("")
    after = preflight.code_hash(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    assert len({before, after, preflight.code_hash(tmp_path)}) == 3


def test_a_healthy_device_computes_exactly() -> None:
    assert preflight.try_device(torch.device("cpu"))[0] == ""
