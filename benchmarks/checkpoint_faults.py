"""Runs killed, disks failing, files damaged: what resumes, and whether it is the same run.

For each of two layouts (tp 2 x pp 2; ZeRO-3 on dp 2; fp32): one run is left alone; others live many lives. A life loads
the newest checkpoint, trains, and ends by SIGKILL of a random rank or of all of them, at a random file operation or
moment of loading, of saving or of publishing, synchronously or not. After each death every checkpoint in place must be
whole, and the newest no older than one save; the last life ends the run, whose losses, gradient norms, weights and
moments must be those of the run left alone, bit for bit. Then file operations of saves fail (ENOSPC, EIO), and every
file of a checkpoint is damaged in every way. All through the real pretrain.py.

    python benchmarks/checkpoint_faults.py --count 50
    python benchmarks/checkpoint_faults.py --count 20 --model nano
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import faults  # noqa: E402
import forked  # noqa: E402

from xlmega.data import tokenizing  # noqa: E402
from xlmega.locking import held  # noqa: E402
from xlmega.text import corpus, synthetic, vocabulary  # noqa: E402
from xlmega.training import saving  # noqa: E402
from xlmega.training.checkpoint import (  # noqa: E402
    MOMENTS,
    Checkpoint,
    damage,
    folder_of,
    list_checkpoints,
    newest,
)
from xlmega.weights import storage  # noqa: E402
from xlmega.weights.comparison import logical_hash  # noqa: E402

LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2_pp2": {"ranks": 4, "zero": 1, "options": ("--tp", "2", "--pp", "2")},
    "dp2_zero3": {"ranks": 2, "zero": 3, "options": ()},
}
STEPS, SAVE_EVERY = 24, 2
MODELS = {"xglm": ("xglm_tiny", 4), "original": ("backpack_micro_4", 4), "nano": ("nano_backpack_mini_4", 3)}
"""Presets and numbers of layers; nano's senses are a part of the pipeline of their own."""
RECIPE = f"""
[model]
preset = "{{preset}}"
hidden_size = 32
ffn_hidden_size = 64
num_layers = {{layers}}
num_heads = 4
[data]
sequence_length = 16
[training]
total_steps = {STEPS}
batch_windows = 4
save_every_steps = {SAVE_EVERY}
validation_windows = 1
keep_checkpoints = 3
"""


class Broken(Exception):
    """A promise was not kept."""


class Runs:
    """Starts runs of one layout, each a number of lives."""

    def __init__(self, folder: Path, tokens: Path, layout: dict[str, Any], model: str = "xglm"):
        self.folder, self.ranks = folder, layout["ranks"]
        preset, layers = MODELS[model]
        folder.mkdir()
        recipe, settings = folder / "tiny.toml", folder / "fp32.json"
        recipe.write_text(RECIPE.format(preset=preset, layers=layers))
        zero = {"stage": layout["zero"]}
        settings.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}))
        self._arguments = ["--recipe", str(recipe), "--ds_config", str(settings), "--set", f"data.root={tokens}"]
        self._arguments += layout["options"]

    def live(
        self, name: str, prepare: Callable[[int], None] = lambda rank: None, *, asynchronous: bool = False
    ) -> tuple[list[int], str]:
        """One life of run `name`: its exit codes and what it said."""
        run = self.folder / name
        log = self.folder / f"{name}.log"
        log.write_text("")
        arguments = [*self._arguments, "--output", str(run), "--resume"]
        arguments += ["--save_asynchronously"] if asynchronous else []
        codes = forked.start(arguments, self.ranks, log, prepare).wait()
        return codes, log.read_text(errors="replace")

    def run(self, name: str) -> Path:
        return self.folder / name


def figures(run: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(one["step"], (one["loss"], one["gradient_norm"])) for one in records if "loss" in one]
    check(len(found) == len(dict(found)), f"a step stands twice in {run}/metrics.jsonl")
    return dict(found)


def whole_hash(checkpoint: Checkpoint) -> str:
    """Of weights and moments."""
    return logical_hash(checkpoint, *(checkpoint.moment(kind) for kind in MOMENTS))


