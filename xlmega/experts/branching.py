"""A resolved plan in, trained experts out: runs of pretrain.py, some at a time, resumable, none held up by another.

    OUTPUT/plan.json                      what the directory is pinned to
    OUTPUT/data/round-1/cluster-0/        an expert's tokens
    OUTPUT/round-1/expert-0/              its run directory; the log, its lock and its last exit beside it
    OUTPUT/dense/                         the baseline

What is done is read from the run directories, so running again goes on: finished experts are kept, others resume, and
one that failed is tried again. A failed expert stops only those that would start from it, and is named. An expert's
process holds a lock for as long as it lives; a second command on the same output waits for it instead of starting a
second process, wherever it runs. When the command dies its experts are told to end.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from xlmega.errors import CheckpointError, ConfigError
from xlmega.experts import parts
from xlmega.experts.features import read_json, write_json
from xlmega.experts.parts import divide_tokens, joined_folder, pinned_to
from xlmega.experts.plan import DENSE, Division, Expert, Resolved
from xlmega.locking import locked
from xlmega.training.checkpoint import list_checkpoints

PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain.py"
PROGRESS_SECONDS = 10.0
STOPPED = 75
"""pretrain.py's exit code when it was asked to stop: it saved, and goes on when started again."""
_POLL_SECONDS = 0.1
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class State:
    """How far one expert is."""

    expert: Expert
    kind: str
    """done, running, stopped, failed, waiting or new."""
    words: str

    def __str__(self) -> str:
        cluster = " ".join(f"{code}:{count}" for code, count in self.expert.languages.items())
        left_out = self.expert.left_out
        less = f"; less than a window, left out: {' '.join(left_out)}" if left_out else ""
        return f"{self.expert.name}: {self.words} ({cluster}{less})"


