"""A split of text and a vocabulary in, a split of token files out.

Documents are read in the order of their files and keep it within their language; an end-of-document id follows each,
unless another prefix or suffix is asked for. Blocks of lines are worked on in `workers` processes and written in their
order: the result does not depend on how many there are, and memory does not on how large the corpus is.

A split appears under its name when all of its languages are whole (`SPLIT.part` until then). Every JOURNAL_SECONDS what
is written is made safe and a journal says how far the input was read, so running again after an interruption goes on
from there, to the same bytes. `sources.txt` in each split says which files it was made from. One process at a time
writes an output.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega.data.encoding import Encoded, Form, encode_blocks
from xlmega.data.indexed import IndexedWriter, token_dtype, write_errors
from xlmega.data.manifest import Manifest, read_manifest
from xlmega.errors import DataError
from xlmega.locking import locked
from xlmega.text.corpus import CHUNK_BYTES, corpus_files, sibling_splits
from xlmega.text.records import Block, read_blocks
from xlmega.text.vocabulary import Vocabulary, load_vocabulary

BLOCK_BYTES = CHUNK_BYTES
PENDING_BYTES = 64 << 20
"""Tokens held back for all languages together."""
SYNCING_THREADS = 8
"""Making a language's files safe is waiting for the disk, and there may be a thousand languages."""
PROGRESS_SECONDS = 5.0
JOURNAL_SECONDS = 30.0
JOURNAL = "journal"
Say = Callable[[str], None]


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
    workers: int = 1,
    prefix: Sequence[str] = (),
    suffix: Sequence[str] | None = None,
    only: bool = False,
    overwrite: bool = False,
    complete_is_fine: bool = False,
    say: Say = lambda line: None,
) -> list[TokenizedSplit]:
    """Tokenise the split folder `split` to `output/NAME` and copy the vocabulary to `output/vocabulary`.

    When the folder is called 'train', the splits beside it are tokenised too unless `only`. `prefix` and `suffix` are
    pieces put around every document: nothing before and the end of a document behind where they are not given, while
    X-ELM's form is `</s>` on both sides, and lines of text that were cut from one another want neither.
    An output that holds everything is refused unless `complete_is_fine`. `say` takes progress lines.
    """
    if workers < 1:
        raise DataError(f"at least 1 process tokenises, but {workers} were asked for.")
    split = split.resolve()
    sources = [split] if only or split.name != "train" else [split, *sibling_splits(split)]
    for source in sources:
        if source.name == "vocabulary":
            raise DataError(f"a split cannot be called 'vocabulary', but '{source}' is. Rename the folder.")
    if any(source == output.resolve() / source.name for source in sources):
        raise DataError(f"'{output}' is where the text lies. Choose another output.")
    vocabulary = load_vocabulary(vocabulary_folder)
    form = Form(
        tuple(map(vocabulary.id_of, prefix)),
        (vocabulary.eod_id,) if suffix is None else tuple(map(vocabulary.id_of, suffix)),
    )
    with locked(output):
        listed = {source: _sources(source) for source in sources}
        if overwrite:
            _check_overwrite(sources, vocabulary, output)
        finished = {} if overwrite else _finished(listed, vocabulary, form, output)
        if len(finished) == len(sources) and not complete_is_fine:
            raise DataError(
                f"'{output}' is complete: it holds {', '.join(source.name for source in sources)}, made from these "
                "files with this vocabulary. Use it as it is, choose another output, or add --overwrite to make it "
                "again."
            )
        place_vocabulary(vocabulary, output / "vocabulary", overwrite)
        if len(sources) > 1:
            say(f"{split.name} and the splits beside it: {', '.join(source.name for source in sources[1:])}")
        results = []
        for source in sources:
            if source in finished:
                say(f"{source.name}: finished before, kept")
                results.append(TokenizedSplit(source.name, output / source.name, finished[source], 0.0))
            else:
                results.append(_tokenize_split(source, listed[source], vocabulary, output, form, workers, say))
    return results


