"""Every checkpoint loaded by every layout: 12 source and 12 target combinations drawn at random, and the awkward pairs.

A tiny model (12 layers, 509 pieces, clipping active) is trained for 3 steps under each source, saved, and trained to
step 6. Each target loads each checkpoint: what it then holds is saved and must have the same logical hash, weights and
moments; three more steps must give the losses (2e-6), gradient norms (1e-5) and weights (1e-5 of a tensor's largest) of
the source left alone, the theorem's bounds, where both compute in fp32. In bf16 and fp16 the distance is that from one
process of the target's precision that loaded the same checkpoint, and losses may be apart by 1e-4 or by four times what
that process is from one in fp32 (nano's unscaled scores make much of bf16's rounding: 5e-4 here, XGLM 1e-5). Every
source is also loaded by its own layout, and must then go on bit for bit. For XGLM and for both Backpacks.

    python benchmarks/any_to_any.py
    python benchmarks/any_to_any.py --models original nano
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

from reshaping import MODELS, PRECISIONS, compare, drawn_cases, named, single  # noqa: E402

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


def cases(model: str, seed: int, count: int, ranks: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(sources, targets) of one model; a target's `loads` are the sources that it loads."""
    awkward = [tuple(named([{**case, **MODELS[model]}])[0] for case in pair) for pair in AWKWARD]
    drawn = named(drawn_cases(seed, count, ranks, model))
    sources = named([*drawn, *(source for source, _ in awkward)])
    loads = [case["name"] for case in drawn]
    targets = named(
        [
            *({**case, "loads": list(loads)} for case in drawn_cases(seed + 1, count, ranks, model)),
            *({**single(precision, model), "loads": list(loads)} for precision in PRECISIONS),
        ]
    )
    by_name = {case["name"]: case for case in targets}
    for source, target in [*awkward, *((one, one) for one in sources)]:
        into = by_name.setdefault(target["name"], {**target, "loads": []})
        if source["name"] not in into["loads"]:
            into["loads"].append(source["name"])
    return sources, list(by_name.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=12, help="sources, and targets, that are drawn")
    parser.add_argument(
        "--ranks", type=int, default=8, help="most ranks of a drawn combination; the awkward have up to 6"
    )
    args = parser.parse_args()
    failed = 0
    for model in args.models:
        started = time.monotonic()
        sources, targets = cases(model, args.seed, args.count, args.ranks)
        print(f"{model}: sources:", ", ".join(case["name"] for case in sources), flush=True)
        print(f"{model}: targets:", ", ".join(case["name"] for case in targets), flush=True)
        with tempfile.TemporaryDirectory() as folder:
            pairs, problems, worst = compare(Path(folder), sources, targets)
        failed += len(problems)
        for problem in problems:
            print(problem)
        print("| computed in | pairs | loss | gradient norm | weights |\n|---|---|---|---|---|")
        for kind, (count, *columns) in sorted(worst.items()):
            print(f"| {kind} | {count} | " + " | ".join(f"{value:.1e}" for value in columns) + " |")
        took = time.monotonic() - started
        print(f"{model}: {pairs} pairs, {len(problems)} problems, {took:.0f} s", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
