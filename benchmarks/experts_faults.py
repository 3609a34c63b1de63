"""SIGKILL at random moments: of the assignment, of the driver of experts, of an expert; then the command again.

    python benchmarks/experts_faults.py --kills 20 --folder runs/faults

Each trial draws a moment of the undisturbed run's length and a victim, kills it, and runs the same command to its end.
Assignments must be byte-identical to the undisturbed ones and experts' weights and moments bitwise; a killed expert is
to be named, and not to stop the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from xlmega.data.tokenizing import tokenize_corpus
from xlmega.experts.clusterer import save_clusterer, train_clusterer
from xlmega.experts.clustering import KMeansSettings
from xlmega.experts.features import FeatureSettings
from xlmega.text.corpus import read_corpus
from xlmega.text.synthetic import make_corpus
from xlmega.text.vocabulary import train_vocabulary
from xlmega.training.checkpoint import Checkpoint, folder_of

ROOT = Path(__file__).resolve().parents[1]
STEPS = 12
OVERRIDES = [
    "model.hidden_size=32", "model.ffn_hidden_size=64", "model.num_layers=2", "data.sequence_length=32",
    "training.batch_windows=8", "training.validation_windows=2", "training.validate_every_steps=0",
    "training.save_every_steps=2",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of the assignment, and of driver and experts in turns")
    parser.add_argument("--of", choices=("assignment", "experts", "both"), default="both")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.folder
    make_data(folder)
    generator = random.Random(args.seed)
    if args.of != "experts":
        assignments(folder, generator, args.kills)
    if args.of != "assignment":
        experts(folder, generator, args.kills)


def make_data(folder: Path) -> None:
    """A corpus of made languages, its tokens and a clusterer, where they are not there yet."""
    if not (folder / "tokens").is_dir():
        make_corpus(folder / "corpus", seed=0, megabytes=2.0, frac_valid=0.1, parallel_pairs=0)
        texts = (document.text for document in read_corpus(folder / "corpus/train"))
        train_vocabulary(texts, 800, folder / "vocabulary")
        tokenize_corpus(folder / "corpus/train", folder / "vocabulary", folder / "tokens")
        clusterer = train_clusterer(folder / "corpus/train", KMeansSettings(3), FeatureSettings(num_components=16))
        save_clusterer(clusterer, folder / "clusterer")


def assignments(folder: Path, generator: random.Random, kills: int) -> None:
    def line(output: Path) -> list[str]:
        words = [folder / "corpus/train", "--clusterer", folder / "clusterer", "--balanced", "--workers", 2]
        return [sys.executable, str(ROOT / "tools/assign_clusters.py"), *map(str, words), "--output", str(output)]

    whole, length = folder / "assigned", 0.0
    shutil.rmtree(whole, ignore_errors=True)
    length = finish(line(whole))
    wanted = contents(whole)
    struck = 0
    for trial in range(kills):
        output, moment = folder / "assigned-again", generator.uniform(0.0, length)
        shutil.rmtree(output, ignore_errors=True)
        struck += kill_at(line(output), moment)
        finish(line(output))
        assert contents(output) == wanted, "another assignment after SIGKILL"
        print(f"trial {trial + 1}: killed at {moment:.1f} s of {length:.1f}; byte-identical", flush=True)
    print(
        f"assignment: {struck} of {kills} killed before their end, all byte-identical after the same command",
        flush=True,
    )


def experts(folder: Path, generator: random.Random, kills: int) -> None:
    plan = folder / "plan.toml"
    plan.write_text(
        f'recipe = "xglm_tiny"\ndata = "{folder}/tokens"\nds_config = "{ROOT}/ds_configs/cpu_debug.json"\n'
        f"overrides = {json.dumps(OVERRIDES)}\ndense = false\n"
        f'[[rounds]]\nlanguages = [["qla"], ["qcy", "qgr", "qhn", "qlb"]]\ntotal_steps = {STEPS}\n'
    )

    def line(output: Path) -> list[str]:
        words = [str(ROOT / "tools/train_experts.py"), str(plan), "--output", str(output), "--parallel", "2"]
        return [sys.executable, *words]

    whole = folder / "experts"
    shutil.rmtree(whole, ignore_errors=True)
    length = finish(line(whole))
    wanted = [digest(whole, k) for k in range(2)]
    struck = {"driver": 0, "expert": 0}
    for trial in range(kills):
        output, victim = folder / "experts-again", ("driver", "expert")[trial % 2]
        shutil.rmtree(output, ignore_errors=True)
        moment = generator.uniform(0.0, length)
        if victim == "driver":
            struck[victim] += kill_at(line(output), moment)
        else:
            struck[victim] += kill_expert(line(output), output, moment, generator.randrange(2))
        finish(line(output))
        assert [digest(output, k) for k in range(2)] == wanted, f"other weights after SIGKILL of the {victim}"
        print(f"trial {trial + 1}: {victim} killed at {moment:.1f} s of {length:.1f}; bitwise the same", flush=True)
    print(f"experts: {struck} killed before their end; all bitwise the same after the same command", flush=True)


def finish(line: list[str]) -> float:
    begun = time.monotonic()
    done = subprocess.run(line, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return time.monotonic() - begun


def kill_at(line: list[str], moment: float) -> bool:
    """Whether the command was still running at that moment, and was killed."""
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()) as process:
        try:
            process.wait(timeout=moment)
            return False
        except subprocess.TimeoutExpired:
            process.kill()
            return True


def kill_expert(line: list[str], output: Path, moment: float, number: int) -> bool:
    """Kill one expert's own process; the command must go on, train the other and name the killed one."""
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
    ) as process:
        deadline, victim = time.monotonic() + moment, None
        while process.poll() is None and (victim is None or time.monotonic() < deadline):
            victim = expert_process(process.pid, number) or victim
            time.sleep(0.02)
        struck = False
        if process.poll() is None and victim is not None:
            try:
                os.kill(victim, signal.SIGKILL)
                struck = True
            except ProcessLookupError:
                pass
        told, _ = process.communicate()
    if struck and process.returncode != 0:
        assert f"round-1/expert-{number}: FAILED" in told and "1 of 2 experts are trained" in told, told[-2000:]
    return struck and process.returncode != 0


def expert_process(driver: int, number: int) -> int | None:
    for task in Path(f"/proc/{driver}/task").glob("*/children"):
        try:
            for child in map(int, task.read_text().split()):
                if f"expert-{number}".encode() in Path(f"/proc/{child}/cmdline").read_bytes():
                    return child
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digest(output: Path, number: int, step: int = STEPS) -> str:
    """Of an expert's last weights and moments."""
    found = hashlib.sha256()
    checkpoint = Checkpoint(folder_of(output / f"round-1/expert-{number}", step))
    for name in checkpoint.names():
        found.update(checkpoint.read(name).numpy().tobytes())
        for kind in ("exp_avg", "exp_avg_sq"):
            everything = tuple(slice(None) for _ in checkpoint.shape(name))
            found.update(checkpoint.moment(kind).read_slice(name, everything).numpy().tobytes())
    return found.hexdigest()


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


if __name__ == "__main__":
    main()
