"""Say what a run directory holds: the run, how far it is, its scores and its checkpoints.

python tools/inspect_run.py runs/first --verify
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import run_main
from xlmega.training.report import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--verify", action="store_true", help="hash every checkpoint, too")
    args = parser.parse_args()
    for line in describe(args.run, verify=args.verify):
        print(line)


if __name__ == "__main__":
    run_main(main)
