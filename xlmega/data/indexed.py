"""Token files: documents in, `PREFIX.bin`, `PREFIX.idx` and the manifest `PREFIX.json` out, and memory maps back.

.bin and .idx are Megatron-core's format (one sequence a document), so its IndexedDataset reads them. That format has no
checksum, language or vocabulary; the manifest has them. Layout: `ROOT/{train,valid,...}/LANG.{bin,idx,json}` and
`ROOT/vocabulary/`. Writing streams in constant memory, names everything `*.part` until it is whole, and puts the
manifest in place last: a prefix without a manifest is no token file. `open_tokens` checks headers, sizes and
manifest against each other without reading the tokens; `verify` reads and hashes all bytes, and `damage` divides that
work in blocks over as many ranks as there are.
"""

from __future__ import annotations

import hashlib
import os
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.data.manifest import (
    DTYPE_CODES,
    HASH_BLOCK_BYTES,
    BlockHash,
    Manifest,
    read_manifest,
    root_of,
    write_manifest,
)
from xlmega.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
MAX_UINT16_VOCABULARY = 65_500
MAX_DOCUMENT_TOKENS = 2**31 - 1
BLOCK = 1 << 20
"""Documents (or bytes x 8) handled at once where a whole file is streamed."""
PENDING_BYTES = 8 << 20
"""A writer holds back at most about this much; files are open only while something is appended to them."""


