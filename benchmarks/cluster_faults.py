"""Every fault that a cluster has, injected at every moment of a run: who notices when, what is told, what is left.

A run of a tiny model in one of six layouts lives many lives. Each goes on from the newest checkpoint and meets one
fault (tests/striking.py): a signal to one rank or all, an exception, a segmentation fault, a loader that fails or
stands still, a full disk, a gradient that is not finite, a weight that differs, a rank that never starts, other
versions or code on one rank, a clock that is off, a second job, a stale lock, a port in use. Of each is recorded how
long it took until the last rank had ended, the exit codes, the last message, whether a process is left behind, and
whether a checkpoint was lost. The last life of a chain ends the run, whose losses, gradient norms, weights and moments
must be those of the run left alone, bit for bit; a fault counts as survived only with that. All through pretrain.py.
Node crashes and cut networks are those of a real Slurm (`--slurm`, as root).

    python benchmarks/cluster_faults.py --results faults.jsonl --parallel 3
    python benchmarks/cluster_faults.py --results faults.jsonl --table

Each result is a line of the file as soon as its chain has ended; started again, what stands there is not done again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import checkpoint_faults as base  # noqa: E402
import forked  # noqa: E402
import striking  # noqa: E402
from striking import Fault  # noqa: E402

from xlmega.training.checkpoint import damage, folder_of, list_checkpoints  # noqa: E402

STEPS, SAVE_EVERY, VALIDATE_EVERY = 45, 3, 2
SILENT, HANG = 5.0, 12.0
BOUND = 90.0
"""Seconds after which a rank counts as left behind."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"ranks": 2, "options": (), "zero": 1},
    "tp2": {"ranks": 2, "options": ("--tp", "2"), "zero": 1},
    "pp2": {"ranks": 2, "options": ("--pp", "2"), "zero": 0},
    "dp3": {"ranks": 3, "options": (), "zero": 1},
    "tp2-zero2": {"ranks": 2, "options": ("--tp", "2"), "zero": 2},
    "tp2-zero3": {"ranks": 2, "options": ("--tp", "2"), "zero": 3},
}
RECIPE = f"""
[model]
preset = "xglm_tiny"
hidden_size = 16
ffn_hidden_size = 32
num_layers = 2
num_heads = 2
[data]
sequence_length = 16
[training]
total_steps = {STEPS}
batch_windows = 12
save_every_steps = {SAVE_EVERY}
validate_every_steps = {VALIDATE_EVERY}
validation_windows = 1
keep_checkpoints = 3
"""


@dataclass(frozen=True)
class Case:
    """One fault to inject and what must become of it."""

    layout: str
    kind: str
    moment: str
    rank: int
    everyone: bool
    nth: int

    @property
    def key(self) -> str:
        return "/".join(map(str, dataclasses.astuple(self)))


def cases() -> Iterator[Case]:
    """All of them, in an order that mixes kinds: stopped early, the table still has some of each."""
    found = []
    for layout in ("dp2", "tp2", "pp2"):
        for number, moment in enumerate(striking.MOMENTS):
            rank, nth = number % 2, 1 + number % 2 if moment in ("save", "forward", "reduce", "evaluation") else 1
            for kind in striking.SIGNALS:
                found += [Case(layout, kind, moment, rank, False, nth), Case(layout, kind, moment, rank, True, nth)]
            for kind in ("exception", "segfault"):
                found.append(Case(layout, kind, moment, 1 - rank, False, nth))
        for kind in ("loader error", "loader stuck", "NaN gradient", "perturbed"):
            moment = "data" if "loader" in kind else "reduce" if kind == "NaN gradient" else "update"
            found += [
                Case(layout, kind, moment, rank, False, 2) for rank in (0, 1) if (layout, kind) != ("pp2", "perturbed")
            ]
        for moment in ("save", "publish"):
            found.append(Case(layout, "disk full", moment, 0 if moment == "publish" else 1, False, 1))
        found.append(Case(layout, "metrics full", "metrics", 0, False, 2))
        for kind in ("never starts", "version", "code", "clock"):
            found += [Case(layout, kind, "start", rank, False, 1) for rank in (0, 1)]
        for moment in ("init", "forward", "save", "publish", "evaluation"):
            found.append(Case(layout, "two jobs", moment, 0, False, 1))
        found += [Case(layout, "stale lock", what, 0, False, 1) for what in ("dead process", "garbage", "half a save")]
        found.append(Case(layout, "port in use", "start", 0, False, 1))
    found += [Case("dp3", "perturbed", "update", rank, False, 2) for rank in (0, 1, 2)]
    found += [Case("dp3", "SIGKILL", moment, rank, False, 1) for moment in ("forward", "save") for rank in (1, 2)]
    for layout in ("tp2-zero2", "tp2-zero3"):
        found += [Case(layout, "NaN gradient", "reduce", rank, False, 2) for rank in (0, 1)]
    random.Random(0).shuffle(found)
    yield from found


