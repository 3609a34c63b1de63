"""Multiple choice by likelihood, per language, from local files of items.

MODEL is a run, a checkpoint, a Hugging Face or logical directory, or another trainer's files. ITEMS are .jsonl files as
the data sets are published, one a language (val.it.jsonl is of 'it'), or a folder of them.
    python tools/evaluate_tasks.py exports/first xcopa/val.it.jsonl --task xcopa --output scores/xcopa
    python tools/evaluate_tasks.py runs/first xnli/test --task xnli --shots 4 --runs 5 --demonstrations xnli/dev \\
        --output scores/xnli
writes SCORES/result.json and prints accuracies under each way of comparing answers (xlmega/evaluation/tasks.py).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from xlmega.errors import ConfigError, DataError, run_main
from xlmega.evaluation.documents import check_output, vocabulary_of, write_result
from xlmega.evaluation.scoring import LogicalScorer, device_named
from xlmega.evaluation.tasks import (
    TASKS,
    Outcome,
    Settings,
    evaluate,
    item_files,
    read_items,
    report,
    task_named,
)
from xlmega.training.checkpoint import open_source
from xlmega.weights.directory import DTYPES, dtype_named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="see above")
    parser.add_argument("items", type=Path, nargs="+", help="see above")
    parser.add_argument("--task", choices=tuple(TASKS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of result.json")
    parser.add_argument("--template", default="", help="of the prompt, for example '{premise} ' (xcopa)")
    parser.add_argument("--shots", type=int, default=0, help="demonstrations before each item")
    parser.add_argument("--runs", type=int, default=1, help="with demonstrations of their own")
    parser.add_argument(
        "--demonstrations", type=Path, nargs="+", default=(), help="files of items to show, one a language"
    )
    parser.add_argument("--demonstration_language", default="", help="show this language's to all; default: the item's")
    parser.add_argument(
        "--max_items", type=int, default=0, help="as many of each language, drawn by --seed; default: all"
    )
    parser.add_argument("--pmi_weight", type=float, default=1.0, help="of the answer's own probability in 'pmi'")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--vocabulary", type=Path, help="vocabulary folder; the model's own is the default")
    parser.add_argument("--config", type=Path, help="folder of the config.json of another trainer's MODEL without one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the computation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="positions in a batch; changes the speed only")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_output(args.output, overwrite=args.overwrite)
    if bool(args.shots) != bool(args.demonstrations):
        raise ConfigError("--shots and --demonstrations go together: how many to show, and out of which files.")
    task = task_named(args.task, args.template)
    items = {language: read_items(path, task) for language, path in item_files(args.items).items()}
    shown = {one: read_items(path, task) for one, path in item_files(args.demonstrations).items()} if args.shots else {}
    source = open_source(args.model, args.config)
    vocabulary = vocabulary_of(source, args.vocabulary)
    if vocabulary is None:
        raise ConfigError("no vocabulary was found with the model. Name its folder: --vocabulary DIR.")
    scorer = LogicalScorer(source, dtype=dtype_named(args.dtype), device=device_named(args.device))
    settings = Settings(args.shots, args.runs, args.seed, args.max_items, args.pmi_weight)
    outcomes = dict[str, Outcome]()
    for language, found in items.items():
        of = args.demonstration_language or language
        if args.shots and of not in shown:
            raise DataError(f"--demonstrations has no file of '{of}'; it has {', '.join(shown)}.")
        outcomes[language] = evaluate(
            scorer, vocabulary, found, settings, demonstrations=shown.get(of, ()), batch_tokens=args.batch_tokens
        )
        print(f"{language}: {outcomes[language].items} items", flush=True)
    result = {
        "model": str(args.model),
        "task": args.task,
        "template": task.template,
        "vocabulary": vocabulary.hash,
        "settings": dataclasses.asdict(settings),
        "demonstration_language": args.demonstration_language,
        "dtype": args.dtype,
        "languages": {language: one.table() for language, one in outcomes.items()},
    }
    for line in report(outcomes):
        print(line)
    print(f"wrote {write_result(args.output, result)}")


if __name__ == "__main__":
    run_main(main)
