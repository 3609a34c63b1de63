"""A thread beside each rank's training that knows when nothing moves, and says which rank is to blame.

In come beats: the main thread says at each turn what it is doing ("data", "step", "save", ...). Every interval the
thread writes its rank's beat into the store in which the ranks met and looks at its neighbour's, so that each rank
is watched by one other at a cost that does not grow with their number. Out comes, at most once in a run, a verdict
that all ranks read:

- a rank that ended with an error tells so itself; one that was killed or stopped no longer beats, and its neighbour
  tells;
- where the store itself does not answer, its host is told to be lost, by each rank for itself: a third thread watches
  the second, since torch waits without end for the answer of a host that is frozen or cut off;
- a rank whose own beat is older than its limit (a multiple of the median step, or `timeout_seconds` for everything
  else) tells that nothing moves, and the ranks that are not where the others wait are named.

On a verdict every rank writes the stacks of its threads to `RUN/hang/rank-00003.txt` and the process ends with the
code of LostRankError or HangError, from the thread, since the main thread may be inside a collective that never
returns. Guaranteed: no rank is left behind for longer than its limit plus `silent_seconds`; a rank that is merely
slow (a loaded machine) is not accused, since limits are counted from its own beats.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from xlmega.errors import HangError, LostRankError, XlmegaError

STEP = "step"
_VERDICT = "verdict"
_OF_A_PEER = ("Connection closed by peer", "Connection reset", "Broken pipe", "NCCL", "ProcessGroup")
"""What gloo and NCCL say when another rank has ended."""
_GRACE_SECONDS = 5.0
"""How long a rank whose main thread is already ending may take to do so by itself."""
_READ = "read"
"""How many ranks have read the verdict."""


class Store(Protocol):
    """The part of torch.distributed's store that is used; an exception means that its host is gone."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def add(self, key: str, amount: int) -> int: ...


