"""Digests in order in, which of them came for the first time out, in memory that does not grow with their number.

128-bit digests go to 64 files by their value; each file is then sorted by itself. What stays in memory is one byte a
digest and one file, so a hundred million take about 140 MB. Two different texts share a digest with probability 2^-75
among 10^8 of them.
"""

from __future__ import annotations

import hashlib
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from xlmega.text.records import write_errors

PARTITIONS = 64
BUFFERED_BYTES = 1 << 16
RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("index", "<u8")])


def digest(*texts: str) -> bytes:
    """16 bytes that stand for these texts in this order."""
    state = hashlib.blake2b(digest_size=16)
    for text in texts:
        body = text.encode("utf-8", "surrogatepass")
        state.update(len(body).to_bytes(8, "little"))
        state.update(body)
    return state.digest()


def first_occurrences(digests: Iterable[bytes], scratch: Path) -> np.ndarray:
    """[number of digests] bool: whether each is the first of its value. `scratch` is a folder to use and remove."""
    shutil.rmtree(scratch, ignore_errors=True)
    buffers = [bytearray() for _ in range(PARTITIONS)]
    files = [scratch / f"digests-{number:02d}.part" for number in range(PARTITIONS)]
    count = 0
    with write_errors(scratch):
        scratch.mkdir(parents=True)
    for value in digests:
        partition = value[0] % PARTITIONS
        buffers[partition] += value + struct.pack("<Q", count)
        count += 1
        if len(buffers[partition]) >= BUFFERED_BYTES:
            _append(files[partition], buffers[partition])
    first = np.ones(count, dtype=np.bool_)
    for file, buffer in zip(files, buffers, strict=True):
        _append(file, buffer)
        table = np.fromfile(file, dtype=RECORD)
        file.unlink()
        # Sorted by value and then by place, so that of equal ones the first in the corpus comes first.
        table = table[np.lexsort((table["index"], table["low"], table["high"]))]
        same = (table["high"][1:] == table["high"][:-1]) & (table["low"][1:] == table["low"][:-1])
        first[table["index"][1:][same]] = False
    shutil.rmtree(scratch)
    return first


def _append(file: Path, buffer: bytearray) -> None:
    with write_errors(file), file.open("ab") as stream:
        stream.write(buffer)
    buffer.clear()
