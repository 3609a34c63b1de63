"""Put any model into one logical directory: its parameters whole, under logical names, in safetensors.

SOURCE is a run (its newest checkpoint), one checkpoint, a Hugging Face or logical directory, or another trainer's files
(consolidated.pt of metaseq, .pt, .bin, DeepSpeed). A recipe starts from the result (init.weights); every tool reads it.
    python tools/consolidate_checkpoint.py runs/first --output models/first
    python tools/consolidate_checkpoint.py downloads/expert0/consolidated.pt --output models/expert0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import run_main
from xlmega.training.checkpoint import open_source
from xlmega.weights.directory import DTYPES, check_output, write_logical


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a directory or file, see above")
    parser.add_argument("--output", type=Path, required=True, help="the new logical directory")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--config", type=Path, help="folder of the config.json of another trainer's SOURCE without one")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary folder; the source's own is the default")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_output(args.output, [args.source], overwrite=args.overwrite)
    source = open_source(args.source, args.config)
    vocabulary = args.vocabulary or source.vocabulary_folder
    files = write_logical(source, args.output, dtype=args.dtype, overwrite=args.overwrite, vocabulary_folder=vocabulary)
    if vocabulary is None:
        print("no vocabulary was found with the source, so none was written; --vocabulary FOLDER adds one")
    size = sum(path.stat().st_size for path in files)
    print(
        f"wrote {args.output}: {len(files)} files, {size / 1e6:.1f} MB, {source.config.num_parameters():,} parameters"
    )


if __name__ == "__main__":
    run_main(main)
