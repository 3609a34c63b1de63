"""Take over an existing vocabulary: a Hugging Face folder, a tokenizer.json or a SentencePiece model.

    python tools/import_vocabulary.py models/xglm-1.7B --output vocab/xglm

keeps the ids as they are there (XGLM's SentencePiece model gets fairseq's numbering: 256,008 ids).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import run_main
from xlmega.text import vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a folder of transformers, a tokenizer.json or a *.model file")
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--eod", default="", help="the piece that ends a document; the tokenizer's own by default")
    parser.add_argument("--pad", default="", help="the piece for padding; the tokenizer's own, if any, by default")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier vocabulary")
    args = parser.parse_args()
    made = vocabulary.import_vocabulary(args.source, args.output, eod=args.eod, pad=args.pad, overwrite=args.overwrite)
    specials = ", ".join(f"{role} {made.piece(id)} = {id}" for role, id in made.specials.items())
    print(f"{made.kind}: {made.size:,} ids ({specials}), hash {made.hash[:12]}")
    print("lossless" if made.lossless else "not lossless: it normalises text, or knows an unknown piece")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
