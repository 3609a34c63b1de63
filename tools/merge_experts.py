"""Average models of one shape: runs, checkpoints, Hugging Face or logical directories, or other trainers' files.

Weights are given, uniform, or from how often a language's documents fall into each expert's cluster.
    python tools/merge_experts.py runs/expert0 runs/expert1 --output models/mean
    python tools/merge_experts.py models/expert0 models/expert1 --weights 3 1 --to hf --output exports/mean
    python tools/merge_experts.py models/expert* --histogram clusters/valid/sw --subset_k 2 --output models/mean_sw
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import ConfigError, run_main
from xlmega.training.checkpoint import open_source
from xlmega.weights.directory import DTYPES, check_output, write_logical
from xlmega.weights.merge import Mean, histogram_weights, read_histogram, uniform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", type=Path, nargs="+", help="directories or files, see above")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--to", choices=("logical", "hf"), default="logical")
    parser.add_argument("--weights", type=float, nargs="+", help="one for each expert, on any scale; default: uniform")
    parser.add_argument("--histogram", type=Path, help="JSON of documents per cluster, or assignments to count them in")
    parser.add_argument("--subset_k", type=int, default=0, help="only the most frequent clusters of --histogram")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--config", type=Path, help="folder of the config.json of other trainers' files without one")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    if args.weights and args.histogram:
        raise ConfigError("--weights and --histogram both say how much each expert counts. Give one of them.")
    if args.subset_k and not args.histogram:
        raise ConfigError("--subset_k is of --histogram, which is not given.")
    check_output(args.output, args.experts, overwrite=args.overwrite)
    if args.histogram:
        weights = histogram_weights(read_histogram(args.histogram), len(args.experts), args.subset_k)
    else:
        weights = args.weights or uniform(len(args.experts))
    mean = Mean([open_source(expert, args.config) for expert in args.experts], weights)
    shares = list(zip(args.experts, mean.weights, strict=True))
    for expert, share in shares:
        print(f"{share:8.6f}  {expert}")
    settings = {"dtype": args.dtype, "overwrite": args.overwrite, "vocabulary_folder": mean.vocabulary_folder}
    if args.to == "hf":
        from xlmega.weights.huggingface import export_huggingface  # transformers takes seconds to import

        card = {
            "name": args.output.name,
            "mean of": ", ".join(f"{share:g} x {expert}" for expert, share in shares),
        }
        files = export_huggingface(mean, args.output, card=card, **settings)
    else:
        files = write_logical(mean, args.output, **settings)
    size = sum(path.stat().st_size for path in files)
    print(f"wrote {args.output}: {len(files)} files, {size / 1e6:.1f} MB, the mean of {len(args.experts)} models")


if __name__ == "__main__":
    run_main(main)