def token_dtype(vocabulary_size: int) -> str:
    """The dtype that a vocabulary's tokens are stored in."""
    return "uint16" if vocabulary_size <= MAX_UINT16_VOCABULARY else "int32"


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
            with_suffix(self.path, ".idx"),
            dtype="<i8",
            count=self.num_documents,
            offset=HEADER.size + 4 * self.num_documents,
        )
        starts = np.append(pointers // self.tokens.itemsize, self.num_tokens)
        lengths = np.fromfile(with_suffix(self.path, ".idx"), dtype="<i4", count=self.num_documents, offset=HEADER.size)
        if starts[0] != 0 or np.any(np.diff(starts) != lengths) or lengths.min() < 1:
            raise DataError(f"'{self.path}.idx' is damaged: its documents are not in order. Tokenise that split again.")
        return starts

    @cached_property
    def document_lengths(self) -> npt.NDArray[np.int32]:
        """[documents]: tokens of each document, memory-mapped; read-only."""
        return np.memmap(
            with_suffix(self.path, ".idx"), dtype="<i4", mode="r", offset=HEADER.size, shape=(self.num_documents,)
        )

    @cached_property
    def _pointers(self) -> npt.NDArray[np.int64]:
        """[documents]: the byte at which each document begins, memory-mapped."""
        offset = HEADER.size + 4 * self.num_documents
        return np.memmap(
            with_suffix(self.path, ".idx"), dtype="<i8", mode="r", offset=offset, shape=(self.num_documents,)
        )

    def document_span(self, index: int) -> tuple[int, int]:
        """Where a document begins and ends in `tokens`, read where it stands: the index is not loaded."""
        start, last = self._start(index), index == self.num_documents - 1
        end = self.num_tokens if last else self._start(index + 1)
        if not 0 <= start < end <= self.num_tokens or end - start != self.document_lengths[index]:
            raise DataError(f"'{self.path}.idx' is damaged: document {index} is no part of the tokens. Tokenise again.")
        return start, end

    def _start(self, index: int) -> int:
        return int(self._pointers[index]) // self.tokens.itemsize

    def document_starts_within(self, start: int, end: int) -> npt.NDArray[np.int64]:
        """Where documents begin in `tokens` from `start` up to before `end`, by bisection of the mapped index."""
        first = bisect_left(range(self.num_documents), start, key=self._start)
        last = bisect_left(range(self.num_documents), end, lo=first, key=self._start)
        return np.asarray(self._pointers[first:last]) // self.tokens.itemsize

    def document(self, index: int) -> npt.NDArray[Any]:
        """The ids of one document, its end-of-document token included."""
        return self.tokens[self.document_starts[index] : self.document_starts[index + 1]]


def open_tokens(prefix: Path) -> IndexedTokens:
    """Memory-map PREFIX.bin after checking that .bin, .idx and .json are whole and agree."""
    manifest = read_manifest(with_suffix(prefix, ".json"))
    for suffix, due in ((".bin", manifest.bin_bytes), (".idx", manifest.idx_bytes)):
        file = with_suffix(prefix, suffix)
        if not file.is_file():
            raise DataError(f"'{file}' is missing, but its manifest is there. Copy it too, or tokenise again.")
        if file.stat().st_size != due:
            raise DataError(
                f"'{file}' has {file.stat().st_size} bytes, but its manifest says {due}. "
                "It was cut off or exchanged: copy it again, or tokenise that split again."
            )
    documents, itemsize = manifest.documents, np.dtype(manifest.dtype).itemsize
    due_header = (MAGIC, 1, DTYPE_CODES[manifest.dtype], documents, documents + 1)
    with with_suffix(prefix, ".idx").open("rb") as index:
        header = HEADER.unpack(index.read(HEADER.size).ljust(HEADER.size, b"\0"))
    sizes_agree = (
        manifest.idx_bytes == HEADER.size + 4 * documents + 8 * documents + 8 * (documents + 1)
        and manifest.bin_bytes == manifest.tokens * itemsize
        and 1 <= documents <= manifest.tokens
    )
    if header != due_header or not sizes_agree:
        raise DataError(
            f"'{prefix}.idx' and its manifest disagree: the header is {header} where {due_header} is due, for "
            f"{manifest.bin_bytes} bytes of {manifest.dtype} tokens. They belong to different runs: tokenise again."
        )
    tokens = np.memmap(with_suffix(prefix, ".bin"), dtype=np.dtype(manifest.dtype).newbyteorder("<"), mode="r")
    return IndexedTokens(prefix, manifest, tokens)


def verify(prefix: Path) -> Manifest:
    """Everything `open_tokens` checks, and that all bytes of both files hash to what the manifest says."""
    manifest = open_tokens(prefix).manifest
    if told := damage([prefix]):
        raise DataError(told)
    return manifest


def damage(prefixes: Sequence[Path], share: int = 0, shares: int = 1) -> str:
    """What hashing finds wrong with token files, '' if nothing. Of all their blocks, each of `shares` callers reads
    every `shares`-th, so that a single large file is no one rank's work."""
    manifests = [(prefix, read_manifest(with_suffix(prefix, ".json"))) for prefix in prefixes]
    blocks = [(prefix, *block) for prefix, manifest in manifests for block in manifest.blocks()]
    for prefix, suffix, offset, size, due in blocks[share::shares]:
        try:
            found = _sha256(with_suffix(prefix, suffix), offset, size)
        except OSError as error:
            return f"cannot read '{prefix}{suffix}': {error.strerror or error}."
        if found != due:
            return (
                f"'{prefix}{suffix}' is damaged: bytes {offset} to {offset + size} have sha256 {found}, but its "
                f"manifest says {due}. Copy it again, or tokenise that split again."
            )
    return ""


def splits(root: Path) -> list[str]:
    """The names of the finished splits under a token folder, sorted ('train', 'valid', ...)."""
    if not root.is_dir():
        raise DataError(f"there is no token folder '{root}'. tools/tokenize_corpus.py writes one.")
    return sorted(
        path.name for path in root.iterdir() if path.is_dir() and path.suffix != ".part" and any(path.glob("*.idx"))
    )


def _instead(root: Path, split: str) -> str:
    """What was probably meant, where `root` is a split itself or a folder of text."""
    if any(root.glob("*.idx")):
        return f" It is a split itself: did you mean '{root.parent}'?"
    if any(any(root.glob(f"{split}/*/*.jsonl{suffix}")) for suffix in ("", ".gz", ".zst")):
        return f" It holds text: tools/tokenize_corpus.py '{root / split}' makes tokens of it."
    return ""


def open_corpus(root: Path, split: str) -> dict[str, IndexedTokens]:
    """Every language of one split, sorted by code; a DataError when they were not made with one vocabulary."""
    known = splits(root)
    if split not in known:
        raise DataError(f"'{root}' has no split '{split}'; it has {', '.join(known) or 'none'}.{_instead(root, split)}")
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


@dataclass(frozen=True)
class Packed:
    """Documents as they will stand in the files."""

    ids: bytes
    lengths: bytes
    min_id: int
    max_id: int


def pack(ids: npt.NDArray[Any], lengths: npt.NDArray[Any], dtype: str) -> Packed:
    """Documents whose ids stand back to back in `ids`, for a writer of `dtype`; a DataError when an id does not fit."""
    low, high, limit = int(ids.min()), int(ids.max()), np.iinfo(dtype).max
    if low < 0 or high > limit:
        raise DataError(
            f"ids from {low} to {high} do not fit into {dtype} (0 to {limit}). "
            "Use the dtype that token_dtype(vocabulary_size) gives."
        )
    little_endian = np.dtype(dtype).newbyteorder("<")
    return Packed(ids.astype(little_endian).tobytes(), lengths.astype("<i4").tobytes(), low, high)


class IndexedWriter:
    """Writes PREFIX.bin, .idx and .json. Until `finish` there are only *.part files, and they mean nothing.

    With the `state` of an earlier writer of the same prefix, it goes on from there: what was written after is cut off.
    """

    def __init__(self, prefix: Path, dtype: str, state: Mapping[str, Any] | None = None) -> None:
        if dtype not in DTYPE_CODES:
            raise DataError(f"tokens are stored as {', '.join(DTYPE_CODES)}, not as '{dtype}'.")
        self._prefix = prefix
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._pending: list[tuple[bytes, bytes]] = []  # tokens, lengths
        self.pending_bytes = 0
        self._closed = False
        self._documents = self._tokens = 0
        self._min_id, self._max_id = int(np.iinfo(self._dtype).max), -1
        self._hash = BlockHash(HASH_BLOCK_BYTES)
        with write_errors(prefix):
            prefix.parent.mkdir(parents=True, exist_ok=True)
            with_suffix(prefix, ".json").unlink(missing_ok=True)  # what it described is about to be replaced
            if state is None:
                for suffix in (".bin", ".lengths"):
                    _part(with_suffix(prefix, suffix)).write_bytes(b"")
            else:
                self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._documents, self._tokens = int(state["documents"]), int(state["tokens"])
        self._min_id, self._max_id = int(state["min_id"]), int(state["max_id"])
        self._hash = BlockHash(HASH_BLOCK_BYTES, tuple(state["bin_blocks"]))
        size = self._tokens * self._dtype.itemsize
        bin_ = with_suffix(self._prefix, ".bin")
        if bin_.is_file() and not _part(bin_).exists():  # stopped between two steps of `finish`
            bin_.replace(_part(bin_))
        for suffix, due in ((".bin", size), (".lengths", 4 * self._documents)):
            file = _part(with_suffix(self._prefix, suffix))
            if not file.is_file() or file.stat().st_size < due:
                raise DataError(f"'{file}' is shorter than the {due} bytes that were written to it.")
            os.truncate(file, due)
        with _part(bin_).open("rb") as written:
            written.seek(len(self._hash.whole) * HASH_BLOCK_BYTES)
            while data := written.read(8 * BLOCK):
                self._hash.update(data)

    def state(self) -> dict[str, Any]:
        """Where the writer stands, as plain JSON; everything up to here is on the disk when it returns."""
        self.flush(sync=True)
        return {
            "documents": self._documents,
            "tokens": self._tokens,
            "min_id": self._min_id,
            "max_id": self._max_id,
            "bin_blocks": self._hash.whole,
        }

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
        self.add_packed(pack(ids, lengths, self._dtype.name))

    def add_packed(self, documents: Packed) -> None:
        """Append documents that `pack` made for this writer's dtype, perhaps in another process."""
        self._min_id, self._max_id = min(self._min_id, documents.min_id), max(self._max_id, documents.max_id)
        self._pending.append((documents.ids, documents.lengths))
        self.pending_bytes += len(documents.ids) + len(documents.lengths)
        self._documents += len(documents.lengths) // 4
        self._tokens += len(documents.ids) // self._dtype.itemsize
        if self.pending_bytes > PENDING_BYTES:
            self.flush()

    def flush(self, *, sync: bool = False) -> None:
        """Append what was held back to the *.part files."""
        if not self._pending and not sync:
            return
        for at, suffix in enumerate((".bin", ".lengths")):
            with write_errors(self._prefix), _part(with_suffix(self._prefix, suffix)).open("ab") as file:
                for pieces in self._pending:
                    file.write(pieces[at])
                    if at == 0:
                        self._hash.update(pieces[at])
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        self._pending.clear()
        self.pending_bytes = 0

    def finish(
        self,
        *,
        language: str,
        split: str,
        vocabulary_hash: str,
        vocabulary_size: int,
        eod_id: int,
        utf8_bytes: int,
        document_prefix: tuple[int, ...] = (),
        document_suffix: tuple[int, ...] | None = None,
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
        self.flush(sync=True)
        idx, bin_ = with_suffix(prefix, ".idx"), with_suffix(prefix, ".bin")
        with write_errors(prefix):
            idx_blocks = write_index(_part(idx), self._dtype.name, self._documents, self._spilled_lengths)
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
                bin_sha256=root_of(self._hash.digests),
                idx_sha256=root_of(idx_blocks),
                block_bytes=HASH_BLOCK_BYTES,
                bin_blocks=self._hash.digests,
                idx_blocks=idx_blocks,
                document_prefix=document_prefix,
                document_suffix=document_suffix,
            )
            _part(bin_).replace(bin_)
            _part(idx).replace(idx)
            write_manifest(with_suffix(prefix, ".json"), manifest)
            _part(with_suffix(prefix, ".lengths")).unlink()
        self._closed = True
        return manifest

    def close(self) -> None:
        """Give up: remove the *.part files (nothing happens after `finish`)."""
        self._pending.clear()
        for suffix in () if self._closed else (".bin", ".lengths", ".idx"):
            _part(with_suffix(self._prefix, suffix)).unlink(missing_ok=True)

    def _spilled_lengths(self) -> Iterator[npt.NDArray[np.int32]]:
        with _part(with_suffix(self._prefix, ".lengths")).open("rb") as file:
            while data := file.read(4 * BLOCK):
                yield np.frombuffer(data, dtype="<i4")


def write_index(
    path: Path, dtype: str, documents: int, lengths_of: Callable[[], Iterable[npt.NDArray[Any]]]
) -> tuple[str, ...]:
    """Write an .idx file for documents whose lengths `lengths_of()` streams, twice; returns its blocks' digests."""
    digest = BlockHash(HASH_BLOCK_BYTES)
    itemsize = np.dtype(dtype).itemsize
    with path.open("wb") as file:

        def put(data: bytes) -> None:
            file.write(data)
            digest.update(data)

        put(HEADER.pack(MAGIC, 1, DTYPE_CODES[dtype], documents, documents + 1))
        for lengths in lengths_of():
            put(lengths.astype("<i4").tobytes())
        offset = 0
        for lengths in lengths_of():
            ends = offset + np.cumsum(lengths, dtype=np.int64)
            put(((ends - lengths) * itemsize).astype("<i8").tobytes())
            offset = int(ends[-1])
        for first in range(0, documents + 1, BLOCK):
            put(np.arange(first, min(first + BLOCK, documents + 1), dtype="<i8").tobytes())
        file.flush()
        os.fsync(file.fileno())
    return digest.digests


@contextmanager
def write_errors(prefix: Path) -> Iterator[None]:
    """What a disk or a folder can refuse while tokens are written, as a DataError."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write the tokens '{prefix}': {error.strerror or error}. Nothing was published; make room, then "
            "run the same command again."
        ) from None


def with_suffix(prefix: Path, suffix: str) -> Path:
    """PREFIX.bin, .idx or .json."""
    # Not Path.with_suffix: a language such as 'zh.Hant' has a dot of its own.
    return prefix.with_name(prefix.name + suffix)


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _sha256(path: Path, offset: int, size: int) -> str:
    """Of `size` bytes from `offset` on, or of as many as there are."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(offset)
        while size > 0 and (block := file.read(min(size, 8 * BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
