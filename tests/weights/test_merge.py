"""Means of models: exact for copies, the textbook's for others, refused where a mean would mean nothing."""

from __future__ import annotations

import dataclasses
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import Held

from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.models.config import ModelConfig, model_config
from xlmega.text.corpus import write_records
from xlmega.training.checkpoint import open_source
from xlmega.weights import merge
from xlmega.weights.directory import write_logical
from xlmega.weights.huggingface import export_huggingface, open_huggingface
from xlmega.weights.merge import Mean, histogram_weights, read_histogram
from xlmega.weights.names import logical_shapes

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
CONFIG = model_config(
    preset="xglm_tiny", num_layers=2, hidden_size=16, num_heads=2, ffn_hidden_size=24, vocab_size=41, max_positions=16
)


class Drawn(Held):
    """A model with values of every magnitude that fp32 has."""

    def __init__(self, seed: int, config: ModelConfig = CONFIG) -> None:
        draw = np.random.default_rng(seed)
        tensors = {
            name: torch.tensor(draw.standard_normal(shape) * 10.0 ** draw.uniform(-44, 38, shape), dtype=torch.float32)
            for name, shape in logical_shapes(config).items()
        }
        super().__init__(config, tensors)


def test_the_mean_of_copies_is_the_model_bit_for_bit() -> None:
    source, draw = Drawn(0), np.random.default_rng(1)
    assert any((tensor != 0).any() and tensor[tensor != 0].abs().min() < 1e-38 for tensor in source.tensors.values())
    for count in range(1, 18):
        for weights in ([1.0] * count, (10.0 ** draw.uniform(-12, 12, count)).tolist()):
            mean = Mean([source] * count, weights)
            assert sum(mean.weights) == pytest.approx(1.0)
            for name, tensor in source.tensors.items():
                assert torch.equal(mean.read(name), tensor), (count, weights, name)


def test_the_mean_is_the_textbooks(monkeypatch: pytest.MonkeyPatch) -> None:
    sources, weights = [Drawn(seed) for seed in range(3)], [3.0, 0.0, 1.0]
    mean = Mean(sources, weights)
    for block in (1 << 25, 40):  # whole tensors, and two rows and a bit at a time
        monkeypatch.setattr(merge, "_BLOCK_ELEMENTS", block)
        for name in mean.names():
            a, b = (sources[k].read(name).double() for k in (0, 2))
            assert torch.equal(mean.read(name), (0.75 * a + 0.25 * b).float()), name
            assert mean.shape(name) == tuple(mean.read(name).shape)
    rows = (slice(2, 5), slice(None))
    name = "embedding.word_embeddings.weight"
    assert torch.equal(mean.read_slice(name, rows), mean.read(name)[2:5])


def test_what_cannot_be_averaged_is_refused(made_vocabulary: Path, tmp_path: Path) -> None:
    source = Drawn(0)
    for weights, message in (
        ([1.0], "1 weights were given for 2 models"),
        ([1.0, -1.0], "weights are 1, -1; they are finite, not negative"),
        ([0.0, 0.0], "not all zero"),
        ([1.0, float("nan")], "finite"),
        ([1.0, float("inf")], "finite"),
    ):
        with pytest.raises(ConfigError, match=message):
            Mean([source, source], weights)
    with pytest.raises(ConfigError, match="no model"):
        Mean([], [])
    wider = Drawn(0, dataclasses.replace(CONFIG, ffn_hidden_size=32, vocab_size=42))
    with pytest.raises(
        CheckpointError, match=r"models 1 and 2 .*ffn_hidden_size is 24 and 32; vocab_size is 41 and 42"
    ):
        Mean([source, wider], [1.0, 1.0])
    other_training = dataclasses.replace(CONFIG, dropout=0.1, init_std=0.5, preset="", residual_init="mlp")
    Mean([source, Drawn(1, other_training)], [1.0, 1.0])
    # The same shape with other vocabularies is no common model either.
    large = dataclasses.replace(CONFIG, vocab_size=800)
    other = tmp_path / "vocabulary"
    other.mkdir()
    described = json.loads((made_vocabulary / "vocabulary.json").read_text())
    for name in ("tokenizer.model", "piece_bytes.npy"):
        (other / name).write_bytes((made_vocabulary / name).read_bytes())
    (other / "vocabulary.json").write_text(json.dumps({**described, "hash": "0" * 64}))
    for name, vocabulary in (("a", made_vocabulary), ("b", made_vocabulary), ("c", other)):
        write_logical(Drawn(0, large), tmp_path / name, vocabulary_folder=vocabulary)
    a, b, c = (open_source(tmp_path / name) for name in "abc")
    assert Mean([a, b], [1.0, 1.0]).vocabulary_folder == tmp_path / "a" / "vocabulary"
    with pytest.raises(CheckpointError, match="models 1 and 3 have other vocabularies"):
        Mean([a, b, c], [1.0, 1.0, 1.0])