def check(holds: bool, words: str) -> None:
    if not holds:
        raise Broken(words)


def check_same(run: Path, alone: Path) -> None:
    """Two finished runs are one and the same, bit for bit."""
    ours, theirs = figures(run), figures(alone)
    check(ours == theirs, f"{run}: losses or gradient norms differ: {[k for k in theirs if ours.get(k) != theirs[k]]}")
    one, other = (Checkpoint(folder_of(one, STEPS)) for one in (run, alone))
    check(whole_hash(one) == whole_hash(other), f"{run}: weights or moments differ")


# -------------------------------------------------------------------- dying


class Death:
    """When and how a life ends: arranged in every rank, carried out by one."""

    def __init__(self, generator: random.Random, operations: list[dict[str, int]]):
        self.phase = generator.choice(("load", "save", "save", "publish"))
        self.rank = 0 if self.phase == "publish" else generator.randrange(len(operations))
        self.of_all = generator.random() < 0.4
        self.after_saves = generator.randint(0, 1)
        self.by_time = self.phase != "publish" and generator.random() < 0.4
        self.at = generator.randint(1, operations[self.rank][self.phase])
        self.delay = generator.random() * 0.15

    def describe(self) -> str:
        return f"{self.phase} {'all' if self.of_all else 'one'}"

    def arrange(self, rank: int) -> None:
        if rank != self.rank:
            return
        self._saves = 0
        stand_in = faults.FaultyOs(10**9, lambda name: self.die())
        module: Any = storage
        module.os = stand_in

        def begin() -> None:
            if self.by_time:
                threading.Timer(self.delay, self.die).start()
            else:
                stand_in.arm(self.at)

        if self.phase == "load":
            begin()
            return
        save, publish = saving.Saver.save, saving._publish

        def counted(saver: Any, *arguments: Any, **keywords: Any) -> Any:
            self._saves += 1
            if self.phase == "save" and self._saves == self.after_saves + 1:
                begin()
            return save(saver, *arguments, **keywords)

        def published(*arguments: Any) -> None:
            if self.phase == "publish" and self._saves == self.after_saves + 1:
                begin()
            publish(*arguments)

        saving.Saver.save, saving._publish = counted, published  # type: ignore[method-assign]

    def die(self) -> None:
        if self.of_all:
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def count_operations(runs: Runs) -> list[dict[str, int]]:
    """File operations of each rank in loading, in a save and, of them, in its publishing."""
    run = runs.run("counted")
    shutil.copytree(runs.run("alone"), run)
    for step in list_checkpoints(run)[1:]:
        shutil.rmtree(folder_of(run, step))
    told = [runs.folder / f"operations{rank}.json" for rank in range(runs.ranks)]

    def prepare(rank: int) -> None:
        stand_in = faults.FaultyOs(10**9, lambda name: None)
        module: Any = storage
        module.os = stand_in
        marks: dict[str, int] = {"publish": 0}  # only rank 0 publishes
        save, publish = saving.Saver.save, saving._publish

        def counted(saver: Any, *arguments: Any, **keywords: Any) -> Iterator[Any]:
            marks.setdefault("load", len(stand_in.log))
            begun = len(stand_in.log)
            yield from save(saver, *arguments, **keywords)
            marks.setdefault("save", len(stand_in.log) - begun)
            told[rank].write_text(json.dumps(marks))

        def published(*arguments: Any) -> None:
            begun = len(stand_in.log)
            publish(*arguments)
            marks["publish"] = marks["publish"] or len(stand_in.log) - begun

        saving.Saver.save, saving._publish = counted, published  # type: ignore[method-assign]

    codes, said = runs.live("counted", prepare)
    check(not any(codes), said)
    return [json.loads(path.read_text()) for path in told]


