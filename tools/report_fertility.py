"""How well a vocabulary serves each language: tokens a word, character and byte, byte fallback, and parity.

python tools/report_fertility.py data/made/valid --vocabulary vocab/made2k --output fertility.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from xlmega.errors import ConfigError, run_main
from xlmega.text import corpus, fertility
from xlmega.text.vocabulary import load_vocabulary
from xlmega.weights.directory import replace_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, help="a folder SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst], such as DATA/valid")
    parser.add_argument("--vocabulary", type=Path, required=True)
    parser.add_argument("--parallel", type=Path, nargs="+", default=[], help="files of pairs, for parity")
    parser.add_argument("--reference", default="en", help="the language that parity compares with")
    parser.add_argument("--output", type=Path, required=True, help="the new JSON file")
    args = parser.parse_args()
    if args.output.exists():
        raise ConfigError(f"'{args.output}' exists. Choose another output.")
    vocabulary = load_vocabulary(args.vocabulary)
    found = fertility.measure_fertility(corpus.read_corpus(args.split), vocabulary)
    parities = fertility.measure_parity(args.parallel, vocabulary, args.reference)
    for language, parity in parities.items():
        found.setdefault(language, fertility.Fertility()).parity = parity
    print(fertility.fertility_table(found))
    content = json.dumps(fertility.fertility_json(found, vocabulary), indent=1) + "\n"
    replace_text(args.output, content)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
