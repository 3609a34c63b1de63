"""Every checkpoint loaded by every layout: 12 source and 12 target combinations drawn at random, and the awkward pairs.

A tiny model (12 layers, 509 pieces, clipping active) is trained for 3 steps under each source, saved, and trained to
step 6. Each target loads each checkpoint: what it then holds is saved and must have the same logical hash, weights and
moments; three more steps must give the losses (2e-6), gradient norms (1e-5) and weights (1e-5 of a tensor's largest) of
the source left alone, the theorem's bounds, where both compute in fp32. In bf16 and fp16 the distance is measured, from
one process of the target's precision that loaded the same checkpoint.

    python benchmarks/any_to_any.py
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from reshaping import PRECISIONS, compare, drawn_cases, named, single  # noqa: E402

# From sizes to sizes that do not divide them, and back: 3 to 2, 4 to 6, 6 to 4.
AWKWARD: list[tuple[dict[str, int], dict[str, int]]] = [
    ({"dp": 3, "zero": 3}, {"dp": 2, "zero": 3}),
    ({"dp": 2, "zero": 3}, {"dp": 3, "zero": 3}),
    ({"dp": 3, "zero": 1}, {"dp": 2, "zero": 2}),
    ({"dp": 4}, {"dp": 6}),
    ({"dp": 6, "zero": 3}, {"dp": 4, "zero": 3}),
    ({"pp": 3, "dp": 2}, {"pp": 2, "dp": 3}),
    ({"pp": 4, "virtual": 3}, {"pp": 6}),
    ({"pp": 6}, {"pp": 4}),
    ({"tp": 4}, {"tp": 2, "pp": 3}),
    ({"tp": 2, "pp": 3}, {"tp": 4}),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12, help="sources, and targets, that are drawn")
    args = parser.parse_args()
    started = time.monotonic()
    drawn = named(drawn_cases(args.seed, args.count))
    sources = named([*drawn, *(source for source, _ in AWKWARD)])
    loads = [case["name"] for case in drawn]
    targets = [{**case, "loads": list(loads)} for case in drawn_cases(args.seed + 1, args.count)]
    targets = named([*targets, *({**single(precision), "loads": list(loads)} for precision in PRECISIONS)])
    for source, target in AWKWARD:
        (name,) = (case["name"] for case in named([source]))
        (case,) = named([{**target, "loads": []}])
        known = next((one for one in targets if one["name"] == case["name"]), None)
        if known is None:
            targets.append(known := case)
        if name not in known["loads"]:
            known["loads"].append(name)
    print("sources:", ", ".join(case["name"] for case in sources), flush=True)
    print("targets:", ", ".join(case["name"] for case in targets), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        pairs, problems, worst = compare(Path(folder), sources, targets)
    for problem in problems:
        print(problem)
    print("| computed in | pairs | loss | gradient norm | weights |\n|---|---|---|---|---|")
    for kind, (count, *columns) in sorted(worst.items()):
        print(f"| {kind} | {count} | " + " | ".join(f"{value:.1e}" for value in columns) + " |")
    print(f"{pairs} pairs, {len(problems)} problems, {time.monotonic() - started:.0f} s")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
