"""A split and a clusterer in, the cluster of every document out: one line a document, in files beside its own.

    OUTPUT/SPLIT/SHARD/FILE.jsonl    {"sp_id": "SPLIT/SHARD/FILE.jsonl.gz|0", "cluster": 3, "lang": "fr"}
    OUTPUT/clusters.json             number of clusters, clusterer, sizes by split and language

The format is the published one (METHODS §2.2) with the language added; `sp_id` is the path within the data set, so
moved data keeps its clusters, and the document's place in its file, from 0. `greedy` takes the least cost. `balanced`
makes the sizes of each split differ by at most one at nearly the least total cost: costs of all documents go to disk,
prices come from a sample, and the documents nearest to a border, at most CANDIDATES of them, are divided exactly.

Files are worked on in parallel, each on one thread, and appear whole; `SPLIT.part` becomes `SPLIT` when all are there.
Several commands can share a split's files out, on any machines that see one directory: each takes `share` of `shares`,
and the one that finds all of them done finishes the split. After an interruption the same command does what is missing.
The output does not depend on workers, shares or interruptions. Memory is a block of documents a worker and the
candidates, whatever the split's size.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError, DataError
from xlmega.experts.clusterer import (
    PROGRESS_SECONDS,
    Clusterer,
    LanguageClusterer,
    clusterer_hash,
    key_of,
    load_clusterer,
)
from xlmega.experts.evening import balanced_labels
from xlmega.experts.features import read_arrays, read_json, write_arrays, write_json
from xlmega.locking import locked
from xlmega.text.corpus import SUFFIXES, Document, corpus_files, read_documents, sibling_splits, write_records

FORMAT_VERSION = 1
NAME = "clusters.json"
BATCH_DOCUMENTS = 2000
CANDIDATES = 200_000
"""Documents divided exactly in memory; splits up to this size are divided at the least cost there is."""
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def assign_clusters(
    split: Path,
    clusterer_folder: Path,
    output: Path,
    *,
    balanced: bool = False,
    workers: int = 1,
    share: int = 0,
    shares: int = 1,
    only: bool = False,
    overwrite: bool = False,
    candidates: int = CANDIDATES,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Assign a split and, when it is called 'train', those beside it unless `only`; returns what clusters.json says.

    With several shares a split that other shares still work on is not in it yet."""
    if workers < 1:
        raise ConfigError(f"at least 1 process assigns, but {workers} were asked for.")
    if not 0 <= share < shares:
        raise ConfigError(f"share {share} of {shares}: shares are numbered from 0 to {shares - 1}.")
    if overwrite and shares > 1:
        raise ConfigError("with several shares each would replace what the others wrote. Remove the output instead.")
    clusterer = load_clusterer(clusterer_folder)
    if balanced and isinstance(clusterer, LanguageClusterer):
        raise ConfigError("a language's documents all go to its cluster, so balancing cannot be. Leave it out.")
    split = split.resolve()
    splits = [split] if only or split.name != "train" else [split, *sibling_splits(split)]
    pinned = {
        "format_version": FORMAT_VERSION,
        "num_clusters": clusterer.num_clusters,
        "assignment": "balanced" if balanced else "greedy",
        "clusterer": clusterer_hash(clusterer_folder),
    }
    with locked(output, wait=True):
        _begun(output, pinned, overwrite)
    for one in splits:
        files = corpus_files(one)
        _check_names(files)
        sizes = [file.stat().st_size for file in files]
        listed = [[f"{file.parent.name}/{file.name}", size] for file, size in zip(files, sizes, strict=True)]
        part = output / f"{one.name}.part"
        with locked(output, wait=True):
            if _is_finished(output, one, listed):
                say(f"{one.name}: finished before, kept")
                continue
            _take_up(part, {**pinned, "files": listed})
        stores = [part / "costs" / file.parent.name / f"{file.name}.npz" for file in files]
        by_size = np.argsort(-np.array(sizes), kind="stable")
        jobs = [(clusterer_folder, files[k], stores[k], balanced) for k in sorted(by_size[share::shares])]
        missing = [job for job in jobs if not job[2].is_file()]
        if len(missing) < len(jobs):
            say(f"{one.name}: {len(jobs) - len(missing)} of {len(jobs)} files were done before")
        _in_parallel(missing, workers, one.name, say)
        with locked(output, wait=True):
            if _is_finished(output, one, listed):
                continue  # by another share, this moment
            if absent := sum(not store.is_file() for store in stores):
                say(f"{one.name}: {absent} of {len(files)} files are left to the other shares")
                continue
            found = _label(files, stores, clusterer.num_clusters, part, balanced, candidates, say)
            table = read_json(output / NAME, FORMAT_VERSION)
            table["splits"][one.name] = {**found, "files": listed}
            shutil.rmtree(part / "costs", ignore_errors=True)
            (part / "of.json").unlink()
            write_json(output / NAME, table)  # before the name: a split without its folder is done again
            shutil.rmtree(output / one.name, ignore_errors=True)
            part.replace(output / one.name)
    return read_json(output / NAME, FORMAT_VERSION)


