"""What a Backpack costs: time and memory of a training step against the formulas written straight down and against its
GPT twin, memory by length, and generation with cached senses against recomputing.

    python benchmarks/backpack_step.py                 a small Backpack, 16 senses, 8 x 512 tokens, bf16, 2 threads
    python benchmarks/backpack_step.py --variant nano
    python benchmarks/backpack_step.py --quick         tiny sizes: does it run?
    python benchmarks/backpack_step.py --windows 64    on a GPU, where there is one, unless DS_ACCELERATOR=cpu

Each contender runs in a process of its own and takes steps in turns with the others; times are medians, ratios medians
over rounds of the ratio within a round. Memory is the resident peak of a step (on a GPU that of its tensors), as it is
and less what lies there before it (weights, masters, moments). Tokens are English and French text where ../shared/data
is, else drawn by Zipf's law; the share of distinct ids is printed, for senses are computed once for each.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import gzip
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
PYDOCS = ROOT.parent / "shared" / "data" / "pydocs" / "train"
WARM_UP_STEPS = 2
LENGTHS = (512, 1024, 2048, 4096)
TINY = {"num_layers": 3, "hidden_size": 64, "num_heads": 4, "num_senses": 4, "vocab_size": 600, "sequence_length": 64}


class Worker:
    """A contender in its own process, which does what it is told, one JSON line for each."""

    def __init__(self, name: str, sizes: dict[str, Any], tokens: Path, threads: int):
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore", "HF_HUB_OFFLINE": "1"}
        self.name = name
        command = [sys.executable, __file__, "--worker", name, "--sizes", json.dumps(sizes), "--tokens", str(tokens)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, what: str) -> Any:
        assert self._process.stdin and self._process.stdout and self._process.stderr
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(what + "\n")
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} stopped:\n{self._process.stderr.read()[-3000:]}")
        return json.loads(answer)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout and self._process.stderr
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            stream.close()
        self._process.wait(60)


def resident(which: str = "VmRSS") -> float:
    """Megabytes of this process (of its tensors on a GPU): VmRSS now, VmHWM at its highest since `forget_peak`."""
    import peers
    import torch

    if peers.DEVICE.type == "cuda":
        now = which == "VmRSS"
        return (torch.cuda.memory_allocated() if now else torch.cuda.max_memory_allocated()) / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(which):
            return int(line.split()[1]) / 1024
    raise AssertionError(which)


def forget_peak() -> None:
    """Give free memory back and let the peak begin where memory is now."""
    import peers
    import torch

    if peers.DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def work_as_told(name: str, given: dict[str, Any], tokens_file: Path) -> None:
    """The worker's side."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    import backpack_peers
    import peers
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sizes = backpack_peers.Sizes(**given)
    stream = np.load(tokens_file).astype(np.int64)

    def reply(value: Any) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    def batch(index: int) -> np.ndarray:
        rows, length = sizes.batch_windows, sizes.sequence_length + 1
        starts = np.random.default_rng((1, index)).integers(0, len(stream) - length, rows)
        return np.stack([stream[start : start + length] for start in starts])

    if name == "matmul":
        for _ in sys.stdin:
            reply(peers.matmul_rate())
        return
    with backpack_peers.contender(name, sizes) as (module, loss_of):
        step, index = None, 0
        for line in sys.stdin:
            order = line.split()[0]
            if order == "ready":
                step = peers.plain_loop(module, loss_of, sizes.batch_windows)
                reply({"parameters": sum(p.numel() for p in module.parameters())})
            elif order == "step":
                assert step is not None
                peers.synchronize()
                start, processor = time.perf_counter(), time.process_time()
                loss = step(batch(index))
                index += 1
                peers.synchronize()
                spent = time.process_time() - processor
                reply({"seconds": time.perf_counter() - start, "processor": spent, "loss": loss})
            elif order == "memory":
                assert step is not None
                forget_peak()
                before = resident()
                step(batch(index))
                reply({"peak": resident("VmHWM"), "before": before})
            else:  # one forward and backward pass, no optimizer
                tokens = torch.from_numpy(batch(0)).to(peers.DEVICE)
                inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
                for parameter in module.parameters():
                    parameter.grad = torch.zeros_like(parameter)
                loss_of(inputs[:, :64], targets[:, :64]).backward()
                forget_peak()
                before = resident()
                loss_of(inputs, targets).backward()
                reply({"peak": resident("VmHWM"), "before": before})


