"""Other trainers' files: metaseq written by hand as X-ELM's are, state dicts, and what DeepSpeed itself saves."""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import theirs
import torch
import worlds
from reference import reference_logits

from xlmega.errors import CheckpointError
from xlmega.training.checkpoint import open_source
from xlmega.weights.deepspeed_zero import Line, open_zero
from xlmega.weights.directory import open_logical_directory
from xlmega.weights.foreign import is_foreign, open_foreign
from xlmega.weights.huggingface import open_huggingface
from xlmega.weights.torch_files import Inert, read_torch, state_dict

pytestmark = pytest.mark.torch
ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(14).mul(31).remainder(97)[None]


def gpt2() -> Any:
    import transformers

    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=16)
    return randomised(transformers.GPT2LMHeadModel(config))


def xglm() -> Any:
    import transformers

    config = transformers.XGLMConfig(
        vocab_size=97, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=32, dropout=0.0
    )
    return randomised(transformers.XGLMForCausalLM(config))


def randomised(model: Any) -> Any:
    torch.manual_seed(6)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def our_logits(source: Any) -> torch.Tensor:
    return reference_logits(source.config, {name: source.read(name).float() for name in source.names()}, IDS)


def same(left: Any, right: Any) -> bool:
    return left.names() == right.names() and all(torch.equal(left.read(n), right.read(n)) for n in left.names())


# -------------------------------------------------------------------- metaseq


def metaseq_state(model: Any) -> dict[str, torch.Tensor]:
    """The published names of `model`, in fp16, with the buffers that metaseq keeps among them."""
    stored = collections.OrderedDict()
    stored["decoder.version"] = torch.tensor([3.0])
    for name, tensor in model.state_dict().items():
        if name.startswith("model.") and not name.endswith("embed_positions.weights"):
            stored["decoder." + name.removeprefix("model.")] = tensor.detach().half().clone()
    stored["decoder.embed_positions._float_tensor"] = torch.zeros(1)
    stored["decoder.output_projection.weight"] = stored["decoder.embed_tokens.weight"]
    return stored


