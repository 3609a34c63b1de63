"""How far bf16 (or fp16) runs of other layouts are from the single process: the table of RESULTS.md.

fp32 is held to fixed bounds by tests/training/test_theorem.py. In lower precision a layout changes the order of
roundings, so the distance is measured: the same tiny model, five steps, every layout of the theorem's list.
    python benchmarks/layout_bounds.py --precision bf16
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "training")]  # test_theorem is there

import test_theorem  # noqa: E402
import trained  # noqa: E402
import worlds  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--preset", choices=test_theorem.PRESETS, default=test_theorem.PRESETS[0])
    args = parser.parse_args()
    cases = [
        {**case, "preset": args.preset, "precision": args.precision}
        for case in (test_theorem.SINGLE, *test_theorem.LAYOUTS)
        if case.get("zero", 1) > 0  # ZeRO-0 is refused in low precision
    ]
    reference = {**test_theorem.SINGLE, "name": "fp32", "preset": args.preset}
    cases = sorted([*cases, reference], key=lambda case: -trained.world_size(case))
    with tempfile.TemporaryDirectory() as folder:
        figures = worlds.run(8, trained.run_cases, cases, folder=Path(folder), timeout=3000)[0]
        weights = {
            case["name"]: trained.assemble(
                [Path(folder) / f"{case['name']}.weight.{rank}.npz" for rank in range(trained.world_size(case))]
            )
            for case in cases
        }
    single = np.array(figures["single"])
    print(f"{args.precision}, {args.preset}: largest distance from the single process over five steps, relative\n")
    print("| layout | loss | gradient norm | weights |\n|---|---|---|---|")
    for name, found in sorted(figures.items(), key=lambda item: item[0] != "fp32"):
        if name == "single":
            continue
        loss, norm = np.abs(np.array(found) / single - 1).max(0)
        weight = max(
            np.abs(weights[name][key] - value).max() / np.abs(value).max() for key, value in weights["single"].items()
        )
        print(f"| {name} | {loss:.1e} | {norm:.1e} | {weight:.1e} |")


if __name__ == "__main__":
    main()
