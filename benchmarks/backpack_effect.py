"""A Backpack against its GPT twin on English and French: perplexity by language and the cloze test, over seeds.

    python benchmarks/backpack_effect.py --output /tmp/effect               mini, 8 senses, three seeds
    python benchmarks/backpack_effect.py --output /tmp/effect --jobs 6      as many runs side by side (a GPU has room)
    python benchmarks/backpack_effect.py --output /tmp/effect --quick       a tiny pair: does it run?

Both models see the same tokens in the same order (the order is the seed's), with the same recipe but for the model.
Training text is pydocs of both languages and the sides of the parallel pairs, from ../shared/data; figures are of its
valid split. At the end stand, for each model, perplexity per token by language (mean and spread over seeds), cloze
top-1 and top-3, and where the pictures of 20 words of each language lie. A run that is there is not trained again.
With a GPU (and without DS_ACCELERATOR=cpu) runs are trained on it in bf16, else on the CPU in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
LANGUAGES = ("en", "fr")
MODELS = {"backpack": "nano_backpack_mini_8", "twin": "nano_gpt_mini"}
PAIRS = (
    *(("file", "fichier"), ("function", "fonction"), ("value", "valeur"), ("name", "nom"), ("list", "liste")),
    *(("number", "nombre"), ("object", "objet"), ("class", "classe"), ("method", "méthode"), ("error", "erreur")),
    *(("word", "mot"), ("string", "chaîne"), ("example", "exemple"), ("new", "nouveau"), ("first", "premier")),
    *(("time", "temps"), ("line", "ligne"), ("key", "clé"), ("server", "serveur"), ("order", "ordre")),
)
TINY = ("model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.ffn_hidden_size=64")


def run(script: str, *words: Any) -> None:
    """One of our commands; what it says goes to the screen only if it fails."""
    line = [sys.executable, str(ROOT / script), *map(str, words)]
    told = filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *told]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stdout[-2000:]}{done.stderr[-3000:]}")


def make_data(folder: Path, vocab_size: int, quick: bool) -> None:
    """folder/corpus and folder/tokens."""
    for split in ("train", "valid"):
        for code in LANGUAGES:
            path = folder / "corpus" / split / code / "00000.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            with gzip.open(path, "wt", encoding="utf-8") as out:
                with gzip.open(DATA / "pydocs" / split / code / "00000.jsonl.gz", "rt", encoding="utf-8") as lines:
                    for number, line in enumerate(lines):
                        if quick and number == 100:
                            break
                        record = json.loads(line)
                        out.write(json.dumps({"text": record["text"], "lang": code, "id": record["id"]}) + "\n")
                with gzip.open(DATA / "parallel" / f"en-fr.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
                    for number, line in enumerate(lines):
                        if quick and number == 100:
                            break
                        text = json.loads(line)["translation"][code]
                        out.write(json.dumps({"text": text, "lang": code, "id": f"pair{number}"}) + "\n")
    corpus, vocabulary, tokens = folder / "corpus", folder / "vocabulary", folder / "tokens"
    kind = ("--kind", "byte_level_bpe", "--size", vocab_size)
    run("tools/train_vocabulary.py", corpus / "train", *kind, "--output", vocabulary)
    run("tools/tokenize_corpus.py", corpus / "train", "--vocabulary", vocabulary, "--output", tokens)  # and valid


def train(folder: Path, model: str, seed: int, asked: argparse.Namespace) -> float:
    """One run; the seconds that it took, 0 where it was there."""
    output = folder / f"{model}-{seed}"
    if (output / "finished").is_file():
        return 0.0
    settings = [
        *(f"model.preset={MODELS[model]}", f"data.root={folder / 'tokens'}", f"training.seed={seed}"),
        *(f"training.total_steps={asked.steps}", f"training.batch_windows={asked.windows}"),
        *(f"optimizer.learning_rate={asked.learning_rate}", f"optimizer.min_learning_rate={asked.learning_rate / 10}"),
        *(f"optimizer.warmup_steps={max(1, asked.steps // 20)}", "training.validate_every_steps=0"),
        *("training.validation_windows=200", "training.save_every_steps=0"),
        *(TINY if asked.quick else ()),
    ]
    if asked.quick and model == "backpack":
        settings.append("model.num_layers=1")  # one fewer than the twin
    sets = [word for setting in settings for word in ("--set", setting)]
    start = time.perf_counter()
    run("xlmega/pretrain.py", "--ds_config", folder / "ds.json", "--recipe", "nano_gpt_mini", *sets, "--output", output)
    (output / "finished").touch()
    return time.perf_counter() - start


def in_own_process(model: str, seed: int) -> Any:
    """Train and score, as this script is told with --only."""
    line = [sys.executable, __file__, *sys.argv[1:], "--only", f"{model}-{seed}"]
    told = subprocess.run(line, capture_output=True, text=True, check=False)
    if told.returncode:
        raise SystemExit(f"{model}-{seed} failed:\n{told.stderr[-4000:]}")
    return json.loads(told.stdout.splitlines()[-1])


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"


def figures_of(folder: Path, items: list[Any]) -> dict[str, dict[str, float]]:
    """Perplexity by language from the run's last validation; cloze."""
    from xlmega.evaluation.cloze import evaluate_cloze
    from xlmega.evaluation.scoring import LogicalScorer
    from xlmega.text.vocabulary import load_vocabulary
    from xlmega.training.checkpoint import open_source

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record.get("validation") == "valid"][-1]
    found = {code: {"perplexity": math.exp(last["by_language"][code]["nats_per_token"])} for code in LANGUAGES}
    source = open_source(folder)
    scorer = LogicalScorer(source, device="cuda" if on_gpu() else "cpu")
    cloze = evaluate_cloze(scorer, load_vocabulary(source.vocabulary_folder), items)
    for code in LANGUAGES:
        found[code] |= {"top-1": cloze[code].top1 / cloze[code].items, "top-3": cloze[code].top3 / cloze[code].items}
    return found


