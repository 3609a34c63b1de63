"""Train on existing Megatron token files: add the manifests they lack, by language.

    python tools/adopt_tokens.py fr=old/fr_text_document sw=old/sw_text_document \\
        --vocabulary vocab/pydocs16k --output tokens/old

links one .bin a language where it lies; several prefixes of one language (en=old/en_0 en=old/en_1) are joined into a
new file. Every id is checked against the vocabulary.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.data.adopting import adopt_tokens
from xlmega.errors import ConfigError, run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefixes", nargs="+", metavar="LANG=PREFIX", help="the files are PREFIX.bin and PREFIX.idx")
    parser.add_argument("--vocabulary", type=Path, required=True, help="the folder of their vocabulary")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", default="train", help="'valid' and other names are validation sets")
    parser.add_argument("--copy", action="store_true", help="write new files instead of links")
    parser.add_argument("--overwrite", action="store_true", help="replace the split if it is there")
    args = parser.parse_args()
    prefixes: dict[str, list[Path]] = {}
    for given in args.prefixes:
        language, equals, prefix = given.partition("=")
        if not equals or not prefix:
            raise ConfigError(f"'{given}' is not LANG=PREFIX, as in fr=old/fr_text_document.")
        prefixes.setdefault(language, []).append(Path(prefix))
    made = adopt_tokens(
        prefixes,
        args.vocabulary,
        args.output,
        split=args.split,
        copy=args.copy,
        overwrite=args.overwrite,
        say=lambda line: print(line, flush=True),
    )
    for one in made:
        print(f"  {one.split}/{one.language}: {one.documents:,} documents, {one.tokens:,} tokens, {one.dtype}")
    print(f"wrote {args.output} ({args.split}, vocabulary)")


if __name__ == "__main__":
    run_main(main)
