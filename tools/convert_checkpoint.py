"""Turn a checkpoint into a Hugging Face directory (--to hf), or such a directory into logical form (--to logical).

SOURCE is a run directory (its newest checkpoint), one checkpoint, a Hugging Face directory, a logical directory, or
what other trainers save: consolidated.pt of metaseq, a .pt or .bin file, a directory of DeepSpeed. Its files show
which. A recipe can start from the logical form (init.weights).
    python tools/convert_checkpoint.py runs/first --to hf --output exports/first --dtype bfloat16 --verify
    python tools/convert_checkpoint.py downloads/xglm-564M --to logical --output models/xglm-564m
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.config import read_toml
from xlmega.errors import CheckpointError, ConfigError, run_main
from xlmega.training.checkpoint import open_source
from xlmega.weights.directory import DTYPES, check_free, write_logical
from xlmega.weights.huggingface import export_huggingface, verify_huggingface


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a directory or file, see above")
    parser.add_argument("--to", choices=("hf", "logical"), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--config", type=Path, help="folder of the config.json of another trainer's SOURCE without one")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary folder; the source's own is the default")
    parser.add_argument("--card", type=Path, help="TOML with what the model card shall say: name, data, languages, ...")
    parser.add_argument("--verify", action="store_true", help="reload the export with transformers and compare (hf)")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    if args.to == "logical" and (args.verify or args.card):
        raise ConfigError("--verify and --card are of Hugging Face directories; with --to logical leave them out.")
    card = read_toml(args.card) if args.card else {}
    if args.output.resolve() == args.source.resolve():
        raise CheckpointError(f"--output is the source itself, '{args.source}'. Choose another.")
    check_free(args.output, overwrite=args.overwrite)
    source = open_source(args.source, args.config)
    vocabulary = args.vocabulary or source.vocabulary_folder
    settings = {"dtype": args.dtype, "overwrite": args.overwrite, "vocabulary_folder": vocabulary}
    if args.to == "hf":
        step = {"step": source.step} if hasattr(source, "step") else {}
        files = export_huggingface(source, args.output, card={"name": args.output.name, **step, **card}, **settings)
    else:
        files = write_logical(source, args.output, **settings)
    if args.verify:
        found = verify_huggingface(source, args.output)
        print(f"verified: {found.describe()}")
    if vocabulary is None:
        print("no vocabulary was found with the source, so none was written; --vocabulary FOLDER adds one")
    size = sum(path.stat().st_size for path in files)
    print(
        f"wrote {args.output}: {len(files)} files, {size / 1e6:.1f} MB, {source.config.num_parameters():,} parameters"
    )


if __name__ == "__main__":
    run_main(main)
