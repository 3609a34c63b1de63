"""From a split to clusters: sizes, the published format, workers, SIGKILL, other kinds of clusterer, refusals."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from xlmega.errors import ConfigError, DataError
from xlmega.experts.assignment import assign_clusters, clusters_by_language, read_clusters
from xlmega.experts.clusterer import (
    LanguageClusterer,
    RandomClusterer,
    load_clusterer,
    save_clusterer,
    train_clusterer,
)
from xlmega.experts.clustering import KMeansSettings
from xlmega.experts.features import FeatureSettings
from xlmega.experts.slurm import share_of
from xlmega.text.corpus import Document, corpus_files, read_corpus, write_documents

ROOT = Path(__file__).resolve().parents[2]
KMEANS, FEATURES = KMeansSettings(4), FeatureSettings(num_components=16)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def clusterer(made_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("clusterers") / "text4"
    save_clusterer(train_clusterer(made_corpus / "train", KMEANS, FEATURES), output)
    return output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 documents in three files."""
    split = tmp_path_factory.mktemp("small") / "DATA" / "train"
    words = ["parser", "tree", "river", "boat", "music", "violin", "bread", "flour"]
    for k, name in enumerate(("a", "b", "c")):
        generator = random.Random(k)
        texts = [" ".join(generator.choices(words[2 * (j % 4) :][:4], k=9)) for j in range(22)]
        write_documents(split / name / "00000.jsonl.gz", (Document(text, name, "x") for text in texts))
    return split


def test_sixty_six_documents_make_four_clusters_of_sixteen_or_seventeen(small: Path, tmp_path: Path) -> None:
    save_clusterer(train_clusterer(small, KMEANS, FEATURES), tmp_path / "clusterer")
    table = assign_clusters(small, tmp_path / "clusterer", tmp_path / "out", balanced=True)
    assert sorted(table["splits"]["train"]["sizes"]) == [16, 16, 17, 17]
    first = json.loads((tmp_path / "out/train/b/00000.jsonl").read_text().splitlines()[3])
    assert first["sp_id"] == "train/b/00000.jsonl.gz|3" and first["cluster"] in range(4) and first["lang"] == "b"
    # With room for few candidates the rest is settled by prices, and sizes are still even.
    few = assign_clusters(small, tmp_path / "clusterer", tmp_path / "few", balanced=True, candidates=20)
    assert sorted(few["splits"]["train"]["sizes"]) == [16, 16, 17, 17]
    greedy = assign_clusters(small, tmp_path / "clusterer", tmp_path / "greedy")
    chosen = load_clusterer(tmp_path / "clusterer")
    documents = list(read_corpus(small))
    costs = chosen.costs(documents, [""] * 66)
    found = [read_clusters(tmp_path / "greedy", "train", f"{name}/00000.jsonl.gz")[0] for name in "abc"]
    np.testing.assert_array_equal(np.concatenate(found), np.argmin(costs, axis=1))
    np.testing.assert_array_equal(clusters_by_language(tmp_path / "greedy", "train")["c"], found[2])
    assert greedy["splits"]["train"]["by_language"]["a"] == np.bincount(found[0], minlength=4).tolist()


def test_training_depends_on_seed_and_text_alone(made_corpus: Path, clusterer: Path, tmp_path: Path) -> None:
    save_clusterer(train_clusterer(made_corpus / "train", KMEANS, FEATURES), tmp_path / "again")
    assert contents(clusterer) == contents(tmp_path / "again")
    moved = tmp_path / "moved" / "train"
    moved.parent.mkdir()
    moved.symlink_to(made_corpus / "train")
    one, other = (train_clusterer(s, KMEANS, FEATURES, sample_documents=50) for s in (moved, made_corpus / "train"))
    np.testing.assert_array_equal(one.kmeans.centres, other.kmeans.centres)
    assert one.about["sample_documents"] == 50 and one.about["documents"] > 50


def test_workers_and_interruptions_change_nothing(made_corpus: Path, clusterer: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    assign_clusters(made_corpus / "train", clusterer, whole, balanced=True)
    command = [sys.executable, str(ROOT / "tools/assign_clusters.py"), str(made_corpus / "train"), "--balanced"]
    line = [*command, "--clusterer", str(clusterer), "--workers", "2", "--output", str(tmp_path / "killed")]
    stores = tmp_path / "killed/train.part/costs"
    for wanted in (1, 3):
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and len(list(stores.glob("*/*.npz"))) < wanted:
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert contents(whole) == contents(tmp_path / "killed")
    assert done.stdout.splitlines()[-1] == f"wrote {tmp_path / 'killed'}: 4 clusters, train, valid"
    again = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert "train: finished before, kept" in again.stdout and contents(whole) == contents(tmp_path / "killed")


def test_shares_are_worked_on_by_several_commands_and_one_of_them_finishes(
    made_corpus: Path, clusterer: Path, tmp_path: Path
) -> None:
    assign_clusters(made_corpus / "train", clusterer, tmp_path / "whole", balanced=True)
    lines: list[str] = []
    common = {"balanced": True, "say": lines.append}
    first = assign_clusters(made_corpus / "train", clusterer, tmp_path / "shared", share=0, shares=2, **common)
    assert first["splits"] == {} and any("left to the other shares" in line for line in lines)
    second = assign_clusters(made_corpus / "train", clusterer, tmp_path / "shared", share=1, shares=2, **common)
    assert set(second["splits"]) == {"train", "valid"}
    assert contents(tmp_path / "whole") == contents(tmp_path / "shared")
    line = [sys.executable, str(ROOT / "tools/assign_clusters.py"), str(made_corpus / "train"), "--balanced"]
    line += ["--clusterer", str(clusterer), "--output", str(tmp_path / "at_once"), "--workers", "1", "--share"]
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "PYTHONPATH": str(ROOT)}}
    both = [subprocess.Popen([*line, f"{k}/2"], **quiet) for k in range(2)]  # type: ignore[call-overload]
    assert [one.wait(timeout=120) for one in both] == [0, 0]
    assert contents(tmp_path / "whole") == contents(tmp_path / "at_once")
    with pytest.raises(ConfigError, match="share 2 of 2"):
        assign_clusters(made_corpus / "train", clusterer, tmp_path / "x", share=2, shares=2)
    with pytest.raises(ConfigError, match="each would replace"):
        assign_clusters(made_corpus / "train", clusterer, tmp_path / "whole", share=1, shares=2, overwrite=True)


