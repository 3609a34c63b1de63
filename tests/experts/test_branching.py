"""Plans resolved, and experts trained: by a stand-in for pretrain.py in a moment, and once for real."""

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
from stand_in import write_plan

from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.experts.branching import Experts
from xlmega.experts.forgetting import summary
from xlmega.experts.plan import Resolved, read_plan
from xlmega.training.checkpoint import Checkpoint, folder_of
from xlmega.training.recipe import read_recipe

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]


def experts_of(plan: Path, output: Path, lines: list[str] | None = None) -> Experts:
    found = Experts(Resolved(read_plan(plan), output), [].append if lines is None else lines.append)
    found.prepare()
    return found


def words_of(output: Path, name: str) -> list[str]:
    return list(json.loads((output / name / "words.json").read_text()))


HMR = [
    {"languages": [["qcy", "qgr", "qhn", "qla", "qlb"]], "total_steps": 4},
    {"languages": [["qla", "qlb"], ["qcy", "qgr", "qhn"]], "total_steps": 6},
    {"languages": [["qcy"], ["qgr", "qhn"], ["qla"], ["qlb"]], "total_steps": 8},
]


def test_rounds_start_from_the_parents_of_the_round_before(made_tokens: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, made_tokens, HMR, seed_model="models/seed")
    resolved = Resolved(read_plan(plan), tmp_path / "out")
    assert resolved.parents == [[], [0, 0], [1, 1, 0, 0]]
    experts = {expert.name: expert for expert in resolved.experts}
    assert list(experts)[-1] == "dense" and len(experts) == 8
    assert experts["round-1/expert-0"].weights == "models/seed" and experts["round-1/expert-0"].batch_windows == 8
    last = experts["round-3/expert-1"]
    assert last.weights == str(tmp_path / "out/round-2/expert-1") and last.total_steps == 8 and last.batch_windows == 2
    assert set(last.languages) == {"qgr", "qhn"}
    assert experts["dense"].total_steps == 18 and experts["dense"].weights == "models/seed"
    # Together the experts of a round see what the dense model sees in its steps.
    for number, one in enumerate(HMR, start=1):
        windows = sum(e.total_steps * e.batch_windows for e in experts.values() if e.round == f"round-{number}")
        assert windows == 8 * one["total_steps"]


def test_the_shipped_plans_are_plans(made_tokens: Path, tmp_path: Path) -> None:
    shipped = sorted((ROOT / "plans").glob("*.toml"))
    assert {"tfidf4", "hmr16"} <= {path.stem for path in shipped}
    for path in shipped:
        plan = read_plan(path)
        assert path.read_text(encoding="utf-8").startswith("# ") and (ROOT / plan.ds_config).is_file()
        read_recipe(plan.recipe, plan.overrides)
    assert [one.typology for one in read_plan(ROOT / "plans/hmr16.toml").rounds] == [1, 2, 4, 8, 16]


def test_budgets_by_steps_and_by_tokens(made_tokens: Path, tmp_path: Path) -> None:
    one = [{"languages": [["qla"], ["qlb"], ["qcy", "qgr", "qhn"]], "total_steps": 30}]
    by_steps = Resolved(read_plan(write_plan(tmp_path, made_tokens, one, share_by="steps", dense=False)), tmp_path)
    assert [(e.total_steps, e.batch_windows) for e in by_steps.experts] == [(10, 8)] * 3
    plan = read_plan(write_plan(tmp_path, made_tokens, one, share_by="steps", budget="tokens"))
    steps = [e.total_steps for e in Resolved(plan, tmp_path).experts[:3]]
    assert abs(sum(steps) - 30) <= 1 and steps[0] > steps[1]
    lots = [{"random": 4, "total_steps": 3}]
    resolved = Resolved(read_plan(write_plan(tmp_path, made_tokens, lots)), tmp_path)
    documents = [expert.languages["qla"] for expert in resolved.experts[:4]]
    assert max(documents) - min(documents) <= 1


