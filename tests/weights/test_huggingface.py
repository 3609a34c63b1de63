"""Exports that transformers loads, imports of what it saves, and tokenizers that agree on every text."""

from __future__ import annotations

import errno
import gzip
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import theirs
import torch
import transformers
from drawn import Drawn
from reference import reference_logits
from safetensors.torch import load_file, save_file

from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.locking import locked
from xlmega.models.config import ModelConfig, model_config
from xlmega.text.vocabulary import load_vocabulary
from xlmega.weights import names
from xlmega.weights.direct import DirectFile
from xlmega.weights.directory import check_output, open_logical_directory, write_logical
from xlmega.weights.families import folded_scale
from xlmega.weights.huggingface import (
    SAMPLES,
    export_huggingface,
    open_huggingface,
    sample_text,
    tokenizer_files,
    verify_huggingface,
)
from xlmega.weights.names import LogicalTensors

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
CORPUS = ROOT / ".." / "shared" / "data" / "pydocs" / "valid"

SIZES = {"num_layers": 2, "vocab_size": 97, "max_positions": 32}
XGLM = model_config(
    preset="xglm_tiny", hidden_size=64, num_heads=4, head_dim=16, ffn_hidden_size=112, init_std=0.05, **SIZES
)
# As languini_small: heads fill the hidden size, head untied, sqrt(hidden_size) not a power of two.
SMALL = model_config(
    preset="languini_small",
    hidden_size=48,
    num_heads=3,
    head_dim=16,
    ffn_hidden_size=80,
    embedding_scale=48**0.5,
    **SIZES,
)
# As languini_mini: attention half as wide as the hidden size.
MINI = model_config(
    preset="languini_mini", hidden_size=64, num_heads=2, head_dim=16, ffn_hidden_size=80, embedding_scale=8.0, **SIZES
)
# As openai's GPT-2: tied, nothing scaled.
GPT2 = model_config(**{**MINI.__dict__, "preset": "", "num_heads": 4, "tied": True, "embedding_scale": 1.0})
NEOX = model_config(preset="neox_tiny", hidden_size=64, num_heads=3, head_dim=16, ffn_hidden_size=80, **SIZES)
BLOOM = model_config(preset="bloom_tiny", hidden_size=48, num_heads=6, head_dim=8, ffn_hidden_size=192, **SIZES)
LLAMA = model_config(
    preset="llama_tiny", hidden_size=64, num_heads=8, head_dim=16, num_kv_heads=2, ffn_hidden_size=80, **SIZES
)
CONFIGS = {"xglm": XGLM, "small": SMALL, "mini": MINI, "gpt2": GPT2, "neox": NEOX, "bloom": BLOOM, "llama": LLAMA}


def tensors_of(source: LogicalTensors) -> dict[str, torch.Tensor]:
    return {name: source.read(name) for name in source.names()}