class Experts:
    """The experts of one output directory."""

    def __init__(self, resolved: Resolved, say: Callable[[str], None] = lambda line: None) -> None:
        self.resolved, self.output, self.say = resolved, resolved.output, say
        self.experts = resolved.experts

    def prepare(self) -> None:
        """Pin the output to the plan; a ConfigError when it was begun with another."""
        path, facts = self.output / "plan.json", self.resolved.facts()
        if self.output.exists() and not self.output.is_dir():
            raise CheckpointError(f"--output '{self.output}' is a file; experts need a directory.")
        if path.is_file():
            before = json.loads(path.read_text(encoding="utf-8"))
            changed = [key for key in facts if before.get(key) != facts[key]]
            if changed:
                raise ConfigError(
                    f"'{self.output}' was begun with another {' and '.join(changed)}:\n  "
                    + "\n  ".join(_differences(before, facts))
                    + "\n  Give the plan of then, or another --output."
                )
            return
        if self.output.is_dir() and any(self.output.iterdir()):
            raise CheckpointError(f"'{self.output}' is not empty and holds no plan.json. Choose another --output.")
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(path, facts)

    def divide(self, chosen: Sequence[Expert]) -> None:
        """Make the token folders that these experts need; one process at a time."""
        resolved = self.resolved
        root, data = Path(resolved.plan.data), self.output / "data"
        data.mkdir(exist_ok=True)
        with locked(data, wait=True):
            for number, one in enumerate(resolved.plan.rounds, start=1):
                if not any(expert.round == f"round-{number}" for expert in chosen):
                    continue
                folder = data / f"round-{number}"
                if not one.add:
                    division = resolved.divisions[number - 1]
                    if one.clusters and not folder.exists():
                        self._take_joined(joined_folder(root, Path(one.clusters)), division, folder)
                    divide_tokens(root, division.labels, division.num_clusters, folder, self.say, resolved.marks)
                    continue
                for cluster in range(len(one.add)):
                    labels = resolved.labels_of(number, cluster)
                    inside = divide_tokens(root, labels, 1, folder / f"of-{cluster}", self.say)[0]
                    link = folder / f"cluster-{cluster}"
                    if not link.exists():
                        link.symlink_to(inside.relative_to(folder))
            if any(expert.name == DENSE for expert in chosen):
                everything = {
                    code: 0 * tokens.document_starts[1:] - (code not in resolved.languages)
                    for code, tokens in resolved.corpus.items()
                }
                inside = divide_tokens(root, everything, 1, data / "of-dense", self.say, resolved.marks)[0]
                if not (data / DENSE).exists():
                    (data / DENSE).symlink_to(inside.relative_to(data))

    def _take_joined(self, joined: Path, division: Division, folder: Path) -> None:
        """Use what tokenize_corpus.py --clusters made, where it is what would be made here."""
        pinned = pinned_to(self.resolved.corpus, division.labels, division.num_clusters, self.resolved.marks)
        if (joined / parts.NAME).is_file() and read_json(joined / parts.NAME, parts.FORMAT_VERSION) == pinned:
            folder.symlink_to(joined.resolve())

    def choose(self, names: Sequence[str] = (), clusters: Sequence[int] = ()) -> list[Expert]:
        """The experts of these names or cluster numbers; all without either."""
        known = {expert.name: expert for expert in self.experts}
        for name in names:
            if name not in known:
                raise ConfigError(f"the plan has no expert '{name}'; it has {', '.join(known)}.")
        for cluster in clusters:
            if all(expert.cluster != cluster for expert in self.experts):
                raise ConfigError(f"no round of the plan has an expert {cluster}.")
        return [
            expert
            for expert in self.experts
            if (not names and not clusters) or expert.name in names or expert.cluster in clusters
        ]

    # ---------------------------------------------------------------- states

    def state(self, expert: Expert) -> State:
        """How far the expert is, from what lies on the disk."""
        run = self.output / expert.name
        total = expert.total_steps
        if total in list_checkpoints(run):
            return State(expert, "done", f"done, {total} steps")
        step, loss = _last_step(run / "metrics.jsonl")
        course = f"step {step} of {total}" + (f", loss {loss:.4f}" if step else "")
        if self._busy(expert):
            return State(expert, "running", f"running, {course}")
        exit_file = self._beside(expert, ".exit.json")
        if exit_file.is_file():
            told = json.loads(exit_file.read_text(encoding="utf-8"))
            if told["exit"] not in (0, STOPPED):
                return State(expert, "failed", f"FAILED with {told['exit']} at {course}: {told['said']}")
        if step or run.is_dir():
            return State(expert, "stopped", f"stopped at {course}")
        if expert.parent and total and self.state(self._named(expert.parent)).kind != "done":
            return State(expert, "waiting", f"waits for {expert.parent}")
        return State(expert, "new", f"not begun, {total} steps of {expert.batch_windows} windows")

    def states(self) -> list[State]:
        return [self.state(expert) for expert in self.experts]

    def _named(self, name: str) -> Expert:
        return next(expert for expert in self.experts if expert.name == name)

    def _beside(self, expert: Expert, suffix: str) -> Path:
        run = self.output / expert.name
        return run.with_name(run.name + suffix)

    def _busy(self, expert: Expert) -> bool:
        path = self._beside(expert, ".lock")
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return not _lock(file)

    # ---------------------------------------------------------------- training

    def train(self, chosen: Sequence[Expert], parallel: int = 1) -> list[State]:
        """Train what is not done of `chosen`, at most `parallel` at once; returns the states of those that failed."""
        if parallel < 1:
            raise ConfigError(f"--parallel {parallel}: at least 1 expert trains at a time.")
        pending = [expert for expert in chosen if self.state(expert).kind != "done"]
        self.divide(pending)
        for expert in pending:  # a failure of before is history
            if not self._busy(expert):
                self._beside(expert, ".exit.json").unlink(missing_ok=True)
        running: dict[str, _Process] = {}
        told = time.monotonic()
        try:
            while pending or running:
                for process in [one for one in running.values() if one.ended()]:
                    del running[process.expert.name]
                    self._ended(process)
                coming = {*running, *(expert.name for expert in pending)}
                pending = [expert for expert in pending if not self._hopeless(expert, coming)]
                for expert in list(pending):
                    if len(running) >= parallel:
                        break
                    state = self.state(expert)
                    if state.kind == "done":  # by another command on this output
                        pending.remove(expert)
                    elif state.kind != "running" and self._parent_done(expert) and (started := self._start(expert)):
                        running[expert.name] = started
                        pending.remove(expert)
                if time.monotonic() - told > PROGRESS_SECONDS:
                    told = time.monotonic()
                    for name in running or [expert.name for expert in pending]:
                        self.say(str(self.state(self._named(name))).partition(" (")[0])
                time.sleep(_POLL_SECONDS)
        finally:
            for left in running.values():
                left.end()
        return [state for state in map(self.state, chosen) if state.kind != "done"]

    def _parent_done(self, expert: Expert) -> bool:
        return not expert.parent or self.state(self._named(expert.parent)).kind == "done"

    def _hopeless(self, expert: Expert, coming: set[str]) -> bool:
        """Its parent is not trained, and nobody is at it: it cannot start in this run."""
        if not expert.parent or expert.parent in coming:
            return False
        parent = self.state(self._named(expert.parent))
        if parent.kind in ("done", "running"):
            return False
        self.say(f"{expert.name}: not begun, for it starts from {expert.parent}, which is: {parent.words}")
        return True

    def _start(self, expert: Expert) -> _Process | None:
        run = self.output / expert.name
        run.parent.mkdir(parents=True, exist_ok=True)
        lock = self._beside(expert, ".lock").open("ab")
        if not _lock(lock):  # between the look and now, another command was faster
            lock.close()
            return None
        if self.state_is_final(expert):
            lock.close()
            return None
        if run.is_dir() and not (run / "run.json").is_file() and not list_checkpoints(run):
            shutil.rmtree(run)  # killed while its directory was being made
        self._beside(expert, ".exit.json").unlink(missing_ok=True)
        line = self.command(expert)
        log = self._beside(expert, ".log").open("ab")
        log.write(f"$ {shlex.join(line)}\n".encode())
        log.flush()
        self.say(f"{expert.name}: starts, log {log.name}")
        process = subprocess.Popen(
            line,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            pass_fds=(lock.fileno(),),
            preexec_fn=_leave_with_parent,  # no thread of ours is alive here
        )
        lock.close()  # the child's copy holds the lock now
        return _Process(expert, process, log)

    def state_is_final(self, expert: Expert) -> bool:
        return expert.total_steps in list_checkpoints(self.output / expert.name)

    def _ended(self, process: _Process) -> None:
        expert, code = process.expert, process.process.returncode
        said = _last_words(self._beside(expert, ".log"))
        if code == 0 and not self.state_is_final(expert):
            code, said = -1, "it ended without its last checkpoint"
        write_json(self._beside(expert, ".exit.json"), {"exit": code, "said": "" if code == 0 else said})
        self.say(str(self.state(expert)))

    def command(self, expert: Expert) -> list[str]:
        """The command line that trains an expert, or goes on training it."""
        plan = self.resolved.plan
        sets = [
            *plan.overrides,
            f"data.root={expert.data}",
            f"training.total_steps={expert.total_steps}",
            f"training.batch_windows={expert.batch_windows}",
        ]
        if expert.weights:
            sets.append(f"init.weights={expert.weights}")
        if expert.mix:
            sets.append('data.validated_languages="all"')  # experts are compared, and one may forget
            sets.append("data.languages={" + ", ".join(f'"{code}" = {one!r}' for code, one in expert.mix.items()) + "}")
            if all(expert.mix.values()):
                sets.append("data.temperature=1.0")  # it is in the weights
        launcher = list(plan.launcher) or [sys.executable]
        line = [*launcher, str(PRETRAIN), "--recipe", plan.recipe, "--ds_config", plan.ds_config]
        line += [part for one in sets for part in ("--set", one)]
        line += ["--output", str(self.output / expert.name), "--resume", *plan.arguments]
        return [part.replace("{port}", str(_free_port())) for part in line]