def test_all_are_trained_a_failure_is_named_and_run_again_goes_on(made_tokens: Path, tmp_path: Path) -> None:
    plan, output, lines = write_plan(tmp_path, made_tokens, HMR), tmp_path / "out", list[str]()
    (tmp_path / "fail").write_text("round-2/expert-1")
    experts = experts_of(plan, output, lines)
    failed = experts.train(experts.experts, parallel=2)
    assert [state.expert.name for state in failed] == ["round-2/expert-1", "round-3/expert-0", "round-3/expert-1"]
    kinds = {state.expert.name: state.kind for state in experts.states()}
    assert kinds["dense"] == kinds["round-3/expert-2"] == kinds["round-3/expert-3"] == "done"
    told = list(summary(experts))
    assert "round-2/expert-1: FAILED with 2 at step 1 of 6, loss 2.5000: DataError: the disk is full of sand" in told[2]
    assert any("round-3/expert-0: not begun, for it starts from round-2/expert-1" in line for line in lines)
    assert f"init.weights={output}/round-2/expert-0" in words_of(output, "round-3/expert-2")
    before = {path: path.stat().st_mtime_ns for path in output.glob("round-*/*/words.json")}
    (tmp_path / "fail").unlink()
    again = experts_of(plan, output)
    assert again.train(again.experts) == []
    assert all(path.stat().st_mtime_ns == at for path, at in before.items() if "round-2/expert-1" not in str(path))
    command = words_of(output, "dense")
    assert "--resume" in command and "training.total_steps=18" in command
    only = experts_of(plan, output).choose(clusters=[1])
    assert [expert.name for expert in only] == ["round-2/expert-1", "round-3/expert-1"]


def test_a_second_command_waits_and_a_killed_one_takes_its_experts_with_it(made_tokens: Path, tmp_path: Path) -> None:
    plan = write_plan(tmp_path, made_tokens, [{"random": 2, "total_steps": 2}], dense=False)
    (tmp_path / "hold").touch()
    line = [sys.executable, str(ROOT / "tools/train_experts.py"), str(plan), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment}
    experts = None
    with subprocess.Popen([*line, "--parallel", "2"], **quiet) as first:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("out/round-1/*/metrics.jsonl"))) < 2:
            assert time.monotonic() < deadline and first.poll() is None
            time.sleep(0.02)
        experts = experts_of(plan, tmp_path / "out")
        assert [state.kind for state in experts.states()] == ["running", "running"]
        with subprocess.Popen(line, **quiet) as second:
            time.sleep(0.3)
            assert second.poll() is None  # it waits for those who train
            first.send_signal(signal.SIGKILL)
            (tmp_path / "hold").unlink()
            assert second.wait(timeout=120) == 0
    assert [state.kind for state in experts.states()] == ["done", "done"]


def test_a_new_language_starts_from_its_donors_expert(made_tokens: Path, tmp_path: Path, monkeypatch: Any) -> None:
    rounds = [
        {"languages": [["qla"], ["qlb", "qgr", "qhn"]], "total_steps": 4},
        {"add": ["qcy"], "total_steps": 3},
    ]
    monkeypatch.setattr("xlmega.experts.plan.nearest_language", lambda code, others, feature_set: "qhn")
    plan = write_plan(tmp_path, made_tokens, rounds)
    experts = experts_of(plan, tmp_path / "out")
    new = experts.experts[2]
    assert set(new.languages) == {"qcy", "qhn"} and new.parent == "round-1/expert-1" and new.batch_windows == 8
    assert "qcy" not in experts.experts[3].languages and experts.experts[3].total_steps == 4
    assert experts.train(experts.experts) == []
    assert {path.stem for path in (tmp_path / "out/data/round-2/cluster-0/train").glob("*.bin")} == {"qcy", "qhn"}
    assert "qcy" not in {path.stem for path in (tmp_path / "out/data/dense/train").glob("*.bin")}
    score = {"validation": "valid", "by_language": {"qla": {"bits_per_byte": 2.0}, "qhn": {"bits_per_byte": 3.0}}}
    later = {"validation": "valid", "by_language": {"qla": {"bits_per_byte": 2.5}, "qhn": {"bits_per_byte": 2.9}}}
    with (tmp_path / "out/round-2/expert-0/metrics.jsonl").open("a") as file:
        file.write(json.dumps(score) + "\n" + json.dumps(later) + "\n")
    lost = list(summary(experts))[-2:]
    assert lost[0] == "round-2/expert-0 valid/qhn: 3.0000 -> 2.9000 bits per byte"
    assert lost[1] == "round-2/expert-0 valid/qla: 2.0000 -> 2.5000 bits per byte  (not trained)"


