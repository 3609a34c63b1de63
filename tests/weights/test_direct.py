"""Files past the page cache: the same bytes as plain ones, whatever the amounts and whatever the file system allows."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path
from typing import Any

import pytest

from xlmega.weights import direct
from xlmega.weights.direct import DirectFile


def written(path: Path, parts: list[bytes]) -> bytes:
    with DirectFile(path) as file:
        for part in parts:
            file.write(part)
        file.finish()
    return path.read_bytes()


@pytest.mark.parametrize("sizes", [[], [0], [1], [4096], [8192, 0], [8191, 2], [5, 20_000, 4096, 3], [1] * 9000])
def test_the_bytes_are_those_given(sizes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BUFFER_BYTES", 8192)
    parts = [random.Random(k).randbytes(size) for k, size in enumerate(sizes)]
    (tmp_path / "file").write_bytes(b"longer than what follows" * 9999)
    assert written(tmp_path / "file", parts) == b"".join(parts)


def test_without_direct_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BUFFER_BYTES", 8192)
    parts, real_open, real_write = [bytes([k]) * 5000 for k in range(9)], os.open, os.write

    def refusing_open(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "no direct writes")
        return real_open(path, flags, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refusing_open)
        assert written(tmp_path / "plain", parts) == b"".join(parts)
    # Opened so, refused at the first write; and a write that stops in the middle of a block.
    answers = [OSError(errno.EINVAL, "blocks are larger")]

    def once_refusing(descriptor: int, data: Any) -> int:
        if answers:
            raise answers.pop()
        return real_write(descriptor, data[:3000])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", once_refusing)
        assert written(tmp_path / "odd", parts) == b"".join(parts)


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", [b"x"])
