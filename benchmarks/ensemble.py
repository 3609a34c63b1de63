"""Scoring text with the two best of eight experts, beside one expert alone.

    python benchmarks/ensemble.py ../shared/data/pydocs --k 8 --top_k 2

Eight models of one shape (weights drawn; speed does not depend on them), a clusterer trained on the text, documents of
every language, the same batches for both, in turns; the ratio of the medians is what counts (bound: at most 2.5). Also
told: the ratio of processor seconds, the mean number of experts with weight at a position and asked for a document, and
the time of the weights alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xlmega.evaluation.scoring import LogicalScorer
from xlmega.experts.clusterer import train_clusterer
from xlmega.experts.clustering import KMeansSettings
from xlmega.experts.ensemble import EnsembleScorer, ExpertPool
from xlmega.experts.features import FeatureSettings
from xlmega.experts.weighing import Weighing, WeighingSettings
from xlmega.models.config import model_config
from xlmega.text.corpus import corpus_files, read_corpus, read_documents
from xlmega.text.vocabulary import load_vocabulary, train_vocabulary
from xlmega.weights.initial import InitialWeights
from xlmega.weights.names import logical_shapes


class Drawn:
    """A model with weights drawn from a seed."""

    def __init__(self, config: Any, seed: int) -> None:
        self.config, self._shapes = config, logical_shapes(config)
        self._weights = InitialWeights(config, seed, self._shapes)

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        return self._weights.read_slice(name, tuple(slice(None) for _ in self._shapes[name]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with train/ and valid/")
    parser.add_argument("--folder", type=Path, required=True, help="where the vocabulary is made")
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--documents", type=int, default=3, help="of each language")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16, help="texts scored together")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not args.folder.is_dir():
        train_vocabulary(
            (d.text for d in itertools.islice(read_corpus(args.data / "train"), 0, None, 8)), 8192, args.folder
        )
    vocabulary = load_vocabulary(args.folder)
    clusterer = train_clusterer(args.data / "train", KMeansSettings(args.k), FeatureSettings())
    files = corpus_files(args.data / "valid")
    texts = [d.text for file in files for d in itertools.islice(read_documents(file), args.documents)]
    rows = [[vocabulary.eod_id, *vocabulary.encode(text)][: args.length + 1] for text in texts]
    rows = [row for row in rows if len(row) == args.length + 1]
    ids_BL = torch.tensor(rows)
    sizes = {"num_layers": args.layers, "hidden_size": args.hidden, "ffn_hidden_size": 4 * args.hidden, "num_heads": 6}
    config = model_config(preset="xglm_tiny", vocab_size=vocabulary.size, **sizes)
    scorers = [LogicalScorer(Drawn(config, seed)) for seed in range(args.k)]
    pool = ExpertPool([lambda one=one: one for one in scorers])  # type: ignore[misc]
    weighing = Weighing(WeighingSettings(top_k=args.top_k), args.k, clusterer, vocabulary)
    ensemble = EnsembleScorer(pool, weighing)
    print(f"{len(rows)} texts of {args.length} tokens, models of {config.num_parameters():,} parameters", flush=True)
    seconds: dict[str, list[float]] = {"one": [], "ensemble": [], "weights": []}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    weights = weighing.before_experts(ids_BL[:, :-1].tolist(), args.length)
    for number in range(args.rounds + 1):
        for name in seconds:
            begun, worked = time.perf_counter(), time.process_time()
            for batch in ids_BL.split(args.batch):
                inputs, targets = batch[:, :-1], batch[:, 1:]
                if name == "one":
                    scorers[0].log_probabilities(inputs, targets)
                elif name == "ensemble":
                    ensemble.log_probabilities(inputs, targets)
                else:
                    weighing.before_experts(inputs.tolist(), args.length)
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
                processor[name].append(time.process_time() - worked)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    ratio = statistics.median(e / o for e, o in zip(seconds["ensemble"], seconds["one"], strict=True))
    by_processor = statistics.median(e / o for e, o in zip(processor["ensemble"], processor["one"], strict=True))
    asked = (weights > 0).any(axis=1).sum(axis=1)
    last = np.argmax((weights > 0)[:, ::-1], axis=1)
    positions = np.where((weights > 0).any(axis=1), args.length - last, 0).sum(axis=1) / args.length
    print(
        f"one expert {median['one']:.2f} s, top-{args.top_k} of {args.k} {median['ensemble']:.2f} s: {ratio:.2f} "
        f"times, {by_processor:.2f} by processor seconds"
    )
    print(
        f"weights alone {median['weights']:.2f} s; experts asked for a text {asked.mean():.2f}, passes in full texts "
        f"{positions.mean():.2f}"
    )
    if args.output:
        told = {
            "seconds": seconds,
            "processor": processor,
            "ratio": ratio,
            "passes": float(positions.mean()),
            "asked": float(asked.mean()),
        }
        args.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