def killed(
    runs: Runs, count: int, generator: random.Random, operations: list[dict[str, int]], lives: int
) -> Counter[str]:
    """`count` deaths, at most `lives` in a run; each run's end is compared with the run left alone."""
    died: Counter[str] = Counter()
    number = restarts = 0
    while sum(died.values()) < count:
        number += 1
        name, before = f"killed{number}", 0
        for _ in range(lives):
            death = Death(generator, operations)
            if death.phase == "load" and not list_checkpoints(runs.run(name)):
                death.phase = "save"
            codes, said = runs.live(name, death.arrange, asynchronous=generator.random() < 0.5)
            restarts += 1
            if not any(codes):
                break  # it had ended before its death came
            check(-signal.SIGKILL in codes, f"{name} ended by itself, {codes}:\n{said[-3000:]}")
            died[death.describe()] += 1
            found = list_checkpoints(runs.run(name))
            bad = [words for step in found for words in damage(folder_of(runs.run(name), step))]
            check(not bad, f"{name} after {death.describe()}: {bad}")
            check(max(found, default=0) >= before, f"{name} lost its newest checkpoint, of step {before}: {found}")
            before = max(found, default=0)
            if sum(died.values()) == count:
                break
        codes, said = runs.live(name)
        check(not any(codes), f"{name} did not resume, {codes}:\n{said[-3000:]}")
        check(not before or f"resuming from step {before}" in said or "nothing to do" in said, said[-3000:])
        check_same(runs.run(name), runs.run("alone"))
    died["restarts"] = restarts
    return died


def check_lock(runs: Runs) -> None:
    """While one process has a run directory, all ranks of another run are refused, by the holder's name."""
    with held(runs.run("alone")):
        codes, said = runs.live("alone")
    check(codes == [2] * runs.ranks and f"is in use by process {os.getpid()} on" in said, f"{codes}\n{said[-2000:]}")


# -------------------------------------------------------------------- failing disks


def failing(runs: Runs, count: int, generator: random.Random, operations: list[dict[str, int]]) -> Counter[str]:
    """Saves that meet ENOSPC or EIO: the run goes on and is the same; at the last save it ends with code 2."""
    seen: Counter[str] = Counter()
    for number in range(count):
        name = f"failing{number}"
        last = number % 5 == 4
        rank = generator.randrange(runs.ranks)
        own = operations[rank]
        at = generator.randint(1, max(1, own["save"] - own["publish"] - 2))
        nth = STEPS // SAVE_EVERY if last else generator.randint(1, STEPS // SAVE_EVERY - 1)

        def prepare(me: int, rank: int = rank, at: int = at, nth: int = nth) -> None:
            if me != rank:
                return
            stand_in = faults.FaultyOs(10**9, generator.choice((faults.FULL, faults.BROKEN)))
            module: Any = storage
            module.os = stand_in
            save, saves = saving.Saver.save, [0]

            def counted(saver: Any, *arguments: Any, **keywords: Any) -> Any:
                saves[0] += 1
                if saves[0] == nth:
                    stand_in.arm(at)
                return save(saver, *arguments, **keywords)

            saving.Saver.save = counted  # type: ignore[method-assign]

        codes, said = runs.live(name, prepare, asynchronous=generator.random() < 0.5)
        found = list_checkpoints(runs.run(name))
        bad = [words for step in found for words in damage(folder_of(runs.run(name), step))]
        check(not bad and not list((runs.run(name) / "checkpoints").glob("step-*.part")), f"{name}: {bad}")
        records = [json.loads(line) for line in (runs.run(name) / "metrics.jsonl").read_text().splitlines()]
        told = [one["step"] for one in records if "save_failed" in one]
        check(told == [nth * SAVE_EVERY], f"{name}: save {nth} failed, but told are {told}:\n{said[-2000:]}")
        if last:
            check(codes == [2] * runs.ranks and "could not be saved" in said, f"{name}: {codes}\n{said[-2000:]}")
            codes, said = runs.live(name)
        check(not any(codes), f"{name}: {codes}\n{said[-3000:]}")
        check_same(runs.run(name), runs.run("alone"))
        seen["at the last step" if last else "on the way"] += 1
    return seen


# -------------------------------------------------------------------- damaged files


