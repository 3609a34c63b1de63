"""Do experts beat one dense model at equal tokens? The whole method on real text of twelve languages, by the commands.

    python benchmarks/experts_effect.py ../shared/data/pydocs --folder runs/effect --seeds 3

For each seed: a seed model, then from it, each on the same number of tokens: a dense continuation, four TF-IDF experts,
four typological experts, and typological experts in two rounds (4, then 8, each from its parent). --ablations adds four
experts of clusters by lot (random4), a dense model that is told each document's cluster (told4), and four typological
experts that share the tokens by steps rather than by batch (steps4): a quarter of the steps at the dense model's batch.
Prints the table that X-ELM's paper prints (perplexity by language and mean; rows are models), the standard deviation
over seeds, each row's difference from dense in pairs by seed, and the expert-by-language matrices. Finished steps are
kept: run it again to go on.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LANGUAGES = ["en", "es", "fr", "id", "it", "ja", "ko", "pl", "pt", "tr", "uk", "zh"]
MODEL = [
    "model.num_layers=4", "model.hidden_size=128", "model.ffn_hidden_size=512", "model.num_heads=4",
    "data.sequence_length=256", "data.temperature=2.0", "training.batch_windows=16", "training.validation_windows=4",
    "training.validate_every_steps=0", "training.save_every_steps=100", "training.log_every_steps=20",
]  # fmt: skip
EXPERTS = [*MODEL, "optimizer.learning_rate=1e-3", "optimizer.min_learning_rate=1e-4", "optimizer.warmup_steps=10"]
ROWS = {  # printed name: (scores, row)
    "seed model": ("tfidf4", "seed"),
    "dense": ("tfidf4", "dense"),
    "TF-IDF, ensemble": ("tfidf4", "clustering"),
    "TF-IDF, top-2": ("tfidf4-top2", "clustering"),
    "typological, routed": ("typology4", "routing"),
    "HMR to 8, routed": ("hmr8", "routing"),
}
ABLATIONS = {
    "by lot, ensemble": ("random4", "uniform"),
    "dense, told its cluster": ("told4", "told"),
    "typological, by steps": ("steps4", "routing"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train/ and valid/")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed_steps", type=int, default=300)
    parser.add_argument("--total_steps", type=int, default=120, help="of the dense continuation")
    parser.add_argument("--documents", type=int, default=20, help="scored of each language")
    parser.add_argument("--ablations", nargs="*", default=[], choices=[name for name, _ in ABLATIONS.values()])
    parser.add_argument("--parallel", type=int, default=1, help="experts side by side")
    args = parser.parse_args()
    begun = time.monotonic()
    settings = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}}  # an eighth of the batch
    args.folder.mkdir(parents=True, exist_ok=True)
    tokens, vocabulary = args.folder / "tokens", args.folder / "vocabulary"
    (args.folder / "ds_config.json").write_text(json.dumps(settings))
    tool(vocabulary, "train_vocabulary.py", args.data / "train", "--size", 8192, "--output", vocabulary)
    tool(tokens / "train", "tokenize_corpus.py", args.data / "train", "--vocabulary", vocabulary, "--output", tokens)
    for seed in range(args.seeds):
        one_seed(args, seed, tokens)
        print(f"seed {seed} is done, {(time.monotonic() - begun) / 60:.0f} minutes", flush=True)
    rows = {**ROWS, **{name: where for name, where in ABLATIONS.items() if where[0] in args.ablations}}
    report(args.folder, args.seeds, rows)


def one_seed(args: argparse.Namespace, seed: int, tokens: Path) -> None:
    folder = args.folder / f"seed-{seed}"
    folder.mkdir(exist_ok=True)
    clusterer, clusters, model = folder / "clusterer", folder / f"tfidf4-{seed}", folder / "seed-model"
    tool(clusterer, "train_clusterer.py", args.data / "train", "--k", 4, "--seed", seed, "--output", clusterer)
    tool(
        clusters / "train", "assign_clusters.py", args.data / "train", "--clusterer", clusterer, "--balanced",
        "--workers", args.parallel, "--output", clusters,
    )  # fmt: skip
    tool(
        tokens / "clusters" / clusters.name, "tokenize_corpus.py", args.data / "train", "--vocabulary",
        args.folder / "vocabulary", "--output", tokens, "--clusters", clusters,
    )  # fmt: skip
    if not (model / "checkpoints" / f"step-{args.seed_steps:08d}").is_dir():
        sets = [*MODEL, f"data.root={tokens}", f"training.total_steps={args.seed_steps}", f"training.seed={seed}"]
        sets += ["optimizer.learning_rate=3e-3", "optimizer.min_learning_rate=1e-3"]
        words = ["--recipe", "xglm_tiny", "--ds_config", ROOT / "ds_configs/cpu_debug.json", "--resume"]
        run(ROOT / "xlmega/pretrain.py", *words, *(w for s in sets for w in ("--set", s)), "--output", model)
    half = args.total_steps // 2
    rounds = {
        "tfidf4": f'[[rounds]]\nclusters = "{clusters}"\ntotal_steps = {args.total_steps}\n',
        "typology4": f"[[rounds]]\ntypology = 4\ntotal_steps = {args.total_steps}\n",
        "hmr8": f"[[rounds]]\ntypology = 4\ntotal_steps = {half}\n[[rounds]]\ntypology = 8\ntotal_steps = {half}\n",
    }
    more = {
        "random4": f"[[rounds]]\nrandom = 4\ntotal_steps = {args.total_steps}\n",
        "told4": f"cluster_token = true\n{rounds['tfidf4']}",
        "steps4": f'share_by = "steps"\n{rounds["typology4"]}',
    }
    rounds |= {name: more[name] for name in args.ablations}
    for name, table in rounds.items():
        plan = folder / f"{name}.toml"
        overrides = [*EXPERTS, f"training.seed={seed + 100}"]
        plan.write_text(
            f'recipe = "xglm_tiny"\ndata = "{tokens}"\nds_config = "{args.folder}/ds_config.json"\n'
            f'seed_model = "{model}"\noverrides = {json.dumps(overrides)}\ntree = "halves"\n'
            f"dense = {json.dumps(name in ('tfidf4', 'told4'))}\n{table}"
        )
        only = ["--only", "dense"] if name == "told4" else []
        run(ROOT / "tools/train_experts.py", plan, "--output", folder / name, "--parallel", args.parallel, *only)
    common = ["--data", tokens, "--max_documents", args.documents, "--length", 256]
    compare = ["--compare", f"seed={model}", f"dense={folder / 'tfidf4/dense'}"]
    told = ["--told", f"told={folder / 'told4/dense'}"]
    ablations = {
        "random4": [folder / "random4", "--kind", "uniform"],
        "told4": [model, model, "--kind", "uniform", "--clusterer", clusterer, *told],
        "steps4": [folder / "steps4"],
    }
    for name, words in {
        **{name: ablations[name] for name in args.ablations},
        "tfidf4": [folder / "tfidf4", "--clusterer", clusterer, "--matrix", *compare],
        "tfidf4-top2": [folder / "tfidf4", "--clusterer", clusterer, "--top_k", 2],
        "typology4": [folder / "typology4", "--matrix"],
        "hmr8": [folder / "hmr8", "--matrix"],
    }.items():
        output = folder / "scores" / name
        tool(output / "result.json", "evaluate_ensemble.py", *words, *common, "--output", output)


def tool(made: Path, name: str, *words: object) -> None:
    """Run a tool whose output is not there yet."""
    if not made.exists():
        run(ROOT / "tools" / name, *words)


def run(script: Path, *words: object) -> None:
    line = [sys.executable, str(script), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(line)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    print(done.stdout.strip().splitlines()[-1], flush=True)


def report(folder: Path, seeds: int, rows: dict[str, tuple[str, str]]) -> None:
    """The table, differences and matrices, over seeds."""
    found = {name: np.array([row_of(folder, seed, *where) for seed in range(seeds)]) for name, where in rows.items()}
    print("\nperplexity by language, mean over seeds (standard deviation of the mean column)")
    print("".ljust(24) + "".join(code.rjust(9) for code in LANGUAGES) + "     mean  (sd)")
    for name, values in found.items():
        mean = values.mean(axis=1)
        spread = statistics.stdev(mean) if seeds > 1 else float("nan")
        cells = "".join(f"{value:9.2f}" for value in values.mean(axis=0))
        print(f"{name.ljust(24)}{cells}{mean.mean():9.2f}  ({spread:.2f})")
    print("\nlog-perplexity less dense's, mean over languages, by seed (negative: better than dense); languages better")
    for name, values in found.items():
        gap = np.log(values) - np.log(found["dense"])
        better = int((gap.mean(axis=0) < 0).sum())
        by_seed = " ".join(f"{one:+.4f}" for one in gap.mean(axis=1))
        print(f"{name.ljust(24)} {by_seed}   {better} of {len(LANGUAGES)}")
    for name in ("tfidf4", "typology4", "hmr8"):
        scores = json.loads((folder / f"seed-0/scores/{name}/result.json").read_text())["rows"]
        print(f"\nexperts by languages, {name}, seed 0")
        print("".ljust(10) + "".join(code.rjust(9) for code in LANGUAGES))
        for expert, row in scores.items():
            if expert.startswith("expert-"):
                print(expert.ljust(10) + "".join(f"{row['languages'][c]['perplexity']:9.2f}" for c in LANGUAGES))


def row_of(folder: Path, seed: int, scores: str, row: str) -> list[float]:
    rows = json.loads((folder / f"seed-{seed}/scores/{scores}/result.json").read_text())["rows"]
    return [rows[row]["languages"][code]["perplexity"] for code in LANGUAGES]


if __name__ == "__main__":
    main()
