"""What is evaluated: each language's documents as ids, from tokens or from text.

In: a token folder and a split of it, a corpus split (`SPLIT/LANG/*.jsonl`), or one file: `.jsonl` (also compressed) as
in a corpus, or `.txt` with a document a line. Out: languages by code, each of which can be read again and again; every
document ends with the vocabulary's end-of-document id. Text is encoded as it is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.data.indexed import IndexedTokens, open_corpus
from xlmega.errors import ConfigError, DataError
from xlmega.text.corpus import SUFFIXES, Document, corpus_files, read_documents
from xlmega.text.vocabulary import Vocabulary, load_vocabulary
from xlmega.weights.directory import write_json

Ids = npt.NDArray[Any]
# Documents that are encoded together.
_BATCH = 256


@dataclass(frozen=True)
class LanguageDocuments:
    """One language."""

    name: str
    read: Callable[[], Iterator[Ids]]
    """Its documents, from the first on."""
    numbering: Ids | None = None
    """The model's id of each of their ids; None where they are the same."""


def is_token_folder(path: Path) -> bool:
    """What tools/tokenize_corpus writes."""
    return (path / "vocabulary").is_dir()


def open_documents(
    path: Path,
    vocabulary: Vocabulary | None,
    *,
    split: str = "valid",
    max_documents: int = 0,
) -> tuple[dict[str, LanguageDocuments], Vocabulary]:
    """The languages at `path`, and the vocabulary of their ids: `vocabulary` for text, that of its own for tokens.

    `split` is of token folders only; `max_documents` takes the first ones of each language, 0 all.
    """
    if max_documents < 0:
        raise ConfigError(f"max_documents={max_documents} must not be negative.")
    if path.is_dir() and is_token_folder(path):
        return _of_tokens(path, split, max_documents)
    if vocabulary is None:
        raise ConfigError(
            f"'{path}' is text, and no vocabulary was found with the model. Name its folder: --vocabulary DIR."
        )
    files = corpus_files(path) if path.is_dir() else [path]
    if path.is_file() and not path.name.endswith((*SUFFIXES, ".txt")):
        raise DataError(
            f"'{path}' is none of {', '.join(SUFFIXES)} and .txt. Give a token folder, a split or such a file."
        )
    if not path.exists():
        raise DataError(f"there is no '{path}'. Give a token folder, a split of a corpus, or a .jsonl or .txt file.")
    found = _languages_of_text(files)
    if not found:
        raise DataError(f"'{path}' holds no document.")
    encoder = vocabulary

    def reader(name: str) -> Callable[[], Iterator[Ids]]:
        return lambda: _encoded(_limited(_documents(files, name), max_documents), encoder)

    return {name: LanguageDocuments(name, reader(name)) for name in found}, vocabulary


def _of_tokens(path: Path, split: str, max_documents: int) -> tuple[dict[str, LanguageDocuments], Vocabulary]:
    own = load_vocabulary(path / "vocabulary")
    corpus = open_corpus(path, split)
    for name, tokens in corpus.items():
        if tokens.manifest.vocabulary_hash != own.hash:
            raise DataError(f"'{path}/{split}/{name}' was not made with '{path}/vocabulary': tokenise it again.")

    def reader(tokens: IndexedTokens) -> Callable[[], Iterator[Ids]]:
        return lambda: _limited((tokens.document(index) for index in range(tokens.num_documents)), max_documents)

    return {name: LanguageDocuments(name, reader(corpus[name])) for name in sorted(corpus)}, own


def _languages_of_text(files: Iterable[Path]) -> list[str]:
    return sorted({document.language for file in files for document in _read(file)})


def _documents(files: Iterable[Path], language: str) -> Iterator[str]:
    return (document.text for file in files for document in _read(file) if document.language == language)


def _read(file: Path) -> Iterator[Document]:
    if file.suffix != ".txt":
        yield from read_documents(file)
        return
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if text := line.rstrip("\n"):
                    yield Document(text, file.stem, f"{file.name}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}' cannot be read as UTF-8 text: {error}.") from None


def _encoded(texts: Iterator[str], vocabulary: Vocabulary) -> Iterator[Ids]:
    while batch := list(itertools.islice(texts, _BATCH)):
        for ids in vocabulary.encode_batch(batch):
            yield np.append(ids, vocabulary.eod_id)


def _limited(documents: Iterator[Any], max_documents: int) -> Iterator[Any]:
    return itertools.islice(documents, max_documents) if max_documents else documents


def vocabulary_of(source: Any, folder: Path | None) -> Vocabulary | None:
    """The vocabulary in `folder`, else the one that lies with a model; None where there is neither."""
    found = folder or getattr(source, "vocabulary_folder", None)
    return None if found is None else load_vocabulary(found)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder of scores that cannot be written, before anything is computed."""
    if output.exists() and not output.is_dir():
        raise DataError(f"'{output}' is a file; --output is the folder of result.json.")
    if (output / "result.json").exists() and not overwrite:
        raise DataError(f"'{output}' holds a result. Choose another --output, or add --overwrite.")


def write_result(output: Path, result: Any) -> Path:
    """`output`/result.json, whole or not at all."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        return write_json(output / "result.json.part", result).replace(output / "result.json")
    except OSError as error:
        raise DataError(f"'{output}/result.json' cannot be written: {error.strerror}.") from None
