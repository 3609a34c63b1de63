"""Write a corpus: with --made, small artificial languages (what they are: xlmega/text/synthetic.py).

    python tools/build_corpus.py --made --output data/made

writes data/made/{train,valid}/LANG/00000.jsonl.gz, data/made/parallel/*.jsonl.gz and data/made/lexicon.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import run_main
from xlmega.text import synthetic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", action="store_true", required=True, help="make up the languages")
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--megabytes", type=float, default=3.0, help="training text, all languages (default %(default)s)"
    )
    parser.add_argument(
        "--languages", nargs="+", default=synthetic.LANGUAGES, help=f"of {' '.join(synthetic.GRAMMARS)}; biggest first"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=(), help="relative sizes (default 8 4 2 1 1)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier made corpus")
    args = parser.parse_args()
    summary = synthetic.make_corpus(
        args.output,
        seed=args.seed,
        languages=args.languages,
        megabytes=args.megabytes,
        shares=args.shares,
        overwrite=args.overwrite,
    )
    for language, size in summary.train_bytes.items():
        print(f"{language}: {summary.documents[language]:,} documents, {size / 1e6:.2f} MB")
    print(f"wrote {summary.output}")


if __name__ == "__main__":
    run_main(main)