def test_weights_from_a_languages_histogram(tmp_path: Path) -> None:
    assert histogram_weights([10, 30, 5, 30], 4) == [10, 30, 5, 30]
    assert histogram_weights([10, 30, 5, 30], 4, 2) == [0, 30, 0, 30]
    assert histogram_weights([10, 30, 5, 30], 4, 1) == [0, 30, 0, 0]  # of equals, the first
    assert histogram_weights([7], 3) == [7, 0, 0]
    assert Mean([Drawn(0)] * 4, histogram_weights([10, 30, 5, 30], 4, 2)).weights == [0.0, 0.5, 0.0, 0.5]
    with pytest.raises(ConfigError, match="cluster 2, but there are 2 models"):
        histogram_weights([1, 1, 1], 2)
    with pytest.raises(ConfigError, match="subset_k=3 of 2 models"):
        histogram_weights([1, 1], 2, 3)
    path = tmp_path / "h.json"
    for text, counts in (("[4, 0, 2]", [4, 0, 2]), ('{"2": 2, "0": 4}', [4, 0, 2]), ("[]", [])):
        path.write_text(text)
        assert read_histogram(path) == counts
    for text in ("[1.5]", "[-1]", '{"a": 1}', "7", "nothing"):
        path.write_text(text)
        with pytest.raises(DataError, match="is not a histogram such as"):
            read_histogram(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_histogram(tmp_path / "nowhere.json")
    lines = [{"sp_id": f"sw/00000.jsonl|{k}", "cluster": cluster} for k, cluster in enumerate([1, 1, 0, -1, 3])]
    write_records(tmp_path / "clusters" / "sw" / "00000.jsonl.gz", lines)
    assert read_histogram(tmp_path / "clusters") == [1, 2, 0, 1]
    assert read_histogram(tmp_path / "clusters" / "sw" / "00000.jsonl.gz") == [1, 2, 0, 1]
    write_records(tmp_path / "clusters" / "sw" / "00000.jsonl.gz", [{"cluster": "1"}])
    with pytest.raises(DataError, match="'cluster' is '1'"):
        read_histogram(tmp_path / "clusters")


class Moderate(Drawn):
    """Values that fp16 can hold."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        draw = torch.Generator().manual_seed(seed)
        self.tensors = {name: torch.randn(t.shape, generator=draw) for name, t in self.tensors.items()}


def test_the_tool_averages_directories_of_any_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = Moderate(1), Moderate(2)
    write_logical(one, tmp_path / "logical")
    export_huggingface(two, tmp_path / "hf", vocabulary_folder=None)

    main = runpy.run_path(str(ROOT / "tools" / "merge_experts.py"))["main"]

    def merged(*args: object) -> str:
        monkeypatch.setattr(sys, "argv", ["merge_experts.py", *map(str, args)])
        main()
        return capsys.readouterr().out

    both = tmp_path / "logical", tmp_path / "hf"
    told = merged(*both, "--weights", 3, 1, "--to", "hf", "--output", tmp_path / "mean")
    assert told.splitlines()[-1].endswith("the mean of 2 models") and "0.750000" in told
    wanted, found = Mean([one, two], [3, 1]), open_huggingface(tmp_path / "mean")
    assert all(torch.equal(found.read(name), wanted.read(name)) for name in wanted.names())
    assert "0.75 x " in (tmp_path / "mean" / "README.md").read_text()
    for given, message in (
        (["--weights", 1, 2, 3], "3 weights were given for 2 models"),
        (["--subset_k", 1], "--subset_k is of --histogram"),
        (["--weights", 1, 1, "--histogram", tmp_path / "h.json"], "Give one of them"),
    ):
        with pytest.raises(ConfigError, match=message):
            merged(*both, *given, "--output", tmp_path / "other")
        assert not (tmp_path / "other").exists()
    with pytest.raises(CheckpointError, match="is the source itself"):
        merged(*both, "--output", tmp_path / "hf", "--overwrite")
