"""What a language blend costs to open and to serve: nothing to build, however large it is; beside Megatron-core's.

    python benchmarks/blend.py                # both parts, about 3 minutes
    python benchmarks/blend.py --part open    # 1,000 languages and 10^12 tokens; any slot costs the same
    python benchmarks/blend.py --part peer    # GPTDataset + BlendedDataset of megatron-core, side by side

The large corpus is of sparse files: real headers, manifests and sizes, and holes for tokens. Each measurement runs in a
process of its own, so that memory is its own; times of the two systems are taken in turns.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from xlmega.data.batches import Batches, Reading
from xlmega.data.blend import Blend
from xlmega.data.indexed import DTYPE_CODES, HEADER, MAGIC, IndexedWriter, open_corpus
from xlmega.data.languages import training_languages
from xlmega.data.manifest import HASH_BLOCK_BYTES, Manifest, root_of, write_manifest
from xlmega.data.plan import Plan
from xlmega.data.planning import plan_of
from xlmega.data.settings import DataSettings
from xlmega.schedules import constant
from xlmega.text.remapping import plain

VOCABULARY = 32_000
LENGTH = 2048
PEER_LENGTH = 256


def megabytes() -> float:
    """Most memory that this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def anonymous_megabytes() -> float:
    """Memory that is this process' own now, without pages of files that are merely mapped."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


# -------------------------------------------------------------------- 10^12 tokens


def write_sparse(root: Path, languages: int, tokens: int) -> None:
    """Languages with Zipf's sizes that add up to `tokens`, as files without blocks on the disk."""
    (root / "train").mkdir(parents=True)
    zipf = 1.0 / np.arange(1, languages + 1)
    for index, share in enumerate(zipf / zipf.sum()):
        count = max(10 * LENGTH, int(share * tokens))
        documents = max(1, count // 700)
        prefix = root / "train" / f"l{index:04d}"
        idx_bytes = HEADER.size + 4 * documents + 8 * documents + 8 * (documents + 1)
        with prefix.with_suffix(".bin").open("wb") as file:
            file.truncate(2 * count)
        with prefix.with_suffix(".idx").open("wb") as file:
            file.write(HEADER.pack(MAGIC, 1, DTYPE_CODES["uint16"], documents, documents + 1))
            file.truncate(idx_bytes)
        blocks = {
            name: tuple("0" * 64 for _ in range(-(-size // HASH_BLOCK_BYTES)))
            for name, size in (("bin", 2 * count), ("idx", idx_bytes))
        }
        write_manifest(
            prefix.with_suffix(".json"),
            Manifest(
                language=prefix.name, split="train", vocabulary_hash="sparse", vocabulary_size=VOCABULARY, eod_id=2,
                documents=documents, tokens=count, utf8_bytes=4 * count, min_id=0, max_id=VOCABULARY - 1,
                dtype="uint16", bin_bytes=2 * count, idx_bytes=idx_bytes, bin_sha256=root_of(blocks["bin"]),
                idx_sha256=root_of(blocks["idx"]), block_bytes=HASH_BLOCK_BYTES, bin_blocks=blocks["bin"],
                idx_blocks=blocks["idx"],
            ),
        )  # fmt: skip


def open_batches(root: Path, length: int, batch_windows: int, **table: Any) -> tuple[Batches, Plan]:
    """From a folder to a stream."""
    settings = DataSettings(root=str(root), sequence_length=length, **table)
    languages = training_languages(settings, [open_corpus(root, "train")])
    sizes = {name: language.size for name, language in languages.items()}
    plan = plan_of(settings, sizes, constant(batch_windows), total_steps=10**9, seed=0)
    reading = Reading(plain(VOCABULARY))
    return Batches(languages, plan, reading, micro_batch_windows=8, dp_rank=0, dp_size=1), plan


def measure_open(root: Path) -> dict[str, Any]:
    """Open, first batch, and the cost of slots near and far."""
    imported = megabytes()
    started = time.perf_counter()
    batches, plan = open_batches(root, LENGTH, 128, temperature=3.3)
    opened = time.perf_counter()
    batches.at(0)
    served = time.perf_counter()
    result: dict[str, Any] = {
        "languages": len(plan.languages),
        "tokens": sum(batches._reader._languages[k].windows.tokens.num_tokens for k in range(len(plan.languages))),  # type: ignore[union-attr]
        "open_seconds": opened - started,
        "first_batch_seconds": served - opened,
        "peak_megabytes": megabytes(),
        "of_these_python_and_numpy": imported,
    }
    curve = {}
    for exponent in (0, 6, 8, 10, 12):
        slots = 10**exponent + np.arange(128)
        singles, many = [], []
        for turn in range(30):
            started = time.perf_counter()
            plan.slots(slots + 128 * turn)
            many.append(time.perf_counter() - started)
            started = time.perf_counter()
            plan.at(10**exponent + turn)
            singles.append(time.perf_counter() - started)
        curve[f"1e{exponent}"] = [1e6 * statistics.median(singles), 1e6 * statistics.median(many) / 128]
    result["microseconds_of_one_slot_and_of_one_among_128"] = curve
    return result


# -------------------------------------------------------------------- beside Megatron-core


def write_small(root: Path, languages: int, tokens: int) -> None:
    """Random tokens in documents of about 200, for both systems to read."""
    generator = np.random.default_rng((0, languages))
    for index in range(languages):
        writer = IndexedWriter(root / "train" / f"l{index:04d}", "uint16")
        lengths = generator.integers(100, 300, tokens // languages // 200)
        writer.add_documents(generator.integers(3, VOCABULARY, lengths.sum()), lengths)
        writer.finish(
            language=f"l{index:04d}", split="train", vocabulary_hash="random", vocabulary_size=VOCABULARY, eod_id=2,
            utf8_bytes=1,
        )  # fmt: skip


class Tokenizer:
    """What GPTDatasetConfig asks of one."""

    vocab_size, eod, pad = VOCABULARY, 2, 0

    def __init__(self) -> None:
        self.unique_identifiers = {"class": "none"}


def begin_group() -> None:
    """A process group of one: BlendedDataset asks for its rank."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def open_megatron(root: Path, samples: int, cache: Path) -> Any:
    """BlendedDataset over a GPTDataset for each language, by equal weights."""
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=0, sequence_length=PEER_LENGTH, blend=None, split="1,0,0", path_to_cache=str(cache),
        tokenizer=Tokenizer(), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,  # type: ignore[arg-type]
        create_attention_mask=False, num_dataset_builder_threads=1,
    )  # fmt: skip
    prefixes = sorted(path.with_suffix("") for path in (root / "train").glob("*.idx"))
    each = -(-samples // len(prefixes)) + -(-samples // (200 * len(prefixes))) + 1  # its own surplus of 0.5 %
    datasets = []
    for prefix in prefixes:
        indexed = IndexedDataset(str(prefix), mmap=True)
        indices = np.arange(indexed.document_indices.shape[0] - 1, dtype=np.int32)
        datasets.append(GPTDataset(indexed, str(prefix), indices, each, Split.train, config))
    return BlendedDataset(datasets, [1.0] * len(datasets), samples, config)


def measure_build(system: str, root: Path, samples: int) -> dict[str, float]:
    """Time to the first sample, memory, and bytes left on the disk."""
    with tempfile.TemporaryDirectory() as cache:
        if system == "megatron":
            import megatron.core.datasets.gpt_dataset  # noqa: F401

            begin_group()
            before = megabytes(), anonymous_megabytes()
            started = time.perf_counter()
            dataset = open_megatron(root, samples, Path(cache))
            dataset[0]
        else:
            import torch  # noqa: F401  (so that both stand on the same memory)

            before = megabytes(), anonymous_megabytes()
            started = time.perf_counter()
            batches, _ = open_batches(root, PEER_LENGTH, 128, languages={}, temperature=1e9)
            batches.at(0)
        seconds = time.perf_counter() - started
        written = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
        return {
            "seconds": seconds,
            "peak_megabytes": megabytes() - before[0],
            "own_megabytes": anonymous_megabytes() - before[1],
            "written_megabytes": written / 2**20,
        }


def measure_reading(root: Path, samples: int) -> dict[str, float]:
    """Windows a second of both, in turns of 4,096 windows; medians, and the median ratio of a turn."""
    with tempfile.TemporaryDirectory() as cache:
        begin_group()
        dataset = open_megatron(root, samples, Path(cache))
        batches, _ = open_batches(root, PEER_LENGTH, 128, temperature=1e9)
        rates: dict[str, list[float]] = {"megatron": [], "xlmega": []}
        for turn in range(16):
            first = turn * 4096
            started = time.perf_counter()
            for index in range(first, first + 4096):
                dataset[index]["tokens"]
            rates["megatron"].append(4096 / (time.perf_counter() - started))
            started = time.perf_counter()
            for step in range(first // 128, first // 128 + 32):
                batches.at(step)
            rates["xlmega"].append(4096 / (time.perf_counter() - started))
        pairs = zip(rates["xlmega"], rates["megatron"], strict=True)
        return {
            **{name: statistics.median(found) for name, found in rates.items()},
            "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
        }


# -------------------------------------------------------------------- driver


def alone(*arguments: str) -> Any:
    """A measurement in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--measure", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def part_open(folder: Path) -> None:
    root = folder / "sparse"
    write_sparse(root, 1000, 10**12)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    for turn in range(3):
        found = alone("open", str(root))
        print(f"open, run {turn + 1}: {json.dumps(found, indent=1)}", flush=True)
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}, "something was written"
    print("nothing was written", flush=True)
    started = time.perf_counter()
    Blend({f"l{k:04d}": 1.0 for k in range(1000)}, {f"l{k:04d}": 10**6 for k in range(1000)}, 0)
    print(f"the blend of 1,000 languages alone: {1000 * (time.perf_counter() - started):.1f} ms", flush=True)


def part_peer(folder: Path) -> None:
    for languages in (10, 100):
        root = folder / f"small{languages}"
        write_small(root, languages, 100_000_000)
        for samples in (100_000, 1_000_000, 10_000_000):
            for system in ("megatron", "xlmega"):
                found = alone("build", system, str(root), str(samples))
                figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
                print(f"{languages} languages, {samples} windows, {system}: {figures}", flush=True)
        found = alone("reading", str(root), "1000000")
        figures = ", ".join(f"{name} {value:,.2f}" for name, value in found.items())
        print(f"{languages} languages, windows a second: {figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("open", "peer"))
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        what, *rest = args.measure
        if what == "open":
            print(json.dumps(measure_open(Path(rest[0]))))
        elif what == "build":
            print(json.dumps(measure_build(rest[0], Path(rest[1]), int(rest[2]))))
        else:
            print(json.dumps(measure_reading(Path(rest[0]), int(rest[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        if args.part != "peer":
            part_open(Path(folder))
        if args.part != "open":
            part_peer(Path(folder))


if __name__ == "__main__":
    main()
