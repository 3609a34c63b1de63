"""Say which cluster each document of a split belongs to; when it is called 'train', the splits beside it too.

    python tools/assign_clusters.py DATA/train --clusterer clusterers/tfidf4 --balanced --output clusters/tfidf4

writes clusters/tfidf4/{train,valid,...}/SHARD/FILE.jsonl. An interrupted run is finished by the same command.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from xlmega.errors import run_main
from xlmega.experts.assignment import assign_clusters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, help="a folder SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst], such as DATA/train")
    parser.add_argument("--clusterer", type=Path, required=True, help="a folder from tools/train_clusterer.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--balanced", action="store_true", help="sizes differ by at most one; else the nearest centre")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; changes the speed only")
    parser.add_argument("--only", action="store_true", help="not the splits beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace assignments that are there")
    args = parser.parse_args()
    table = assign_clusters(
        args.split,
        args.clusterer,
        args.output,
        balanced=args.balanced,
        workers=args.workers,
        only=args.only,
        overwrite=args.overwrite,
        say=lambda line: print(line, flush=True),
    )
    for name, split in table["splits"].items():
        for code, counts in split["by_language"].items():
            print(f"  {name}/{code}: {' '.join(map(str, counts))}")
    print(f"wrote {args.output}: {table['num_clusters']} clusters, {', '.join(table['splits'])}")


if __name__ == "__main__":
    run_main(main)
