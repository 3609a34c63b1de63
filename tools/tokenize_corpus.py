"""Tokenise a split, and when it is called 'train' the splits beside it too.

    python tools/tokenize_corpus.py data/made/train --vocabulary vocab/made2k --output tokens/made

writes tokens/made/{train,valid,...}/LANG.{bin,idx,json} and a copy of the vocabulary. An interrupted run is finished by
the same command. With --clusters clusters/tfidf4 it also writes tokens/made/clusters/tfidf4/cluster-K, a token folder
of each cluster's documents; tokens that are there already stay as they are.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from xlmega.data import tokenizing
from xlmega.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, help="a folder SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst], such as DATA/train")
    parser.add_argument("--vocabulary", type=Path, required=True, help="a folder from tools/train_vocabulary.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that encode; changes the speed only"
    )
    parser.add_argument("--prefix", nargs="*", default=(), metavar="PIECE", help="put before every document, as '</s>'")
    parser.add_argument(
        "--suffix", nargs="*", metavar="PIECE", help="put behind instead of the document's end; none: ''"
    )
    parser.add_argument("--clusters", type=Path, help="a folder from tools/assign_clusters.py: divide the tokens by it")
    parser.add_argument("--only", action="store_true", help="not the splits beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace splits that are there")
    args = parser.parse_args()

    def say(line: str) -> None:
        print(line, flush=True)

    splits = tokenizing.tokenize_corpus(
        args.split,
        args.vocabulary,
        args.output,
        workers=args.workers,
        prefix=args.prefix,
        suffix=args.suffix,
        only=args.only,
        overwrite=args.overwrite,
        complete_is_fine=args.clusters is not None,
        say=say,
    )
    for split in splits:
        for manifest in split.manifests:
            print(f"  {split.name}/{manifest.language}: {manifest.documents:,} documents, {manifest.tokens:,} tokens")
    written = [*(split.name for split in splits), "vocabulary"]
    if args.clusters:
        from xlmega.experts.parts import join_clusters  # brings scipy, which tokenising does without

        written += [
            str(folder.relative_to(args.output))
            for folder in join_clusters(args.output, args.clusters, overwrite=args.overwrite, say=say)
        ]
    print(f"wrote {args.output} ({', '.join(written)})")


if __name__ == "__main__":
    run_main(main)
