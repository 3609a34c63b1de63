"""Perplexity of a model per language, with its sums written out.

MODEL is a run, a checkpoint, a Hugging Face or logical directory, or another trainer's files. DATA is a token folder
(and a --split of it), a corpus split such as DATA/valid, or a .jsonl or .txt file (a document a line).
    python tools/evaluate_perplexity.py runs/first tokens/pydocs --output scores/first
    python tools/evaluate_perplexity.py exports/first DATA/valid --language en fr --output scores/en_fr
    python tools/evaluate_perplexity.py runs/first tokens/pydocs --definition sliding --last_n 128 --output scores/last
writes SCORES/result.json and prints a table. What each definition counts stands in xlmega/evaluation/perplexity.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from xlmega.errors import ConfigError, DataError, run_main
from xlmega.evaluation.documents import check_output, open_documents, vocabulary_of, write_result
from xlmega.evaluation.numberings import numbered, numberings_by_hand, numberings_of_run
from xlmega.evaluation.perplexity import DEFINITIONS, Definition, Perplexity, Spelling, perplexity, report, total
from xlmega.evaluation.scoring import LogicalScorer, device_named
from xlmega.text.vocabulary import load_vocabulary
from xlmega.training.checkpoint import open_source
from xlmega.weights.directory import DTYPES, dtype_named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="see above")
    parser.add_argument("data", type=Path, help="see above")
    parser.add_argument("--output", type=Path, required=True, help="folder of result.json")
    parser.add_argument("--split", default="valid", help="of a token folder (default %(default)s)")
    parser.add_argument("--language", nargs="+", default=(), help="these only; clones are called en-clone1")
    parser.add_argument("--definition", choices=DEFINITIONS, default="documents")
    parser.add_argument(
        "--length", type=int, default=0, help="of a window or the longest document; default: the model's"
    )
    parser.add_argument("--last_n", type=int, default=128, help="sliding: targets that count in a window, and its step")
    parser.add_argument("--max_documents", type=int, default=0, help="the first ones of each language; default: all")
    parser.add_argument(
        "--mean_of_batch_exponentials",
        type=int,
        default=0,
        metavar="SEQUENCES",
        help="also that figure, of such batches",
    )
    parser.add_argument("--vocabulary", type=Path, help="vocabulary folder; the model's own is the default")
    parser.add_argument("--num_cloned_languages", type=int, default=0, help="of the model; a run says so itself")
    parser.add_argument("--frac_clone", type=float, default=1.0, help="with --num_cloned_languages")
    parser.add_argument("--second_vocabulary", type=Path, help="of the model; a run says so itself")
    parser.add_argument("--merge_vocab", action="store_true", help="with --second_vocabulary")
    parser.add_argument("--config", type=Path, help="folder of the config.json of another trainer's MODEL without one")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the computation")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="positions in a batch; changes the speed only")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_output(args.output, overwrite=args.overwrite)
    source = open_source(args.model, args.config)
    definition = Definition(args.definition, args.length, args.last_n, args.mean_of_batch_exponentials)
    definition = definition.checked(source.config.max_positions)
    own = vocabulary_of(source, args.vocabulary)
    languages, vocabulary = open_documents(args.data, own, split=args.split, max_documents=args.max_documents)
    numberings = numberings_of_run(source)
    if numberings is None:
        second = [load_vocabulary(args.second_vocabulary)] if args.second_vocabulary else []
        settings = {"num_clones": args.num_cloned_languages, "frac_clone": args.frac_clone, "merge": args.merge_vocab}
        numberings = numberings_by_hand([own or vocabulary, *second], **settings)
    elif args.num_cloned_languages or args.second_vocabulary or args.merge_vocab:
        raise ConfigError("clones and second vocabularies of a run stand in its run.json: leave these options out.")
    if numberings.space.size > source.config.vocab_size:
        raise DataError(f"the ids go to {numberings.space.size}, and the model has {source.config.vocab_size}.")
    languages = numbered(languages, vocabulary, numberings, args.language)
    scorer = LogicalScorer(source, dtype=dtype_named(args.dtype), device=device_named(args.device))
    spelling, scores = Spelling.of(vocabulary), dict[str, Perplexity]()
    for name, language in languages.items():
        begun = time.monotonic()
        scores[name] = perplexity(
            scorer,
            language.read(),
            definition,
            spelling,
            vocabulary.eod_id,
            batch_tokens=args.batch_tokens,
            numbering=language.numbering,
        )
        print(f"{name}: {scores[name].tokens:,} tokens in {time.monotonic() - begun:.1f} s", flush=True)
    result = {
        "model": str(args.model),
        "data": str(args.data),
        "split": args.split,
        "vocabulary": vocabulary.hash,
        "definition": dataclasses.asdict(definition),
        "max_documents": args.max_documents,
        "dtype": args.dtype,
        "languages": {name: one.table() for name, one in scores.items()},
        "all": total(scores.values()).table(),
    }
    for line in report(scores):
        print(line)
    if definition.batch_windows and not any(one.batch_exponentials for one in scores.values()):
        print(f"no mean of batch exponentials: no language has a batch of {definition.batch_windows} sequences")
    print(f"wrote {write_result(args.output, result)}")


if __name__ == "__main__":
    run_main(main)
