"""What a run tells: a progress line, `metrics.jsonl`, and wandb or TensorBoard when asked.

In come one record a step and one an evaluation; out go JSON objects, one a line, at full precision. Only rank 0 makes a
Metrics. On resume the lines of steps that will be run again are taken out, so that each step stands there once.
The only file that may import wandb.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xlmega.errors import CheckpointError, ConfigError
from xlmega.training.validation import Score, total

if TYPE_CHECKING:
    from xlmega.training.saving import Outcome

# Dense bf16 matmul peak in TFLOP/s by device name, from the vendors' data sheets (FIELD §C1).
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "GH200": 989.0, "A100": 312.0, "V100": 125.0}


def peak_flops(device_name: str, devices: int) -> float | None:
    """Dense peak of so many devices in FLOP/s, where it is known."""
    known = [tera for name, tera in PEAK_TFLOPS.items() if name in device_name.replace("-", " ").split()]
    return known[0] * 1e12 * devices if known else None


def check_trackers(*, wandb: bool, tensorboard: bool) -> None:
    """Refuse a tracker that is not installed, before anything is started."""
    for asked, name in ((wandb, "wandb"), (tensorboard, "tensorboard")):
        if asked and importlib.util.find_spec(name) is None:
            raise ConfigError(f"--{name} needs the package {name}: pip install -e .[track]")


class Metrics:
    """Writes what a run tells; use as a context manager."""

    def __init__(
        self,
        run: Path,
        *,
        first_step: int,
        total_steps: int,
        log_every_steps: int,
        flops_per_token: float,
        peak: float | None,
        wandb_project: str = "",
        tensorboard: bool = False,
        settings: Mapping[str, Any] | None = None,
    ):
        self._total_steps, self._log_every = total_steps, log_every_steps
        self._flops_per_token, self._peak = flops_per_token, peak
        self._first_step = first_step
        self._trackers: list[Any] = []
        path = run / "metrics.jsonl"
        _drop_after(path, first_step)
        self._lines = _Lines(path)
        if wandb_project:
            self._trackers.append(_Wandb(wandb_project, run, settings or {}))
        if tensorboard:
            self._trackers.append(_TensorBoard(run, first_step))
        self._terminal = sys.stdout.isatty()
        self._open_line = False
        self._started = time.monotonic()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._end_line()
        try:
            self._lines.close()
        except CheckpointError as lost:
            if error is None:
                raise
            self.say(str(lost))  # what ends the run says more, and has its own code
        for tracker in self._trackers:
            tracker.close()

    def step(self, step: int, record: Mapping[str, Any], bad: str = "") -> None:
        """One step; `step` counts steps done. The record has loss, learning_rate, gradient_norm, seconds, ...

        `bad` says why its windows were left out, where they were.
        """
        self._write({"step": step, **record, **({"left_out": bad} if bad else {})})
        if bad:
            self.say(f"LEFT OUT: {bad}")
        last = step == self._total_steps
        if self._terminal or step % self._log_every == 0 or last or step == self._first_step + 1:
            self._progress(step, record, keep=step % self._log_every == 0 or last)

    def validation(self, step: int, name: str, scores: Mapping[str, Score], seconds: float) -> None:
        """One evaluation of one named set."""
        whole = total(dict(scores))
        by_language = {language: score.table() for language, score in scores.items()}
        self._write({"step": step, "validation": name, **whole.table(), "by_language": by_language, "seconds": seconds})
        self._end_line()
        figures = "  ".join(
            f"{name} {score.nats_per_token:.3f}/{score.bits_per_byte:.3f}" for name, score in scores.items()
        )
        print(
            f"validation '{name}' at step {step}, nats/token and bits/byte: "
            f"all {whole.nats_per_token:.4f}/{whole.bits_per_byte:.4f}  {figures}",
            flush=True,
        )

    def saved(self, outcome: Outcome) -> None:
        """How a save ended; one that failed stands in metrics.jsonl too."""
        if outcome.problem:
            self._append({"step": outcome.step, "save_failed": outcome.problem})
            self.say(
                f"NOT SAVED: the checkpoint of step {outcome.step}: {outcome.problem}. The ones before it are "
                "untouched, and the run goes on."
            )
            return
        waited = outcome.seconds - outcome.blocking_seconds > 0.05
        behind = f", {outcome.blocking_seconds:.2f} s of them in the way of training" if waited else ""
        self.say(f"saved {outcome.folder} in {outcome.seconds:.1f} s{behind}")
        if outcome.note:
            self._append({"step": outcome.step, "save_note": outcome.note})
            self.say(f"checkpoint of step {outcome.step}: {outcome.note}")

    def say(self, text: str) -> None:
        """A line of its own on stdout."""
        self._end_line()
        print(text, flush=True)

    def _write(self, record: dict[str, Any]) -> None:
        self._append(record)
        for tracker in self._trackers:
            tracker.log(record)

    def _append(self, record: dict[str, Any]) -> None:
        trouble = self._lines.append(json.dumps(_finite(record), allow_nan=False) + "\n")
        if trouble:
            self.say(trouble)

    def _progress(self, step: int, record: Mapping[str, Any], keep: bool) -> None:
        rate = record["tokens_per_second"]
        left = (time.monotonic() - self._started) / max(1, step - self._first_step) * (self._total_steps - step)
        parts = [f"step {step}/{self._total_steps}", f"loss {record['loss']:.4f}"]
        languages = record["loss_by_language"]
        shown = sorted(languages.items(), key=lambda item: -record["tokens_by_language"][item[0]])[:6]
        parts.append(" ".join(f"{name} {loss:.2f}" for name, loss in shown) + (" .." if len(languages) > 6 else ""))
        parts += [f"lr {record['learning_rate']:.2e}", f"grad {record['gradient_norm']:.3f}", f"{rate:,.0f} tok/s"]
        if self._peak:
            parts.append(f"{100 * rate * self._flops_per_token / self._peak:.1f} % of peak")
        parts.append(f"{_duration(left)} left")
        line = " | ".join(parts)
        if self._terminal:
            columns = os.get_terminal_size().columns
            print("\r" + line[: columns - 1].ljust(columns - 1), end="", flush=True)
            self._open_line = True
            if keep:
                self._end_line()
        else:
            print(line, flush=True)

    def _end_line(self) -> None:
        if self._open_line:
            print(flush=True)
            self._open_line = False


class _Lines:
    """Lines appended to a file; what a full disk does not take is kept and tried again with the next."""

    def __init__(self, path: Path):
        self._path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._waiting = b""

    def append(self, line: str) -> str:
        """Write a line; what is wrong, in words, when it is wrong for the first time."""
        news = not self._waiting
        self._waiting += line.encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
        except OSError as error:
            return f"'{self._path}' cannot be written: {error.strerror}. Its lines are kept in memory." if news else ""
        return ""

    def close(self) -> None:
        """Let go of the file; a CheckpointError if lines are still waiting."""
        trouble = self.append("")
        os.close(self._descriptor)
        if self._waiting:
            lines = self._waiting.count(b"\n")
            raise CheckpointError(trouble or f"{lines} lines of '{self._path}' could not be written.")


def _drop_after(path: Path, step: int) -> None:
    """Take out the lines of steps after `step`, and a last line that a killed run left half-written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            told = int(record["step"])
        except (ValueError, TypeError, KeyError):
            continue
        if told < step or (told == step and (step or "validation" not in record)):
            kept.append(line + "\n")
    part = path.with_name(path.name + ".part")
    part.write_text("".join(kept), encoding="utf-8")
    part.replace(path)


