"""Train a vocabulary on the text of a split.

python tools/train_vocabulary.py data/made/train --size 2048 --output vocab/made2k
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from xlmega.errors import run_main
from xlmega.text import corpus, vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, help="a folder SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst], such as DATA/train")
    parser.add_argument("--size", type=int, required=True, help="number of ids, specials and 256 bytes included")
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--kind", choices=vocabulary.KINDS, default=vocabulary.KINDS[0])
    parser.add_argument("--character_coverage", type=float, default=0.9995, help="other characters become bytes")
    parser.add_argument("--input_sentence_size", type=int, default=2_000_000, help="lines drawn from a larger corpus")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--num_threads", type=int, default=2, help="part of the result, as the seed is")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier vocabulary")
    args = parser.parse_args()
    begun = time.monotonic()
    print(f"training {args.size:,} ids on {args.split} (about a minute for 50 MB on two cores)", flush=True)
    made = vocabulary.train_vocabulary(
        (document.text for document in corpus.read_corpus(args.split)),
        args.size,
        args.output,
        kind=args.kind,
        character_coverage=args.character_coverage,
        input_sentence_size=args.input_sentence_size,
        seed=args.seed,
        num_threads=args.num_threads,
        overwrite=args.overwrite,
    )
    print(f"{made.size:,} ids, hash {made.hash[:12]}, {time.monotonic() - begun:.1f} s")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
