"""Sentence pairs as people have them in, (source, target) in order out.

A corpus of pairs is two text files aligned line by line, or the zip archive of two that OPUS hands out; a file of
records {"translation": {"en": ..., "fr": ...}} (JSON lines or parquet); a folder that `save_to_disk` wrote; a data set
of the Hugging Face hub (`hf:NAME`, whose configuration and columns are found by the codes of the languages); or an OPUS
corpus by name (`opus:NAME`), fetched by opustools, an optional package of which this is the door. One that cannot be
read is an error that names it: no corpus is passed over.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from xlmega.errors import ConfigError, DataError
from xlmega.text import hub
from xlmega.text.aligned import aligned_lines
from xlmega.text.corpus import LANGUAGE
from xlmega.text.languages import base, names_of, two_letters
from xlmega.text.records import CHUNK_BYTES, has_surrogate, kind, read_records, write_errors
from xlmega.text.sources import JSON, PARQUET

PREPROCESSINGS = ("moses", "raw", "xml")


@dataclass(frozen=True)
class PairSource:
    """One corpus of pairs."""

    name: str
    """Names files and rows of statistics."""
    identities: tuple[Path | str, ...]
    read: Callable[[Path], Iterable[tuple[str, str]]]
    """Every pair; the folder is for what must be unpacked, and is removed afterwards."""

    def pairs(self, scratch: Path) -> Iterator[tuple[str, str]]:
        """Every pair, whole characters only."""
        try:
            for number, pair in enumerate(self.read(scratch), start=1):
                if any(map(has_surrogate, pair)):
                    raise DataError(f"{self.name}, pair {number}: half of a surrogate pair, which is no character.")
                yield pair
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


@dataclass(frozen=True)
class Opus:
    """How corpora are fetched from OPUS."""

    folder: Path = Path("opus")
    """Where the archives are kept, and looked for first."""
    release: str = "latest"
    preprocess: str = "moses"

    def __post_init__(self) -> None:
        if self.preprocess not in PREPROCESSINGS:
            raise ConfigError(f"preprocess must be one of {', '.join(PREPROCESSINGS)}, but is '{self.preprocess}'.")


def find_pairs(where: str, source: str, target: str, opus: Opus) -> PairSource:
    """The corpus that `where` describes: FILE, FILE_A,FILE_B, ARCHIVE.zip, FOLDER, hf:NAME or opus:NAME."""
    kind_of, _, rest = where.partition(":")
    if kind_of == "hf" and rest:
        return PairSource(_name(rest), (where,), partial(_hub, rest, source, target))
    if kind_of == "opus" and rest:
        release = f"{rest} {opus.release} {opus.preprocess}"
        return PairSource(_name(rest), (release,), partial(_opus, rest, source, target, opus))
    if not Path(where).exists() and "," in where:
        first, second = (Path(part) for part in where.split(",", 1))
        return PairSource(_name(first.stem), (first, second), lambda scratch: aligned_lines(first, second))
    path = Path(where)
    if path.suffix == ".zip" and path.is_file():
        return PairSource(_name(path.stem), (path,), partial(_archive, path, source, target))
    if path.is_file() and JSON.search(path.name):
        return PairSource(_name(path.name.split(".")[0]), (path,), partial(_records, path, source, target))
    if path.is_file() and PARQUET.search(path.name):
        return PairSource(_name(path.stem), (path,), partial(_parquet, path, source, target))
    if splits := hub.saved_splits(path):
        folder = path if "" in splits else path / "train"
        files = splits.get("", splits.get("train"))
        if files is None:
            raise DataError(
                f"'{path}' has the splits {', '.join(splits)} but no 'train'. Give one of them: {path}/NAME."
            )
        return PairSource(_name(path.name), tuple(files), partial(_saved, folder, source, target))
    raise DataError(
        f"'{where}' is no corpus of pairs. Give FILE_A,FILE_B (line n of one translates line n of the other), an OPUS "
        "archive (.zip), records with 'translation' (.jsonl, .parquet), a saved data set, hf:NAME or opus:NAME."
    )


def _name(text: str) -> str:
    name = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in text).strip("._-")
    if not LANGUAGE.fullmatch(name):
        raise ConfigError(f"'{text}' gives no name for a corpus: letters, digits, '_', '-' and '.', at most 64.")
    return name


def translation(row: Mapping[str, Any], source: str, target: str, where: str) -> tuple[str, str]:
    """The two sides of a record; a side that is null is ''."""
    inner = row.get("translation")
    columns: Mapping[str, Any] = inner if isinstance(inner, Mapping) else row
    sides = []
    for code in (source, target):
        key = column_of(columns, code)
        if key is None:
            raise DataError(
                f"{where}: no text of '{code}'. It would be under one of {', '.join(names_of(code))} (a script may "
                f"follow), but there is {', '.join(map(str, columns)) or 'nothing'}."
            )
        value = columns[key]
        if not isinstance(value, str | None):
            raise DataError(f"{where}: the text of '{key}' is {kind(value)}, not a string.")
        sides.append(value or "")
    return sides[0], sides[1]


def column_of(columns: Iterable[str], code: str) -> str | None:
    """The column of a language: its own code, another code of it, or such a code with a script ('swh_Latn')."""
    known = [column for column in columns if isinstance(column, str)]
    for name in names_of(code):
        for column in known:
            if column == name or (base(column) == name and "_" in column):
                return column
    return None


def config_of(known: list[str], source: str, target: str, name: str) -> str | None:
    """The configuration of two languages, in either order; None for a data set that has but one."""
    for first, second in ((source, target), (target, source)):
        for one in names_of(first):
            for other in names_of(second):
                for config in known:
                    left, _, right = config.partition("-")
                    if (left == one or base(left) == one) and (right == other or base(right) == other):
                        return config
    if len(known) < 2:
        return None
    raise DataError(f"'{name}' has no configuration of '{source}' and '{target}'. It has: {', '.join(known[:40])}.")


def _hub(name: str, source: str, target: str, scratch: Path) -> Iterator[tuple[str, str]]:
    rows = hub.hub_rows(name, "train", lambda known: config_of(known, source, target, name))
    for number, row in rows:
        yield translation(row, source, target, f"{name}:{number}")


def _saved(folder: Path, source: str, target: str, scratch: Path) -> Iterator[tuple[str, str]]:
    for number, row in hub.saved_rows(folder):
        yield translation(row, source, target, f"{folder}:{number}")


def _records(file: Path, source: str, target: str, scratch: Path) -> Iterator[tuple[str, str]]:
    for number, row in read_records(file):
        yield translation(row, source, target, f"{file}:{number}")


def _parquet(file: Path, source: str, target: str, scratch: Path) -> Iterator[tuple[str, str]]:
    for number, row in hub.parquet_rows(file, None):
        yield translation(row, source, target, f"{file}:{number}")


def _archive(archive: Path, source: str, target: str, scratch: Path) -> Iterator[tuple[str, str]]:
    """The two aligned files of an OPUS archive, known by the codes at the end of their names."""
    try:
        with zipfile.ZipFile(archive) as opened:
            ends = {name.rpartition(".")[2]: name for name in opened.namelist()}
            files: list[Path] = []
            for code in (source, target):
                end = column_of(ends, code)
                if end is None:
                    raise DataError(f"'{archive}' holds no file of '{code}': {', '.join(opened.namelist()[:10])}.")
                file = scratch / f"{len(files)}.txt"
                with write_errors(file):
                    scratch.mkdir(parents=True, exist_ok=True)
                with opened.open(ends[end]) as packed, file.open("wb") as unpacked:
                    while chunk := packed.read(CHUNK_BYTES):
                        with write_errors(file):
                            unpacked.write(chunk)
                files.append(file)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"cannot read '{archive}': {error}. Fetch it again; `unzip -t` tests it.") from None
    yield from aligned_lines(files[0], files[1])


def _opus(name: str, source: str, target: str, opus: Opus, scratch: Path) -> Iterator[tuple[str, str]]:
    try:
        import opustools
    except ImportError:
        raise DataError(
            f"fetching opus:{name} needs the package opustools: pip install opustools. Or fetch the archive of its "
            "Moses files yourself and give its path."
        ) from None
    files = scratch / "source.txt", scratch / "target.txt"
    told = io.StringIO()
    with write_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        opus.folder.mkdir(parents=True, exist_ok=True)
    try:
        # It speaks on both streams and asks on standard output.
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            opustools.OpusRead(
                directory=name,
                source=two_letters(source),
                target=two_letters(target),
                release=opus.release,
                preprocess=opus.preprocess,
                write_mode="moses",
                write=[str(file) for file in files],
                suppress_prompts=True,
                download_dir=str(opus.folder),
            ).printPairs()
    except (Exception, SystemExit) as error:
        said = [line for line in told.getvalue().splitlines() if line.strip()]
        raise DataError(
            f"opustools could not fetch '{name}' for {two_letters(source)}-{two_letters(target)}: "
            f"{str(error).strip() or type(error).__name__}{f' ({said[-1].strip()})' if said else ''}. Leave this "
            f"corpus out, or put its archive into '{opus.folder}'."
        ) from None
    if "Continuing from next sentence file" in told.getvalue():
        print(told.getvalue(), file=sys.stderr)
        raise DataError(f"opustools passed over a part of '{name}' (see above). Fetch its archives again.")
    yield from aligned_lines(files[0], files[1])
