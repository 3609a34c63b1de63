"""The entry script as users start it: launchers, stopping, SIGKILL and resume, refusals of the rendezvous."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import worlds

from xlmega.training.checkpoint import Checkpoint, folder_of, list_checkpoints

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.num_layers=4",
    "data.sequence_length=32",
    "training.batch_windows=8",
    "training.total_steps=8",
    "training.save_every_steps=3",
    "training.validate_every_steps=0",
    "training.validation_windows=2",
]


def command(tokens: Path, output: Path, precision: str, *extra: str, sets: tuple[str, ...] = ()) -> list[str]:
    """pretrain.py's arguments for a few steps of a tiny model."""
    config = output.parent / f"{precision}.json"
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    config.write_text(json.dumps(settings))
    overrides = [part for one in (f"data.root={tokens}", *SMALL, *sets) for part in ("--set", one)]
    script = str(ROOT / "xlmega" / "pretrain.py")
    return [script, "--ds_config", str(config), "--recipe", "xglm_tiny", "--output", str(output), *overrides, *extra]


def environment(**extra: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **extra}


def deepspeed(ranks: int, arguments: list[str]) -> list[str]:
    """Started through DeepSpeed's launcher, as the README does."""
    launcher = [sys.executable, str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(worlds.free_port()), *arguments]


def finish(line: list[str], **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, env=environment(**extra), capture_output=True, text=True, timeout=300, cwd=ROOT)


def losses(run: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of every step, each of which must stand in metrics.jsonl once."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(record["step"], (record["loss"], record["gradient_norm"])) for record in records if "loss" in record]
    assert len(dict(found)) == len(found), "a step stands twice in metrics.jsonl"
    return dict(found)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_and_resumed_equals_left_alone(precision: str, made_tokens: Path, tmp_path: Path) -> None:
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    layout = ("--tp", "2", "--pp", "2")
    whole = finish(deepspeed(4, command(made_tokens, alone, precision, *layout)))
    assert whole.returncode == 0, whole.stdout + whole.stderr
    _start_and_kill_one_rank(deepspeed(4, command(made_tokens, killed, precision, *layout)), killed, at_step=5)
    assert list_checkpoints(killed) == [3]
    again = finish(deepspeed(4, command(made_tokens, killed, precision, *layout, "--resume")))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming from step 3" in again.stdout
    assert losses(killed) == losses(alone)  # bitwise
    _same_checkpoint(alone, killed, 8)


def _start_and_kill_one_rank(line: list[str], run: Path, at_step: int) -> None:
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as launcher:
        deadline = time.monotonic() + 200
        while not (run / "metrics.jsonl").is_file() or len(losses(run)) < at_step:
            assert launcher.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
            time.sleep(0.005)
        victim = next(pid for pid in _descendants(launcher.pid) if b"--local_rank=2" in _command_line(pid))
        os.kill(victim, signal.SIGKILL)
        launcher.communicate(timeout=120)
        assert launcher.returncode != 0


def _descendants(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *_descendants(child)]
    return found


def _command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def _same_checkpoint(first: Path, second: Path, step: int) -> None:
    one, other = (Checkpoint(folder_of(run, step)) for run in (first, second))
    for name in one.names():
        everything = tuple(slice(None) for _ in one.shape(name))
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            ours, theirs = (checkpoint.read_kind(kind, name, everything) for checkpoint in (one, other))
            assert ours.equal(theirs), f"{kind} of {name} differs"


def test_stopped_resumed_and_moved_to_another_launcher_and_layout(made_tokens: Path, tmp_path: Path) -> None:
    """--stop_at keeps the schedule; torchrun goes on with what a single process began, under ZeRO-3, like one run."""
    run, alone = tmp_path / "run", tmp_path / "alone"
    single = [sys.executable, *command(made_tokens, run, "fp32", "--stop_at", "4")]
    first = finish(single)
    assert first.returncode == 0, first.stderr
    assert list_checkpoints(run) == [3, 4]
    occupied = finish(single)
    assert occupied.returncode == 2 and "is occupied" in occupied.stderr and "--resume" in occupied.stderr
    arguments = command(made_tokens, run, "fp32", "--resume")
    config = Path(arguments[arguments.index("--ds_config") + 1])
    config.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    second = finish([*torchrun, "--master_port", str(worlds.free_port()), *arguments], DS_ACCELERATOR="cpu")
    assert second.returncode == 0, second.stdout + second.stderr
    assert finish([sys.executable, *command(made_tokens, alone, "fp32")]).returncode == 0
    found, expected = losses(run), losses(alone)
    assert found.keys() == expected.keys() == set(range(1, 9))
    for step, (loss, norm) in expected.items():
        assert found[step] == pytest.approx((loss, norm), rel=1e-5), step


def test_what_is_not_finite_stops_the_run_before_the_weights_change(made_tokens: Path, tmp_path: Path) -> None:
    line = command(
        made_tokens, tmp_path / "run", "fp32", sets=("optimizer.learning_rate=1e30", "optimizer.warmup_steps=0")
    )
    done = finish([sys.executable, *line])
    assert done.returncode == 3, done.stdout + done.stderr
    assert "NumericsError" in done.stderr and "No weight changed" in done.stderr and "slots" in done.stderr
    assert done.stderr.count("\n") == 1 or "Traceback" not in done.stderr


def test_dry_run_tells_everything_and_touches_nothing(made_tokens: Path, tmp_path: Path) -> None:
    line = command(made_tokens, tmp_path / "run", "bf16", "--tp", "2", "--pp", "2", "--dry_run", "--world_size", "8")
    done = finish([sys.executable, *line])
    assert done.returncode == 0, done.stderr
    for told in ("[training]", "tp2 pp2 dp2", "parameters", "memory of the fullest rank", "epochs", "'valid'"):
        assert told in done.stdout, told
    assert not (tmp_path / "run").exists()


def test_a_rank_that_never_comes_is_named(made_tokens: Path, tmp_path: Path) -> None:
    line = command(made_tokens, tmp_path / "run", "fp32", "--rendezvous_timeout_seconds", "3")
    done = finish(
        [sys.executable, *line],
        RANK="0",
        WORLD_SIZE="2",
        LOCAL_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(worlds.free_port()),
    )
    assert done.returncode == 4
    assert "rank 1" in done.stderr and "did not come" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