def make_tokens(output: Path, vocab_size: int, quick: bool) -> tuple[Path, str]:
    """A stream of ids, and where it comes from."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"backpack_tokens_{vocab_size}.npy"
    if quick or not PYDOCS.is_dir():
        ranks = np.arange(1, vocab_size + 1)
        probability = 1.0 / (ranks + 2.7)
        ids = np.random.default_rng(0).choice(vocab_size, 400_000, p=probability / probability.sum())
        np.save(path, ids.astype(np.uint16))
        return path, "drawn by Zipf's law"
    told = f"English and French of pydocs, byte-level BPE of {vocab_size:,}"
    if not path.is_file():
        from xlmega.text.vocabulary import train_vocabulary

        texts: list[str] = []
        for code in ("en", "fr"):
            size = 0
            with gzip.open(PYDOCS / code / "00000.jsonl.gz", "rt", encoding="utf-8") as lines:
                for line in lines:
                    texts.append(json.loads(line)["text"])
                    size += len(texts[-1])
                    if size > 2_000_000:
                        break
        folder = output / f"backpack_vocabulary_{vocab_size}"
        vocabulary = train_vocabulary(texts, vocab_size, folder, kind="byte_level_bpe", overwrite=True)
        np.save(path, np.concatenate([vocabulary.encode(text) for text in texts]).astype(np.uint16))
    return path, told


def distinct_share(path: Path, windows: int, length: int) -> float:
    """Distinct ids per token of a micro-batch."""
    stream = np.load(path)
    found = []
    for index in range(20):
        starts = np.random.default_rng((1, index)).integers(0, len(stream) - length - 1, windows)
        ids = np.concatenate([stream[start : start + length] for start in starts])
        found.append(len(np.unique(ids)) / len(ids))
    return statistics.mean(found)


def measure_steps(sizes: dict[str, Any], tokens: Path, threads: int, rounds: int) -> dict[str, Any]:
    """Times in turns, then each contender's memory."""
    import backpack_peers

    workers: list[Worker] = []
    results: dict[str, Any] = {}
    for name in backpack_peers.names():
        workers.append(Worker(name, sizes, tokens, threads))
    for worker in workers:
        results[worker.name] = {**worker.ask("ready"), "seconds": [], "processor": [], "losses": []}
    matmul, rates = Worker("matmul", sizes, tokens, threads), []
    for turn in range(WARM_UP_STEPS + rounds):
        # Every other round backwards: no contender always follows the same neighbour.
        for worker in workers if turn % 2 == 0 else workers[::-1]:
            answer = worker.ask("step")
            results[worker.name]["losses"].append(answer["loss"])
            if turn >= WARM_UP_STEPS:
                results[worker.name]["seconds"].append(answer["seconds"])
                results[worker.name]["processor"].append(answer["processor"])
        rates.append(matmul.ask("rate"))
        print(f"round {turn + 1} of {WARM_UP_STEPS + rounds}", file=sys.stderr)
    for worker in workers:
        results[worker.name].update(worker.ask("memory"))
        worker.close()
    matmul.close()
    results["matmul"] = statistics.median(rates)
    return results


def measure_lengths(sizes: dict[str, Any], tokens: Path, threads: int, lengths: tuple[int, ...]) -> dict[int, float]:
    """Megabytes above what lies there before, of one window forward and backward."""
    found = {}
    workers = [
        Worker("xlmega", {**sizes, "sequence_length": length, "batch_windows": 1}, tokens, threads)
        for length in lengths
    ]
    for length, worker in zip(lengths, workers, strict=True):
        answer = worker.ask("once")
        found[length] = answer["peak"] - answer["before"]
        worker.close()
    return found


def measure_generation(given: dict[str, Any], threads: int, prompt: int, new: int) -> dict[str, float]:
    """Seconds for greedy continuation: the export with its caches, and the formulas recomputed for every token."""
    import backpack_peers
    import peers
    import torch

    from xlmega.weights.backpack_code.configuration_backpack import BackpackConfig
    from xlmega.weights.backpack_code.modeling_backpack import BackpackForCausalLM

    torch.set_num_threads(threads)
    sizes = backpack_peers.Sizes(**given)
    nano = sizes.variant == "nano"
    config = BackpackConfig(
        variant=sizes.variant,
        vocab_size=sizes.vocab_size,
        n_positions=sizes.sequence_length,
        n_embd=sizes.hidden_size,
        n_layer=sizes.num_contextualiser_layers,
        n_head=sizes.num_heads,
        num_senses=sizes.num_senses,
        linear_bias=not nano,
        norm_bias=not nano,
        scale_attn_by_inverse_layer_idx=not nano,
    )
    model = BackpackForCausalLM(config).eval().to(peers.DEVICE)
    straight = backpack_peers.StraightBackpack(sizes).eval().to(peers.DEVICE)
    ids = torch.arange(prompt, device=peers.DEVICE)[None] * 7 % sizes.vocab_size
    how: Any = {"do_sample": False, "max_new_tokens": new, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}

    def recomputed() -> None:
        text = ids
        for _ in range(new):
            text = torch.cat([text, straight.logits(text)[:, -1:].argmax(-1)], 1)

    def cached() -> None:
        model.generate(ids, **how)

    def best(work: Any) -> float:
        times = []
        for _ in range(3):
            peers.synchronize()
            start = time.perf_counter()
            work()
            peers.synchronize()
            times.append(time.perf_counter() - start)
        return min(times)

    with torch.no_grad():
        start = time.perf_counter()
        model.backpack.cache_senses()
        peers.synchronize()
        table = time.perf_counter() - start
        return {"cached": best(cached), "recomputed": best(recomputed), "table": table}


