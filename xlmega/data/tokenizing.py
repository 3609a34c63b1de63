"""A split of text and a vocabulary in, a split of token files out.

Documents are read in the order of their files and keep it within their language, and an end-of-document id follows
each. One thread reads and parses while SentencePiece encodes the batch before with `num_threads` of its own; at most
three batches are in memory, however large the corpus. The result does not depend on the number of threads.

A split appears under its name when all of its languages are whole (`SPLIT.part` until then), so running again after an
interruption keeps what is finished and does the rest. `sources.txt` in each split says which files it was made from.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xlmega.data.indexed import IndexedWriter, token_dtype
from xlmega.data.manifest import Manifest, read_manifest
from xlmega.errors import DataError
from xlmega.text.corpus import CHUNK_BYTES, Document, corpus_files, read_documents, sibling_splits
from xlmega.text.vocabulary import Vocabulary, load_vocabulary

BATCH_CHARACTERS = 4 * CHUNK_BYTES
PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class TokenizedSplit:
    """What became of one split."""

    name: str
    folder: Path
    manifests: tuple[Manifest, ...]
    """Sorted by language."""
    seconds: float
    """0 for a split that was finished before."""

    @property
    def tokens(self) -> int:
        return sum(manifest.tokens for manifest in self.manifests)

    @property
    def utf8_bytes(self) -> int:
        return sum(manifest.utf8_bytes for manifest in self.manifests)


def tokenize_corpus(
    split: Path,
    vocabulary_folder: Path,
    output: Path,
    *,
    num_threads: int = 2,
    only: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> list[TokenizedSplit]:
    """Tokenise the split folder `split` to `output/NAME` and copy the vocabulary to `output/vocabulary`.

    When the folder is called 'train', the splits beside it are tokenised too unless `only`. `say` takes progress lines.
    """
    if num_threads < 1:
        raise DataError(f"at least 1 thread encodes, but {num_threads} were asked for.")
    split = split.resolve()
    sources = [split] if only or split.name != "train" else [split, *sibling_splits(split)]
    listed = {source: _sources(source) for source in sources}
    for source in sources:
        if source.name == "vocabulary":
            raise DataError(f"a split cannot be called 'vocabulary', but '{source}' is. Rename the folder.")
    vocabulary = load_vocabulary(vocabulary_folder)
    if overwrite:
        _check_overwrite(sources, vocabulary, output)
    finished = {} if overwrite else _finished(listed, vocabulary, output)
    if len(finished) == len(sources):
        raise DataError(
            f"'{output}' is complete: it holds {', '.join(source.name for source in sources)}, made from these files "
            "with this vocabulary. Use it as it is, choose another output, or add --overwrite to make it again."
        )
    _place_vocabulary(vocabulary, output / "vocabulary", overwrite)
    if len(sources) > 1:
        say(f"{split.name} and the splits beside it: {', '.join(source.name for source in sources[1:])}")
    results = []
    for source in sources:
        if source in finished:
            say(f"{source.name}: finished before, kept")
            results.append(TokenizedSplit(source.name, output / source.name, finished[source], 0.0))
        else:
            results.append(_tokenize_split(source, listed[source], vocabulary, output, num_threads, say))
    return results


def _tokenize_split(
    source: Path, listed: str, vocabulary: Vocabulary, output: Path, num_threads: int, say: Callable[[str], None]
) -> TokenizedSplit:
    part, folder = output / f"{source.name}.part", output / source.name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    writers: dict[str, IndexedWriter] = {}
    utf8_bytes: dict[str, int] = {}
    begun = told = time.monotonic()
    try:
        for batch in _ahead(_batches(source)):
            _write_batch(batch, vocabulary, part, writers, utf8_bytes, num_threads)
            if (now := time.monotonic()) - told > PROGRESS_SECONDS:
                told, done = now, sum(utf8_bytes.values()) / 1e6
                say(f"{source.name}: {done:,.0f} MB, {done / (now - begun):.1f} MB/s, {batch[-1].id}")
        manifests = tuple(
            writers[language].finish(
                language=language,
                split=source.name,
                vocabulary_hash=vocabulary.hash,
                vocabulary_size=vocabulary.size,
                eod_id=vocabulary.eod_id,
                utf8_bytes=utf8_bytes[language],
                document_suffix=(vocabulary.eod_id,),
            )
            for language in sorted(writers)
        )
    finally:
        for writer in writers.values():
            writer.close()
    if not manifests:
        raise DataError(f"'{source}' holds no document. Remove the folder, or put text into it.")
    (part / "sources.txt").write_text(listed, encoding="utf-8")
    if folder.exists():
        shutil.rmtree(folder)
    part.replace(folder)
    seconds = time.monotonic() - begun
    result = TokenizedSplit(source.name, folder, manifests, seconds)
    say(
        f"{source.name}: {sum(m.documents for m in manifests):,} documents in {len(manifests)} languages, "
        f"{result.utf8_bytes / 1e6:,.1f} MB to {result.tokens:,} tokens in {seconds:.1f} s "
        f"({result.utf8_bytes / 1e6 / seconds:.1f} MB/s)"
    )
    return result


def _write_batch(
    batch: list[Document],
    vocabulary: Vocabulary,
    folder: Path,
    writers: dict[str, IndexedWriter],
    utf8_bytes: dict[str, int],
    num_threads: int,
) -> None:
    encoded = vocabulary.encode_batch([document.text for document in batch], num_threads)
    eod = np.array([vocabulary.eod_id], dtype=np.int32)
    by_language: dict[str, list[np.ndarray]] = {}
    for document, ids in zip(batch, encoded, strict=True):
        by_language.setdefault(document.language, []).append(ids)
    for language, documents in by_language.items():
        if language not in writers:
            writers[language] = IndexedWriter(folder / language, token_dtype(vocabulary.size))
            utf8_bytes[language] = 0
        flat = np.concatenate([part for ids in documents for part in (ids, eod)])
        lengths = np.array([len(ids) + 1 for ids in documents], dtype=np.int64)
        writers[language].add_documents(flat, lengths)
        # The vocabulary is lossless, so this is the text's own length in UTF-8, without encoding it once more.
        utf8_bytes[language] += int(vocabulary.piece_bytes[flat].sum(dtype=np.int64))


def _batches(source: Path) -> Iterator[list[Document]]:
    """Documents of one split in batches of about BATCH_CHARACTERS; one longer document is a batch of its own."""
    batch: list[Document] = []
    characters = 0
    for file in corpus_files(source):
        for document in read_documents(file):
            batch.append(document)
            characters += len(document.text)
            if characters >= BATCH_CHARACTERS:
                yield batch
                batch, characters = [], 0
    if batch:
        yield batch


def _ahead(batches: Iterable[list[Document]]) -> Iterator[list[Document]]:
    """The same batches, the next one read by another thread while this one is used."""
    source = iter(batches)
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(next, source, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, source, None)
            yield batch


def _sources(split: Path) -> str:
    """One line for each file of a split: its size and its place."""
    return "".join(f"{file.stat().st_size}\t{file.relative_to(split)}\n" for file in corpus_files(split))


def _finished(listed: dict[Path, str], vocabulary: Vocabulary, output: Path) -> dict[Path, tuple[Manifest, ...]]:
    """The splits that `output` already holds; a DataError when they are of other files or another vocabulary."""
    finished = {}
    for source, sources in listed.items():
        folder = output / source.name
        if not folder.is_dir():
            continue
        manifests = tuple(read_manifest(file) for file in sorted(folder.glob("*.json"), key=lambda f: f.stem))
        reason = ""
        if not manifests or not (folder / "sources.txt").is_file():
            reason = "which was not written by this tool"
        elif any(manifest.vocabulary_hash != vocabulary.hash for manifest in manifests):
            reason = f"made with another vocabulary ({manifests[0].vocabulary_hash[:12]}, not {vocabulary.hash[:12]})"
        elif (folder / "sources.txt").read_text(encoding="utf-8") != sources:
            reason = "made from other files (see its sources.txt)"
        if reason:
            raise DataError(f"'{folder}' exists, {reason}. Choose another output, or add --overwrite to replace it.")
        finished[source] = manifests
    return finished


def _check_overwrite(sources: list[Path], vocabulary: Vocabulary, output: Path) -> None:
    """Only splits are removed, and none is left behind that the new vocabulary does not fit."""
    names = [source.name for source in sources]
    for folder in sorted(path for path in output.glob("*") if path.is_dir() and path.suffix != ".part"):
        manifests = (
            [read_manifest(file) for file in sorted(folder.glob("*.json"))] if folder.name != "vocabulary" else []
        )
        if folder.name in names and not manifests:
            raise DataError(f"'{folder}' holds no tokens, so it is not removed. Choose another output.")
        if folder.name not in names and any(manifest.vocabulary_hash != vocabulary.hash for manifest in manifests):
            raise DataError(
                f"'{folder}' was made with another vocabulary and is not among {', '.join(names)}, so it would not be "
                "made again. Remove it, or choose another output."
            )


def _place_vocabulary(vocabulary: Vocabulary, folder: Path, overwrite: bool) -> None:
    if folder.exists():
        try:
            if load_vocabulary(folder).hash == vocabulary.hash:
                return
            reason = "holds another vocabulary"
        except DataError:
            reason = "is damaged"
        if not overwrite:
            raise DataError(f"'{folder}' {reason}. Choose another output, or add --overwrite to replace it.")
    vocabulary.save(folder, overwrite=overwrite)
