"""Saving: bitwise what the engine held, whole or not at all, on disks that fail anywhere; and what is kept."""

from __future__ import annotations

import ctypes
import errno
import gc
import json
import math
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
import torch
import worlds

from xlmega.data.batches import Batch
from xlmega.models.config import ModelConfig, model_config
from xlmega.parallel import groups
from xlmega.parallel.layout import Layout
from xlmega.training.checkpoint import (
    KINDS,
    LATEST,
    Checkpoint,
    damage,
    folder_of,
    latest,
    list_checkpoints,
    newest,
    restore,
)
from xlmega.training.saving import Outcome, Retention, Saver, prune
from xlmega.weights import storage
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes

pytestmark = pytest.mark.torch
MODEL = model_config(
    preset="xglm_tiny", num_layers=2, hidden_size=16, ffn_hidden_size=24, num_heads=2, vocab_size=37, tied=False
)
ALL = Retention()


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """A tiny engine of one rank, two steps old."""
    process = groups.Process(0, 1, 0, "127.0.0.1", worlds.free_port(), "test")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_DEVICE_MAX_CONNECTIONS", "DS_SKIP_CUDA_CHECK"):
            patch.setenv(name, "0")  # so that they are as before afterwards
        patch.setenv("DS_ACCELERATOR", "cpu")
        worlds.forget_groups()
        with groups.joined(process, Layout()):
            one = build(MODEL)
            for step in range(2):
                advance(one, step)
            yield one
        worlds.forget_groups()
    gc.collect()