class _Process:
    """A running expert."""

    def __init__(self, expert: Expert, process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
        self.expert, self.process, self._log = expert, process, log

    def ended(self) -> bool:
        if self.process.poll() is None:
            return False
        self._log.close()
        return True

    def end(self) -> None:
        """Ask it to stop, and insist."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def _last_step(path: Path) -> tuple[int, float]:
    """(step, loss) of the last step told, (0, 0) before the first; only the file's end is read."""
    if not path.is_file():
        return 0, 0.0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 65536))
        lines = file.read().split(b"\n")[:-1]
    for line in reversed(lines):
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut off at the front
        if "loss" in record:
            return int(record["step"]), float(record["loss"])
    return 0, 0.0


def _last_words(path: Path) -> str:
    """The message that a log ends with: from the last line that names an error, else its last line."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines()[-200:] if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["nothing"])[-1].strip()[:500]


def _differences(before: dict[str, Any], after: dict[str, Any], path: str = "") -> Iterator[str]:
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{path}{key}.")
        elif old != new and key == "experts":
            rows = [{one["name"]: one for one in side or ()} for side in (old, new)]
            yield from _differences(rows[0], rows[1], f"{path}{key}.")
        elif old != new:
            yield f"{path}{key}: {old!r} -> {new!r}"


def _lock(file: IO[bytes]) -> bool:
    """Take the file's lock if it is free; it is held until every copy of the handle is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


_libc = ctypes.CDLL(None)


def _leave_with_parent() -> None:
    """In the child: the kernel sends SIGTERM when the command that started it dies, whatever killed it."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