def test_a_share_is_what_slurm_says() -> None:
    assert share_of({"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}) == (1, 4)
    array = {"SLURM_ARRAY_TASK_MIN": "2", "SLURM_ARRAY_TASK_MAX": "6", "SLURM_ARRAY_TASK_STEP": "2"}
    third = {**array, "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_ID": "6", "SLURM_PROCID": "0"}
    assert share_of(third) == (2, 3)
    assert share_of({**third, "SLURM_NTASKS": "2", "SLURM_PROCID": "1"}) == (5, 6)
    with pytest.raises(ConfigError, match="an array without gaps"):
        share_of({**third, "SLURM_ARRAY_TASK_COUNT": "2"})
    with pytest.raises(ConfigError, match="for commands that srun starts"):
        share_of({})


def test_a_worker_leaves_with_its_parent(made_corpus: Path, clusterer: Path, tmp_path: Path) -> None:
    script = (
        "import os, time\nfrom concurrent.futures import ProcessPoolExecutor\nimport multiprocessing\n"
        "from xlmega.experts.assignment import _leave_with_parent\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _leave_with_parent, (os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n    time.sleep(600)\n"
    )
    (tmp_path / "parent.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and "State:\tZ" not in Path(f"/proc/{worker}/status").read_text():
        assert time.monotonic() < deadline, "the worker lives on"
        time.sleep(0.05)


def test_by_language_and_by_lot(made_corpus: Path, tmp_path: Path) -> None:
    languages = sorted({document.language for document in read_corpus(made_corpus / "train")})
    save_clusterer(LanguageClusterer({code: k % 2 for k, code in enumerate(languages)}), tmp_path / "two")
    table = assign_clusters(made_corpus / "train", tmp_path / "two", tmp_path / "by_language", only=True)
    for k, code in enumerate(languages):
        assert table["splits"]["train"]["by_language"][code][1 - k % 2] == 0
    save_clusterer(RandomClusterer(3, seed=5), tmp_path / "lot")
    table = assign_clusters(made_corpus / "train", tmp_path / "lot", tmp_path / "by_lot", balanced=True)
    assert np.ptp(table["splits"]["train"]["sizes"]) <= 1
    with pytest.raises(ConfigError, match="balancing cannot be"):
        assign_clusters(made_corpus / "train", tmp_path / "two", tmp_path / "x", balanced=True)
    save_clusterer(LanguageClusterer({languages[0]: 0}), tmp_path / "one")
    with pytest.raises(DataError, match=f"language '{languages[1]}' is in no cluster"):
        assign_clusters(made_corpus / "train", tmp_path / "one", tmp_path / "y")
    with pytest.raises(ConfigError, match="numbered from 0 without gaps"):
        LanguageClusterer({"a": 1})


def test_refusals_leave_everything_as_it_was(small: Path, clusterer: Path, tmp_path: Path) -> None:
    assign_clusters(small, clusterer, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(DataError, match=r"another assignment \(greedy, not balanced\)"):
        assign_clusters(small, clusterer, tmp_path / "out", balanced=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds no clusters\.json"):
        assign_clusters(small, clusterer, tmp_path / "full", overwrite=True)
    with pytest.raises(DataError, match=r"it has no clusterer\.json"):
        assign_clusters(small, tmp_path / "full", tmp_path / "new")
    assert contents(tmp_path / "out") == before and not (tmp_path / "new").exists()
    with pytest.raises(DataError, match="not empty"):
        save_clusterer(RandomClusterer(2), tmp_path / "full")
    with pytest.raises(DataError, match="holds no clusterer"):
        save_clusterer(RandomClusterer(2), tmp_path / "full", overwrite=True)
    assign_clusters(small, clusterer, tmp_path / "out", balanced=True, overwrite=True)
    assert [f.name for f in corpus_files(small)] == ["00000.jsonl.gz"] * 3
    (tmp_path / "out/train/a/00000.jsonl").write_text('{"sp_id": "train/a/00000.jsonl.gz|1", "cluster": 0}\n')
    with pytest.raises(DataError, match="not the cluster of document 0"):
        read_clusters(tmp_path / "out", "train", "a/00000.jsonl.gz")