class Watchdog:
    """Watches one rank and its neighbour; a context manager around the training of a run."""

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        folder: Path,
        host: str = "",
        timeout_seconds: float = 900.0,
        step_factor: float = 20.0,
        least_step_seconds: float = 60.0,
        silent_seconds: float = 60.0,
        interval_seconds: float = 2.0,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self._store, self._rank, self._world_size, self._host = store, rank, world_size, host
        self._folder, self._end = folder, end
        self._timeout, self._factor, self._least = timeout_seconds, step_factor, least_step_seconds
        self._silent, self._interval = silent_seconds, interval_seconds
        self._seconds: deque[float] = deque(maxlen=64)
        self._waits: deque[float] = deque(maxlen=16)
        self._beat: tuple[float, int, str] = (time.monotonic(), 0, "start")
        self._count = 0
        self._closing = threading.Event()
        self._verdict: dict[str, Any] | None = None
        self._unwritten = ""
        """Why this rank's stacks could not be written."""
        self._asks_since = 0.0
        """When the question began that the store has not answered yet; 0: none is open."""
        self._thread = threading.Thread(target=self._watch, name="xlmega-watchdog", daemon=True)
        self._guard = threading.Thread(target=self._watch_the_store, name="xlmega-watchdog-store", daemon=True)

    def __enter__(self) -> Watchdog:
        self._guard.start()
        with self._asking():
            self._publish()  # at once: a rank that never beat could not be missed
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            if error is None or self._world_size == 1 or _is_everybodys(error):
                return
            with self._asking():
                if not _is_a_peers(error):
                    words = f"ended with {type(error).__name__}: {str(error)[:500]}"
                    self._tell(words, [self._rank], LostRankError.exit_code)
                    self._await_readers()
                    return
                verdict = self._who_left()
        finally:
            self._closing.set()
            self._thread.join(timeout=30.0)
        raise _kind(verdict)(_spell(verdict)) from None

    def beat(self, step: int, doing: str) -> None:
        """The main thread is at `step` and begins `doing`; a step's own length is learnt from beat to beat."""
        now = time.monotonic()
        before, _, was = self._beat
        if was == STEP:
            self._seconds.append(now - before)
        self._beat = (now, step, doing)

    def waits(self, seconds: float) -> None:
        """So long this rank waited for the others in the step that is done."""
        self._waits.append(seconds)

    def waits_of_all(self) -> tuple[dict[int, float], dict[int, str], float]:
        """(median wait in a step of each rank that told, its host, the median step), from the newest beats."""
        with suppress(RuntimeError), self._asking():
            told = {rank: one for rank, one in self._beats().items() if one.get("waits") is not None}
            steps = [float(one["step_seconds"]) for one in told.values()]
            waits, hosts = ({rank: one[key] for rank, one in told.items()} for key in ("waits", "host"))
            return waits, hosts, statistics.median(steps) if steps else 0.0
        return {}, {}, 0.0

    def limit(self) -> float:
        """Seconds that what the main thread is doing may take."""
        if self._beat[2] == STEP and len(self._seconds) >= 3:
            return min(self._timeout, max(self._least, self._factor * statistics.median(self._seconds)))
        return self._timeout

    # ---------------------------------------------------------------- the threads

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Questions to the store, which must be answered before the host counts as lost."""
        self._asks_since = time.monotonic()
        try:
            yield
        finally:
            self._asks_since = 0.0

    def _watch_the_store(self) -> None:
        for asleep in self._turns():
            self._asks_since += asleep if self._asks_since else 0.0
            since = self._asks_since
            if since and time.monotonic() - since > self._silent:
                words = f"keeps the store of the run, which has not answered for {time.monotonic() - since:.0f} s"
                self._obey({"words": words, "ranks": [0], "code": LostRankError.exit_code, "where": ""}, ask=False)
                return

    def _turns(self) -> Iterator[float]:
        """Every interval, until closing: for how long this process was stopped meanwhile, as all may have been."""
        while not self._closing.is_set():
            began = time.monotonic()
            if self._closing.wait(self._interval):
                return
            asleep = time.monotonic() - began - self._interval
            yield asleep if asleep > self._interval else 0.0

    def _watch(self) -> None:
        neighbour = (self._rank + 1) % self._world_size
        heard, seen = time.monotonic(), b""
        for asleep in self._turns():
            heard += asleep  # it could hear nobody
            self._beat = (self._beat[0] + asleep, *self._beat[1:]) if asleep else self._beat
            try:
                with self._asking():
                    self._publish()
                    if self._store.check([_VERDICT]):
                        verdict = self._read()
                        break
                    if neighbour != self._rank:
                        told = self._store.get(f"beat/{neighbour}") if self._store.check([f"beat/{neighbour}"]) else b""
                        now = time.monotonic()
                        if told != seen:
                            heard, seen = now, told
                        elif now - heard > self._silent:
                            self._tell(f"has been silent for {now - heard:.0f} s", [neighbour], LostRankError.exit_code)
                    started = self._beat[0]
                    if time.monotonic() - started > self.limit():
                        words = f"nothing has moved for {time.monotonic() - started:.0f} s"
                        self._tell(f"{words} (limit {self.limit():.0f} s)", self._behind(), HangError.exit_code)
            except RuntimeError:  # torch.distributed.DistError and its kin: the store's host does not answer
                if not self._closing.wait(self._interval):
                    host = {"words": "keeps the store of the run and does not answer", "ranks": [0]}
                    self._obey({**host, "code": LostRankError.exit_code, "where": ""})
                return
        else:
            return
        self._obey(verdict)

    def _who_left(self) -> dict[str, Any]:
        """A connection broke: the verdict that a rank left behind, or the ranks that no longer beat."""
        with suppress(RuntimeError):
            before = self._beats()
            deadline = time.monotonic() + 2.5 * self._interval + 1.0
            while time.monotonic() < deadline:
                self._asks_since = time.monotonic()  # the last answer came
                if self._store.check([_VERDICT]):
                    return self._read()
                time.sleep(0.1)
            after = self._beats()
            silent = [rank for rank in range(self._world_size) if after.get(rank) == before.get(rank)]
            self._tell("left the run without a word", silent, LostRankError.exit_code)
            return self._read()
        return self._verdict or {"words": "keeps the store of the run and is gone", "ranks": [0], "where": ""}

    def _read(self) -> dict[str, Any]:
        """The verdict, which is there; kept, since its store may go before it is needed."""
        if self._verdict is None:
            self._verdict = dict(json.loads(self._store.get(_VERDICT)))
            self._store.add(_READ, 1)
        return self._verdict

    def _await_readers(self) -> None:
        """The rank that keeps the store ends last: once the others know why, or have had the time to."""
        deadline = time.monotonic() + 2 * self._interval + 1.0
        with suppress(RuntimeError):
            while self._rank == 0 and time.monotonic() < deadline:
                self._asks_since = time.monotonic()
                if self._store.add(_READ, 0) >= self._world_size - 1:
                    return
                time.sleep(0.05)

    def _beats(self) -> dict[int, dict[str, Any]]:
        """The newest beat of every rank that has one."""
        found = {}
        for rank in range(self._world_size):
            if self._store.check([f"beat/{rank}"]):
                found[rank] = json.loads(self._store.get(f"beat/{rank}"))
        return found

    def _publish(self) -> None:
        self._count += 1
        started, step, doing = self._beat
        told: dict[str, Any] = {
            "count": self._count,
            "step": step,
            "doing": doing,
            "for": round(time.monotonic() - started, 1),
        }
        if len(self._waits) == self._waits.maxlen and self._seconds:
            told["waits"], told["step_seconds"] = statistics.median(self._waits), statistics.median(self._seconds)
        self._store.set(f"beat/{self._rank}", json.dumps({**told, "host": self._host}))

    def _behind(self) -> list[int]:
        """The ranks that are not where most are; empty where all wait at the same place."""
        places: dict[tuple[int, str], list[int]] = {}
        for rank, told in self._beats().items():
            places.setdefault((told["step"], told["doing"]), []).append(rank)

        def standing(place: tuple[int, str]) -> tuple[int, int, bool]:
            """Of as many here as there, those who are further wait; nobody waits for others at his own data."""
            return len(places[place]), place[0], place[1] != "data"

        most = max(places, key=standing, default=None)
        return sorted(rank for place, ranks in places.items() if place != most for rank in ranks)

    def _tell(self, words: str, ranks: list[int], code: int) -> None:
        """Put a verdict where all ranks will read it, unless there is one."""
        with suppress(RuntimeError):
            if not self._store.check([_VERDICT]):
                where = []
                for rank in ranks[:16]:
                    if self._store.check([f"beat/{rank}"]):
                        told = json.loads(self._store.get(f"beat/{rank}"))
                        where.append(f"rank {rank} on {told['host']} at step {told['step']} ({told['doing']})")
                verdict = {"words": words, "ranks": ranks, "code": code, "where": "; ".join(where)}
                self._store.set(_VERDICT, json.dumps(verdict))

    def _obey(self, verdict: dict[str, Any], *, ask: bool = True) -> None:
        """Leave the stacks, say why, and end the process, unless it ends by itself in a moment.

        `ask` whether another rank of this host speaks; where the store does not answer, each does.
        """
        writer = threading.Thread(target=self._write_stacks, name="xlmega-watchdog-stacks", daemon=True)
        writer.start()
        if self._closing.wait(_GRACE_SECONDS):
            return
        if ask:
            self._await_readers()
        if not ask or self._speaks():
            stacks = f"Stacks of the ranks are in '{self._folder}'."
            if writer.is_alive() or self._unwritten:
                stacks = f"'{self._folder}' cannot be written ({self._unwritten or 'its disk does not answer'})."
            print(f"{_kind(verdict).__name__}: {_spell(verdict)} {stacks}", file=sys.stderr, flush=True)
        self._end(int(verdict["code"]))

    def _write_stacks(self) -> None:
        """In a thread of its own: the disk may be full, or be what hangs, and the process must end all the same."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with (self._folder / f"rank-{self._rank:05d}.txt").open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)
        except OSError as error:
            self._unwritten = str(error.strerror)

    def _speaks(self) -> bool:
        """One rank of each host tells what all know; where the store is gone, each tells."""
        with suppress(RuntimeError):
            return self._store.add(f"spoken/{self._host}", 1) == 1
        return True


def _spell(verdict: dict[str, Any]) -> str:
    ranks = verdict["ranks"]
    names = f"rank {', '.join(map(str, ranks[:16]))}" if ranks else "all ranks stand at the same place"
    where = f" ({verdict['where']})" if verdict["where"] else ""
    return f"{names}: {verdict['words']}{where}. Go on from the last checkpoint with the same command and --resume."


def _kind(verdict: dict[str, Any]) -> type[XlmegaError]:
    return HangError if verdict.get("code") == HangError.exit_code else LostRankError


def _is_a_peers(error: BaseException) -> bool:
    """A broken connection: some other rank ended, and this one only noticed."""
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _OF_A_PEER)


def _is_everybodys(error: BaseException) -> bool:
    """An error that every rank raises together needs no verdict."""
    return isinstance(error, XlmegaError) and not error.of_one_rank
