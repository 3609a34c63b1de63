"""Plans are arithmetic: figures that a reader can check by hand, and what is refused."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from xlmega import config
from xlmega.errors import ConfigError, LayoutError
from xlmega.models.config import model_config
from xlmega.parallel.layout import Layout
from xlmega.training.outlook import outlook, report, young_daly
from xlmega.training.planning import (
    CLUSTERS,
    Cluster,
    Job,
    held_parameters,
    kept_values,
    memory,
    plan,
    plans,
    step_seconds,
)
from xlmega.training.recipe import read_recipe
from xlmega.training.runtime import runtime

ROOT = Path(__file__).resolve().parents[2]
D, F, V, LAYERS = 64, 256, 1000, 4
MODEL = model_config(preset="xglm_tiny", hidden_size=D, ffn_hidden_size=F, num_layers=LAYERS, num_heads=4, vocab_size=V)
LAYER = 4 * D * D + 2 * D * F + (4 * D + F + D) + 4 * D
"""Parameters of a layer: matrices, their biases, two norms."""


def how(stage: int, precision: str = "bf16", micro: int = 2, **zero: Any) -> Any:
    settings: dict[str, Any] = {"train_micro_batch_size_per_gpu": micro, "zero_optimization": {"stage": stage, **zero}}
    return runtime(settings if precision == "fp32" else {**settings, precision: {"enabled": True}})


def job(layout: Layout, stage: int = 1, precision: str = "bf16", **more: Any) -> Job:
    return Job(MODEL, layout, how(stage, precision), 16, 32, **more)


def test_parameters_of_a_rank() -> None:
    assert held_parameters(MODEL, Layout()) == LAYERS * LAYER + V * D
    assert held_parameters(MODEL, Layout(pp=2)) == LAYERS / 2 * LAYER + V * D  # the tied embedding on both ends
    uncut = 4 * D + 2 * D  # norms, and the biases of the two output projections
    assert held_parameters(MODEL, Layout(tp=2)) == LAYERS * (uncut + (LAYER - uncut) / 2) + V * D / 2


def test_what_is_kept_of_a_token() -> None:
    assert kept_values(MODEL, Layout(), "none") == 4 * D + (3 * D + D + 2 * F)
    assert kept_values(MODEL, Layout(tp=2), "none") == 4 * D + (3 * D + D + 2 * F) / 2
    assert kept_values(MODEL, Layout(tp=2, sequence_parallel=True), "none") == (4 * D + 4 * D + 2 * F) / 2
    assert kept_values(MODEL, Layout(), "selective") == 3 * D + 4 * D
    assert kept_values(MODEL, Layout(), "full") == D


def test_zero_divides_one_part_after_the_other() -> None:
    held = LAYERS * LAYER + V * D
    one, two, three = (memory(job(Layout(dp=4), stage)) for stage in (1, 2, 3))
    assert [part["weights"] for part in (one, two, three)] == [2 * held, 2 * held, 2 * held / 4]
    assert [part["gradients"] for part in (one, two, three)] == [4 * held, held, held]
    assert [part["moments"] for part in (one, two, three)] == [2 * held] * 3
    assert memory(job(Layout(), 0, "fp32"))["master weights"] == 0
    gathered = memory(Job(MODEL, Layout(dp=4), how(3, reduce_bucket_size=100), 16, 32))["buffers"]
    assert gathered == 2 * (100 + held * 3 / 4)


def test_activations_follow_the_schedule() -> None:
    tokens = 2 * 32
    layer = kept_values(MODEL, Layout(), "none")
    assert memory(job(Layout()))["activations"] == 2 * tokens * (LAYERS * layer + 2 * D + F)
    assert memory(job(Layout(pp=2)))["activations"] == 2 * tokens * (2 * LAYERS / 2 * layer + 2 * D + F)
    full = memory(job(Layout(), recompute="full"))["activations"]
    assert full == 2 * tokens * (LAYERS * D + layer + 2 * D + F)


def test_seconds_add_up_and_follow_the_links() -> None:
    cluster = Cluster(nodes=1, devices_per_node=4, matmul_share=0.5, latency_seconds=0.0)
    alone = step_seconds(job(Layout()), replace(cluster, devices_per_node=1))
    flops = MODEL.flops_per_token(32) * 16 * 32
    assert alone["compute"] == pytest.approx(flops / (989e12 * 0.5))
    assert alone["gradient reduction"] == alone["tensor parallel"] == alone["pipeline bubble"] == 0
    four = step_seconds(job(Layout(dp=4)), cluster)
    held = held_parameters(MODEL, Layout())
    assert four["compute"] == pytest.approx(alone["compute"] / 4)
    assert four["gradient reduction"] == pytest.approx(2 * 4 * held * 3 / 4 / 300e9)
    assert four["ZeRO gathers"] == pytest.approx(2 * held * 3 / 4 / 300e9)
    far = step_seconds(job(Layout(dp=4)), replace(cluster, nodes=4, devices_per_node=1))
    assert far["gradient reduction"] == pytest.approx(four["gradient reduction"] * 300 / 40)
    piped = step_seconds(job(Layout(pp=4)), cluster)
    assert piped["pipeline bubble"] == pytest.approx(3 / 8 * piped["compute"])
    again = step_seconds(job(Layout(), recompute="full"), cluster)["recomputation"]
    words = 6 * V * D / MODEL.flops_per_token(32)
    assert again == pytest.approx(step_seconds(job(Layout()), cluster)["compute"] * (1 - words) / 3)


def test_plans_fit_and_are_ordered_and_what_cannot_be_is_refused() -> None:
    large = model_config(preset="xglm_7.5b")
    runtimes = [how(stage) for stage in (1, 2, 3)]
    cluster = replace(CLUSTERS["h100"], nodes=4)
    found = plans(large, runtimes, cluster, [512], 2048)
    assert all(one.bytes / 2**30 + cluster.reserved_gib <= cluster.memory_gib for one in found)
    assert all(one.job.layout.world_size == 32 and one.job.micro_batches >= 1 for one in found)
    assert found[0].step <= 1.02 * min(one.step for one in found)
    with pytest.raises(LayoutError, match=r"on 1 devices of 80 GiB: the smallest needs \d+\.\d GiB"):
        plans(large, runtimes, replace(cluster, nodes=1, devices_per_node=1), [512], 2048)
    with pytest.raises(LayoutError, match="no layout is allowed"):
        plans(MODEL, runtimes, Cluster(devices_per_node=7), [4], 32)
    told = "\n".join(report(found[:2], cluster, 1e11))
    assert "so: --tp " in told and "save every" in told and "this rests on 989 TFLOP/s at 45%" in told


def test_each_size_of_a_growing_batch_is_shared() -> None:
    cluster = Cluster(nodes=8, devices_per_node=8)
    found = plans(MODEL, [how(1), how(2)], cluster, [8, 64], 32)
    assert {one.job.batch_windows for one in found} == {64}
    assert all(8 % (one.job.layout.dp * one.job.runtime.micro_batch_windows) == 0 for one in found)
    with pytest.raises(LayoutError, match=r"sequence_length=4096 is beyond the model's max_positions"):
        plans(MODEL, [how(1)], cluster, [64], 4096)


def test_a_group_that_stays_in_a_node_uses_its_links() -> None:
    cluster = Cluster(nodes=2, devices_per_node=4, latency_seconds=0.0)
    held = held_parameters(MODEL, Layout(dp=4, pp=2))
    inside = step_seconds(job(Layout(dp=4, pp=2)), cluster)  # tp x dp is a node; the pipeline crosses
    assert inside["gradient reduction"] == pytest.approx(2 * 4 * held * 3 / 4 / 300e9)
    assert inside["pipeline transfers"] == pytest.approx(2 * (2 + 1) * 2 * 32 * D * 2 / 40e9)
    assert cluster.bytes_per_second(3) == 40e9  # every third rank's group lies in two nodes


def test_offloaded_state_is_the_hosts() -> None:
    settings: dict[str, Any] = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    offloaded = runtime({"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}, "zero_optimization": settings})
    parts = memory(Job(MODEL, Layout(dp=4), offloaded, 16, 32))
    assert parts["master weights"] == parts["moments"] == parts["gradients"] == 0 < parts["weights"]
    assert memory(Job(MODEL, Layout(dp=4), offloaded, 16, 32, on_gpu=False))["moments"] > 0


def test_a_thousand_nodes_are_arithmetic() -> None:
    large = model_config(preset="xglm_7.5b")
    cluster = replace(CLUSTERS["h100"], nodes=1000, price_per_device_hour=2.0)
    best = plans(large, [how(1), how(2)], cluster, [8000], 2048)[0]
    ahead = outlook(best, cluster, 1e12)
    assert ahead.steps == math.ceil(1e12 / (8000 * 2048))
    assert ahead.cost == pytest.approx(ahead.hours * 8000 * 2)
    assert ahead.failures == pytest.approx(ahead.hours * 8000 / 50_000)
    assert 0.5 < ahead.share_training < 1


def test_the_interval_is_youngs_where_saves_are_short_and_never_above_the_failures() -> None:
    assert young_daly(10, 86_400) == pytest.approx(math.sqrt(2 * 10 * 86_400), rel=0.01)
    assert young_daly(3, 1) == 1
    every = young_daly(60, 7200)

    def lost(seconds: float) -> float:
        return 60 / seconds + (seconds / 2) / 7200

    assert lost(every) <= 1.01 * min(lost(every / 2), lost(every * 2))


def test_a_run_that_fails_faster_than_it_saves_and_one_that_never_does() -> None:
    cluster = Cluster(device_hours_between_failures=0.05)
    best = plans(MODEL, [how(1)], cluster, [16], 32)[:1]
    with pytest.raises(ConfigError, match="a failure every 180 s leaves no time to train: a save takes 0 s"):
        list(report(best, cluster, 1e9))
    assert "save after the last step" in "\n".join(report(best, Cluster(), 1e6))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--tokens 0", "--tokens 0 is not a number of tokens"),
        ("--tokens nan", "--tokens nan is not"),
        ("--tokens inf", "--tokens inf is not"),
        ("--show 0", "--show 0: at least the fastest way"),
        ("--tp 0", "tp=0: sizes start at 1"),
        ("--nodes 0", "nodes must be positive, but is 0"),
        ("--devices_per_node -1", "devices_per_node must be positive, but is -1"),
        ("--calibrate none/here.toml", "there is no folder 'none'"),
    ],
)
def test_what_cannot_be_planned(
    options: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["plan_run.py", "--recipe", "xglm_tiny", "--set", "model.vocab_size=512", *options.split()]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/plan_run.py"), run_name="__main__")
    assert ended.value.code == 2 and words in capsys.readouterr().err


def test_a_clones_ids_are_the_models(made_tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_run.py"])
    tool = runpy.run_path(str(ROOT / "tools/plan_run.py"))
    clones = ["data.num_cloned_languages=1", "data.p_clone=0.5", "data.frac_clone=1.0"]
    sizes = [
        tool["sized"](read_recipe("xglm_tiny", [f"data.root={made_tokens}", *more])).model.vocab_size
        for more in ([], clones)
    ]
    assert sizes[0] < sizes[1] <= 2 * sizes[0]


def test_a_cluster_file_is_checked() -> None:
    with pytest.raises(ConfigError, match="matmul_share is a share"):
        config.build(Cluster, {"matmul_share": 1.5}, what="c.toml")
    with pytest.raises(ConfigError, match="tflop"):
        config.build(Cluster, {"tflop": 3.0}, what="c.toml")


@pytest.mark.multiprocess
def test_the_device_at_hand_is_measured_and_planned_with(tmp_path: Path) -> None:
    tool = [sys.executable, str(ROOT / "tools/plan_run.py"), "--recipe", "xglm_tiny", "--set", "model.vocab_size=512"]
    tool += ["--set", "data.sequence_length=32", "--set", "training.batch_windows=8"]
    here = tmp_path / "here.toml"
    for options in (["--calibrate", str(here)], ["--cluster", str(here), "--tokens", "1e6"]):
        done = subprocess.run([*tool, *options], capture_output=True, text=True, timeout=300, cwd=ROOT)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "matmul_share" in here.read_text() and "1 devices in 1 nodes" in done.stdout
    again = subprocess.run([*tool, "--calibrate", str(here)], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert again.returncode == 2 and "exists" in again.stderr
    assert json.dumps(plan(job(Layout()), Cluster()).memory)