ARGUMENTS = {
    "arch": "transformer_lm_megatron",
    "decoder_layers": 2,
    "decoder_embed_dim": 32,
    "decoder_ffn_embed_dim": 48,
    "decoder_attention_heads": 4,
    "decoder_learned_pos": False,
    "decoder_normalize_before": True,
    "activation_fn": "gelu",
    "share_decoder_input_output_embed": True,
    "no_scale_embedding": False,
    "max_target_positions": 32,
    "dropout": 0.1,
    "attention_dropout": 0.1,
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", ["args", "cfg", "cfg table"])
def test_a_consolidated_metaseq_file_is_the_model_it_was(kept: str, zipped: bool, tmp_path: Path) -> None:
    model = xglm()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    logits = logits_of(model)
    told: Any = argparse.Namespace(**ARGUMENTS)
    settings = {"args": told} if kept == "args" else {"cfg": {"model": told if kept == "cfg" else ARGUMENTS}}
    path = tmp_path / "consolidated.pt"
    torch.save({**settings, "model": metaseq_state(model)}, path, _use_new_zipfile_serialization=zipped)
    source = open_source(tmp_path)
    assert (source.config.family, source.config.num_heads, source.config.tied) == ("xglm", 4, True)
    assert source.config.embedding_scale == pytest.approx(32**0.5) and source.config.dropout == 0.1
    assert source.vocabulary_folder is None
    assert all(source.read(name).dtype == torch.float16 for name in source.names())
    model.half().save_pretrained(tmp_path / "hf")
    assert same(source, open_huggingface(tmp_path / "hf"))
    torch.testing.assert_close(our_logits(source), logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.2  # the comparison above means something


def test_what_is_no_xglm_is_refused_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"

    def refused(message: str, arguments: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        torch.save({"args": argparse.Namespace(**arguments), "model": state}, path)
        with pytest.raises(CheckpointError, match=message):
            open_foreign(path)

    state = metaseq_state(xglm())
    refused("decoder_learned_pos is True", {**ARGUMENTS, "decoder_learned_pos": True}, state)
    refused("activation_fn is relu", {**ARGUMENTS, "activation_fn": "relu"}, state)
    refused("arguments lack decoder_attention_heads", {**ARGUMENTS, "decoder_attention_heads": None}, state)
    refused("neither 'args' nor 'cfg'", {}, state)
    fused = {**state, "decoder.layers.0.self_attn.qkv_proj.weight": torch.ones(96, 32)}
    refused("queries, keys and values in one matrix", ARGUMENTS, fused)
    short = {name: tensor for name, tensor in state.items() if "layers.1.fc2.bias" not in name}
    refused(r"lacks model.layers.1.fc2.bias \(32,\)", ARGUMENTS, short)
    refused("has model.layers.2.fc1.bias", ARGUMENTS, {**state, "decoder.layers.2.fc1.bias": torch.ones(48)})


# -------------------------------------------------------------------- state dicts


@pytest.mark.parametrize("kind", theirs.SIX)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_directory_of_bin_files_reads_as_one_of_safetensors(kind: str, shards: int, tmp_path: Path) -> None:
    tensors = theirs.saved(kind, tmp_path / "hf")
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        places = {name: f"pytorch_model-{k % shards + 1:05}-of-00003.bin" for k, name in enumerate(tensors)}
        for file in set(places.values()):
            torch.save({name: tensors[name] for name in places if places[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    source, wanted = open_source(folder), open_huggingface(tmp_path / "hf")
    assert same(source, wanted) and source.config == wanted.config
    name = "embedding.word_embeddings.weight"
    assert torch.equal(source.read_slice(name, (slice(3, 9), slice(None))), wanted.read(name)[3:9].float())
    if shards > 1:
        (folder / "pytorch_model-00002-of-00003.bin").unlink()
        with pytest.raises(CheckpointError, match=r"names pytorch_model-00002-of-00003.bin, which is not there"):
            open_source(folder)


def test_a_lone_file_needs_a_config_and_wrappers_are_seen_through(tmp_path: Path) -> None:
    model = gpt2()
    model.config.save_pretrained(tmp_path / "config")
    model.save_pretrained(tmp_path / "hf")
    (tmp_path / "files" / "deep" / "er").mkdir(parents=True)
    path = tmp_path / "files" / "deep" / "er" / "model.ckpt"
    wrapped = {f"_orig_mod.module.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped, "hyper_parameters": {"lr": 1e-3}}, path)
    with pytest.raises(CheckpointError, match=r"(?s)no config.json in .*--config DIR"):
        open_source(path)
    assert same(open_source(path, tmp_path / "config"), open_huggingface(tmp_path / "hf"))
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="holds no named tensors: it is a list"):
        open_source(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="damaged or not a file of torch.save"):
        open_source(path)
    torch.save(wrapped, path)
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(CheckpointError, match="damaged or not"):
        open_source(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_an_error_of_the_file(zipped: bool, tmp_path: Path) -> None:
    """Flipped bits, noise, cuts and gaps: a message, or (where only values were hit) a model of the same shape."""
    path, draw = tmp_path / "consolidated.pt", np.random.default_rng(0)
    stored = {"args": argparse.Namespace(**ARGUMENTS), "model": metaseq_state(xglm())}
    torch.save(stored, path, _use_new_zipfile_serialization=zipped)
    whole, refused = path.read_bytes(), 0
    for trial in range(60):
        data, at = bytearray(whole), int(draw.integers(len(whole)))
        if trial % 4 == 0:
            data[at % 3000] ^= 1 << int(draw.integers(8))
        elif trial % 4 == 1:
            del data[at:]
        elif trial % 4 == 2:
            data[at % 3000 : at % 3000 + 32] = draw.bytes(32)
        else:
            del data[at : at + 100]
        path.write_bytes(data)
        try:
            source = open_foreign(path)
            assert all(tuple(source.read(name).shape) == source.shape(name) for name in source.names())
        except CheckpointError:
            refused += 1
    assert refused >= 30


# -------------------------------------------------------------------- hostile files


class Call:
    """Whatever it is reduced to is what an ordinary unpickler would call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Hooked(torch.nn.Linear):
    """A module whose hook is a function of ours."""


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_hostile_file_does_nothing_and_is_refused_by_name(zipped: bool, protocol: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    command = f"touch {canary}"
    hooked = Hooked(2, 2)
    hooked.register_forward_hook(print)
    hooks = collections.OrderedDict({0: Call(os.system, command)})
    storage = torch.ones(2).untyped_storage()
    hostile = {
        "os.system": Call(os.system, command),
        "os.system of a hook": Call(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, hooks),
        "builtins.eval": Call(eval, f"open({str(canary)!r}, 'w')"),
        "builtins.exec": {"layer": [Call(exec, f"open({str(canary)!r}, 'w')")]},
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "builtins.getattr": Call(getattr, argparse.Namespace(x=1), "x"),
        "torch.hub.load": Call(torch.hub.load, str(tmp_path), "model"),
        "torch.load": Call(torch.load, str(canary)),
        "test_foreign.Hooked": hooked,
        "pathlib.PosixPath": Path("/"),
    }
    for name, thing in hostile.items():
        path = tmp_path / "model.bin"
        stored = {"model": {"embed.weight": torch.ones(3), "extra": thing}}
        torch.save(stored, path, _use_new_zipfile_serialization=zipped, pickle_protocol=protocol)
        with pytest.raises(CheckpointError) as refusal:
            open_source(path)
        told, name = str(refusal.value), name.split(" ")[0]
        assert name.rsplit(".", 1)[-1] in told and "nothing of it has run" in told, (name, told)
        assert name in told or name.startswith(("torch.", "pathlib.", "test_foreign.")), (name, told)
        assert not canary.exists(), name


def test_the_restricted_reader_is_a_second_wall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should the listing of names ever miss one, torch's own reader refuses it."""
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    monkeypatch.setattr("xlmega.weights.torch_files._wanted", lambda path, zipped: set())
    for zipped in (True, False):
        torch.save({"w": Call(os.system, f"touch {canary}")}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match="os.system|posix.system"):
            read_torch(path)
        assert not canary.exists()


def test_settings_of_trainers_come_out_as_data(tmp_path: Path) -> None:
    torch.save({"args": argparse.Namespace(lr=1e-3, langs=["en", "fr"]), "w": torch.ones(2)}, tmp_path / "a.pt")
    args = read_torch(tmp_path / "a.pt")["args"]
    assert type(args) is Inert and (args.lr, args.langs) == (1e-3, ["en", "fr"])


# -------------------------------------------------------------------- DeepSpeed

# The larger world first: DeepSpeed numbers parameters over the life of a process, and its ranks must agree.
CASES = [
    {"name": "zero3dp2", "stage": 3, "size": 2, "frozen": True},
    {"name": "zero2dp2", "stage": 2, "size": 2, "frozen": True},
    {"name": "zero1dp2", "stage": 1, "size": 2, "bf16": True},
    {"name": "zero3", "stage": 3, "size": 1},
    {"name": "zero2", "stage": 2, "size": 1},
    {"name": "zero1", "stage": 1, "size": 1},
    {"name": "zero0", "stage": 0, "size": 1},
]


def save_with_deepspeed(rank: int, folder: Path, cases: list[dict[str, Any]]) -> None:
    """Two steps of a tiny GPT-2 under each case's ZeRO stage; its checkpoint and its own account of the weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    for case in cases:
        if rank >= case["size"]:
            continue
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["size"]), MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(worlds.meet(folder, case["name"], rank))
        worlds.forget_groups()
        deepspeed.init_distributed("gloo")
        model = gpt2().train()
        if case.get("frozen"):
            model.transformer.h[0].mlp.c_fc.weight.requires_grad_(False)
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": case["stage"]},
            "bf16": {"enabled": case.get("bf16", False)},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        }
        engine, *_ = deepspeed.initialize(
            model=model, config=settings, model_parameters=[p for p in model.parameters() if p.requires_grad]
        )
        for step in range(2):
            ids = torch.randint(97, (1, 16), generator=torch.Generator().manual_seed(10 * step + rank))
            engine.backward(engine(input_ids=ids, labels=ids).loss)
            engine.step()
        told = {}
        for name, parameter in model.named_parameters():
            if case["stage"] and parameter.requires_grad:
                told[name] = safe_get_full_fp32_param(parameter).clone()
            else:
                with deepspeed.zero.GatheredParameters([parameter], enabled=case["stage"] == 3):
                    told[name] = parameter.detach().clone()
        # The folder of a trainer: config.json above, DeepSpeed's tag below.
        engine.save_checkpoint(str(folder / case["name"]), tag="global_step2")
        if rank == 0:
            model.config.save_pretrained(folder / case["name"])
            torch.save(told, folder / f"{case['name']}.told.pt")
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepspeed")
    worlds.run(2, save_with_deepspeed, CASES, folder=folder)
    return folder


@pytest.mark.multiprocess
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_deepspeeds_directories_give_the_weights_that_it_had(case: dict[str, Any], saved: Path) -> None:
    told = state_dict(saved / f"{case['name']}.told.pt")
    folder = saved / case["name"]
    assert is_foreign(folder) and is_foreign(folder / "global_step2")
    model = gpt2()
    assert not torch.equal(told["transformer.wte.weight"], model.transformer.wte.weight)  # it was trained
    tensors = open_zero(folder / "global_step2")
    for name, tensor in told.items():
        assert torch.equal(tensors.read(name).float(), tensor.float()), name
    if case["stage"]:
        assert tensors.read("transformer.wte.weight").dtype == torch.float32
    source = open_source(folder)
    assert source.config == open_source(folder / "global_step2").config
    model.load_state_dict({**told, "lm_head.weight": told["transformer.wte.weight"]})
    torch.testing.assert_close(our_logits(source), logits_of(model.float()), rtol=1e-5, atol=1e-5)


@pytest.mark.multiprocess
def test_a_deepspeed_directory_that_is_not_whole_is_refused(saved: Path) -> None:
    folder = saved / "zero2dp2" / "global_step2"
    lost = folder / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    lost.rename(saved / "aside")
    try:
        with pytest.raises(CheckpointError, match=r"saved by 2 ranks.*those of rank 1 are missing"):
            open_source(folder)
    finally:
        (saved / "aside").rename(lost)
    other = folder / "zero_pp_rank_0_mp_rank_01_optim_states.pt"
    other.write_bytes(b"")
    try:
        with pytest.raises(CheckpointError, match="2 model-parallel ranks"):
            open_source(folder)
    finally:
        other.unlink()
    latest = saved / "zero2dp2" / "latest"
    latest.write_text("../elsewhere")
    with pytest.raises(CheckpointError, match=r"names '../elsewhere', which is not a folder beside it"):
        open_source(saved / "zero2dp2")
    latest.write_text("global_step2")


def test_data_that_is_laid_out_otherwise_is_refused(tmp_path: Path) -> None:
    model, optimizer = tmp_path / "mp_rank_00_model_states.pt", tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"module": {"w": torch.ones(2)}, "param_shapes": 3}, model)
    gpt2().config.save_pretrained(tmp_path)
    for state, message in (
        ({"zero_stage": "two", "partition_count": 1}, "not laid out"),
        ({"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [torch.ones(2)]}, "not laid out"),
        ({"zero_stage": 2}, "has no 'partition_count'"),
        ({}, "has no 'zero_stage'"),
    ):
        torch.save({"optimizer_state_dict": state}, optimizer)
        with pytest.raises(CheckpointError, match=message):
            open_source(tmp_path)
    torch.save([1], optimizer)
    with pytest.raises(CheckpointError, match="it holds a list"):
        open_source(tmp_path)


def test_values_are_taken_across_the_parts_of_a_line() -> None:
    line = Line([torch.arange(3), torch.arange(3, 5), torch.arange(5, 9)])
    assert line.length == 9
    for start in range(9):
        for count in range(9 - start + 1):
            assert line.take(start, count).tolist() == list(range(start, start + count))


# -------------------------------------------------------------------- the tools


def test_the_tools_take_them(tmp_path: Path) -> None:
    model = xglm()
    torch.save({"args": argparse.Namespace(**ARGUMENTS), "model": metaseq_state(model)}, tmp_path / "consolidated.pt")

    def tool(name: str, *args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, args)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = tool(
        "consolidate_checkpoint", tmp_path / "consolidated.pt", "--output", tmp_path / "one", "--dtype", "float16"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"wrote {tmp_path / 'one'}: ")
    assert same(open_logical_directory(tmp_path / "one"), open_foreign(tmp_path))
    torch.save({"model": Call(os.system, f"touch {tmp_path / 'canary'}")}, tmp_path / "consolidated.pt")
    done = tool("convert_checkpoint", tmp_path / "consolidated.pt", "--to", "hf", "--output", tmp_path / "two")
    assert done.returncode == 2 and "os.system" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "canary").exists() and not (tmp_path / "two").exists()


def test_what_other_packages_allow_torch_to_make_is_not_made_here(tmp_path: Path) -> None:
    """Megatron-core allows argparse.Namespace and more for the whole process once it is imported."""
    torch.save({"args": argparse.Namespace(a=1)}, tmp_path / "a.pt")
    torch.serialization.add_safe_globals([argparse.Namespace])
    assert isinstance(read_torch(tmp_path / "a.pt")["args"], Inert)
    assert argparse.Namespace in torch.serialization.get_safe_globals()
