"""Balanced k-means on many documents, beside the published auction and scikit-learn's unbalanced KMeans.

    python benchmarks/clustering.py ../shared/data/pydocs/train --documents 200000

The vectors are real ones (TF-IDF and SVD of the split's documents), repeated with noise up to `--documents`; all three
start from the same array in one process, in turns, and the medians are compared; processor seconds stand beside the
clock's, for other work on the machine changes them less. The auction's k-means is the published procedure (blocks of
50,000, 20 iterations each) with its inner loop in numpy. Quality is the mean squared distance to the own centre under a
balanced assignment. Memory is the peak of assigning files of 50,000 and 400,000 documents.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from sklearn.cluster import KMeans

from xlmega.experts.assignment import assign_clusters
from xlmega.experts.balancing import balanced_assignment
from xlmega.experts.clusterer import load_clusterer, save_clusterer, train_clusterer
from xlmega.experts.clustering import KMeansSettings, squared_distances, train_kmeans
from xlmega.experts.features import FeatureSettings, normalised
from xlmega.text.corpus import Document, read_corpus, write_documents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("split", type=Path)
    parser.add_argument("--documents", type=int, default=200_000)
    parser.add_argument("--k", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory_of", type=int, help="internal: assign this many documents and tell the peak")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.memory_of:
        print(json.dumps(memory_of(args.folder)))
        return
    clusterer = train_clusterer(args.split, KMeansSettings(args.k), FeatureSettings())
    texts = [document.text for document in read_corpus(args.split)]
    rows = clusterer.features.vectors(texts)
    generator = np.random.default_rng(0)
    chosen = rows[generator.integers(len(rows), size=args.documents)]
    vectors = normalised(chosen + 0.02 * generator.standard_normal(chosen.shape).astype(np.float32))
    print(f"{len(texts):,} documents to {len(vectors):,} vectors of {vectors.shape[1]}, k={args.k}", flush=True)
    seconds: dict[str, list[float]] = {"balanced": [], "auction": [], "sklearn": []}
    processor: dict[str, list[float]] = {name: [] for name in seconds}
    centres: dict[str, list[np.ndarray]] = {name: [] for name in seconds}
    for number in range(args.rounds):
        for name in seconds:
            begun, worked = time.perf_counter(), time.process_time()
            if name == "sklearn":
                found = KMeans(args.k, random_state=number).fit(vectors).cluster_centers_.astype(np.float32)
            else:
                method = "balanced" if name == "balanced" else "published"
                settings = KMeansSettings(args.k, method=method, seed=number)  # type: ignore[arg-type]
                found = train_kmeans(vectors, settings).centres
            centres[name].append(found)
            seconds[name].append(time.perf_counter() - begun)
            processor[name].append(time.process_time() - worked)
            print(
                f"round {number} {name}: {seconds[name][-1]:.2f} s, processor {processor[name][-1]:.2f} s", flush=True
            )
    result: dict[str, object] = {"documents": len(vectors), "k": args.k, "seconds": seconds, "processor": processor}
    median = {name: statistics.median(values) for name, values in seconds.items()}
    worked_for = {name: statistics.median(values) for name, values in processor.items()}
    for name, of_rounds in centres.items():
        costs, largest = [], []
        for found in of_rounds:
            distances = squared_distances(vectors, found, "euclidean")
            labels, _ = balanced_assignment(distances)
            assert np.ptp(np.bincount(labels)) <= 1
            costs.append(float(distances[np.arange(len(labels)), labels].mean(dtype=np.float64)))
            largest.append(int(np.bincount(np.argmin(distances, axis=1)).max()))
        cost = statistics.mean(costs)
        print(
            f"{name}: median {median[name]:.2f} s, processor {worked_for[name]:.2f} s; "
            f"mean squared distance, assigned evenly, {cost:.4f} "
            f"({min(costs):.4f} to {max(costs):.4f}); largest cluster by nearest centre {statistics.mean(largest):,.0f}"
        )
        result[name] = {"median_seconds": median[name], "costs": costs, "largest_by_nearest_centre": largest}
    print(
        f"the auction takes {median['auction'] / median['balanced']:.1f} times ours (bound: at least 5), ours "
        f"{median['balanced'] / median['sklearn']:.2f} times scikit-learn's (bound: at most 2)"
    )
    print(
        f"by processor seconds {worked_for['auction'] / worked_for['balanced']:.1f} and "
        f"{worked_for['balanced'] / worked_for['sklearn']:.2f} times"
    )
    result["memory"] = memory(args, clusterer)
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.output}")


def memory(args: argparse.Namespace, clusterer: object) -> dict[str, float]:
    """Peak memory, in MB, of assigning splits of two sizes with room for 20,000 candidates."""
    peaks = {}
    for number in (50_000, 400_000):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            save_clusterer(clusterer, root / "clusterer")  # type: ignore[arg-type]
            words = list(load_clusterer(root / "clusterer").features.vocabulary[::997])  # type: ignore[attr-defined]
            for file in range(number // 50_000):
                generator = np.random.default_rng(file)
                texts = (" ".join(words[k] for k in generator.integers(len(words), size=4)) for _ in range(50_000))
                write_documents(root / "train" / "xx" / f"{file:05d}.jsonl", (Document(t, "xx", "") for t in texts))
            line = [sys.executable, __file__, str(args.split), "--memory_of", str(number), "--folder", str(root)]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            peaks[f"{number:,}"] = json.loads(done.stdout.splitlines()[-1])
            print(f"assigning {number:,} documents evenly: peaks {peaks[f'{number:,}']} MB", flush=True)
    return peaks


def memory_of(folder: Path) -> dict[str, float]:
    assign_clusters(folder / "train", folder / "clusterer", folder / "out", balanced=True, only=True, candidates=20_000)
    own, workers = (
        resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return {"command": round(own), "worker": round(workers)}


if __name__ == "__main__":
    main()
