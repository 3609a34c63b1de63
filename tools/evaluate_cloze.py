"""How often a model finds the last word of a passage, by language: the cloze test with a beam of three.

SOURCE is a run, a checkpoint, or a logical or Hugging Face directory. Passages come from --items (JSON lines with
prompt, answer and language), or are made from the documents of a corpus split, and kept for the next model with
--keep_items.
    python tools/evaluate_cloze.py runs/backpack --corpus data/valid --count 100 --keep_items cloze.jsonl
    python tools/evaluate_cloze.py runs/twin --items cloze.jsonl --output cloze_twin.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from xlmega.errors import ConfigError, run_main
from xlmega.evaluation.cloze import evaluate_cloze, make_items, read_items, write_items
from xlmega.evaluation.scoring import LogicalScorer
from xlmega.text.corpus import read_corpus
from xlmega.text.vocabulary import load_vocabulary
from xlmega.training.checkpoint import open_source
from xlmega.weights.directory import replace_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a model, see above")
    parser.add_argument("--items", type=Path, help="passages that were made before")
    parser.add_argument("--corpus", type=Path, help="a corpus split to make passages from, such as data/valid")
    parser.add_argument("--count", type=int, help="with --corpus: passages of each language; default: 100")
    parser.add_argument("--seed", type=int, help="with --corpus: which passages; default: 0")
    parser.add_argument("--keep_items", type=Path, help="write the passages here")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary folder; the source's own is the default")
    parser.add_argument("--output", type=Path, help="write the figures here, as JSON")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    if (args.items is None) == (args.corpus is None):
        raise ConfigError("give either --items FILE or --corpus SPLIT.")
    if args.items and (args.count, args.seed) != (None, None):
        raise ConfigError("--count and --seed are of --corpus: the passages of --items are taken as they are.")
    if args.output and args.keep_items and args.output.resolve() == args.keep_items.resolve():
        raise ConfigError(f"--output and --keep_items are both '{args.output}'. Give each a name of its own.")
    for path in filter(None, (args.keep_items, args.output)):
        if path.is_dir():
            raise ConfigError(f"'{path}' is a folder. Give the name of a file.")
        if path.exists() and not args.overwrite:
            raise ConfigError(f"'{path}' exists. Choose another name, or add --overwrite.")
    if args.items:
        items = read_items(args.items)
    else:
        count = 100 if args.count is None else args.count
        items = make_items(read_corpus(args.corpus), count, args.seed or 0)
    source = open_source(args.source)
    folder = args.vocabulary or source.vocabulary_folder
    if folder is None:
        raise ConfigError(f"'{args.source}' has no vocabulary with it. Name one: --vocabulary FOLDER.")
    if args.keep_items:
        write_items(items, args.keep_items)
    results = evaluate_cloze(LogicalScorer(source), load_vocabulary(folder), items)
    for language, result in results.items():
        print(f"{language}: {result.describe()}")
    if args.output:
        found = {language: dataclasses.asdict(result) for language, result in results.items()}
        replace_text(args.output, json.dumps(found, indent=2, ensure_ascii=False) + "\n")
        print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