def _tokenize_split(
    source: Path, listed: str, vocabulary: Vocabulary, output: Path, form: Form, workers: int, say: Say
) -> TokenizedSplit:
    part, folder = output / f"{source.name}.part", output / source.name
    made_from = {"sources": listed, "vocabulary": vocabulary.hash, "prefix": form.prefix, "suffix": form.suffix}
    begun = time.monotonic()
    work = _Work.taken_up(part, json.loads(json.dumps(made_from)), token_dtype(vocabulary.size))
    if work.blocks:
        say(f"{source.name}: going on at {work.utf8_bytes / 1e6:,.0f} MB")
    progress = _Progress(source.name, corpus_files(source), work, say)
    blocks = work.coming(corpus_files(source))
    with closing(encode_blocks(blocks, vocabulary, output / "vocabulary", form, workers)) as encoded_blocks:
        for block, encoded in encoded_blocks:
            work.add(block, encoded)
            progress.tell(block)
    if not work.languages:
        raise DataError(f"'{source}' holds no document. Remove the folder, or put text into it.")
    empty = {file.parent.name for file in corpus_files(source)} - set(work.languages)
    if empty := {name for name in empty if not name.isdecimal()}:
        say(f"{source.name}: no document in {', '.join(sorted(empty))}, so no tokens are written for it")
    manifests = work.finish(
        split=source.name,
        vocabulary_hash=vocabulary.hash,
        vocabulary_size=vocabulary.size,
        eod_id=vocabulary.eod_id,
        document_prefix=form.prefix,
        document_suffix=form.suffix,
    )
    with write_errors(part):
        (part / "sources.txt").write_text(listed, encoding="utf-8")
        (part / JOURNAL).unlink()
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


class _Work:
    """One split under construction: a writer for each language, and where reading stands.

    The journal says both, as of its last writing; what the files hold beyond it is cut off when work is taken up.
    """

    def __init__(self, part: Path, made_from: dict[str, Any], dtype: str) -> None:
        self.part, self._made_from, self._dtype = part, made_from, dtype
        self.writers: dict[str, IndexedWriter] = {}
        self._utf8_bytes: dict[str, int] = {}
        self._pending_bytes = 0
        self.blocks = 0
        """Blocks that the files hold."""
        self.file, self._first, self._offset = "", 1, 0
        """Reading stands in this file, before this line, at this byte of its content."""
        self._journalled = time.monotonic()

    @classmethod
    def taken_up(cls, part: Path, made_from: dict[str, Any], dtype: str) -> _Work:
        """The work as the journal in `part` has it, if it was begun from the same; else from the start."""
        work = cls(part, made_from, dtype)
        try:
            told = json.loads((part / JOURNAL).read_text(encoding="utf-8"))
            if told["made_from"] == made_from:
                work._restore(told)
                return work
        except (OSError, ValueError, KeyError, TypeError, DataError):  # none, or damaged: all is made again
            pass
        with write_errors(part):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        return cls(part, made_from, dtype)

    def _restore(self, told: dict[str, Any]) -> None:
        for language, state in told["languages"].items():
            if not (self.part / f"{language}.json").exists():  # else it was finished, and only the split was not
                self.writers[language] = IndexedWriter(self.part / language, self._dtype, state)
            self._utf8_bytes[language] = int(state["utf8_bytes"])
        known = {f"{language}.{end}" for language in self.writers for end in ("bin.part", "lengths.part")}
        for file in self.part.glob("*.part"):
            if file.name not in known:  # of a language that came after the journal, or was finished
                file.unlink()
        self.blocks, self.file = int(told["blocks"]), str(told["file"])
        self._first, self._offset = int(told["first"]), int(told["offset"])

    @property
    def languages(self) -> list[str]:
        return sorted(self._utf8_bytes)

    @property
    def utf8_bytes(self) -> int:
        return sum(self._utf8_bytes.values())

    def coming(self, files: Sequence[Path]) -> Iterator[Block]:
        """The blocks that were not read yet."""
        names = [_name(file) for file in files]
        at = names.index(self.file) if self.file else 0
        for k, file in enumerate(files[at:]):
            first, offset = (self._first, self._offset) if k == 0 else (1, 0)
            yield from read_blocks(file, BLOCK_BYTES, first=first, offset=offset)

    def add(self, block: Block, encoded: list[Encoded]) -> None:
        """Write a block's documents; from time to time everything so far is made safe."""
        for one in encoded:
            if one.language not in self.writers:
                self.writers[one.language] = IndexedWriter(self.part / one.language, self._dtype)
                self._utf8_bytes[one.language] = 0
            writer = self.writers[one.language]
            before = writer.pending_bytes
            writer.add_packed(one.documents)
            self._utf8_bytes[one.language] += one.utf8_bytes
            self._pending_bytes += writer.pending_bytes - before
        self.blocks += 1
        self.file, self._first = _name(block.file), block.first + block.data.count(b"\n")
        self._offset = block.offset
        if self._pending_bytes > PENDING_BYTES:
            for writer in self.writers.values():
                writer.flush()
            self._pending_bytes = 0
        if time.monotonic() - self._journalled > JOURNAL_SECONDS:
            self.journal()

    def journal(self) -> None:
        """Make everything so far safe and note where it stands."""
        with ThreadPoolExecutor(SYNCING_THREADS) as pool:
            states = pool.map(IndexedWriter.state, self.writers.values())
            languages = dict(zip(self.writers, states, strict=True))
        for code, size in self._utf8_bytes.items():
            languages.setdefault(code, {})["utf8_bytes"] = size
        told = {
            "made_from": self._made_from,
            "blocks": self.blocks,
            "file": self.file,
            "first": self._first,
            "offset": self._offset,
            "languages": languages,
        }
        with write_errors(self.part), (self.part / f"{JOURNAL}.new").open("w", encoding="utf-8") as file:
            json.dump(told, file)
            file.flush()
            os.fsync(file.fileno())
            (self.part / f"{JOURNAL}.new").replace(self.part / JOURNAL)
        self._journalled = time.monotonic()

    def finish(self, **about: Any) -> tuple[Manifest, ...]:
        """Publish every language's files within the split's folder."""
        self.journal()

        def manifest(code: str) -> Manifest:
            if code not in self.writers:
                return read_manifest(self.part / f"{code}.json")
            return self.writers[code].finish(language=code, utf8_bytes=self._utf8_bytes[code], **about)

        with ThreadPoolExecutor(SYNCING_THREADS) as pool:
            return tuple(pool.map(manifest, self.languages))