def ratio(results: dict[str, Any], other: str) -> float:
    """Median over rounds of the other's time over xlmega's."""
    pairs = zip(results[other]["seconds"], results["xlmega"]["seconds"], strict=True)
    return statistics.median(theirs / ours for theirs, ours in pairs)


def table(results: dict[str, Any], step_tokens: int) -> str:
    lines = [
        "| contender | parameters | s/step (median) | processor s | tokens/s | over xlmega's | peak MB | the step's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = [name for name in results if name != "matmul"]
    for name in names:
        found = results[name]
        seconds, processor = (statistics.median(found[kind]) for kind in ("seconds", "processor"))
        own = found["peak"] - found["before"]
        lines.append(
            f"| {name} | {found['parameters'] / 1e6:.1f} M | {seconds:.3f} | {processor:.2f} "
            f"| {step_tokens / seconds:,.0f} | {ratio(results, name):.2f} | {found['peak']:,.0f} | {own:,.0f} |"
        )
    ours, straight, twin = (results[name] for name in ("xlmega", "straight", "twin"))
    steps = {name: results[name]["peak"] - results[name]["before"] for name in names}
    senses = (steps["xlmega"] - steps["twin"]) / (steps["straight"] - steps["twin"])
    leaner = ratio(results, "straight") / ratio(results, "selective")
    told = f"""
tokens/s over the straightforward model's: {ratio(results, "straight"):.2f} (aim 1.4)
  over that with only the senses straightforward: {ratio(results, "straight_senses"):.2f}
peak memory over the straightforward model's: {ours["peak"] / straight["peak"]:.2f} (aim 0.5)
  of the step's part: {steps["xlmega"] / steps["straight"]:.2f}; of what senses add to the twin's: {senses:.2f}
  with MLPs recomputed: {results["selective"]["peak"] / straight["peak"]:.2f}, of the step's part \
{steps["selective"] / steps["straight"]:.2f}, at {leaner:.2f} times its tokens/s
step time over the GPT twin's: {1 / ratio(results, "twin"):.2f} (aim 1.35)
  peak memory over it: {ours["peak"] / twin["peak"]:.2f}
bf16 product of 2048 x 2048 in the same run: {results["matmul"] / 1e12:.2f} TFLOP/s"""
    return "\n".join(lines) + "\n" + told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does it run?")
    parser.add_argument("--variant", choices=("original", "nano"), default="original")
    parser.add_argument("--parts", default="steps,lengths,generation", help="what to measure, comma-separated")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--windows", type=int, default=8, help="windows of a step")
    parser.add_argument("--output", type=Path, default=Path(), help="folder for backpack_step.json and the tokens")
    for hidden in ("--worker", "--sizes", "--tokens"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work_as_told(asked.worker, json.loads(asked.sizes), Path(asked.tokens))
        return
    parts = asked.parts.split(",")
    if unknown := set(parts) - {"steps", "lengths", "generation"}:
        parser.error(f"--parts does not know {', '.join(sorted(unknown))}; there are steps, lengths, generation")

    import backpack_peers

    sizes = {"variant": asked.variant, "batch_windows": asked.windows, **(TINY if asked.quick else {})}
    full = backpack_peers.Sizes(**sizes)
    report: dict[str, Any] = {"sizes": dataclasses.asdict(full), "threads": asked.threads}
    tokens, origin = make_tokens(asked.output, full.vocab_size, asked.quick)
    share = report["distinct_share"] = distinct_share(tokens, full.batch_windows, full.sequence_length)
    print(
        f"{asked.variant}: {full.num_layers} layers, d {full.hidden_size}, {full.num_senses} senses, "
        f"{full.batch_windows} x {full.sequence_length} tokens ({origin}; distinct ids: {share:.0%} of the tokens)\n"
    )
    if "steps" in parts:
        report["steps"] = measure_steps(sizes, tokens, asked.threads, 2 if asked.quick else asked.rounds)
        print(table(report["steps"], full.batch_windows * full.sequence_length))
    if "lengths" in parts:
        lengths = (64, 128) if asked.quick else LENGTHS
        found = report["lengths"] = measure_lengths(sizes, tokens, asked.threads, lengths)
        print("\none window, forward and backward, MB above the weights and gradients: ", end="")
        print(", ".join(f"L = {length}: {megabytes:,.0f}" for length, megabytes in found.items()))
    if "generation" in parts:
        prompt, new = (8, 8) if asked.quick else (128, 64)
        found_seconds = report["generation"] = measure_generation(sizes, asked.threads, prompt, new)
        faster = found_seconds["recomputed"] / found_seconds["cached"]
        print(
            f"\n{new} tokens after {prompt}, fp32: {found_seconds['cached']:.2f} s with cached senses, "
            f"{found_seconds['recomputed']:.2f} s recomputing: {faster:.1f} times as fast (aim 3); the table of senses "
            f"took {found_seconds['table']:.1f} s once"
        )
    path = asked.output / "backpack_step.json"
    part = path.with_suffix(".json.part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)
    print(f"\nwrote {path}")


if __name__ == "__main__":
    main()
