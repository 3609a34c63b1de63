"""Token files: documents in, `PREFIX.bin`, `PREFIX.idx` and the manifest `PREFIX.json` out, and memory maps back.

.bin and .idx are Megatron-core's format (one sequence a document), so its IndexedDataset reads them. That format has no
checksum, language or vocabulary; the manifest has them. Layout: `ROOT/{train,valid,...}/LANG.{bin,idx,json}` and
`ROOT/vocabulary/`. Writing streams in constant memory, names everything `*.part` until it is whole, and puts the
manifest in place last: a prefix without a manifest is no token file. `open_tokens` checks headers, sizes and
manifest against each other without reading the tokens; `verify` reads and hashes all bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega import config
from xlmega.errors import ConfigError, DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_CODES = {"uint16": 8, "int32": 4}
MAX_UINT16_VOCABULARY = 65_500
MAX_DOCUMENT_TOKENS = 2**31 - 1
BLOCK = 1 << 20
"""Documents (or bytes x 8) handled at once where a whole file is streamed."""


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
    """End-of-document tokens included."""
    utf8_bytes: int
    """Bytes of the text that the tokens stand for."""
    min_id: int
    max_id: int
    dtype: str
    """'uint16' or 'int32'."""
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str
    format_version: int = 1


def token_dtype(vocabulary_size: int) -> str:
    """The dtype that a vocabulary's tokens are stored in."""
    return "uint16" if vocabulary_size <= MAX_UINT16_VOCABULARY else "int32"


def read_manifest(path: Path) -> Manifest:
    """The manifest in the file `path` (PREFIX.json)."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        manifest = config.build(Manifest, table if isinstance(table, dict) else {}, what="manifest")
    except FileNotFoundError:
        raise DataError(
            f"there is no manifest '{path}'. Without it the tokens were never finished: tokenise that split again."
        ) from None
    except (ValueError, ConfigError) as error:
        raise DataError(f"'{path}' is not a token manifest: {error} Tokenise that split again.") from None
    if manifest.format_version != 1 or manifest.dtype not in DTYPE_CODES:
        raise DataError(
            f"'{path}' has format_version {manifest.format_version} and dtype '{manifest.dtype}'; "
            "this xlmega reads version 1 with uint16 or int32. Tokenise that split again."
        )
    return manifest


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Put `manifest` at `path`, whole or not at all."""
    part = _part(path)
    with part.open("w", encoding="utf-8") as file:
        json.dump(dataclasses.asdict(manifest), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class IndexedTokens:
    """The tokens of one language and split, memory-mapped; made by `open_tokens`."""

    def __init__(self, path: Path, manifest: Manifest, tokens: npt.NDArray[Any]) -> None:
        self.path = path
        """The prefix: the files are this with .bin, .idx and .json."""
        self.manifest = manifest
        self.tokens = tokens
        """All tokens, documents back to back, 1-D; read-only."""

    @property
    def num_tokens(self) -> int:
        return self.manifest.tokens

    @property
    def num_documents(self) -> int:
        return self.manifest.documents

    @cached_property
    def document_starts(self) -> npt.NDArray[np.int64]:
        """[documents + 1]: where each document begins in `tokens`; the last is `num_tokens`."""
        pointers = np.fromfile(
            _with(self.path, ".idx"), dtype="<i8", count=self.num_documents, offset=HEADER.size + 4 * self.num_documents
        )
        starts = np.append(pointers // self.tokens.itemsize, self.num_tokens)
        if starts[0] != 0 or np.any(np.diff(starts) < 0):
            raise DataError(f"'{self.path}.idx' is damaged: its documents are not in order. Tokenise that split again.")
        return starts

    def document(self, index: int) -> npt.NDArray[Any]:
        """The ids of one document, its end-of-document token included."""
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]]


