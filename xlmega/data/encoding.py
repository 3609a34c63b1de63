"""Blocks of JSON lines in, their documents as token bytes by language out, in the order of the blocks.

Parsing holds Python's lock and every vocabulary's library takes its time, so blocks are worked on in processes: a
worker parses, encodes and packs a block, and only bytes come back. Results come in the order of the blocks whoever
finishes first, and at most two blocks a worker are in memory. A worker ends by itself when its parent is gone, however
that happened; a worker that dies (out of memory, most likely) is a DataError, not a hang.

A document without any token, that is an empty text with nothing put around it, is left out.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from xlmega.data.indexed import Packed, pack, token_dtype
from xlmega.errors import DataError
from xlmega.text.corpus import parse_document
from xlmega.text.records import Block, parse_record
from xlmega.text.vocabulary import Vocabulary, load_vocabulary

PARENT_SECONDS = 0.5
"""How often a worker looks whether its parent is there."""


@dataclass(frozen=True)
class Form:
    """What stands around the ids of each document's text."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """The documents of one language in one block."""

    language: str
    documents: Packed
    utf8_bytes: int


def encode_block(block: Block, vocabulary: Vocabulary, form: Form) -> list[Encoded]:
    """The documents of a block, by language in order of appearance."""
    texts: dict[str, list[str]] = {}
    for number, line in enumerate(block.data.split(b"\n"), start=block.first):
        if line and not line.isspace():
            record = parse_record(block.file, number, line)
            document = parse_document(block.file, number, record, escaped=b"\\u" in line)
            texts.setdefault(document.language, []).append(document.text)
    prefix, suffix = np.array(form.prefix, np.int32), np.array(form.suffix, np.int32)
    dtype, found = token_dtype(vocabulary.size), []
    for language, of_language in texts.items():
        parts: list[npt.NDArray[np.int32]] = []
        for ids in vocabulary.encode_batch(of_language):
            parts += (prefix, ids, suffix)
        lengths = np.array([len(ids) + len(prefix) + len(suffix) for ids in parts[1::3]], dtype=np.int64)
        if not lengths.all():
            parts, lengths = _without_empty(parts, lengths)
        utf8_bytes = sum(len(text) if text.isascii() else len(text.encode()) for text in of_language)
        if len(lengths):
            found.append(Encoded(language, pack(np.concatenate(parts), lengths, dtype), utf8_bytes))
    return found


def _without_empty(
    parts: list[npt.NDArray[np.int32]], lengths: npt.NDArray[np.int64]
) -> tuple[list[npt.NDArray[np.int32]], npt.NDArray[np.int64]]:
    # With nothing around it, an empty document has no token, and token files hold documents of one token or more.
    kept = np.flatnonzero(lengths)
    return [part for k in kept for part in parts[3 * k : 3 * k + 3]], lengths[kept]


def encode_blocks(
    blocks: Iterable[Block], vocabulary: Vocabulary, vocabulary_folder: Path, form: Form, workers: int
) -> Generator[tuple[Block, list[Encoded]], None, None]:
    """Each block with its documents, in order; `workers` changes the speed and nothing else.

    Blocks are read in the caller's thread, which also writes; both take little of a core's time.
    """
    pool: Executor
    if workers == 1:
        pool, work = ThreadPoolExecutor(1), partial(encode_block, vocabulary=vocabulary, form=form)
    else:
        pool, work = _processes(vocabulary, vocabulary_folder, workers), partial(_work, form=form)
    running: deque[tuple[Block, Future[list[Encoded]]]] = deque()
    try:
        for block in blocks:
            running.append((block, pool.submit(work, block)))
            if len(running) > 2 * workers:
                done, result = running.popleft()
                yield done, result.result()
        while running:
            done, result = running.popleft()
            yield done, result.result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenises was killed, most likely for want of memory. Run the same command again with "
            "fewer --workers: what is finished is kept."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _processes(vocabulary: Vocabulary, folder: Path, workers: int) -> ProcessPoolExecutor:
    # A fork starts at once and inherits the vocabulary, but must not happen while other threads may hold locks.
    forks = threading.active_count() == 1
    return ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("fork" if forks else "spawn"),
        initializer=_begin_work,
        initargs=(vocabulary if forks else folder, os.getpid()),
    )


_vocabulary: Vocabulary
"""Of a worker process."""


def _begin_work(vocabulary: Vocabulary | Path, parent: int) -> None:
    global _vocabulary

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; more would compete with the other workers
    _vocabulary = load_vocabulary(vocabulary) if isinstance(vocabulary, Path) else vocabulary


def _work(block: Block, form: Form) -> list[Encoded]:
    return encode_block(block, _vocabulary, form)