class _Progress:
    """A line every few seconds: how much of the input is done, how fast, and the time left."""

    def __init__(self, what: str, files: Sequence[Path], work: _Work, say: Say) -> None:
        self._what, self._work, self._say = what, work, say
        sizes = [file.stat().st_size for file in files]
        self._before = dict(zip(map(_name, files), itertools.accumulate(sizes, initial=0), strict=False))
        self._total = sum(sizes)
        self._first: tuple[float, int, int] | None = None
        self._told = time.monotonic()

    def tell(self, block: Block) -> None:
        now, done = time.monotonic(), self._before[_name(block.file)] + block.file_bytes
        if self._first is None:
            self._first = now, done, self._work.utf8_bytes
        if now - self._told > PROGRESS_SECONDS and done > self._first[1]:
            self._told = now
            seconds, megabytes = now - self._first[0], (self._work.utf8_bytes - self._first[2]) / 1e6
            left = seconds * (self._total - done) / (done - self._first[1])
            self._say(
                f"{self._what}: {100 * done / self._total:.0f} %, {self._work.utf8_bytes / 1e6:,.0f} MB, "
                f"{megabytes / seconds:.1f} MB/s, {left:,.0f} s left ({_name(block.file)}:{block.first})"
            )


def _name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}"


def _sources(split: Path) -> str:
    """One line for each file of a split: its size and its place."""
    return "".join(f"{file.stat().st_size}\t{file.relative_to(split)}\n" for file in corpus_files(split))


def _finished(
    listed: dict[Path, str], vocabulary: Vocabulary, form: Form, output: Path
) -> dict[Path, tuple[Manifest, ...]]:
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
        elif any((m.document_prefix, m.document_suffix) not in _forms_of(m, form) for m in manifests):
            reason = "with another prefix or suffix around its documents"
        elif (folder / "sources.txt").read_text(encoding="utf-8") != sources:
            reason = "made from other files (see its sources.txt)"
        if reason:
            raise DataError(f"'{folder}' exists, {reason}. Choose another output, or add --overwrite to replace it.")
        finished[source] = manifests
    return finished


def _forms_of(manifest: Manifest, form: Form) -> list[tuple[tuple[int, ...], tuple[int, ...] | None]]:
    """How a manifest may say `form`; version 1 knew only the end of a document, and did not say it."""
    known: list[tuple[tuple[int, ...], tuple[int, ...] | None]] = [(form.prefix, form.suffix)]
    return [*known, ((), None)] if form == Form((), (manifest.eod_id,)) else known


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


def place_vocabulary(vocabulary: Vocabulary, folder: Path, overwrite: bool) -> None:
    """Put the vocabulary beside its tokens; refuses a folder that holds another one."""
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