def table(results: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Mean and spread (standard deviation) over seeds."""
    lines = ["| model | language | perplexity per token | cloze top-1 | cloze top-3 |", "|---|---|---|---|---|"]
    for model, seeds in results.items():
        for code in LANGUAGES:
            cells = []
            for figure in ("perplexity", "top-1", "top-3"):
                values = [one[code][figure] for one in seeds]
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                scale, unit = (1, "") if figure == "perplexity" else (100, " %")
                cells.append(f"{statistics.mean(values) * scale:.2f} ± {spread * scale:.2f}{unit}")
            lines.append(f"| {model} | {code} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--windows", type=int, default=16, help="windows of 256 tokens in a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--items", type=int, default=100, help="cloze passages of each language")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--quick", action="store_true", help="a tiny pair on little text")
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    folder = asked.output.resolve()
    made = (folder / "tokens" / "valid").is_dir()
    if not (made or DATA.is_dir()):
        raise SystemExit(f"'{DATA}' is not there: this benchmark is about that text.")
    if asked.quick:
        asked.steps, asked.windows, asked.seeds, asked.items = 3, 4, 2, 3
    if not made:
        make_data(folder, 1000 if asked.quick else 10_001, asked.quick)

    from xlmega.evaluation.cloze import make_items
    from xlmega.text.corpus import read_corpus

    items = make_items(read_corpus(folder / "corpus" / "valid"), asked.items)
    if asked.only:
        model, seed = asked.only.split("-")
        took = train(folder, model, int(seed), asked)
        print(json.dumps({"seconds": took, "figures": figures_of(folder / asked.only, items)}))
        return
    how: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
    if on_gpu():
        how |= {"train_micro_batch_size_per_gpu": asked.windows, "bf16": {"enabled": True}}
    (folder / "ds.json").write_text(json.dumps(how))
    results: dict[str, list[dict[str, dict[str, float]]]] = {model: [] for model in MODELS}
    seconds: dict[str, list[float]] = {model: [] for model in MODELS}
    runs = [(model, seed) for seed in range(asked.seeds) for model in MODELS]
    with ThreadPoolExecutor(asked.jobs) as pool:
        answers = pool.map(lambda one: in_own_process(*one), runs)
        for (model, seed), answer in zip(runs, answers, strict=True):
            results[model].append(answer["figures"])
            seconds[model].append(answer["seconds"])
            print(f"{model}, seed {seed}: {answer['seconds']:.0f} s, {answer['figures']}", file=sys.stderr, flush=True)
    words, pairs = folder / "words.tsv", folder / "pairs.tsv"
    words.write_text("".join(f"en\t{a}\nfr\t{b}\n" for a, b in PAIRS), encoding="utf-8")
    pairs.write_text("".join(f"{a}\t{b}\n" for a, b in PAIRS), encoding="utf-8")
    lists = ("--words", words, "--pairs", pairs, "--tokens", folder / "tokens", "--split", "train", "--overwrite")
    run("tools/inspect_senses.py", folder / "backpack-0", *lists, "--usage_windows", 4, "--output", folder / "senses")
    tokens = asked.steps * asked.windows * 256
    print(
        f"{asked.steps} steps of {asked.windows} x 256 = {tokens:,} tokens, {asked.seeds} seeds, {len(items)} items\n"
    )
    print(table(results))
    told = {model: statistics.median(found) for model, found in seconds.items() if all(found)}
    print(f"\nmedian seconds of a run: {told}\nsenses of {2 * len(PAIRS)} words: {folder / 'senses'}")
    path = folder / "backpack_effect.json"
    part = path.with_suffix(".json.part")
    part.write_text(
        json.dumps({"results": results, "seconds": seconds, "items": [dataclasses.asdict(i) for i in items]})
    )
    part.replace(path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