def clusters_by_language(output: Path, split: str) -> dict[str, npt.NDArray[np.int64]]:
    """For each language the clusters of its documents, in the order in which a split is read and tokenised."""
    found: dict[str, list[npt.NDArray[np.int64]]] = {}
    for file, _ in assigned_files(output, split):
        clusters, languages = read_clusters(output, split, file)
        names = np.array(languages, dtype=object)
        for code in dict.fromkeys(languages):
            found.setdefault(code, []).append(clusters[names == code])
    return {code: np.concatenate(parts) for code, parts in sorted(found.items())}


def assigned_files(output: Path, split: str) -> list[tuple[str, int]]:
    """('SHARD/FILE', bytes) of each file whose documents were assigned, in order."""
    table = read_json(output / NAME, FORMAT_VERSION)
    if split not in table.get("splits", {}):
        known = ", ".join(table.get("splits", {})) or "none"
        raise DataError(f"'{output}' has no clusters of split '{split}'; it has {known}. Run assign_clusters.py on it.")
    return [(str(name), int(size)) for name, size in table["splits"][split]["files"]]


def num_clusters(output: Path) -> int:
    """How many clusters documents were assigned to."""
    return int(read_json(output / NAME, FORMAT_VERSION)["num_clusters"])


def read_clusters(output: Path, split: str, file: str) -> tuple[npt.NDArray[np.int64], list[str]]:
    """(clusters, languages) of a file's documents in order; `file` is 'SHARD/FILE.jsonl[.gz|.zst]'."""
    path = output / split / _mirrored(file)
    found: list[int] = []
    languages: list[str] = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}.") from None
    for number, line in enumerate(lines):
        try:
            record = json.loads(line)
            if record["sp_id"] != f"{split}/{file}|{number}":
                raise ValueError(f"sp_id is {record['sp_id']!r}")
            found.append(int(record["cluster"]))
            languages.append(str(record["lang"]))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number + 1}: not the cluster of document {number} ({error}).") from None
    return np.array(found, np.int64), languages


def _begun(output: Path, pinned: dict[str, Any], overwrite: bool) -> None:
    """Write clusters.json where there is none; refuses one of another clusterer, and an output of another kind."""
    if output.is_file():
        raise DataError(f"--output '{output}' is a file; clusters are a folder.")
    if not output.is_dir() or not any(output.iterdir()):
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / NAME, {**pinned, "splits": {}})
        return
    if not (output / NAME).is_file():
        raise DataError(f"'{output}' is not empty and holds no {NAME}. Choose another --output.")
    table = read_json(output / NAME, FORMAT_VERSION)
    if overwrite:
        for name in list(table.get("splits", {})):
            shutil.rmtree(output / name, ignore_errors=True)
        table = {**pinned, "splits": {}}
        write_json(output / NAME, table)
    changed = [key for key in pinned if table.get(key) != pinned[key]]
    if changed:
        raise DataError(
            f"'{output}' was made with another {' and '.join(changed)} ({table.get(changed[0])}, not "
            f"{pinned[changed[0]]}). Choose another --output, or add --overwrite."
        )


def _is_finished(output: Path, split: Path, listed: list[list[Any]]) -> bool:
    """The split is assigned; a DataError when it was from other files."""
    splits = read_json(output / NAME, FORMAT_VERSION)["splits"]
    if split.name not in splits or not (output / split.name).is_dir():
        return False
    if splits[split.name]["files"] != listed:
        raise DataError(
            f"'{output / split.name}' was assigned from other files than '{split}' has now. Choose another "
            "--output, or add --overwrite."
        )
    return True


def _take_up(part: Path, of: dict[str, Any]) -> None:
    """Keep what another command or moment began from the same files, and nothing else."""
    if part.is_dir() and not (part / "of.json").is_file():
        shutil.rmtree(part)  # its first moment was its last
    if part.is_dir() and read_json(part / "of.json", FORMAT_VERSION) != of:
        shutil.rmtree(part)  # begun from other files
    if not part.is_dir():
        part.mkdir(parents=True)
        write_json(part / "of.json", of)