# -------------------------------------------------------------------- what must become of a fault


def expected(case: Case, ranks: int) -> tuple[list[set[int]], str]:
    """(allowed exit codes of each rank, a pattern that what is told must match)."""
    me, early = case.rank, case.moment in ("joining", "meeting")
    lost = rf"rank {me}\b" if case.moment != "joining" else r"rank \d+ could not connect to the others"

    def struck(own: set[int], others: set[int]) -> list[set[int]]:
        return [own if rank == me or case.everyone else others for rank in range(ranks)]

    number = getattr(signal, case.kind, 0) if case.kind.startswith("SIG") else 0
    if case.kind == "SIGKILL":
        return struck({-number}, {5}), "" if case.everyone else lost
    if case.kind in ("SIGTERM", "SIGINT"):
        asked = {75} if case.kind == "SIGTERM" else {130}
        if early:  # nothing is watched over yet, and nothing is to be saved
            return struck({-number, 130, 143}, {5}), "" if case.everyone else lost
        return struck(asked, {75}), r"stopped by .* step \d+ is saved"
    if case.kind == "SIGSTOP":
        if case.everyone:
            return [{0}] * ranks, "done: step"
        return struck({-signal.SIGKILL}, {5}), lost
    if case.kind == "exception":
        return struck({1}, {5}), rf"(?s)ZeroDivisionError.*{lost}|{lost}.*ZeroDivisionError"
    if case.kind == "segfault":
        return struck({-signal.SIGSEGV}, {5}), lost
    if case.kind == "loader error":
        return struck({2}, {5}), r"DataError: step \d+ cannot be read: .*Input/output error"
    if case.kind == "loader stuck":
        return [{6}] * ranks, rf"{lost}: nothing has moved .*\(data\)"
    if case.kind == "NaN gradient":
        return [{3}] * ranks, r"a gradient of step \d+ is not finite"
    if case.kind == "perturbed":
        return [{7}] * ranks, rf"replicas differ: rank (0, 1|{me})\b" if ranks == 2 else rf"replicas differ: rank {me} "
    if case.kind == "disk full":
        return [{0}] * ranks, r"NOT SAVED.*No space left"
    if case.kind == "metrics full":
        return [{0}] * ranks, r"metrics.jsonl' cannot be written: No space left"
    if case.kind == "never starts":
        return struck({1}, {4}), rf"rank {me}\b" if me else "cannot reach rank 0"
    if case.kind in ("version", "code"):
        what = "torch is" if case.kind == "version" else "xlmega's code is"
        return [{2}] * ranks, rf"rank [01]\b.*{what}"
    if case.kind == "clock":
        return [{0}] * ranks, r"the clock is [+-]\d+ s off"
    if case.kind == "two jobs":
        return [{0}] * ranks, r"is in use by process \d+"
    if case.kind == "stale lock":
        return [{0}] * ranks, "done: step"
    if case.kind == "port in use":
        return [{4}] * ranks, r"port \d+ of this machine is in use"
    raise AssertionError(case.kind)


# -------------------------------------------------------------------- one life


@dataclass
class Life:
    """What was seen of one life."""

    codes: list[int]
    told: str
    seconds: float
    """From the strike until the last rank had ended by itself; of refusals, from the start."""
    left: int
    """Ranks that had to be killed at the bound."""