def build(model: ModelConfig, **settings: Any) -> Any:
    """An engine with initial weights, in the groups that the fixture has joined."""
    from xlmega.training.engine import Engine
    from xlmega.training.optimizer import OptimizerSettings
    from xlmega.training.runtime import runtime

    how = runtime({"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, **settings})
    cpu = torch.device("cpu")
    engine = Engine(model, Layout(), how, OptimizerSettings(), device=cpu, micro_batches=1, languages=("a",))
    engine.write_state(InitialWeights(model, 0, logical_shapes(model)))
    return engine


def advance(engine: Any, step: int) -> float:
    tokens = np.random.default_rng(step).integers(0, 37, (1, 2, 9))
    slots = np.array([[2 * step, 2 * step + 1]])
    batch = Batch(tokens, np.ones((1, 2, 8), np.float32), np.zeros((1, 2), np.int32), slots)
    loss: float = engine.forward_backward(batch, step=step).loss
    engine.apply(1e-3, step=step)
    return loss


def state(engine: Any) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (kind, shard.name): engine.read_state(shard, parameter, kind).clone()
        for kind in KINDS
        for shard, parameter in engine.shards
    }


def save(engine: Any, run: Path, step: int, **facts: Any) -> Path:
    """A synchronous save that must work."""
    (outcome,) = Saver(engine, run, ALL).save(step, facts)
    assert not outcome.problem and not outcome.note, outcome
    assert latest(run) == step and not list(damage(outcome.folder))
    return outcome.folder


def equal_to(folder: Path, expected: dict[tuple[str, str], torch.Tensor]) -> bool:
    found = Checkpoint(folder)
    return all(
        torch.equal(found.read_kind(kind, name, (slice(None),) * value.dim()), value)
        for (kind, name), value in expected.items()
    )


def leftovers(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step-*.part"))


def test_an_engine_saves_reads_back_and_goes_on_bitwise(engine: Any, tmp_path: Path) -> None:
    before = state(engine)
    folder = save(engine, tmp_path, 2, tokens=32)
    assert list_checkpoints(tmp_path) == [2] and not leftovers(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    found = Checkpoint(folder)
    assert found.manifest["facts"] == {"tokens": 32} and found.config == MODEL
    stored = sum(math.prod(shape) for shape in logical_shapes(MODEL).values())
    assert 0 < (folder / "rank-00000.safetensors").stat().st_size - 3 * 4 * stored < 20_000
    assert equal_to(folder, before)
    steps = engine.optimizer_steps
    losses = [advance(engine, step) for step in (2, 3)]
    after = state(engine)
    restore(engine, found)
    assert engine.optimizer_steps == steps
    assert all(torch.equal(value, before[key]) for key, value in state(engine).items())
    assert [advance(engine, step) for step in (2, 3)] == losses
    assert all(torch.equal(value, after[key]) for key, value in state(engine).items())


def test_saving_replaces_what_a_killed_run_left(engine: Any, tmp_path: Path) -> None:
    part = tmp_path / "checkpoints/step-00000005.part"
    part.mkdir(parents=True)
    (part / "rank-00009.json").write_text("rubbish")
    part.with_name("step-00000003.removed.part").mkdir()
    folder = save(engine, tmp_path, 5)
    data = bytearray((folder / "rank-00000.safetensors").read_bytes())
    data[900] ^= 1
    (folder / "rank-00000.safetensors").write_bytes(data)
    assert list(damage(folder))
    assert save(engine, tmp_path, 5) == folder
    assert list_checkpoints(tmp_path) == [5] and not leftovers(tmp_path)


def test_an_asynchronous_save_is_of_its_moment(engine: Any, tmp_path: Path) -> None:
    saver = Saver(engine, tmp_path, ALL, asynchronous=True)
    before = state(engine)
    assert list(saver.save(3, {})) == []
    advance(engine, 7)
    ended: list[Outcome] = []
    while not ended:
        ended += saver.poll()
        advance(engine, 8)
    assert [(one.step, one.problem, one.note) for one in ended] == [(3, "", "")]
    assert ended[0].blocking_seconds <= ended[0].seconds
    assert list(saver.poll()) == [] and equal_to(folder_of(tmp_path, 3), before)
    # One at a time: the next waits for the one before, and the last for itself.
    second = state(engine)
    assert list(saver.save(4, {})) == []
    third = save_after(engine, saver)
    assert equal_to(folder_of(tmp_path, 4), second) and equal_to(folder_of(tmp_path, 5), third)
    assert list_checkpoints(tmp_path) == [3, 4, 5] and latest(tmp_path) == 5 and not leftovers(tmp_path)


def save_after(engine: Any, saver: Saver) -> dict[tuple[str, str], torch.Tensor]:
    advance(engine, 9)
    now = state(engine)
    outcomes = list(saver.save(5, {}, wait=True))
    assert [(one.step, one.problem) for one in outcomes] == [(4, ""), (5, "")]
    return now


def test_the_whole_state_of_fp16_scaling_goes_on(engine: Any, tmp_path: Path) -> None:
    """Overflows, hysteresis and the window behind the next loss scales, and Adam's own count of steps."""
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 2, "hysteresis": 2}}
    one = build(MODEL, **fp16)
    advance(one, 0)
    assert one.optimizer_steps == 0  # it overflowed: there are no moments yet
    early = save(one, tmp_path / "early", 1)
    assert not Checkpoint(early).read_kind("exp_avg", "output_layer.weight", (slice(None), slice(None))).any()
    for step in range(1, 12):
        advance(one, step)
    assert 0 < one.optimizer_steps < 12
    found = Checkpoint(save(one, tmp_path, 12))
    assert found.optimizer_steps == one.optimizer_steps and set(found.manifest["loss_scaler"]) == set(one.loss_scaler)
    expected = [(advance(one, step), one.loss_scale) for step in range(12, 20)]
    assert len({scale for _, scale in expected}) > 1
    after = state(one)
    other = build(MODEL, **fp16)
    for again in (other, one):  # a new engine, and one that has lived
        restore(again, found)
        assert again.loss_scaler == found.manifest["loss_scaler"]
        assert [(advance(again, step), again.loss_scale) for step in range(12, 20)] == expected
        assert all(torch.equal(value, after[key]) for key, value in state(again).items())
    restore(engine, found)  # fp32: no scale, the same masters
    assert engine.loss_scale == 1.0 and equal_to(save(engine, tmp_path / "fp32", 12), state_of(found))
    restore(one, Checkpoint(early))
    assert one.optimizer_steps == 0
    scaler = build(MODEL, **fp16).loss_scaler
    fresh = build(MODEL, **fp16)
    restore(fresh, Checkpoint(folder_of(tmp_path / "fp32", 12)))  # from fp32: as at the beginning
    assert fresh.loss_scaler == scaler


def state_of(found: Checkpoint) -> dict[tuple[str, str], torch.Tensor]:
    everything = {name: tuple(slice(None) for _ in found.shape(name)) for name in found.names()}
    return {(kind, name): found.read_kind(kind, name, span) for kind in KINDS for name, span in everything.items()}


def test_the_sign_of_zero_is_kept(engine: Any, tmp_path: Path) -> None:
    negative = -torch.zeros(16)
    (parameter,) = [parameter for shard, parameter in engine.shards if shard.name == "decoder.final_layernorm.bias"]
    engine._set(parameter, negative, "weight")
    found = Checkpoint(save(engine, tmp_path, 1))
    restore(build(MODEL), found)
    restore(engine, found)
    assert torch.signbit(Checkpoint(save(engine, tmp_path, 2)).read("decoder.final_layernorm.bias")).all()


def test_memory_is_bounded_by_tensors_and_not_by_the_model(engine: Any, tmp_path: Path) -> None:
    model = model_config(
        preset="xglm_tiny", num_layers=12, hidden_size=256, ffn_hidden_size=1024, num_heads=4, vocab_size=512
    )
    large = build(model)
    advance(large, 0)
    written = 3 * 4 * sum(math.prod(shape) for shape in logical_shapes(model).values())
    assert written > 110e6  # the largest tensor has 1 MB
    folder = tmp_path / "checkpoints/step-00000001"
    saved = growth(lambda: save(large, tmp_path, 1))
    loaded = growth(lambda: restore(large, Checkpoint(folder)))
    assert saved < 40e6 and loaded < 20e6, (saved, loaded)


def growth(action: Any) -> int:
    """Peak resident bytes above those before."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        pytest.skip("this system does not tell a process's peak memory")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")
    before = int(status.read_text().split("VmRSS:")[1].split()[0])
    action()
    return 1024 * (int(status.read_text().split("VmHWM:")[1].split()[0]) - before)


# -------------------------------------------------------------------- disks that fail


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fault", [faults.FULL, faults.BROKEN])
def test_any_operation_may_fail(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Any, asynchronous: bool
) -> None:
    """Every operation on files of a save fails in turn: it is told, nothing is half there, the next save works."""
    saver = Saver(engine, tmp_path, Retention(newest=1), asynchronous=asynchronous)

    def attempt(step: int, at: int) -> tuple[Outcome, list[str]]:
        stand_in = faults.FaultyOs(at, fault)
        monkeypatch.setattr(storage, "os", stand_in)
        (outcome,) = [*saver.save(step, {}), *saver.finish()]
        monkeypatch.undo()
        return outcome, stand_in.log

    assert not attempt(1, 10**9)[0].problem
    outcome, operations = attempt(2, 10**9)
    assert not outcome.problem and {"open", "write", "fsync", "readv", "replace", "rename", "unlink"} <= {*operations}
    writes = [at for at, name in enumerate(operations, start=1) if name == "write"]
    good, notes = 2, 0
    for at in [k for k, name in enumerate(operations, start=1) if name != "write" or k in (*writes[:3], *writes[-4:])]:
        outcome, _ = attempt(good + 1, at)
        assert outcome.problem or outcome.note, operations[at - 1]
        assert "injected" in outcome.problem + outcome.note and not leftovers(tmp_path)
        notes += bool(outcome.note)
        found = newest(tmp_path)
        assert found is not None and found.step in (good, good + 1)
        # Only when the folder's new name is brought to the disk may a failure leave a whole checkpoint.
        assert not outcome.problem or found.step == good or at > len(operations) - 12
        good = found.step
    assert notes > 0
    assert attempt(good + 1, 10**9)[0].problem == ""
    assert list_checkpoints(tmp_path) == [good + 1] and latest(tmp_path) == good + 1


def test_what_reads_back_otherwise_is_not_published(
    engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class RottenOs(faults.FaultyOs):
        def fsync(self, descriptor: int) -> None:
            os.fsync(descriptor)
            os.pwrite(descriptor, b"\x55", 700)

    monkeypatch.setattr(storage, "os", RottenOs(10**9, faults.FULL))
    (outcome,) = Saver(engine, tmp_path, ALL).save(6, {})
    assert "reads back otherwise" in outcome.problem and list_checkpoints(tmp_path) == []


def test_a_small_file_system_that_is_full(engine: Any, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    size = save(engine, tmp_path / "large", 1).joinpath("rank-00000.safetensors").stat().st_size
    command = ["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.7) // 4096 * 4096}", "none", str(small)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("a file system of a chosen size can be mounted by root only")
    try:
        saver = Saver(engine, small, Retention(newest=1))
        (outcome,) = saver.save(1, {})
        assert not outcome.problem
        (outcome,) = saver.save(2, {})
        assert "No space left on device" in outcome.problem
        assert not leftovers(small)
        found = newest(small)
        assert found is not None and found.step == 1
    finally:
        subprocess.run(["umount", str(small)], check=True)


# -------------------------------------------------------------------- what is kept


def pretend(run: Path, step: int, figure: float | None = None) -> None:
    """A folder with a manifest and no tensors: what retention looks at."""
    from xlmega.training.checkpoint import FORMAT_VERSION, manifest_digest

    facts = {} if figure is None else {"validation": {"valid": {"bits_per_byte": figure}}}
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "facts": facts}
    manifest["sha256"] = manifest_digest(manifest)
    folder_of(run, step).mkdir(parents=True)
    storage.write_json(folder_of(run, step) / "manifest.json", manifest)


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6, 7]),
        (Retention(newest=9), [1, 2, 3, 4, 5, 6, 7]),
        (Retention(newest=2), [5, 6, 7]),  # 7 is later than the step just saved: it is yet to be written again
        (Retention(newest=1, every_steps=2), [2, 4, 6, 7]),
        (Retention(newest=1, best="valid/bits_per_byte"), [3, 6, 7]),
        (Retention(newest=1, best="test/bits_per_byte"), [6, 7]),
        (Retention(newest=1, every_steps=4, best="valid/bits_per_byte"), [3, 4, 6, 7]),
    ],
)
def test_retention(tmp_path: Path, retention: Retention, kept: list[int]) -> None:
    for step, figure in ((1, 2.0), (2, 1.5), (3, 1.0), (4, None), (5, math.nan), (6, 1.0000001), (7, 0.5)):
        pretend(tmp_path, step, figure)
    prune(tmp_path, retention, 6)
    assert list_checkpoints(tmp_path) == kept and not leftovers(tmp_path)


def test_a_checkpoint_is_nameless_before_it_is_incomplete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        pretend(tmp_path, step)
    monkeypatch.setattr(storage.shutil, "rmtree", lambda *_, **__: None)  # killed there
    prune(tmp_path, Retention(newest=1), 2)
    assert list_checkpoints(tmp_path) == [2] and leftovers(tmp_path) == ["step-00000001.removed.part"]
    monkeypatch.undo()


def test_facts_are_what_json_makes_of_them(engine: Any, tmp_path: Path) -> None:
    facts = {"by_number": {10: 1, 9: (2, 3)}, "nan": math.nan, "text": "é"}
    found = Checkpoint(save(engine, tmp_path, 8, **facts))
    assert found.manifest["facts"]["by_number"] == {"10": 1, "9": [2, 3]} and found.manifest["facts"]["text"] == "é"


def test_the_pointer_is_a_name_and_a_digest(engine: Any, tmp_path: Path) -> None:
    folder = save(engine, tmp_path, 8)
    told = json.loads((tmp_path / "checkpoints" / LATEST).read_text())
    assert told == {"step": 8, "sha256": json.loads((folder / "manifest.json").read_text())["sha256"]}


def test_errors_have_names() -> None:
    with pytest.raises(OSError) as caught:
        faults.FULL("write")
    assert caught.value.errno == errno.ENOSPC


def test_validation_sums_what_the_engine_finds(engine: Any) -> None:
    from xlmega.training.validation import ValidationSet

    class Windows(list[Batch]):
        languages = ("a", "b")

    generator = np.random.default_rng(1)
    weights = np.ones((1, 2, 8), np.float32)
    weights[0, 1, 5:] = 0.0
    batches = Windows(
        Batch(
            generator.integers(0, 37, (1, 2, 9)), weights, np.array([[0, 1]], np.int32), np.array([[2 * k, 2 * k + 1]])
        )
        for k in range(3)
    )
    piece_bytes = np.arange(37, dtype=np.int32)
    before = state(engine)
    scores = ValidationSet("valid", batches, piece_bytes).score(engine)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[key]) for key, value in state(engine).items())
    assert (scores["a"].tokens, scores["b"].tokens) == (24.0, 15.0)
    assert scores["b"].bytes == sum(int(batch.tokens[0, 1, 1:6].sum()) for batch in batches)
    reports = [engine.evaluate(batch, num_languages=2) for batch in batches]
    assert scores["a"].nats == pytest.approx(sum(report.nll[0] for report in reports), rel=1e-12)