def all_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def some_ids(config: ModelConfig) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", CONFIGS)
def test_transformers_computes_the_logical_model(kind: str, tmp_path: Path) -> None:
    source = Drawn(CONFIGS[kind])
    files = export_huggingface(source, tmp_path / "out", vocabulary_folder=None)
    assert sorted(path.name for path in files) == sorted(path.name for path in (tmp_path / "out").iterdir())
    ids = some_ids(source.config)
    ours = reference_logits(source.config, source.tensors, ids)
    assert ours.std() > 0.5  # the comparison below means something
    torch.testing.assert_close(theirs.logits(tmp_path / "out", ids), ours, rtol=1e-5, atol=1e-5)
    verified = verify_huggingface(source, tmp_path / "out")
    assert verified.num_samples == 0 and verified.num_tensors == len(load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_import_returns_config_and_tensors(kind: str, tmp_path: Path) -> None:
    source = Drawn(CONFIGS[kind])
    export_huggingface(source, tmp_path / "out", vocabulary_folder=None)
    back = open_huggingface(tmp_path / "out")
    assert back.config == source.config
    for name, tensor in tensors_of(back).items():
        if kind == "small" and name == "embedding.word_embeddings.weight":  # folded, and sqrt(48) is no power of two
            torch.testing.assert_close(tensor, source.tensors[name], rtol=2e-7, atol=0)
        else:
            assert torch.equal(tensor, source.tensors[name]), name
        assert back.shape(name) == tuple(tensor.shape)


@pytest.mark.parametrize("kind", [*theirs.SIX, *theirs.MORE])
def test_what_transformers_saved_survives_the_round_trip_bit_for_bit(kind: str, tmp_path: Path) -> None:
    stored = theirs.saved(kind, tmp_path / "theirs")
    source = open_huggingface(tmp_path / "theirs")
    ids = some_ids(source.config)
    ours = reference_logits(source.config, tensors_of(source), ids)
    torch.testing.assert_close(theirs.logits(tmp_path / "theirs", ids), ours, rtol=1e-5, atol=1e-5)
    write_logical(source, tmp_path / "logical")
    export_huggingface(open_logical_directory(tmp_path / "logical"), tmp_path / "back", vocabulary_folder=None)
    assert all_equal(load_file(tmp_path / "back" / "model.safetensors"), stored)
    assert open_huggingface(tmp_path / "back").config == source.config


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["gpt_neox in turn, tied", "llama wide, tied, with biases"])
def test_verified_within_the_tolerance_of_the_dtype(kind: str, dtype: str, tmp_path: Path) -> None:
    theirs.saved(kind, tmp_path / "theirs")
    source = open_huggingface(tmp_path / "theirs")
    export_huggingface(source, tmp_path / "out", vocabulary_folder=None, dtype=dtype)
    found = verify_huggingface(source, tmp_path / "out")
    assert found.largest_logit > 0.5
    assert (found.logit_difference < 1e-5) == (dtype == "float32") and found.loss_difference < 0.05