class Chain:
    """A run of one layout and its lives."""

    def __init__(self, folder: Path, tokens: Path, layout: str, name: str):
        self.layout, self.ranks = layout, int(LAYOUTS[layout]["ranks"])
        self.run, self._folder, self._lives = folder / name, folder, 0
        recipe, settings = folder / f"{name}.toml", folder / f"{name}.json"
        recipe.write_text(RECIPE)
        micro = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": LAYOUTS[layout]["zero"]}}
        settings.write_text(json.dumps(micro))
        self._arguments = ["--recipe", str(recipe), "--ds_config", str(settings), "--set", f"data.root={tokens}"]
        self._arguments += ["--output", str(self.run), "--hang_timeout_seconds", str(HANG)]
        self._arguments += ["--silent_seconds", str(SILENT), "--rendezvous_timeout_seconds", "15", "--resume"]
        self._arguments += LAYOUTS[layout]["options"]

    def start(self, case: Case | None, *more: str, check: bool = False) -> tuple[forked.Ranks, Path, Fault | None]:
        self._lives += 1
        log = self._folder / f"{self.run.name}-{self._lives}.log"
        marker = log.with_suffix(".struck")
        fault = None
        if case:
            kind = "waits" if case.kind == "two jobs" else case.kind
            fault = Fault(kind, case.moment, case.rank, case.everyone, case.nth, str(marker))
            if case.kind in ("stale lock", "port in use"):
                fault = None
        arguments = [*self._arguments, *more]
        if case and case.kind == "perturbed":
            arguments += ["--check_replicas_every_steps", "1"]
        log.write_text("")

        def prepare(rank: int) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            if fault:
                striking.arrange(fault, rank)

        return forked.start(arguments, self.ranks, log, prepare), log, fault

    def live(self, case: Case | None, *more: str) -> Life:
        """One life, with its fault."""
        begun = time.monotonic()
        if case and case.kind == "stale lock":
            self._leave_behind(case.moment)
        with _port_taken(self._arguments, case):
            started, log, fault = self.start(case, *more)
            if case and case.kind == "two jobs":
                self._second(log, fault)
            codes, left, ended = _wait(started, case, Path(fault.marker) if fault else None)
        told = log.read_text(errors="replace")
        if fault and Path(fault.marker).exists():
            begun = float(Path(fault.marker).read_text().split()[0])
        second = log.with_suffix(".second")
        told += second.read_text(errors="replace") if second.exists() else ""
        return Life(codes, told, ended - begun, left)

    def _leave_behind(self, what: str) -> None:
        """What a job leaves that died with its machine."""
        self.run.mkdir(exist_ok=True)
        me = {"pid": 999_999_999, "host": "a-node-that-is-gone", "since": "2020-01-01 00:00:00"}
        (self.run / "lock").write_text("\0\0{" if what == "garbage" else json.dumps(me))
        (self.run / "stop").touch()  # meant for the job that is gone
        if what == "half a save":
            part = self.run / "checkpoints/step-00000099.part"
            part.mkdir(parents=True, exist_ok=True)
            (part / "rank-00000.safetensors").write_bytes(b"half")

    def _second(self, log: Path, fault: Fault | None) -> None:
        """Another job of the same run, while the first waits at its moment."""
        assert fault
        marker = Path(fault.marker)
        _until(marker.exists, 60)
        second = log.with_suffix(".second")
        second.write_text("")
        other = forked.start(self._arguments, self.ranks, second)
        codes, left, _ = _wait(other, None, None)
        second.write_text(second.read_text() + f"\nsecond job: codes {codes}, left {left}\n")
        Path(f"{fault.marker}.go").touch()


@contextlib.contextmanager
def _port_taken(arguments: list[str], case: Case | None) -> Iterator[None]:
    """A stale process listens where the ranks want to meet."""
    if not case or case.kind != "port in use":
        yield
        return
    import socket

    import worlds

    real = worlds.free_port
    with socket.socket() as held:
        held.bind(("", 0))
        held.listen()
        port = int(held.getsockname()[1])
        setattr(worlds, "free_port", lambda: port)  # noqa: B010
        try:
            yield
        finally:
            setattr(worlds, "free_port", real)  # noqa: B010


