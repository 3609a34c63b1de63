"""Report a run: loss per language before and after, a plot, and text by its export.

    python tools/report_run.py runs/first --export exports/first --output reports/first

writes reports/first/{loss.png,report.txt} and prints the report.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import run_main
from xlmega.training.report import report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--export", type=Path, help="its Hugging Face directory, from tools/convert_checkpoint.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the plot and the report")
    parser.add_argument("--seed", type=int, default=0, help="of the text")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier report")
    args = parser.parse_args()
    for line in report(args.run, args.output, export=args.export, seed=args.seed, overwrite=args.overwrite):
        print(line, flush=True)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
