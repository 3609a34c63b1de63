"""Say what a run directory holds, prove what it was trained on, or say how two models differ.

python tools/inspect_run.py runs/first --verify
python tools/inspect_run.py runs/first --audit
python tools/inspect_run.py --compare runs/first runs/second
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import ConfigError, run_main
from xlmega.training.audit import audit
from xlmega.training.inspection import comparison_lines
from xlmega.training.report import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="a run directory")
    parser.add_argument("--verify", action="store_true", help="hash every checkpoint, too")
    parser.add_argument(
        "--audit", action="store_true", help="replay the data arithmetic: no window was repeated or skipped in an epoch"
    )
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("A", "B"), help="runs, checkpoints, logical or Hugging Face folders"
    )
    args = parser.parse_args()
    if (args.run is None) == (args.compare is None):
        raise ConfigError("give either a run directory, or --compare A B.")
    for line in comparison_lines(*args.compare) if args.compare else describe(args.run, verify=args.verify):
        print(line)
    if args.audit and args.run:
        print("\naudit:")
        for line in audit(args.run):
            print(line)
        print("the audit holds: no window was repeated or skipped within an epoch")


if __name__ == "__main__":
    run_main(main)
