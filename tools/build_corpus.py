"""Write a corpus, from text as you have it or made up. One verb for each kind of source:

    python tools/build_corpus.py text TEXTS --output data/mine
    python tools/build_corpus.py mc4 MC4 --num_shards 1024 --output data/mc4
    python tools/build_corpus.py oscar OSCAR --languages de --megabytes 4096 --output data/oscar_de
    python tools/build_corpus.py europarl --languages en fr --europarl EP.en EP.fr --output data/europarl
    python tools/build_corpus.py bitext opus:TED2020 hf:allenai/nllb --languages eng swh --output data/eng_swh
    python tools/build_corpus.py --made --output data/made

Each writes OUTPUT/train/... and, where there is one, OUTPUT/valid/..., as tools/tokenize_corpus.py reads them; pairs go
to OUTPUT/parallel/. The statistics of every stage are shown and kept (corpus.json). An interrupted build is finished by
the same command. `VERB --help` says more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from xlmega.errors import run_main
from xlmega.text import aligned, bitext, conversion, filters, mc4, parallel_sources, sources, synthetic
from xlmega.text.tally import Console, Statistics, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--made", action="store_true", help="the same as the verb 'made'")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for add in (add_text, add_mc4, add_oscar, add_europarl, add_bitext, add_made):
        add(verbs)
    words = sys.argv[1:]
    args = parser.parse_args(["made", *(w for w in words if w != "--made")] if "--made" in words else words)
    try:
        args.run(args)
    finally:
        say.close()


say = Console(sys.stdout)


def add_text(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("text", help="JSON lines, plain text, parquet, saved or hub data sets: all of it")
    parser.add_argument("source", help="a file, a folder [SPLIT/]LANG/..., or hf:NAME[:CONFIG[:SPLIT]]")
    parser.add_argument("--language", help="of all the text, where no folder says it; or the one to take")
    add_reading(parser)
    add_output(parser)

    def run(args: argparse.Namespace) -> None:
        statistics = conversion.convert_text(
            args.source,
            args.output,
            reading=sources.Reading(args.text_key, args.documents),
            language=args.language,
            overwrite=args.overwrite,
            say=say,
        )
        finish(args, statistics)

    parser.set_defaults(run=run)


def add_mc4(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("mc4", help="shards that mix the languages, from files of each language")
    parser.add_argument("source", type=Path, help="a folder {train,valid}/LANG/*.jsonl.gz, or of mC4's own files")
    parser.add_argument("--languages", nargs="+", default=(), help="only these")
    parser.add_argument("--num_shards", type=int, default=mc4.SHARDS, help="at most so many (default %(default)s)")
    parser.add_argument("--pieces", type=int, help="cut each language into so many (default: as many as it has files)")
    parser.add_argument("--compression", choices=tuple(mc4.COMPRESSIONS), default="none")
    add_output(parser)

    def run(args: argparse.Namespace) -> None:
        statistics = mc4.shard_languages(
            args.source,
            args.output,
            languages=args.languages,
            num_shards=args.num_shards,
            pieces=args.pieces,
            compression=args.compression,
            overwrite=args.overwrite,
            say=say,
        )
        finish(args, statistics)

    parser.set_defaults(run=run)


def add_oscar(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("oscar", help="the first megabytes for training, the following percent for validation")
    parser.add_argument("source", help="as for text; '{language}' in it stands for each language in turn")
    parser.add_argument("--languages", nargs="+", required=True)
    parser.add_argument("--megabytes", type=float, required=True, help="of 1024 x 1024 bytes, for each language")
    parser.add_argument("--valid_percent", type=float, default=10.0, help="of that, after it (default %(default)s)")
    add_reading(parser)
    add_output(parser)

    def run(args: argparse.Namespace) -> None:
        statistics = conversion.take_megabytes(
            args.source,
            args.output,
            args.languages,
            megabytes=args.megabytes,
            valid_percent=args.valid_percent,
            reading=sources.Reading(args.text_key, args.documents),
            overwrite=args.overwrite,
            say=say,
        )
        finish(args, statistics)

    parser.set_defaults(run=run)


def add_europarl(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("europarl", help="files aligned line by line: both languages, and their pairs")
    parser.add_argument("--languages", nargs=2, required=True, metavar=("A", "B"), help="codes of the two sides")
    files = ("FILE_A", "FILE_B")
    parser.add_argument("--europarl", nargs=2, type=Path, metavar=files, help="Europarl: all lines")
    parser.add_argument("--multiun", nargs=2, type=Path, metavar=files, help="MultiUN: the published limits")
    parser.add_argument(
        "--pair", nargs=3, action="append", default=[], metavar=("NAME", *files), help="any other, may be repeated"
    )
    parser.add_argument("--seed", type=int, default=aligned.SEED, help="of the held-out lines (default %(default)s)")
    parser.add_argument(
        "--lines_per_document", type=int, default=aligned.LINES_PER_DOCUMENT, help="at most (default %(default)s)"
    )
    add_output(parser)

    def run(args: argparse.Namespace) -> None:
        pairs = [aligned.europarl(*args.europarl)] if args.europarl else []
        pairs += [aligned.multiun(*args.multiun)] if args.multiun else []
        pairs += [aligned.Pair(name, Path(first), Path(second)) for name, first, second in args.pair]
        statistics = aligned.split_aligned(
            pairs,
            tuple(args.languages),
            args.output,
            seed=args.seed,
            lines_per_document=args.lines_per_document,
            overwrite=args.overwrite,
            say=say,
        )
        finish(args, statistics)

    parser.set_defaults(run=run)


def add_bitext(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("bitext", help="sentence pairs: fetched, filtered, without duplicates, scored, shuffled")
    parser.add_argument(
        "corpora",
        nargs="+",
        help="FILE_A,FILE_B (aligned lines), an OPUS archive (.zip), records with 'translation' (.jsonl, .parquet), a "
        "saved data set, hf:NAME or opus:NAME",
    )
    parser.add_argument("--languages", nargs=2, required=True, metavar=("SOURCE", "TARGET"))
    keep, select, opus = filters.Filters(), bitext.Selection(), parallel_sources.Opus()
    parser.add_argument("--max_per_corpus", type=int, default=select.max_per_corpus, help="pairs; 0: all (%(default)s)")
    parser.add_argument("--min_words", type=int, default=keep.min_words, help="of either side (%(default)s)")
    parser.add_argument("--max_words", type=int, default=keep.max_words, help="of either side (%(default)s)")
    parser.add_argument("--min_characters", type=int, default=keep.min_characters, help="(%(default)s)")
    parser.add_argument("--max_characters", type=int, default=keep.max_characters, help="0: any number (%(default)s)")
    parser.add_argument("--min_ratio", type=float, default=keep.min_ratio, help="of words, either way (%(default)s)")
    parser.add_argument("--max_ratio", type=float, default=keep.max_ratio, help="of words, either way (%(default)s)")
    parser.add_argument("--skip_normalisation", action="store_true", help="leave punctuation as it is")
    parser.add_argument("--skip_language_id", action="store_true", help="believe the corpora")
    parser.add_argument(
        "--embedding_threshold", type=float, default=select.embedding_threshold, help="0: no embeddings (%(default)s)"
    )
    parser.add_argument("--embedding_model", default=select.embedding_model, help="name or folder (%(default)s)")
    parser.add_argument("--embedding_batch_size", type=int, default=select.embedding_batch_size, help="(%(default)s)")
    parser.add_argument("--target_size", type=int, default=select.target_size, help="pairs; 0: all (%(default)s)")
    parser.add_argument("--valid_pairs", type=int, default=select.valid_pairs, help="beside those (%(default)s)")
    parser.add_argument("--seed", type=int, default=select.seed, help="of the order (%(default)s)")
    parser.add_argument("--opus_folder", type=Path, default=opus.folder, help="where archives are kept (%(default)s)")
    parser.add_argument("--opus_release", default=opus.release, help="(%(default)s)")
    parser.add_argument("--opus_preprocess", choices=parallel_sources.PREPROCESSINGS, default=opus.preprocess)
    add_output(parser)

    def run(args: argparse.Namespace) -> None:
        statistics = bitext.build_bitext(
            args.corpora,
            args.languages[0],
            args.languages[1],
            args.output,
            filters=filters.Filters(
                min_words=args.min_words,
                max_words=args.max_words,
                min_ratio=args.min_ratio,
                max_ratio=args.max_ratio,
                min_characters=args.min_characters,
                max_characters=args.max_characters,
                normalise_punctuation=not args.skip_normalisation,
                identify_language=not args.skip_language_id,
            ),
            selection=bitext.Selection(
                max_per_corpus=args.max_per_corpus,
                embedding_threshold=args.embedding_threshold,
                embedding_model=args.embedding_model,
                embedding_batch_size=args.embedding_batch_size,
                target_size=args.target_size,
                valid_pairs=args.valid_pairs,
                seed=args.seed,
            ),
            opus=parallel_sources.Opus(args.opus_folder, args.opus_release, args.opus_preprocess),
            overwrite=args.overwrite,
            say=say,
        )
        finish(args, statistics)

    parser.set_defaults(run=run)


def add_made(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = verbs.add_parser("made", help="small artificial languages: what they are says xlmega/text/synthetic.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--megabytes", type=float, default=3.0, help="training text, all languages (default %(default)s)"
    )
    parser.add_argument(
        "--languages", nargs="+", default=synthetic.LANGUAGES, help=f"of {' '.join(synthetic.GRAMMARS)}; biggest first"
    )
    parser.add_argument("--shares", nargs="+", type=float, default=(), help="relative sizes (default 8 4 2 1 1)")
    add_output(parser)

    def run(args: argparse.Namespace) -> None:
        summary = synthetic.make_corpus(
            args.output,
            seed=args.seed,
            languages=args.languages,
            megabytes=args.megabytes,
            shares=args.shares,
            overwrite=args.overwrite,
        )
        for language, size in summary.train_bytes.items():
            print(f"{language}: {summary.documents[language]:,} documents, {size / 1e6:.2f} MB")
        print(f"wrote {summary.output}")

    parser.set_defaults(run=run)


def add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text_key", default="text", help="the key or column of the text (default %(default)s)")
    parser.add_argument(
        "--documents", choices=sources.DOCUMENTS, default="paragraph", help="in plain text (default: %(default)s)"
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="the new folder")
    parser.add_argument("--overwrite", action="store_true", help="build anew what an earlier call built there")


def finish(args: argparse.Namespace, statistics: dict[str, Statistics]) -> None:
    say(table(statistics))
    say(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
