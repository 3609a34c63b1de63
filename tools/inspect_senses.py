"""Look inside a Backpack: what its senses mean, how they agree across languages, how they are used, and steering.

SOURCE is a run, a checkpoint, or a logical or Hugging Face directory. Lists are tab-separated: --words language, word;
--pairs word, translation; --similarity word, word, score; --steer word, sense, factor.
    python tools/inspect_senses.py runs/backpack --words words.tsv --tokens data/tokens --output senses
    python tools/inspect_senses.py runs/backpack --pairs pairs.tsv --usage_windows 20 --tokens data/tokens --output more
    python tools/inspect_senses.py runs/backpack --prompt "The doctor said that" --steer steer.tsv --output steered
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.analysis.sense_reports import Wishes, inspect, read_table
from xlmega.analysis.senses import SenseBook
from xlmega.errors import ConfigError, run_main
from xlmega.text.vocabulary import load_vocabulary
from xlmega.training.checkpoint import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a Backpack, see above")
    parser.add_argument("--words", type=Path, help="words whose senses are told by their likeliest tokens")
    parser.add_argument("--pairs", type=Path, help="words and translations whose senses are compared")
    parser.add_argument("--similarity", type=Path, help="pairs of words with people's scores")
    parser.add_argument("--tokens", type=Path, help="token folder: says which tokens are of which language")
    parser.add_argument("--split", default="valid", help="of --tokens")
    parser.add_argument("--usage_windows", type=int, default=0, help="windows of each language to measure usage on")
    parser.add_argument("--prompt", default="", help="what is continued with steered senses")
    parser.add_argument("--steer", type=Path, help="senses to multiply")
    parser.add_argument("--count", type=int, default=5, help="tokens of each sense")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary folder; the source's own is the default")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    steer = read_table(args.steer, 3, numbers=2) if args.steer else ()
    if any(sense != int(sense) for _, sense, _ in steer):
        raise ConfigError(f"'{args.steer}' must name senses by whole numbers from 0.")
    wishes = Wishes(
        words=tuple(read_table(args.words, 2)) if args.words else (),
        pairs=tuple(read_table(args.pairs, 2)) if args.pairs else (),
        similarity=tuple(read_table(args.similarity, 3, numbers=1)) if args.similarity else (),
        tokens=args.tokens,
        split=args.split,
        usage_windows=args.usage_windows,
        steer=tuple((word, int(sense), factor) for word, sense, factor in steer),
        prompt=args.prompt,
        count=args.count,
    )
    source = open_source(args.source)
    folder = args.vocabulary or source.vocabulary_folder
    if folder is None:
        raise ConfigError(f"'{args.source}' has no vocabulary with it. Name one: --vocabulary FOLDER.")
    files = inspect(SenseBook(source, load_vocabulary(folder)), wishes, args.output, overwrite=args.overwrite)
    for path in files:
        if path.suffix in (".txt", ".tsv"):
            print(f"{path.name}:\n{path.read_text(encoding='utf-8')}")
    print(f"wrote {args.output}: {', '.join(path.name for path in files)}")


if __name__ == "__main__":
    run_main(main)