def open_tokens(prefix: Path) -> IndexedTokens:
    """Memory-map PREFIX.bin after checking that .bin, .idx and .json are whole and agree."""
    manifest = read_manifest(_with(prefix, ".json"))
    for suffix, due in ((".bin", manifest.bin_bytes), (".idx", manifest.idx_bytes)):
        file = _with(prefix, suffix)
        if not file.is_file():
            raise DataError(f"'{file}' is missing, but its manifest is there. Copy it too, or tokenise again.")
        if file.stat().st_size != due:
            raise DataError(
                f"'{file}' has {file.stat().st_size} bytes, but its manifest says {due}. "
                "It was cut off or exchanged: copy it again, or tokenise that split again."
            )
    documents, itemsize = manifest.documents, np.dtype(manifest.dtype).itemsize
    due_header = (MAGIC, 1, DTYPE_CODES[manifest.dtype], documents, documents + 1)
    with _with(prefix, ".idx").open("rb") as index:
        header = HEADER.unpack(index.read(HEADER.size).ljust(HEADER.size, b"\0"))
    sizes_agree = (
        manifest.idx_bytes == HEADER.size + 4 * documents + 8 * documents + 8 * (documents + 1)
        and manifest.bin_bytes == manifest.tokens * itemsize
        and documents >= 1
    )
    if header != due_header or not sizes_agree:
        raise DataError(
            f"'{prefix}.idx' and its manifest disagree: the header is {header} where {due_header} is due, for "
            f"{manifest.bin_bytes} bytes of {manifest.dtype} tokens. They belong to different runs: tokenise again."
        )
    tokens = np.memmap(_with(prefix, ".bin"), dtype=np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
    return IndexedTokens(prefix, manifest, tokens)


def verify(prefix: Path) -> Manifest:
    """Everything `open_tokens` checks, and that both files hash to what the manifest says."""
    manifest = open_tokens(prefix).manifest
    for suffix, due in ((".bin", manifest.bin_sha256), (".idx", manifest.idx_sha256)):
        if (found := _sha256(_with(prefix, suffix))) != due:
            raise DataError(
                f"'{prefix}{suffix}' is damaged: its sha256 is {found}, but its manifest says {due}. "
                "Copy it again, or tokenise that split again."
            )
    return manifest


def splits(root: Path) -> list[str]:
    """The names of the finished splits under a token folder, sorted ('train', 'valid', ...)."""
    if not root.is_dir():
        raise DataError(f"there is no token folder '{root}'. tools/tokenize_corpus.py writes one.")
    return sorted(
        path.name for path in root.iterdir() if path.is_dir() and path.suffix != ".part" and any(path.glob("*.idx"))
    )


def open_corpus(root: Path, split: str) -> dict[str, IndexedTokens]:
    """Every language of one split, sorted by code; a DataError when they were not made with one vocabulary."""
    known = splits(root)
    if split not in known:
        raise DataError(f"'{root}' has no split '{split}'; it has {', '.join(known) or 'none'}.")
    corpus = {}
    # A language is here when its manifest or its index is: one that lost either is an error, not left out of the blend.
    files = [file for file in (root / split).iterdir() if file.suffix in (".idx", ".json")]
    for language in sorted({file.name.removesuffix(file.suffix) for file in files}):
        file = root / split / f"{language}.idx"
        corpus[language] = tokens = open_tokens(root / split / language)
        if tokens.manifest.language != language:
            raise DataError(
                f"'{file}' says that its language is '{tokens.manifest.language}'. Files may not be renamed: "
                f"call them {tokens.manifest.language}.bin, .idx and .json."
            )
    by_hash: dict[str, list[str]] = {}
    for language, tokens in corpus.items():
        by_hash.setdefault(tokens.manifest.vocabulary_hash, []).append(language)
    if len(by_hash) > 1:
        groups = "; ".join(f"{key[:12]}: {', '.join(languages)}" for key, languages in by_hash.items())
        raise DataError(
            f"'{root}/{split}' mixes {len(by_hash)} vocabularies ({groups}). "
            "The same id would mean different things: tokenise all languages with one vocabulary."
        )
    return corpus


class IndexedWriter:
    """Writes PREFIX.bin, .idx and .json. Until `finish` there are only *.part files, and they mean nothing."""

    def __init__(self, prefix: Path, dtype: str) -> None:
        if dtype not in DTYPE_CODES:
            raise DataError(f"tokens are stored as uint16 or int32, not as '{dtype}'.")
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._limits = np.iinfo(self._dtype)
        _with(prefix, ".json").unlink(missing_ok=True)  # what it described is about to be replaced
        self._bin = _part(_with(prefix, ".bin")).open("wb")
        self._lengths = _part(_with(prefix, ".lengths")).open("wb")
        self._sha256 = hashlib.sha256()
        self._documents = self._tokens = 0
        self._min_id, self._max_id = int(self._limits.max), -1

    def add_document(self, ids: npt.ArrayLike) -> None:
        """Append one document, its end-of-document token already in it."""
        ids = np.asarray(ids)
        self.add_documents(ids, np.array([len(ids)]))

    def add_documents(self, ids: npt.NDArray[Any], lengths: npt.NDArray[Any]) -> None:
        """Append several documents whose ids stand back to back in `ids`."""
        if not len(lengths):
            return
        if int(lengths.sum()) != len(ids) or lengths.min() < 1 or lengths.max() > MAX_DOCUMENT_TOKENS:
            raise DataError(
                f"documents of {lengths.min()} to {lengths.max()} tokens, {lengths.sum()} together, were given with "
                f"{len(ids)} ids. A document has 1 to {MAX_DOCUMENT_TOKENS} tokens and the lengths add up to the ids."
            )
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high > self._limits.max:
            raise DataError(
                f"ids from {low} to {high} do not fit into {self._dtype.name} (0 to {self._limits.max}). "
                "Use the dtype that token_dtype(vocabulary_size) gives."
            )
        self._min_id, self._max_id = min(self._min_id, low), max(self._max_id, high)
        data = np.ascontiguousarray(ids, dtype=self._dtype).data.cast("B")
        self._bin.write(data)
        self._sha256.update(data)
        self._lengths.write(lengths.astype("<i4").tobytes())
        self._documents += len(lengths)
        self._tokens += len(ids)

    def finish(
        self, *, language: str, split: str, vocabulary_hash: str, vocabulary_size: int, eod_id: int, utf8_bytes: int
    ) -> Manifest:
        """Publish the files and return their manifest."""
        prefix = self._prefix
        if not self._documents:
            raise DataError(f"'{prefix}': no document was written, and an empty token file is of no use.")
        if self._max_id >= vocabulary_size:
            raise DataError(
                f"'{prefix}': id {self._max_id} was written, but the vocabulary has {vocabulary_size} ids, "
                f"0 to {vocabulary_size - 1}. Was the text encoded with another vocabulary?"
            )
        _close(self._bin)
        self._lengths.close()
        self._write_index()
        idx, bin_ = _with(prefix, ".idx"), _with(prefix, ".bin")
        manifest = Manifest(
            language=language,
            split=split,
            vocabulary_hash=vocabulary_hash,
            vocabulary_size=vocabulary_size,
            eod_id=eod_id,
            documents=self._documents,
            tokens=self._tokens,
            utf8_bytes=utf8_bytes,
            min_id=self._min_id,
            max_id=self._max_id,
            dtype=self._dtype.name,
            bin_bytes=_part(bin_).stat().st_size,
            idx_bytes=_part(idx).stat().st_size,
            bin_sha256=self._sha256.hexdigest(),
            idx_sha256=_sha256(_part(idx)),
        )
        _part(_with(prefix, ".lengths")).unlink()
        _part(bin_).replace(bin_)
        _part(idx).replace(idx)
        write_manifest(_with(prefix, ".json"), manifest)
        return manifest

    def close(self) -> None:
        """Give up: close and remove the *.part files (nothing happens after `finish`)."""
        for file, suffix in ((self._bin, ".bin"), (self._lengths, ".lengths")):
            file.close()
            _part(_with(self._prefix, suffix)).unlink(missing_ok=True)

    def _write_index(self) -> None:
        code, itemsize = DTYPE_CODES[self._dtype.name], self._dtype.itemsize
        with _part(_with(self._prefix, ".idx")).open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, code, self._documents, self._documents + 1))
            for lengths in self._spilled_lengths():
                file.write(lengths.tobytes())
            offset = 0
            for lengths in self._spilled_lengths():
                ends = offset + np.cumsum(lengths, dtype=np.int64)
                file.write(((ends - lengths) * itemsize).astype("<i8").tobytes())
                offset = int(ends[-1])
            for first in range(0, self._documents + 1, BLOCK):
                file.write(np.arange(first, min(first + BLOCK, self._documents + 1), dtype="<i8").tobytes())
            _close(file)

    def _spilled_lengths(self) -> Iterator[npt.NDArray[np.int32]]:
        with _part(_with(self._prefix, ".lengths")).open("rb") as file:
            while data := file.read(4 * BLOCK):
                yield np.frombuffer(data, dtype="<i4")


def _with(prefix: Path, suffix: str) -> Path:
    # Not Path.with_suffix: a language such as 'zh.Hant' has a dot of its own.
    return prefix.with_name(prefix.name + suffix)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(8 * BLOCK):
            digest.update(block)
    return digest.hexdigest()
