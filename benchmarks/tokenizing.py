"""Tokenising, side by side: xlmega, a loop in the manner of Megatron's, and SentencePiece's own threads.

    python benchmarks/tokenizing.py VOCABULARY          # rates, in turns, medians over rounds
    python benchmarks/tokenizing.py VOCABULARY --memory # peak memory from 50 MB to 5 GB of text

The text is ../shared/data/pydocs/train (12 languages, 50.6 MB of UTF-8 in .jsonl.gz). Every contender runs in a process
of its own and times itself without imports and without loading the vocabulary:

- xlmega: tokenize_corpus, from the .jsonl.gz files to .bin, .idx and checksummed manifests on the disk.
- megatron: gunzip and lines in the parent, a process pool that parses JSON and calls the tokenizer document by document
  (imap, chunks of 32, as its preprocessing does), Megatron-core's IndexedDatasetBuilder, one file a language.
- sentencepiece list, sentencepiece numpy: only `encode` with threads on texts in memory; no reading, no writing.

CPU seconds are those of the process and its workers for the same work; unlike MB/s they hardly depend on what else the
machine does. The peak is the resident memory of the tokenising process and of its largest worker, as the kernel counts
it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CORPUS = ROOT.parent / "shared" / "data" / "pydocs" / "train"
ROUNDS = 7
REPEATS = (1, 10, 100)
CONTENDERS = ("xlmega", "megatron", "sentencepiece_list", "sentencepiece_numpy")


def texts() -> list[str]:
    from xlmega.text.corpus import read_corpus

    return [document.text for document in read_corpus(CORPUS)]


def xlmega(vocabulary: Path, output: Path, workers: int, corpus: Path = CORPUS) -> float:
    from xlmega.data import encoding, tokenizing

    load, took = tokenizing.load_vocabulary, 0.0

    def timed(folder: Path) -> Any:
        nonlocal took
        global _cpu_before
        begun, cpu_begun = time.perf_counter(), cpu()
        found = load(folder)
        took += time.perf_counter() - begun
        _cpu_before += cpu() - cpu_begun
        return found

    tokenizing.load_vocabulary = encoding.load_vocabulary = timed  # type: ignore[assignment]
    begun = start()
    tokenizing.tokenize_corpus(corpus, vocabulary, output, workers=workers, only=True)
    return time.perf_counter() - begun - took


_processor: Any = None


def _begin(vocabulary: Path) -> None:
    import sentencepiece

    global _processor
    _processor = sentencepiece.SentencePieceProcessor(model_file=str(vocabulary / "tokenizer.model"))


def _encode(line: bytes) -> list[int]:
    ids: list[int] = _processor.encode(json.loads(line)["text"])
    ids.append(2)
    return ids


def megatron(vocabulary: Path, output: Path, workers: int) -> float:
    import numpy as np
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    output.mkdir()
    with multiprocessing.get_context("fork").Pool(workers, _begin, (vocabulary,)) as pool:
        pool.map(_encode, [b'{"text": "x"}'] * workers)  # the pool is up before the clock starts
        begun = start()
        for file in sorted(CORPUS.glob("*/*.jsonl.gz")):
            prefix = output / file.parent.name
            builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
            with gzip.open(file) as lines:
                for ids in pool.imap(_encode, lines, 32):
                    builder.add_document(torch.IntTensor(ids), [len(ids)])
            builder.finalize(f"{prefix}.idx")
        seconds = time.perf_counter() - begun
        pool.close()
        pool.join()
    return seconds


def sentencepiece_threads(vocabulary: Path, return_type: Any, workers: int) -> float:
    held = texts()
    _begin(vocabulary)
    _processor.encode(held[:100], return_type=return_type, num_threads=workers)
    begun = start()
    _processor.encode(held, return_type=return_type, num_threads=workers)
    return time.perf_counter() - begun


def run_one(name: str, vocabulary: Path, workers: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "tokens"
        if name == "xlmega":
            seconds = xlmega(vocabulary, output, workers)
        elif name == "megatron":
            seconds = megatron(vocabulary, output, workers)
        else:
            seconds = sentencepiece_threads(vocabulary, "numpy" if name.endswith("numpy") else int, workers)
    print(json.dumps({"seconds": seconds, "cpu": cpu() - _cpu_before, **peaks()}))


_cpu_before = 0.0


def start() -> float:
    """The clock at the beginning of what is timed."""
    global _cpu_before
    _cpu_before = cpu()
    return time.perf_counter()


def cpu() -> float:
    """Seconds of this process and of its children that have ended."""
    used = [resource.getrusage(code) for code in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def peaks() -> dict[str, float]:
    return {
        who: resource.getrusage(code).ru_maxrss / 1024
        for who, code in (("own_mb", resource.RUSAGE_SELF), ("child_mb", resource.RUSAGE_CHILDREN))
    }


def run_memory(vocabulary: Path, workers: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        split = Path(folder) / "repeated"
        for file in CORPUS.glob("*/*.jsonl.gz"):
            (split / file.parent.name).mkdir(parents=True)
            for k in range(repeats):
                (split / file.parent.name / f"{k:05d}.jsonl.gz").symlink_to(file)
        seconds = xlmega(vocabulary, Path(folder) / "tokens", workers, split)
        size = sum(file.stat().st_size for file in (Path(folder) / "tokens").rglob("*.bin"))
    print(json.dumps({"seconds": seconds, "bin_mb": size / 1e6, **peaks()}))


def call(*arguments: str) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    if run.returncode:
        sys.exit(run.stderr)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path, help="a unigram vocabulary of 16,384 ids of this text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--repeats", type=int, nargs="+", default=REPEATS, help="of the corpus, with --memory")
    parser.add_argument("--one", choices=[*CONTENDERS, "repeated"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not CORPUS.is_dir():
        sys.exit(f"the text of this benchmark is not here: {CORPUS}")
    if args.one == "repeated":
        return run_memory(args.vocabulary, args.workers, *args.repeats)
    if args.one:
        return run_one(args.one, args.vocabulary, args.workers)
    own = [str(args.vocabulary), "--workers", str(args.workers)]
    megabytes = sum(len(text.encode()) for text in texts()) / 1e6
    print(f"{megabytes:.1f} MB of text, {args.workers} workers, load average {os.getloadavg()[0]:.1f}")
    if args.memory:
        print("| text MB | .bin MB | seconds | MB/s | peak MB, parent | peak MB, a worker |\n|---|---|---|---|---|---|")
        for repeats in args.repeats:
            found = call(*own, "--one", "repeated", "--repeats", str(repeats))
            size = megabytes * repeats
            print(
                f"| {size:,.0f} | {found['bin_mb']:,.0f} | {found['seconds']:.1f} | {size / found['seconds']:.1f} | "
                f"{found['own_mb']:.0f} | {found['child_mb']:.0f} |",
                flush=True,
            )
        return None
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    cpus: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    memory: dict[str, dict[str, float]] = {}
    for _ in range(args.rounds):
        for name in CONTENDERS:
            memory[name] = call(*own, "--one", name)
            rates[name].append(megabytes / memory[name]["seconds"])
            cpus[name].append(memory[name]["cpu"])
    print("| contender | MB/s | xlmega over it | CPU s | peak MB, own | largest child |\n|---|---|---|---|---|---|")
    for name in CONTENDERS:
        ratio = statistics.median(a / b for a, b in zip(rates["xlmega"], rates[name], strict=True))
        row, rate = memory[name], statistics.median(rates[name])
        seconds = statistics.median(cpus[name])
        print(f"| {name} | {rate:.1f} | {ratio:.2f} | {seconds:.2f} | {row['own_mb']:.0f} | {row['child_mb']:.0f} |")
    print(f"load average at the end {os.getloadavg()[0]:.1f}")
    return None


if __name__ == "__main__":
    main()