def _wait(started: forked.Ranks, case: Case | None, marker: Path | None) -> tuple[list[int], int, float]:
    """(exit codes, ranks left behind, when the last ended by itself); nobody ends a rank before the bound but for one
    that was stopped: it cannot end itself, and its launcher would kill it once the others have ended."""
    codes: dict[int, int] = {}
    deadline, ended, left = time.monotonic() + 2 * BOUND, time.monotonic(), 0
    stopped = case is not None and case.kind == "SIGSTOP"
    continued = not (stopped and case and case.everyone)
    killed = False
    while len(codes) < len(started.pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in started.pids:
            codes[pid] = os.waitstatus_to_exitcode(status)
            ended = ended if killed else time.monotonic()
            if codes[pid]:
                deadline = min(deadline, time.monotonic() + BOUND)
            continue
        if marker and not continued and marker.exists():
            struck = float(marker.read_text().split()[0]) if marker.read_text() else time.monotonic()
            if time.monotonic() > struck + 2 * SILENT:
                for one in started.pids:
                    os.kill(one, signal.SIGCONT)
                continued = True
        alone = stopped and case and not case.everyone and len(codes) == len(started.pids) - 1
        if not killed and (time.monotonic() > deadline or alone):
            left += 0 if alone else len(started.pids) - len(codes)
            killed = True
            for one in started.pids:
                if one not in codes:
                    os.kill(one, signal.SIGKILL)
        time.sleep(0.005)
    left += len(_group(started.pids[0]))
    return [codes[pid] for pid in started.pids], left, ended


def _group(pgid: int) -> list[int]:
    """Processes that are still in the group of a run's ranks."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if entry.name.isdigit() and int(fields[2]) == pgid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def _until(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)


def last_message(told: str) -> str:
    """The message that a user finds at the end of a log."""
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    wanted = [
        line for line in lines if re.match(r"(\w+Error: |NOT SAVED|note: .*clock|done: )|.*cannot be written", line)
    ]
    errors = [line for line in wanted if re.match(r"\w+Error: |NOT SAVED|note: |.*cannot be written", line)]
    last = (errors or wanted or lines or ["nothing"])[-1]
    after = lines[lines.index(last) + 1 :] if last.endswith(":") else []
    return " ".join([last, *after[:1]])


# -------------------------------------------------------------------- chains


def check_life(chain: Chain, case: Case, before: list[int]) -> dict[str, Any]:
    """Meet the fault; what was seen, with what is wrong of it."""
    stop = min(STEPS, max(before, default=0) + 3 * SAVE_EVERY)
    life = chain.live(case, "--stop_at", str(stop))
    allowed, pattern = expected(case, chain.ranks)
    wrong = []
    if any(code not in may for code, may in zip(life.codes, allowed, strict=True)):
        wrong.append(f"exit codes {life.codes}, not {[sorted(may) for may in allowed]}")
    if not re.search(pattern, life.told):
        wrong.append(f"nothing told matches {pattern!r}")
    if life.left:
        wrong.append(f"{life.left} processes left")
    after = list_checkpoints(chain.run)
    bad = [words for step in after for words in damage(folder_of(chain.run, step))]
    if bad or max(after, default=0) < max(before, default=0):
        wrong.append(f"checkpoints {before} became {after} {bad}")
    done = max(base.figures(chain.run), default=0) if (chain.run / "metrics.jsonl").exists() else 0
    facts = {"key": case.key, **dataclasses.asdict(case), "codes": life.codes, "seconds": round(life.seconds, 2)}
    facts |= {"told": last_message(life.told), "left": life.left, "lost_steps": done - max(after, default=0)}
    return {**facts, "wrong": wrong, "log": life.told[-6000:] if wrong else ""}


def run_chain(folder: Path, tokens: Path, alone: Path, todo: list[Case], name: str) -> list[dict[str, Any]]:
    """Several faults of one run, one a life, and the life that ends it."""
    chain = Chain(folder, tokens, todo[0].layout, name)
    found: list[dict[str, Any]] = []
    for case in todo:
        before = list_checkpoints(chain.run)
        found.append(check_life(chain, case, before))
    life = chain.live(None)
    same = ""
    if any(life.codes):
        same = f"the restart ended with {life.codes}: {life.told[-3000:]}"
    else:
        try:
            base.STEPS = STEPS
            base.check_same(chain.run, alone)
        except base.Broken as broken:
            same = str(broken)
    for one in found:
        one["same"] = not same
        one["wrong"] += [same] if same else []
    return found


def chains_of(todo: list[Case], length: int) -> list[list[Case]]:
    """Cases of one layout at a time; a chain's lives must fit the run's steps."""
    found = []
    for layout in LAYOUTS:
        mine = [case for case in todo if case.layout == layout]
        found += [mine[start : start + length] for start in range(0, len(mine), length)]
    random.Random(1).shuffle(found)
    return found


def work(
    folder: Path, tokens: Path, alone: dict[str, Path], chains: list[list[Case]], results: Path, name: str
) -> None:
    """One worker's chains, one after the other."""
    for number, chain in enumerate(chains):
        found = run_chain(folder, tokens, alone[chain[0].layout], chain, f"{name}c{number}")
        lines = "".join(json.dumps({"at": time.time(), **one}) + "\n" for one in found)
        with results.open("a", encoding="utf-8") as file:
            file.write(lines)
        for one in found:
            state = "ok" if not one["wrong"] else f"WRONG {one['wrong']}"
            print(
                f"{one['key']}: {one['seconds']:.1f} s, {one['codes']}, {one['told'][:90]} -> {state}"[:400], flush=True
            )


def read(results: Path) -> list[dict[str, Any]]:
    """The newest result of each case."""
    if not results.is_file():
        return []
    found = {one["key"]: one for one in map(json.loads, results.read_text(encoding="utf-8").splitlines())}
    return list(found.values())


def table(found: list[dict[str, Any]]) -> str:
    """Results by kind, as Markdown."""
    lines = ["| fault | of | at | faults | detected in s, median and most | told (an example) | then | kept |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    kinds = sorted({(one["kind"], one["everyone"]) for one in found})
    for kind, everyone in kinds:
        mine = [one for one in found if (one["kind"], one["everyone"]) == (kind, everyone)]
        good = [one for one in mine if not one["wrong"]]
        seconds = [one["seconds"] for one in mine]
        codes = sorted({str(code) for one in good for code in one["codes"]})
        example = re.sub(r"/tmp/\S*?/", "", (good or mine)[0]["told"])[:150].replace("|", "/")
        moments = sorted({one["moment"] for one in mine})
        lines.append(
            f"| {kind} | {'all' if everyone else 'one rank'} | {', '.join(moments)} | {len(mine)} | "
            f"{statistics.median(seconds):.1f}, {max(seconds):.1f} | {example} | codes {', '.join(codes)} | "
            f"{len(good)} of {len(mine)} |"
        )
    lost = [one["lost_steps"] for one in found if "lost_steps" in one]
    good = sum(not one["wrong"] for one in found)
    lines.append(
        f"\n{len(found)} faults; {good} ended as they must, and the run after them bitwise as the one left alone. "
        f"Processes left behind: {sum(one['left'] for one in found)}. "
        f"Steps to be done again, median {statistics.median(lost):.0f}, most {max(lost)}; a save every {SAVE_EVERY}."
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSONL that results are appended to")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose name has one of these, as in tp2/SIGKILL")
    parser.add_argument("--slurm", action="store_true", help="node crashes and network cuts on a real Slurm instead")
    parser.add_argument("--count", type=int, default=0, help="at most so many")
    parser.add_argument("--parallel", type=int, default=1, help="chains at a time: a fault is mostly waiting")
    parser.add_argument("--chain", type=int, default=4, help="faults of one run")
    parser.add_argument("--tokens", type=Path, help="a token folder; made where not given")
    parser.add_argument("--again", action="store_true", help="do again what went wrong")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown and end")
    args = parser.parse_args()
    if args.table:
        print(table(read(args.results)))
        return 0
    if args.slurm:
        import cluster_faults_slurm

        return cluster_faults_slurm.main(args)
    done = {one["key"] for one in read(args.results) if not (args.again and one["wrong"])}
    todo = [case for case in cases() if case.key not in done and any(words in case.key for words in args.only)]
    todo = todo[: args.count or None]
    print(f"{len(todo)} faults to inject, {len(done)} done before", flush=True)
    forked.warm_up()
    before = {one["key"] for one in read(args.results)} - {case.key for case in todo}
    with tempfile.TemporaryDirectory(prefix="faults") as place:
        folder = Path(place)
        tokens = (args.tokens or base.in_another_process(base.make_tokens, folder)).resolve()
        alone = {}
        for layout in {case.layout: None for case in todo}:
            chain = Chain(folder, tokens, layout, f"alone-{layout}")
            life = chain.live(None)
            base.check(not any(life.codes), life.told[-4000:])
            alone[layout] = chain.run
            print(f"{layout}: the run left alone took {life.seconds:.1f} s", flush=True)
        chains = chains_of(todo, args.chain)
        workers = []
        for number in range(args.parallel):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    work(folder, tokens, alone, chains[number :: args.parallel], args.results, f"w{number}")
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stdout.flush()
                    os._exit(code)
            workers.append(pid)
        failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in workers)
    found = [one for one in read(args.results) if one["key"] not in before]
    wrong = [one for one in found if one["wrong"]]
    print(f"{len(found)} faults: {len(found) - len(wrong)} as they must be, {len(wrong)} not; workers failed: {failed}")
    return 1 if wrong or failed or len(found) < len(todo) else 0


if __name__ == "__main__":
    sys.exit(main())