def damaged(runs: Runs, bits: int, generator: random.Random) -> Counter[str]:
    """Every file of the newest checkpoint, damaged in every way: found, named, and the one before taken."""
    run, seen = runs.run("damaged"), Counter[str]()
    shutil.copytree(runs.run("alone"), run)
    *_, previous, last = list_checkpoints(run)
    folder, other = folder_of(run, last), folder_of(run, previous)
    for path in sorted(folder.iterdir()):
        good = path.read_bytes()

        def flipped(good: bytes = good) -> bytes:
            place = generator.randrange(len(good))
            return good[:place] + bytes([good[place] ^ (1 << generator.randrange(8))]) + good[place + 1 :]

        ways: list[tuple[str, bytes | None]] = [("one bit flipped", flipped()) for _ in range(bits)]
        ways += [("truncated by a byte", good[:-1]), ("emptied", b""), ("deleted", None)]
        ways += [("replaced by another step's", (other / path.name).read_bytes())]
        others = [one for one in folder.iterdir() if one != path]
        ways += [("replaced by another file's", generator.choice(others).read_bytes())]
        for way, data in ways:
            path.unlink() if data is None else path.write_bytes(data)
            said: list[str] = []
            found = newest(run, said.append)
            named = any(str(folder) in words for words in said)
            check(found is not None and found.step == previous and named, f"{path.name} {way}: {said}")
            check(way == "replaced by another step's" or path.name in said[0], f"{path.name} {way}: {said}")
            seen[way] += 1
        path.write_bytes(good)
    found = newest(run, print)
    check(found is not None and found.step == last, "the repaired checkpoint is not taken")
    return seen


def make_tokens(folder: Path) -> Path:
    """A small made corpus, tokenised."""
    synthetic.make_corpus(folder / "corpus", seed=0, megabytes=0.2, frac_valid=0.1, parallel_pairs=10)
    texts = (document.text for document in corpus.read_corpus(folder / "corpus/train"))
    vocabulary.train_vocabulary(texts, 600, folder / "vocabulary")
    tokenizing.tokenize_corpus(folder / "corpus/train", folder / "vocabulary", folder / "tokens")
    return folder / "tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="kills for each layout")
    parser.add_argument("--failing", type=int, default=10, help="runs with a failing disk for each layout")
    parser.add_argument("--bits", type=int, default=40, help="flips in each file")
    parser.add_argument("--lives", type=int, default=8, help="most kills of one run")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--model", choices=MODELS, default="xglm", help="XGLM, or one of the two Backpacks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=Path, help="a token folder; made where not given")
    args = parser.parse_args()
    forked.warm_up()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        tokens = args.tokens or in_another_process(make_tokens, folder)
        for layout in args.layouts:
            generator = random.Random(f"{args.seed} {layout}")
            started = time.monotonic()
            runs = Runs(folder / layout, tokens, LAYOUTS[layout], args.model)
            codes, said = runs.live("alone")
            check(not any(codes), f"the run left alone failed:\n{said[-4000:]}")
            print(f"{layout}: the run left alone took {time.monotonic() - started:.1f} s", flush=True)
            check_lock(runs)
            operations = count_operations(runs)
            print(f"{layout}: file operations of each rank: {operations}", flush=True)
            died = killed(runs, args.count, generator, operations, args.lives)
            restarts = died.pop("restarts")
            how = ", ".join(f"{name} {number}" for name, number in sorted(died.items()))
            print(
                f"{layout}: {sum(died.values())} kills ({how}) in {restarts} lives: every one resumed, every end is "
                f"bitwise that of the run left alone ({time.monotonic() - started:.0f} s)",
                flush=True,
            )
            seen = failing(runs, args.failing, generator, operations)
            print(f"{layout}: failing disks: {dict(seen)}, all told, all the same in the end", flush=True)
            seen = damaged(runs, args.bits, generator)
            print(f"{layout}: {sum(seen.values())} damaged files, all found and named: {dict(seen)}", flush=True)
    print("every promise kept")


def in_another_process(function: Callable[[Path], Path], folder: Path) -> Path:
    """Threads that `function` starts do not belong to the process that forks ranks."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(folder)
            code = 0
        finally:
            os._exit(code)
    check(os.waitpid(pid, 0)[1] == 0, "the corpus could not be made")
    return folder / "tokens"


if __name__ == "__main__":
    main()