def test_the_bare_gpt2_of_the_hub_is_read_and_its_buffers_ignored(tmp_path: Path) -> None:
    stored = theirs.saved("gpt2", tmp_path)
    whole = tensors_of(open_huggingface(tmp_path))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    save_file({**bare, "h.0.attn.bias": torch.ones(1, 1, 32, 32)}, tmp_path / "model.safetensors")
    assert all_equal(tensors_of(open_huggingface(tmp_path)), whole)
    save_file({**bare, "h.7.ln_1.bias": torch.ones(64)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has h.7.ln_1.bias \(64,\), which the config has no place for"):
        open_huggingface(tmp_path)


def test_shards_and_dtypes(tmp_path: Path) -> None:
    source = Drawn(XGLM)
    export_huggingface(source, tmp_path / "out", vocabulary_folder=None, dtype="bfloat16", shard_bytes=40_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    assert max((tmp_path / "out" / name).stat().st_size for name in files) < 50_000
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * source.config.num_parameters()
    back = tensors_of(open_huggingface(tmp_path / "out"))
    assert all_equal(back, {name: tensor.bfloat16() for name, tensor in source.tensors.items()})
    assert verify_huggingface(source, tmp_path / "out").num_tensors == len(index["weight_map"])
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    source.tensors["decoder.final_layernorm.bias"][3] = 1e5
    with pytest.raises(CheckpointError, match=r"'model.layer_norm.bias' has values that are not finite"):
        export_huggingface(source, tmp_path / "half", vocabulary_folder=None, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]  # nothing half-written stays


def test_large_tensors_are_passed_on_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in CONFIGS.items():
        export_huggingface(Drawn(config), tmp_path / name, vocabulary_folder=None)
    monkeypatch.setattr(names, "PART_ELEMENTS", 1000)
    for name, config in CONFIGS.items():
        export_huggingface(Drawn(config), tmp_path / f"{name}_parts", vocabulary_folder=None)
        verify_huggingface(Drawn(config), tmp_path / f"{name}_parts")
        write_logical(open_huggingface(tmp_path / name), tmp_path / f"{name}_logical")
        export_huggingface(
            open_logical_directory(tmp_path / f"{name}_logical"), tmp_path / f"{name}_back", vocabulary_folder=None
        )
        for other in ("parts", "back") if folded_scale(config) == 1.0 else ("parts",):
            whole, found = (tmp_path / folder / "model.safetensors" for folder in (name, f"{name}_{other}"))
            assert whole.read_bytes() == found.read_bytes(), (name, other)


def test_an_occupied_output_is_refused_and_overwritten_when_asked(tmp_path: Path) -> None:
    export_huggingface(Drawn(XGLM), tmp_path / "out", vocabulary_folder=None)
    with pytest.raises(CheckpointError, match=r"add --overwrite"):
        export_huggingface(Drawn(XGLM, seed=1), tmp_path / "out", vocabulary_folder=None)
    export_huggingface(Drawn(XGLM, seed=1), tmp_path / "out", vocabulary_folder=None, overwrite=True)
    assert all_equal(tensors_of(open_huggingface(tmp_path / "out")), Drawn(XGLM, seed=1).tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_takes_nothing_but_a_model(tmp_path: Path) -> None:
    export_huggingface(Drawn(XGLM), tmp_path / "models" / "out", vocabulary_folder=None)
    with pytest.raises(CheckpointError, match=r"has no model.json or config.json: it was not written by this command"):
        export_huggingface(Drawn(XGLM), tmp_path / "models", vocabulary_folder=None, overwrite=True)
    for output, words in (("models", "holds the source"), ("models/out", "is the source itself")):
        with pytest.raises(CheckpointError, match=words):
            check_output(tmp_path / output, [tmp_path / "models" / "out"], overwrite=True)
    assert all_equal(tensors_of(open_huggingface(tmp_path / "models" / "out")), Drawn(XGLM).tensors)


def test_one_writer_at_a_time_and_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_logical(Drawn(XGLM), tmp_path / "out")
    with locked(tmp_path / "out"), pytest.raises(DataError, match="is being written by another process"):
        write_logical(Drawn(XGLM, seed=1), tmp_path / "out", overwrite=True)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DirectFile, "finish", full)
    with pytest.raises(CheckpointError, match=r"out' cannot be written: No space left on device. Nothing of it"):
        write_logical(Drawn(XGLM, seed=1), tmp_path / "out", overwrite=True)
    assert all_equal(tensors_of(open_logical_directory(tmp_path / "out")), Drawn(XGLM).tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_quantized_weights_and_an_index_of_other_places_are_refused(tmp_path: Path) -> None:
    export_huggingface(Drawn(XGLM), tmp_path / "out", vocabulary_folder=None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    save_file({name: one.to(torch.int8) for name, one in stored.items()}, tmp_path / "out" / "model.safetensors")
    coded = open_huggingface(tmp_path / "out")
    for read in (coded.read, lambda name: coded.read_slice(name, (slice(1),))):
        with pytest.raises(CheckpointError, match=r"layer_norm.bias as torch.int8: quantized weights"):
            read("decoder.final_layernorm.bias")
    for place in (3, "../out/model.safetensors"):
        index = json.dumps({"weight_map": dict.fromkeys(stored, place)})
        (tmp_path / "out" / "model.safetensors.index.json").write_text(index)
        with pytest.raises(CheckpointError, match="is not an index of safetensors shards"):
            open_huggingface(tmp_path / "out")


def test_verify_sees_a_changed_value(tmp_path: Path) -> None:
    source = Drawn(MINI)
    export_huggingface(source, tmp_path / "out", vocabulary_folder=None)
    source.tensors["decoder.layers.1.self_attention.linear_qkv.bias"][5] += 1e-3
    with pytest.raises(CheckpointError, match=r"other values in 'transformer.h.1.attn.c_attn.bias'"):
        verify_huggingface(source, tmp_path / "out")


def test_zero_heads_that_were_trained_are_not_dropped(tmp_path: Path) -> None:
    export_huggingface(Drawn(MINI), tmp_path, vocabulary_folder=None, overwrite=True)
    stored = load_file(tmp_path / "model.safetensors")
    stored["transformer.h.0.attn.c_proj.weight"][-1, 0] = 1.0
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"Remove 'xlmega' from config.json"):
        open_huggingface(tmp_path).read("decoder.layers.0.self_attention.linear_proj.weight")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["xlmega"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    wide = open_huggingface(tmp_path)
    assert (wide.config.num_heads, wide.config.embedding_scale) == (4, 1.0)
    ids = some_ids(wide.config)
    torch.testing.assert_close(
        reference_logits(wide.config, tensors_of(wide), ids), theirs.logits(tmp_path, ids), rtol=1e-5, atol=1e-5
    )


@pytest.fixture
def edited_config(tmp_path: Path) -> Callable[..., Path]:
    def edit(config: ModelConfig, **changes: Any) -> Path:
        export_huggingface(Drawn(config), tmp_path / "out", vocabulary_folder=None, overwrite=True)
        path = tmp_path / "out" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return tmp_path / "out"

    return edit


def test_what_our_decoders_do_not_compute_is_refused(edited_config: Callable[..., Path], tmp_path: Path) -> None:
    for config, changes, message in (
        (XGLM, {"activation_function": "relu"}, "activation_function is 'relu'"),
        (XGLM, {"pad_token_id": 3}, "blanks position 1"),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights is false"),
        (GPT2, {"n_inner": 96}, r"mlp.c_fc.weight as \(64, 80\), but the config says \(64, 96\)"),
        (GPT2, {"model_type": "mistral"}, "is a 'mistral'. Models of these kinds can be read: xglm, gpt2, gpt_neox"),
        (MINI, {"xlmega": {"format_version": 1}}, "damaged 'xlmega' note"),
        (NEOX, {"attention_bias": False}, "attention_bias is false while the MLP has biases"),
        (BLOOM, {"apply_residual_connection_post_layernorm": True}, "residuals are always those before the norm"),
        (LLAMA, {"mlp_bias": True}, "attention_bias is False and mlp_bias True"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling is 'linear'"),
        (LLAMA, {"num_key_value_heads": 3}, "num_kv_heads=3 must divide num_heads=8"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_huggingface(edited_config(config, **changes))
    with pytest.raises(CheckpointError, match="is a pickle"):
        path = edited_config(XGLM)
        (path / "model.safetensors").rename(path / "pytorch_model.bin")
        open_huggingface(path)
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_huggingface(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="damaged"):
        path = edited_config(XGLM)
        (path / "model.safetensors").write_bytes((path / "model.safetensors").read_bytes()[:-1])
        open_huggingface(path)


def test_what_a_family_cannot_compute_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    wide = model_config(**{**MINI.__dict__, "preset": "", "num_heads": 6})
    with pytest.raises(ConfigError, match=r"wider than hidden_size=64"):
        export_huggingface(Drawn(wide), tmp_path / "out", vocabulary_folder=None)
    source = Drawn(XGLM)
    del source.tensors["decoder.layers.1.mlp.linear_fc2.bias"]
    with pytest.raises(CheckpointError, match=r"lacks decoder.layers.1.mlp.linear_fc2.bias \(64,\)"):
        export_huggingface(source, tmp_path / "out", vocabulary_folder=None)
    assert not list(tmp_path.iterdir())


def test_logical_directories(tmp_path: Path) -> None:
    source = Drawn(MINI)
    write_logical(source, tmp_path / "out", shard_bytes=30_000)
    back = open_logical_directory(tmp_path / "out")
    assert back.config == MINI and all_equal(tensors_of(back), source.tensors) and back.vocabulary_folder is None
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    rows = back.read_slice("decoder.layers.0.mlp.linear_fc1.weight", (slice(3, 5), slice(None)))
    assert torch.equal(rows, source.tensors["decoder.layers.0.mlp.linear_fc1.weight"][3:5])
    model = json.loads((tmp_path / "out" / "model.json").read_text())
    model["config"]["num_layers"] = 3
    (tmp_path / "out" / "model.json").write_text(json.dumps(model))
    with pytest.raises(CheckpointError, match=r"lacks decoder.layers.2.input_layernorm.weight"):
        open_logical_directory(tmp_path / "out")


@pytest.fixture(scope="module")
def tokenized(made_vocabulary: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported XGLM with the tokenizer of the made vocabulary."""
    output = tmp_path_factory.mktemp("export") / "xglm"
    source = Drawn(model_config(**{**XGLM.__dict__, "preset": "", "vocab_size": 800, "embedding_scale": 8.0}))
    card = {"name": "Tiny", "languages": {"aa": 1200, "no": 800}, "step": 7, "recipe": "[model]\npreset = 'xglm_tiny'"}
    export_huggingface(source, output, vocabulary_folder=made_vocabulary, card=card)
    assert verify_huggingface(source, output).num_samples == len(SAMPLES)
    return output


def test_the_tokenizer_gives_our_ids_for_odd_texts(tokenized: Path, made_vocabulary: Path) -> None:
    ours, theirs = load_vocabulary(made_vocabulary), transformers.AutoTokenizer.from_pretrained(tokenized)
    draw = random.Random(0)
    parts = [
        " ",
        "  ",
        "\n",
        "\t",
        "\r\n",
        "\u2581",
        "<",
        "D>",
        "<0x41>",
        "<pad>",
        "é",
        "日本",
        "🤖",
        "\0",
        "de",
        "\u200d",
        "7",
    ]
    texts = [*SAMPLES, *("".join(draw.choices(parts, k=draw.randrange(40))) for _ in range(300))]
    # Beyond one segment: newlines, only spaces, nothing to cut at.
    texts += ["ab c\n" * 2000, " " * 9000, "x y" * 3000, "日本" * 5000, "\n".join(texts) * 3]
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text), text[:80]
        assert theirs.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id, theirs.pad_token_id, theirs.unk_token_id) == ("<D>", 2, 0, 1)


@pytest.mark.skipif(not CORPUS.is_dir(), reason="../shared/data is absent")
@pytest.mark.parametrize("trained_on", ["itself", "made"])
def test_the_tokenizer_gives_our_ids_for_real_text(trained_on: str, made_vocabulary: Path, tmp_path: Path) -> None:
    texts = []
    for path in sorted(CORPUS.glob("*/*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            texts += [json.loads(line)["text"] for _, line in zip(range(25), file, strict=False)]
    folder = made_vocabulary
    if trained_on == "itself":
        from xlmega.text.vocabulary import train_vocabulary

        train_vocabulary(texts, 4000, folder := tmp_path / "vocabulary")
    ours = load_vocabulary(folder)
    for name, content in tokenizer_files(ours, 512).items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert len(texts) > 200
    for text, ids in zip(texts, theirs(texts)["input_ids"], strict=True):
        assert ids == ours.encode(text), text[:80]


def test_a_sample_is_a_function_of_its_seed_and_leaves_the_global_generator_alone(tokenized: Path) -> None:
    before = torch.get_rng_state()
    drawn = [sample_text(tokenized, ["tel ", ""], max_new_tokens=8, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 2


def test_the_directory_says_what_it_is(tokenized: Path) -> None:
    card = (tokenized / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and '- "no"' in card  # quoted: YAML reads no as false
    assert "# Tiny\n" in card and "| aa | 1,200 |" in card and "- Step: 7" in card and "preset = 'xglm_tiny'" in card
    generation = transformers.GenerationConfig.from_pretrained(tokenized)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (2, 2, 0)
    config = transformers.AutoConfig.from_pretrained(tokenized)
    assert (config.scale_embedding, config.decoder_start_token_id, config.vocab_size) == (True, 2, 800)
    back = open_huggingface(tokenized)
    assert back.vocabulary_folder is not None and load_vocabulary(back.vocabulary_folder).size == 800


def test_scales_and_small_vocabularies(tmp_path: Path, made_vocabulary: Path) -> None:
    plain = model_config(**{**XGLM.__dict__, "preset": "", "embedding_scale": 1.0})
    export_huggingface(Drawn(plain), tmp_path / "plain", vocabulary_folder=None)
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["scale_embedding"] is False
    assert open_huggingface(tmp_path / "plain").config == plain
    odd = model_config(**{**XGLM.__dict__, "preset": "", "embedding_scale": 3.0, "tied": False})
    source = Drawn(odd)
    export_huggingface(source, tmp_path / "odd", vocabulary_folder=None)
    assert open_huggingface(tmp_path / "odd").config == odd
    ids = some_ids(odd)
    ours = reference_logits(odd, source.tensors, ids)
    torch.testing.assert_close(theirs.logits(tmp_path / "odd", ids), ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="has 800 pieces, but the model knows 97 ids"):
        export_huggingface(source, tmp_path / "out", vocabulary_folder=made_vocabulary)


def test_the_tool_converts_both_ways(tokenized: Path, tmp_path: Path) -> None:
    def convert(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / "convert_checkpoint.py"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = convert(tokenized, "--to", "logical", "--output", tmp_path / "logical")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"wrote {tmp_path / 'logical'}: ")
    done = convert(tmp_path / "logical", "--to", "hf", "--output", tmp_path / "back", "--verify")
    assert done.returncode == 0, done.stderr
    assert "5 texts tokenized alike" in done.stdout
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tokenized / name).read_bytes()
    done = convert(tmp_path / "logical", "--to", "hf", "--output", tmp_path / "back")
    assert done.returncode == 2 and done.stderr.startswith("CheckpointError: ") and "--overwrite" in done.stderr
