"""Between tensors and the disk: safetensors files written in one stream and read in slices, folders moved whole.

In come tensors in a known order, or a path; out go files whose sha256 was taken as they were written, and that read
back as they were written, or slices of one. Guaranteed: what `finish` returned for is on the disk; reading is by plain
reads of no more than what is asked (in blocks where it is not contiguous), so a damaged or vanishing file is an error
of this process and not a signal, and memory is the result and one block; a folder disappears by a rename first.
Every operation on files goes through this module's `os`, so that a test can let any of them fail.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from xlmega.errors import CheckpointError
from xlmega.weights.directory import safetensors_header

BLOCK_BYTES = 1 << 23
_HANDED_OVER_BYTES = 1 << 20
"""From here on it is worth letting another thread hash a block."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class TensorFile:
    """A safetensors file in the making: tensors come in the order of `shapes`, each once."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32):
        self.path = path
        self.bytes = 0
        self._digest = hashlib.sha256()
        self._sums: list[int] = []
        self._hasher = ThreadPoolExecutor(1)  # hashing and writing both let go of the interpreter
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            self._write(memoryview(safetensors_header(shapes, dtype)))
        except OSError:
            self.close()
            raise

    def write(self, tensor: torch.Tensor) -> None:
        """Append the next tensor, contiguous and on the CPU."""
        data = _bytes_of(tensor)
        for start in range(0, len(data), BLOCK_BYTES):
            self._write(data[start : start + BLOCK_BYTES])

    def finish(self) -> dict[str, Any]:
        """Bring the file to the disk, read it back, and tell its `file`, `bytes` and `sha256`."""
        try:
            os.fsync(self._descriptor)
        finally:
            self.close()
        # Block by block against sums that are three times as fast as the sha256, which every load checks.
        found = [zlib.crc32(block) for block in _blocks(self.path, from_disk=True)]
        if found != self._sums:
            raise OSError(f"'{self.path}' reads back otherwise than it was written")
        return {"file": self.path.name, "bytes": self.bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Let go of the file; what is not finished is not to be trusted."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            self._hasher.shutdown()
            os.close(descriptor)

    def _write(self, data: memoryview) -> None:
        hashed = self._hasher.submit(self._digest.update, data) if len(data) >= _HANDED_OVER_BYTES else None
        try:
            done = 0
            while done < len(data):
                done += os.write(self._descriptor, data[done:])
            self._sum_up(data)
        finally:
            if hashed:
                hashed.result()
            else:
                self._digest.update(data)

    def _sum_up(self, data: memoryview) -> None:
        """Each block of the file has a sum of its own."""
        while len(data):
            begun = self.bytes % BLOCK_BYTES
            piece = data[: BLOCK_BYTES - begun]
            if not begun:
                self._sums.append(0)
            self._sums[-1] = zlib.crc32(piece, self._sums[-1])
            self.bytes += len(piece)
            data = data[len(piece) :]


class TensorReader:
    """The tensors of one safetensors file; the header is read at once, values when asked for."""

    def __init__(self, path: Path):
        self.path = path
        self._descriptor = -1
        self._entries: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
            self._read_header()
        except OSError as error:
            raise CheckpointError(f"'{path}' cannot be read: {error.strerror or error}.") from None
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):
            raise CheckpointError(f"'{path}' is not a safetensors file, or its header is damaged.") from None

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def names(self) -> list[str]:
        """Names of the tensors, in the order of the header."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as stored."""
        return self._entries[name][1]

    def read(self, name: str, slices: tuple[slice, ...] = ()) -> torch.Tensor:
        """A slice (all of it by default) of the tensor, as stored."""
        if name not in self._entries:
            raise CheckpointError(f"'{self.path}' has no tensor {name}.")
        dtype, shape, begin = self._entries[name]
        rest = slices[1:]
        first, last, _ = slices[0].indices(shape[0]) if slices else (0, shape[0] if shape else 1, 1)
        last = max(first, last)
        row = math.prod(shape[1:])
        if all(span.indices(size) == (0, size, 1) for span, size in zip(rest, shape[1:], strict=False)):
            out = torch.empty((last - first, *shape[1:]) if shape else (), dtype=dtype)
            self._fill(out, begin + first * row * dtype.itemsize)
            return out
        out = torch.empty((last - first, *shape[1:]), dtype=dtype, device="meta")[(slice(None), *rest)]
        out = torch.empty(out.shape, dtype=dtype)
        rows = max(1, BLOCK_BYTES // (row * dtype.itemsize))
        for start in range(first, last, rows):
            block = torch.empty((min(rows, last - start), *shape[1:]), dtype=dtype)
            self._fill(block, begin + start * row * dtype.itemsize)
            out[start - first : start - first + len(block)] = block[(slice(None), *rest)]
        return out

    def _fill(self, out: torch.Tensor, offset: int) -> None:
        data = _bytes_of(out)
        done = 0
        while done < len(data):
            try:
                count = os.preadv(self._descriptor, [data[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"'{self.path}' cannot be read: {error.strerror}.") from None
            if count == 0:
                raise CheckpointError(f"'{self.path}' ends before its tensors do: it was cut.")
            done += count

    def _read_header(self) -> None:
        size = os.fstat(self._descriptor).st_size
        (length,) = struct.unpack("<Q", os.pread(self._descriptor, 8, 0))
        if length > size - 8:
            raise ValueError(length)
        table = json.loads(os.pread(self._descriptor, length, 8))
        for name, entry in table.items():
            if name == "__metadata__":
                continue
            dtype, shape = _DTYPES[entry["dtype"]], tuple(map(int, entry["shape"]))
            begin, end = entry["data_offsets"]
            if end - begin != math.prod(shape) * dtype.itemsize or not 0 <= begin <= end <= size - 8 - length:
                raise ValueError(name)
            self._entries[name] = (dtype, shape, 8 + length + begin)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    flat = tensor.detach().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")  # type: ignore[arg-type]


def sha256_of(path: Path) -> str:
    """Of a file's bytes."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as hasher:  # one block is hashed while the next is read
        hashed = None
        for block in _blocks(path):
            if hashed is not None:
                hashed.result()
            hashed = hasher.submit(digest.update, block)
    return digest.hexdigest()


def _blocks(path: Path, *, from_disk: bool = False) -> Iterator[memoryview]:
    """A file's bytes in blocks, each good until the next but one; `from_disk`: not from the system's copy in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        size = max(1, min(BLOCK_BYTES, os.fstat(descriptor).st_size))
        for buffer in itertools.cycle([memoryview(bytearray(size)), memoryview(bytearray(size))]):
            done = 0
            while done < size and (count := os.readv(descriptor, [buffer[done:]])):
                done += count
            if not done:
                return
            yield buffer[:done]
    finally:
        os.close(descriptor)


def json_text(value: Any) -> str:
    """The one text that `write_json` writes for a value."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """`value` as JSON in place of whatever `path` was, at once and on the disk when this returns."""
    part = path.with_name(path.name + ".part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        data = memoryview(json_text(value).encode())
        while len(data):
            data = data[os.write(descriptor, data) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(part, path)  # noqa: PTH105


def make_folder(path: Path) -> None:
    """A fresh, empty folder at `path`; what a killed writer left there goes."""
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)  # noqa: PTH103 - through `os`, see above


def move_folder(part: Path, final: Path) -> None:
    """Rename `part`, whose files are on the disk, to `final`; on the disk when this returns. An old `final` goes."""
    sync_folder(part)
    if final.exists():
        remove_folder(final)
    os.rename(part, final)  # noqa: PTH104
    sync_folder(final.parent)


def remove_folder(path: Path) -> None:
    """Take a folder away: it loses its name first, so that a killed process leaves it whole or nameless."""
    aside = path.with_name(path.name + ".removed.part")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)  # noqa: PTH104
    shutil.rmtree(aside, ignore_errors=True)


def sync_folder(path: Path) -> None:
    """Names made or moved in a folder are on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Take a file away."""
    os.unlink(path)  # noqa: PTH108