def _mirrored(file: str) -> str:
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if file.endswith(suffix):
            return file.removesuffix(suffix) + ".jsonl"
    raise AssertionError(file)


def _check_names(files: Sequence[Path]) -> None:
    seen: dict[tuple[str, str], Path] = {}
    for file in files:
        other = seen.setdefault((file.parent.name, _mirrored(file.name)), file)
        if other != file:
            raise DataError(f"'{other}' and '{file}' would have one cluster file. Rename one of them.")


# -------------------------------------------------------------------- a split


def _label(
    files: Sequence[Path],
    stores: Sequence[Path],
    num_clusters: int,
    part: Path,
    balanced: bool,
    candidates: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write a split's clusters from what is known of all its files."""
    name = part.stem
    if balanced:
        say(f"{name}: dividing evenly")
        labels = balanced_labels(stores, num_clusters, candidates)
    else:
        labels = (read_arrays(store, ("labels",))["labels"] for store in stores)
    by_language: dict[str, Counter[int]] = {}
    for file, store, found in zip(files, stores, labels, strict=True):
        known = read_arrays(store, ("languages", "names"))
        rows, codes = known["languages"], known["names"]
        for row, code in enumerate(codes):
            by_language.setdefault(str(code), Counter()).update(found[rows == row].tolist())
        write_records(
            part / file.parent.name / _mirrored(file.name),
            (
                {"sp_id": key_of(file, line), "cluster": int(k), "lang": str(codes[language])}
                for line, (k, language) in enumerate(zip(found, rows, strict=True))
            ),
        )
    num = range(num_clusters)
    table = {code: [counts[k] for k in num] for code, counts in sorted(by_language.items())}
    total = [sum(row[k] for row in table.values()) for k in num]
    say(f"{name}: {sum(total):,} documents, sizes {' '.join(map(str, total))}")
    return {"documents": sum(total), "sizes": total, "by_language": table}


def _in_parallel(
    jobs: list[tuple[Path, Path, Path, bool]], workers: int, name: str, say: Callable[[str], None]
) -> None:
    """Run `_cost_file` on every job in processes of one thread each."""
    if not jobs:
        return
    before = {key: os.environ.get(key) for key in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))  # the workers' numbers must not depend on how many there are
    told = time.monotonic()
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(workers, len(jobs)), context, _leave_with_parent, (os.getpid(),)) as pool:
            running = [pool.submit(_cost_file, *job) for job in jobs]
            try:
                for done, future in enumerate(as_completed(running), start=1):
                    documents = future.result()
                    if time.monotonic() - told > PROGRESS_SECONDS or done == len(jobs):
                        told = time.monotonic()
                        say(f"{name}: {done} of {len(jobs)} files ({documents:,} documents in the last)")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except BrokenProcessPool:
        raise DataError(
            "a process that assigned clusters was killed, perhaps for memory. Run the command again: finished files "
            "are kept. Fewer --workers need less memory."
        ) from None
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


def _leave_with_parent(parent: int) -> None:
    """A worker must not outlive the command that started it, whatever ended that."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_loaded: dict[Path, Clusterer] = {}


def _cost_file(clusterer_folder: Path, file: Path, store: Path, balanced: bool) -> int:
    """Write what is known of a file's documents (costs if balanced, labels, languages); returns their number."""
    if clusterer_folder not in _loaded:
        _loaded[clusterer_folder] = load_clusterer(clusterer_folder)
    clusterer = _loaded[clusterer_folder]
    costs, labels = [], []
    codes: dict[str, int] = {}
    languages: list[int] = []
    for first, batch in _batches(file):
        found = clusterer.costs(batch, [key_of(file, first + k) for k in range(len(batch))])
        if balanced:
            costs.append(found)
        labels.append(np.argmin(found, axis=1))
        languages += [codes.setdefault(document.language, len(codes)) for document in batch]
    store.parent.mkdir(parents=True, exist_ok=True)
    kept = {"costs": np.concatenate([np.empty((0, clusterer.num_clusters), np.float32), *costs])} if balanced else {}
    write_arrays(
        store,
        labels=np.concatenate([np.empty(0, np.int64), *labels]),
        languages=np.array(languages, np.int32),
        names=np.array(list(codes), np.str_),
        **kept,
    )
    return len(languages)


def _batches(file: Path) -> Iterator[tuple[int, list[Document]]]:
    batch: list[Document] = []
    first = 0
    for document in read_documents(file):
        batch.append(document)
        if len(batch) == BATCH_DOCUMENTS:
            yield first, batch
            first, batch = first + len(batch), []
    if batch:
        yield first, batch
