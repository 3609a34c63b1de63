"""Perplexity per language of experts together, alone and routed, against other models, with the sums written out.

EXPERTS is the output of tools/train_experts.py, an exported ensemble, or the experts' models in the order of clusters.
    python tools/evaluate_ensemble.py experts/tfidf4 --clusterer clusterers/tfidf4 --data tokens/pydocs --matrix \\
        --compare dense=experts/tfidf4/dense seed=runs/first --output scores/tfidf4
    python tools/evaluate_ensemble.py experts/typology4 --kind routing --data tokens/pydocs --output scores/typology4
writes SCORES/result.json, with --matrix SCORES/matrix.png, and with --export a directory that holds the ensemble.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from xlmega import config
from xlmega.errors import ConfigError, DataError, run_main
from xlmega.evaluation.documents import check_output, open_documents, write_result
from xlmega.evaluation.perplexity import DEFINITIONS, Definition, Spelling
from xlmega.evaluation.scoring import Scorer
from xlmega.experts.clusterer import LanguageClusterer
from xlmega.experts.collection import Ensemble, scorer_of
from xlmega.experts.comparison import ROUTING, Comparison
from xlmega.experts.ensemble import generate
from xlmega.experts.pictures import draw_matrix
from xlmega.experts.told import cluster_marks, told
from xlmega.experts.weighing import KINDS, WeighingSettings
from xlmega.weights.directory import DTYPES, dtype_named


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experts", type=Path, nargs="+", help="see above")
    parser.add_argument("--data", type=Path, required=True, help="token folder, corpus split, or .jsonl or .txt file")
    parser.add_argument("--output", type=Path, required=True, help="folder of result.json")
    parser.add_argument("--round", type=int, default=0, help="of train_experts.py's output; the last by default")
    parser.add_argument("--clusterer", type=Path, help="a folder from tools/train_clusterer.py")
    parser.add_argument("--kind", default="", metavar="A,B", help=f"rules: {ROUTING}, {', '.join(KINDS)}")
    parser.add_argument("--temperature", type=float, default=0.1, help="of cluster weights")
    parser.add_argument("--published_square", action="store_true", help="square the squared distance, as c-BTM's code")
    parser.add_argument("--top_k", type=int, default=0, help="experts at a position; 0: all")
    parser.add_argument("--cluster_ratio", type=float, default=1.0, help="part of a text that sets cluster weights")
    parser.add_argument("--prior", default="", metavar="P,P|training", help="of bayes, posterior and fixed")
    parser.add_argument("--matrix", action="store_true", help="every expert alone on every language, too")
    parser.add_argument("--compare", nargs="+", default=[], metavar="NAME=MODEL", help="other models")
    parser.add_argument(
        "--told", nargs="+", default=[], metavar="NAME=MODEL", help="trained with cluster_token: told --clusterer's"
    )
    parser.add_argument("--split", default="valid", help="of a token folder (default %(default)s)")
    parser.add_argument("--language", nargs="+", default=(), help="these only")
    parser.add_argument("--definition", choices=DEFINITIONS, default="documents")
    parser.add_argument("--length", type=int, default=0, help="of the longest document; default: the model's")
    parser.add_argument("--max_documents", type=int, default=0, help="the first ones of each language; default: all")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="of the computation")
    parser.add_argument("--devices", default="cpu", metavar="A,B", help="expert e lives on device e mod their number")
    parser.add_argument("--resident", type=int, default=0, help="experts in memory at once; 0: all")
    parser.add_argument("--batch_tokens", type=int, default=8192, help="positions in a batch; changes the speed only")
    parser.add_argument("--export", type=Path, help="write the ensemble here, experts as Hugging Face directories")
    parser.add_argument("--prompt", help="also let the first rule go on with this text")
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_output(args.output, overwrite=args.overwrite)
    ensemble = opened(args)
    kinds = [kind for kind in args.kind.split(",") if kind] or [default_kind(ensemble)]
    rules = {kind: settings_of(args, kind, ensemble) for kind in kinds if kind != ROUTING}
    for settings in rules.values():
        ensemble.weighing_of(settings)
    others, knowing = named(args.compare), named(args.told)
    if knowing and ensemble.clusterer is None:
        raise ConfigError("--told needs --clusterer: it says which cluster each text is told to be of.")
    dtype = dtype_named(args.dtype)
    devices = [device for device in args.devices.split(",") if device]
    pool = ensemble.pool(resident=args.resident, devices=devices, dtype=dtype)
    positions = pool.expert(0).max_positions
    if knowing and ensemble.clusterer is not None:  # a mark takes its place
        positions -= len(cluster_marks(ensemble.vocabulary, ensemble.clusterer.num_clusters)[0])
    definition = Definition(args.definition, args.length).checked(positions)
    languages, vocabulary = open_documents(
        args.data, ensemble.vocabulary, split=args.split, max_documents=args.max_documents
    )
    if vocabulary.hash != ensemble.vocabulary.hash:
        raise DataError(
            f"'{args.data}' is of vocabulary {vocabulary.hash[:12]}, the experts of {ensemble.vocabulary.hash[:12]}."
        )
    missing = [code for code in args.language if code not in languages]
    if missing:
        raise ConfigError(f"'{args.data}' has no '{missing[0]}'; it has {', '.join(languages)}.")
    chosen = {code: one for code, one in languages.items() if not args.language or code in args.language}
    if ROUTING in kinds:
        for code in chosen:
            ensemble.route(code)
    compared = Comparison(
        chosen,
        definition,
        Spelling.of(vocabulary),
        vocabulary.eod_id,
        args.batch_tokens,
        lambda line: print(line, flush=True),
    )
    for name, folder in others.items():
        model = scorer_of(folder, device=devices[0], dtype=dtype)
        compared.score(name, lambda code, model=model: model)  # type: ignore[misc]
    for name, folder in knowing.items():
        assert ensemble.clusterer is not None
        model, knows = scorer_of(folder, device=devices[0], dtype=dtype), ensemble.clusterer
        compared.score(name, lambda code, model=model, knows=knows: told(model, knows, vocabulary, code))  # type: ignore[misc]
    compared.score_ensemble(ensemble, pool, rules, routing=ROUTING in kinds, matrix=args.matrix)
    for line in compared.table():
        print(line)
    result = {
        "experts": [str(folder) for folder in ensemble.folders],
        "clusterer": str(args.clusterer or ""),
        "data": str(args.data),
        "split": args.split,
        "vocabulary": vocabulary.hash,
        "definition": dataclasses.asdict(definition),
        "max_documents": args.max_documents,
        "dtype": args.dtype,
        "rules": {name: config.to_table(settings) for name, settings in rules.items()},
        "compared": {name: str(folder) for name, folder in others.items()},
        "told": {name: str(folder) for name, folder in knowing.items()},
        "rows": compared.result(),
    }
    written = [str(write_result(args.output, result))]
    if args.matrix:
        names = [*ensemble.names]
        draw_matrix(compared.perplexities(names), names, list(chosen), args.output / "matrix.png", label="perplexity")
        written.append(str(args.output / "matrix.png"))
    if args.prompt is not None:
        scorer: Scorer = ensemble.scorer(pool, next(iter(rules.values()), WeighingSettings("uniform")))
        ids = [vocabulary.eod_id, *vocabulary.encode(args.prompt)]
        print(
            args.prompt
            + vocabulary.decode(generate(scorer, ids, 60, eod_id=vocabulary.eod_id, temperature=0.8, top_p=0.9))
        )
    if args.export:
        settings = next(iter(rules.values()), WeighingSettings("uniform"))
        ensemble.export(args.export, settings=settings, overwrite=args.overwrite)
        written.append(str(args.export))
    print(f"wrote {', '.join(written)}")


def opened(args: argparse.Namespace) -> Ensemble:
    if len(args.experts) == 1:
        return Ensemble.open(args.experts[0], round_number=args.round, clusterer=args.clusterer)
    if args.round:
        raise ConfigError("--round is of the output of train_experts.py, but several models were given.")
    return Ensemble.of(args.experts, clusterer=args.clusterer)


def default_kind(ensemble: Ensemble) -> str:
    """Clusters by text weigh each position; clusters by language route."""
    if ensemble.clusterer is None:
        return ROUTING if any(ensemble.documents) else "uniform"
    return ROUTING if isinstance(ensemble.clusterer, LanguageClusterer) else "clustering"


def settings_of(args: argparse.Namespace, kind: str, ensemble: Ensemble) -> WeighingSettings:
    if args.prior == "training":
        prior = tuple(float(sum(one.values())) for one in ensemble.documents)
        if not prior:
            raise ConfigError("--prior training needs experts that say what they were trained on; give numbers.")
    else:
        try:
            prior = tuple(float(part) for part in args.prior.split(",") if part)
        except ValueError:
            raise ConfigError(f"--prior takes numbers with commas, or 'training'; got '{args.prior}'.") from None
    return WeighingSettings(
        kind=kind,  # type: ignore[arg-type]
        temperature=args.temperature,
        published_square=args.published_square,
        top_k=args.top_k,
        cluster_ratio=args.cluster_ratio,
        prior=prior if kind in ("bayes", "posterior", "fixed") else (),
    )


def named(texts: list[str]) -> dict[str, Path]:
    found = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not name or not path:
            raise ConfigError(f"--compare and --told take NAME=MODEL, such as dense=runs/dense; got '{text}'.")
        found[name] = Path(path)
    return found


if __name__ == "__main__":
    run_main(main)