def test_refusals(made_tokens: Path, tmp_path: Path) -> None:
    def refused(error: type[Exception], match: str, rounds: list[dict[str, Any]], **keys: Any) -> None:
        with pytest.raises(error, match=match):
            list(Resolved(read_plan(write_plan(tmp_path, made_tokens, rounds, **keys)), tmp_path / "out").experts)

    refused(ConfigError, r"needs at least one \[\[rounds\]\]", [])
    refused(ConfigError, "one of clusters, languages, typology, random and add", [{"total_steps": 1}])
    refused(ConfigError, "round 1 has no key 'cluster'. Did you mean 'clusters'", [{"total_steps": 1, "cluster": "x"}])
    refused(ConfigError, "total_steps must be at least 1", [{"total_steps": 0, "random": 2}])
    refused(ConfigError, "batch_windows=8 cannot be shared by 3", [{"total_steps": 1, "random": 3}])
    shipped = str(ROOT / "ds_configs/cpu_debug.json")
    refused(
        ConfigError,
        "each of 4 experts has 2 .*windows=16, .*of 2,",
        [{"total_steps": 1, "random": 4}],
        ds_config=shipped,
    )
    refused(ConfigError, 'needs share_by = "steps"', [{"total_steps": 1, "random": 2}], budget="tokens")
    refused(ConfigError, "round 1 has nothing before it", [{"total_steps": 1, "add": ["qla"]}])
    refused(ConfigError, r"parents = \[5\]", [HMR[0], {"total_steps": 1, "random": 1, "parents": [5]}])
    refused(DataError, "clusters.json' cannot be read", [{"total_steps": 1, "clusters": str(tmp_path / "none")}])
    refused(ConfigError, "no recipe 'nosuch'", HMR, recipe="nosuch")
    plan = write_plan(tmp_path, made_tokens, HMR)
    experts = experts_of(plan, tmp_path / "out")
    with pytest.raises(ConfigError, match="no expert 'round-9/expert-0'"):
        experts.choose(["round-9/expert-0"])
    with pytest.raises(ConfigError, match="no round of the plan has an expert 7"):
        experts.choose(clusters=[7])
    with pytest.raises(ConfigError, match=r"begun with another plan(.|\n)*plan.seed_model: '' -> 'other'"):
        experts_of(write_plan(tmp_path, made_tokens, HMR, seed_model="other"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"holds no plan\.json"):
        experts_of(plan, tmp_path)


@pytest.mark.multiprocess
def test_real_experts_killed_and_gone_on_are_bitwise_those_left_alone(made_tokens: Path, tmp_path: Path) -> None:
    one = [{"languages": [["qla"], ["qcy", "qgr", "qhn", "qlb"]], "total_steps": 6}]
    plan = write_plan(tmp_path, made_tokens, one, dense=False, launcher=[])
    line = [sys.executable, str(ROOT / "tools/train_experts.py"), str(plan), "--parallel", "2", "--output"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def train(output: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*line, str(output)], capture_output=True, text=True, env=environment, timeout=300)

    alone = train(tmp_path / "alone")
    assert alone.returncode == 0, alone.stdout + alone.stderr
    killed = tmp_path / "killed"
    with subprocess.Popen([*line, str(killed)], stdout=subprocess.DEVNULL, env=environment) as driver:
        deadline = time.monotonic() + 200
        while not list(killed.glob("round-1/*/checkpoints/step-00000002/manifest.json")):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        driver.kill()
    again = train(killed)
    assert again.returncode == 0, again.stdout + again.stderr
    for cluster in range(2):
        one_, other = (
            Checkpoint(folder_of(tmp_path / name / f"round-1/expert-{cluster}", 6)) for name in ("alone", "killed")
        )
        assert all(one_.read(name).equal(other.read(name)) for name in one_.names())
