"""Turn a checkpoint into a Hugging Face directory (--to hf), or such a directory into logical form (--to logical).

SOURCE is a run directory (its newest checkpoint), one checkpoint, a Hugging Face directory, a logical directory, or
what other trainers save: consolidated.pt of metaseq, a .pt or .bin file, a directory of DeepSpeed. Its files show
which. A recipe can start from the logical form (init.weights). The vocabulary goes along: a run's own, the copy that an
export holds, or the tokenizer of a directory of transformers.
    python tools/convert_checkpoint.py runs/first --to hf --output exports/first --dtype bfloat16 --verify
    python tools/convert_checkpoint.py downloads/xglm-564M --to logical --output models/xglm-564m
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from xlmega.config import read_toml
from xlmega.errors import ConfigError, DataError, run_main
from xlmega.text.vocabulary import import_vocabulary
from xlmega.training.checkpoint import Checkpoint, open_source
from xlmega.weights.card import card_of
from xlmega.weights.directory import DTYPES, check_output, write_logical
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
    check_output(args.output, [args.source], overwrite=args.overwrite)
    source = open_source(args.source, args.config)
    with tempfile.TemporaryDirectory() as work:
        vocabulary = args.vocabulary or source.vocabulary_folder or tokenizer_of(args.source, Path(work))
        settings = {"dtype": args.dtype, "overwrite": args.overwrite, "vocabulary_folder": vocabulary}
        if args.to == "hf":
            known = card_of(source.manifest["facts"], source.step) if isinstance(source, Checkpoint) else {}
            files = export_huggingface(
                source, args.output, card={"name": args.output.name, **known, **card}, **settings
            )
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


def tokenizer_of(source: Path, work: Path) -> Path | None:
    """The tokenizer that lies in a directory of transformers, taken over as a vocabulary under `work`."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "sentencepiece.bpe.model")):
        return None
    try:
        import_vocabulary(source, work / "vocabulary")
    except (ConfigError, DataError) as error:
        print(f"the tokenizer in '{source}' is left out: {error}")
        return None
    return work / "vocabulary"


if __name__ == "__main__":
    run_main(main)
