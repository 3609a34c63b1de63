"""Say which cluster each document of a split belongs to; when it is called 'train', the splits beside it too.

    python tools/assign_clusters.py DATA/train --clusterer clusterers/tfidf4 --balanced --output clusters/tfidf4

writes clusters/tfidf4/{train,valid,...}/SHARD/FILE.jsonl. An interrupted run is finished by the same command. Several
machines share the work when each says its --share; on a Slurm cluster slurm/assign_clusters.sbatch does.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from xlmega.errors import ConfigError, run_main
from xlmega.experts.assignment import assign_clusters
from xlmega.experts.slurm import share_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, help="a folder SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst], such as DATA/train")
    parser.add_argument("--clusterer", type=Path, required=True, help="a folder from tools/train_clusterer.py")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--balanced", action="store_true", help="sizes differ by at most one; else the nearest centre")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes; changes the speed only")
    parser.add_argument(
        "--share", default="0/1", metavar="I/N|slurm", help="this command's part of the files, or what srun gives it"
    )
    parser.add_argument("--only", action="store_true", help="not the splits beside it")
    parser.add_argument("--overwrite", action="store_true", help="replace assignments that are there")
    args = parser.parse_args()
    share, shares = share_of(os.environ) if args.share == "slurm" else shared(args.share)
    table = assign_clusters(
        args.split,
        args.clusterer,
        args.output,
        balanced=args.balanced,
        workers=args.workers,
        share=share,
        shares=shares,
        only=args.only,
        overwrite=args.overwrite,
        say=lambda line: print(line, flush=True),
    )
    for name, split in table["splits"].items():
        for code, counts in split["by_language"].items():
            print(f"  {name}/{code}: {' '.join(map(str, counts))}")
    done = ", ".join(table["splits"]) or "no split whole yet"
    print(f"wrote {args.output}: {table['num_clusters']} clusters, {done}")


def shared(text: str) -> tuple[int, int]:
    share, slash, shares = text.partition("/")
    if not (slash and share.isdecimal() and shares.isdecimal()):
        raise ConfigError(f"--share takes I/N, such as 0/4 to 3/4, or slurm; got '{text}'.")
    return int(share), int(shares)


if __name__ == "__main__":
    run_main(main)
