"""Learn which documents belong together: TF-IDF, an SVD and balanced k-means; or write clusters by language or by lot.

python tools/train_clusterer.py DATA/train --k 4 --output clusterers/tfidf4
python tools/train_clusterer.py DATA/train --k 4 --kind random --output clusterers/random4
python tools/train_clusterer.py --languages "en,es,bg,ru ja,ko,tr,zh" --output clusterers/given2
python tools/train_clusterer.py --kind typology --languages "en es bg ru ja ko" --k 3 --output clusterers/typology3
"""

from __future__ import annotations

import argparse
from pathlib import Path

from xlmega.errors import ConfigError, run_main
from xlmega.experts.clusterer import (
    Clusterer,
    LanguageClusterer,
    RandomClusterer,
    TextClusterer,
    check_free,
    save_clusterer,
    train_clusterer,
)
from xlmega.experts.clustering import KMeansSettings
from xlmega.experts.features import FeatureSettings
from xlmega.experts.pictures import draw_tree
from xlmega.experts.segmentation import SEGMENTATIONS
from xlmega.experts.typology import LINKAGES, language_tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path, nargs="?", help="a folder SHARD-OR-LANGUAGE/*.jsonl[.gz|.zst]")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--k", type=int, help="number of clusters")
    parser.add_argument("--kind", choices=("text", "random", "typology"), default="text")
    parser.add_argument("--languages", metavar="'A,B C,D'", help="clusters by language, instead of from a split")
    parser.add_argument("--linkage", choices=LINKAGES, default="single", help="distance of two clusters (typology)")
    parser.add_argument("--feature_set", default="syntax_average", help="of lang2vec (typology)")
    parser.add_argument("--tree", choices=("pairs", "halves"), default="pairs", help="from below or above (typology)")
    parser.add_argument("--picture", type=Path, help="draw the tree of the languages there (typology)")
    parser.add_argument("--segmentation", choices=SEGMENTATIONS, default="scripts", help="how text is cut into terms")
    parser.add_argument(
        "--stop_words", default="all", metavar="A,B", help="languages whose commonest words are left out"
    )
    parser.add_argument("--max_terms", type=int, default=500_000)
    parser.add_argument("--num_components", type=int, default=100)
    parser.add_argument("--svd_documents", type=int, default=50_000, help="fit the SVD on this many; 0: all")
    parser.add_argument("--sample_documents", type=int, default=200_000, help="learn from this many, drawn uniformly")
    parser.add_argument("--metric", choices=("euclidean", "cosine"), default="euclidean")
    parser.add_argument("--method", choices=("balanced", "published", "unbalanced"), default="balanced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--overwrite", action="store_true")
    args = parser.parse_args()
    check_free(args.output, overwrite=args.overwrite)
    clusterer: Clusterer
    if args.kind == "typology":
        clusterer = by_typology(args)
    else:
        clusterer = by_language(args) if args.languages else from_split(args)
    save_clusterer(clusterer, args.output, overwrite=args.overwrite)
    if isinstance(clusterer, TextClusterer):
        for name, value in clusterer.about.items():
            if name.startswith("sample_sizes"):
                print(f"  {name}: {' '.join(map(str, value))}")
    print(f"wrote {args.output}: {clusterer.num_clusters} clusters")


def from_split(args: argparse.Namespace) -> Clusterer:
    if args.k is None or args.k < 1:
        raise ConfigError(f"--k says how many clusters, from 1; it is {args.k}.")
    if args.kind == "random":
        return RandomClusterer(args.k, args.seed)
    if args.split is None:
        raise ConfigError("clusters by text are learnt from a split: name one, such as DATA/train.")
    features = FeatureSettings(
        segmentation=args.segmentation,
        stop_words=tuple(code for code in args.stop_words.split(",") if code),
        max_terms=args.max_terms,
        num_components=args.num_components,
        svd_documents=args.svd_documents,
        seed=args.seed,
    )
    kmeans = KMeansSettings(args.k, args.metric, args.method, args.seed)
    problems = [*features.problems(), *kmeans.problems()]
    if problems:
        raise ConfigError("\n  ".join(f"--{problem}" for problem in problems))
    return train_clusterer(
        args.split,
        kmeans,
        features,
        sample_documents=args.sample_documents,
        say=lambda line: print(line, flush=True),
    )


def by_typology(args: argparse.Namespace) -> Clusterer:
    codes = (args.languages or "").replace(",", " ").split()
    if args.k is None or args.split is not None or not codes:
        raise ConfigError("--kind typology takes --languages 'A B C D' and --k, and no split.")
    tree = language_tree(codes, feature_set=args.feature_set, linkage=args.linkage, method=args.tree)
    if args.picture:
        draw_tree(tree, args.picture)
    clusters = tree.clusters(args.k)
    for k, cluster in enumerate(clusters):
        print(f"  {k}: {' '.join(cluster)}")
    return LanguageClusterer({code: k for k, cluster in enumerate(clusters) for code in cluster})


def by_language(args: argparse.Namespace) -> Clusterer:
    groups = [[code for code in group.split(",") if code] for group in args.languages.split()]
    codes = [code for group in groups for code in group]
    twice = sorted({code for code in codes if codes.count(code) > 1})
    if twice:
        raise ConfigError(f"--languages names '{twice[0]}' twice; a language is in one cluster.")
    if args.split is not None or args.k not in (None, len(groups)):
        raise ConfigError(f"--languages gives {len(groups)} clusters by itself: leave out the split, and --k.")
    return LanguageClusterer({code: k for k, group in enumerate(groups) for code in group})


if __name__ == "__main__":
    run_main(main)