def _finite(value: Any) -> Any:
    """The record with null for what JSON cannot say (an fp16 step that overflowed has an infinite norm)."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


def _flat(record: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a record under slashed names: train/loss, train/loss/fr, validation/valid/fr/bits_per_byte."""
    head = f"validation/{record['validation']}" if "validation" in record else "train"
    flat: dict[str, float] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{path}/{key}".replace("/by_language", "").replace("_by_language", ""), inner)
        elif isinstance(value, (int, float)):
            flat[path] = float(value)

    for key, value in record.items():
        if key not in ("step", "validation"):
            add(f"{head}/{key}".replace("/by_language", "").replace("_by_language", ""), value)
    return flat


class _Wandb:
    def __init__(self, project: str, run: Path, settings: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise ConfigError("--wandb needs the package wandb: pip install -e .[track]") from None
        # Without a key wandb would ask for one and wait; its own look-up of the key is on its way out (0.31).
        key = os.environ.get("WANDB_API_KEY") or getattr(getattr(wandb, "api", None), "api_key", None)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if key else "offline")
        self._run = wandb.init(project=project, name=run.name, dir=str(run), config=dict(settings), mode=mode)

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(_flat(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, run: Path, first_step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ConfigError("--tensorboard needs the package tensorboard: pip install -e .[track]") from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1 if first_step else 0)

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in _flat(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()
