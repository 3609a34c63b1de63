"""What token files are and must look like: `PREFIX.json`, the manifest beside .bin and .idx.

In and out: a `Manifest`. Version 2 hashes .bin and .idx in blocks of `block_bytes`, so that many ranks can verify one
large file in shares, and signs itself, so that a flipped bit in the manifest is found as one in the tokens is.
Version 1, with one sha256 over each file and no signature, is still read. A manifest is put in place last, whole or not
at all.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega import config
from xlmega.errors import ConfigError, DataError

DTYPE_CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
"""Megatron's codes of the dtypes that can hold ids; xlmega itself writes uint16 and int32."""
HASH_BLOCK_BYTES = 64 << 20
SIGNATURE = "manifest_sha256"


@dataclass(frozen=True)
class Manifest:
    """What the tokens of one language and split are, and what their files must look like."""

    language: str
    split: str
    vocabulary_hash: str
    vocabulary_size: int
    eod_id: int
    documents: int
    tokens: int
    """What is put before and after each document included."""
    utf8_bytes: int
    """Bytes of the text that the tokens stand for, before any normalisation."""
    min_id: int
    max_id: int
    dtype: str
    """A key of DTYPE_CODES."""
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    """Of the blocks' digests, one after another (in version 1 of the file itself)."""
    idx_sha256: str
    format_version: int = 2
    block_bytes: int = 0
    bin_blocks: tuple[str, ...] = ()
    """sha256 of each `block_bytes` of .bin, the last one shorter."""
    idx_blocks: tuple[str, ...] = ()
    document_prefix: tuple[int, ...] = ()
    """Ids put before every document."""
    document_suffix: tuple[int, ...] | None = None
    """Ids put after every document; None where that is not known."""

    def blocks(self) -> Iterator[tuple[str, int, int, str]]:
        """(suffix, offset, bytes, sha256) of everything there is to verify."""
        for suffix, size, digests, whole in (
            (".bin", self.bin_bytes, self.bin_blocks, self.bin_sha256),
            (".idx", self.idx_bytes, self.idx_blocks, self.idx_sha256),
        ):
            if self.format_version == 1:
                yield suffix, 0, size, whole
            for k, digest in enumerate(digests):
                offset = k * self.block_bytes
                yield suffix, offset, min(self.block_bytes, size - offset), digest

    def problems(self) -> Iterator[str]:
        """What is wrong in itself, whatever the files are."""
        if self.dtype not in DTYPE_CODES:
            yield f"dtype '{self.dtype}' is none of {', '.join(DTYPE_CODES)}."
        negative = [name for name in ("documents", "tokens", "utf8_bytes", "bin_bytes") if getattr(self, name) < 0]
        if negative:
            yield f"{', '.join(negative)} cannot be negative."
        if self.format_version == 2:
            for size, digests, whole in (
                (self.bin_bytes, self.bin_blocks, self.bin_sha256),
                (self.idx_bytes, self.idx_blocks, self.idx_sha256),
            ):
                if self.block_bytes < 1 or len(digests) != -(-size // self.block_bytes) or whole != root_of(digests):
                    yield f"its {len(digests)} block digests do not fit {size} bytes in blocks of {self.block_bytes}."


def read_manifest(path: Path) -> Manifest:
    """The manifest in the file `path` (PREFIX.json)."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        table = table if isinstance(table, dict) else {}
        version = table.get("format_version")
        if isinstance(version, int) and version not in (1, 2):
            raise ConfigError(f"format_version is {version}; this xlmega reads version 1 and 2.")
        signature = table.pop(SIGNATURE, None)
        if version == 2 and signature != _signature(table):
            raise ConfigError("its own checksum does not fit: it was changed or damaged.")
        return config.build(Manifest, table, what="manifest")
    except FileNotFoundError:
        raise DataError(
            f"there is no manifest '{path}'. Without it the tokens were never finished: tokenise that split again."
        ) from None
    except OSError as error:
        raise DataError(f"cannot read the manifest '{path}': {error.strerror or error}.") from None
    except (ValueError, RecursionError, ConfigError) as error:
        raise DataError(f"'{path}' is not a token manifest: {error} Tokenise that split again.") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put `manifest` at `path`, whole or not at all."""
    table = config.to_table(manifest)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        json.dump({**table, SIGNATURE: _signature(table)}, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class BlockHash:
    """sha256 of each block of a stream that is written piece by piece."""

    def __init__(self, block_bytes: int, digests: tuple[str, ...] = ()) -> None:
        self.block_bytes, self._digests, self._filled = block_bytes, list(digests), 0
        self._hash = hashlib.sha256()

    def update(self, data: memoryview | bytes) -> None:
        data = memoryview(data)
        while len(data):
            piece = data[: self.block_bytes - self._filled]
            self._hash.update(piece)
            self._filled += len(piece)
            data = data[len(piece) :]
            if self._filled == self.block_bytes:
                self._digests.append(self._hash.hexdigest())
                self._hash, self._filled = hashlib.sha256(), 0

    @property
    def whole(self) -> tuple[str, ...]:
        """Digests of the blocks that are full."""
        return tuple(self._digests)

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of all blocks, the last one as far as it is filled."""
        return (*self._digests, self._hash.hexdigest()) if self._filled else self.whole


def root_of(digests: tuple[str, ...]) -> str:
    """One sha256 for a file: over the digests of its blocks."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def _signature(table: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(table, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
