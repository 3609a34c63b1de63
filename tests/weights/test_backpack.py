"""Backpacks on their way to transformers and back, what the exported code computes, and its authors' own files."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from backpack_reference import Parts, reference_parts
from drawn import Held
from one_rank import uneven_weights
from round_trips import through_real_ranks
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from xlmega.errors import CheckpointError
from xlmega.models.config import ModelConfig, model_config
from xlmega.weights.foreign import open_foreign
from xlmega.weights.forward import PlainDecoder
from xlmega.weights.huggingface import export_huggingface, open_huggingface, read_config, verify_huggingface
from xlmega.weights.names import logical_shapes

pytestmark = pytest.mark.torch

SIZES = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 128, "num_heads": 4, "vocab_size": 101}
MODELS = {
    "original": model_config(preset="backpack_micro_4", init_std=0.15, max_positions=40, **SIZES),
    "nano": model_config(preset="nano_backpack_mini_4", init_std=0.15, max_positions=40, **SIZES),
}


def uneven(config: ModelConfig) -> Held:
    """A model with uneven weights in memory."""
    return Held(config, uneven_weights(config))


@functools.cache
def ids() -> torch.Tensor:
    return torch.randint(101, (3, 20), generator=torch.Generator().manual_seed(1))


@functools.cache
def source_and_parts(variant: str) -> tuple[Held, Parts]:
    source = uneven(MODELS[variant])
    return source, reference_parts(source.config, source.tensors, ids())


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {}
    for variant in MODELS:
        folders[variant] = tmp_path_factory.mktemp("exports") / variant
        export_huggingface(source_and_parts(variant)[0], folders[variant], vocabulary_folder=None)
    return folders


def loaded(folder: Path) -> Any:
    """By the code in the directory. (In a process that has read a Backpack, the auto classes know our own.)"""
    kind: Any = get_class_from_dynamic_module("modeling_backpack.BackpackForCausalLM", str(folder))
    assert kind.__module__.startswith("transformers_modules.")
    return kind.from_pretrained(folder, local_files_only=True).eval()


@pytest.mark.parametrize("variant", MODELS)
def test_the_plain_forward_pass_agrees_with_the_reference(variant: str) -> None:
    source, parts = source_and_parts(variant)
    torch.testing.assert_close(PlainDecoder(source).logits(ids()), parts.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", MODELS)
def test_transformers_computes_the_model_and_shows_its_parts(variant: str, exports: dict[str, Path]) -> None:
    _, parts = source_and_parts(variant)
    model = loaded(exports[variant])
    with torch.no_grad():
        output = model(input_ids=ids(), labels=ids(), label_smoothing=0.1, output_hidden_states=True)
        plain = model(ids(), labels=ids(), output_senses=False)
    close = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(output.logits, parts.logits)
    close(plain.logits, parts.logits)
    close(output.senses, parts.senses)
    close(output.contextualization, parts.alpha)
    close(output.backpack_hidden_states, parts.hidden)
    assert plain.senses is None and len(output.hidden_states) == MODELS[variant].num_layers + 1
    log_probability = parts.logits.log_softmax(-1)[:, :-1]
    nll = -log_probability.gather(2, ids()[:, 1:, None]).mean()
    close(output.loss_unsmoothed, nll)
    close(output.loss, 0.9 * nll - 0.1 * log_probability.mean())
    close(plain.loss, nll)
    for name in ("sense_network", "sense_weight_net", "word_embeddings", "position_embeddings", "gpt2_model"):
        assert hasattr(model.backpack, name), name
    assert model.lm_head.weight is model.backpack.word_embeddings.weight


@pytest.mark.parametrize("variant", MODELS)
def test_generation_with_caches_is_generation_without(variant: str, exports: dict[str, Path]) -> None:
    model, prompt = loaded(exports[variant]), ids()[:, :5]
    expected = prompt
    with torch.no_grad():
        for _ in range(12):
            logits = model(expected, output_senses=False, use_cache=False).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    assert torch.equal(model.generate(prompt, attention_mask=mask, **how), expected)
    beams = [model.generate(prompt, attention_mask=mask, num_beams=3, use_cache=c, **how) for c in (True, False)]
    assert torch.equal(*beams)
    padded, mask = (torch.nn.functional.pad(x, (4, 0)) for x in (prompt, mask))  # on the left, as for generation
    assert torch.equal(model.generate(padded, attention_mask=mask, **how)[:, 4:], expected)
    with torch.no_grad():  # a prompt in two pieces; what is padded on the right changes nothing before it
        first = model(ids()[:, :8], use_cache=True)
        second = model(ids()[:, 8:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(second.logits, model(ids()).logits[:, 8:], rtol=1e-5, atol=1e-5)
        mask = (torch.arange(20) < 15).long().expand(3, -1)
        torch.testing.assert_close(
            model(ids(), attention_mask=mask).logits[:, :15], model(ids()).logits[:, :15], rtol=1e-5, atol=1e-5
        )


def test_kept_senses_follow_the_weights_and_steering(exports: dict[str, Path]) -> None:
    model, (source, _) = loaded(exports["original"]), source_and_parts("original")
    token = int(ids()[0, 0])
    with torch.no_grad():
        before = model(ids()[:1]).logits
        model.backpack.steer([token], [2], 0.5)
        steered = model(ids()[:1]).logits
        assert torch.equal(steered, model(ids()[:1], output_senses=False).logits)
        model.backpack.unsteer()
        assert torch.equal(before, model(ids()[:1]).logits)
        factors = torch.ones(101, 4)
        factors[token, 2] = 0.5
        torch.testing.assert_close(
            PlainDecoder(source, sense_factors_VK=factors).logits(ids()[:1]), steered, rtol=1e-5, atol=1e-5
        )
        assert not torch.allclose(before, steered)
        model.backpack.sense_network.final_mlp.c_proj.weight.mul_(2.0)  # as an optimizer's step changes it
        changed = model(ids()[:1]).logits
    model.train()
    torch.testing.assert_close(model(ids()[:1]).logits, changed, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, changed)
    model.backpack.sense_network.final_mlp.c_proj.weight.data.mul_(0.5)  # as DeepSpeed's: no version counts it
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids()[:1]).logits, before, rtol=1e-4, atol=1e-4)


def test_autocast_keeps_what_is_kept_exact(exports: dict[str, Path]) -> None:
    model, prompt = loaded(exports["nano"]), ids()[:, :5]
    with torch.no_grad():
        due = model(prompt).logits
        model.eval()  # forgets
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(prompt).logits
            model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)
        torch.testing.assert_close(low.float(), due, rtol=0.1, atol=0.1)
        assert torch.equal(model(prompt).logits, due)


def test_what_does_not_fit_is_said(exports: dict[str, Path]) -> None:
    model = loaded(exports["nano"])
    most = model.config.n_positions
    with pytest.raises(ValueError, match=f"a text of {most + 1} tokens is beyond the model's {most} positions"):
        model(torch.ones(1, most + 1, dtype=torch.int64))
    padded = torch.ones(1, most + 3, dtype=torch.int64)
    mask = (torch.arange(most + 3) >= 3).long()[None]  # the text itself fits
    assert model(padded, attention_mask=mask).logits.shape[1] == most + 3
    with pytest.raises(ValueError, match="output_attentions is not kept"):
        model(padded[:, :3], output_attentions=True)


@pytest.mark.parametrize("variant", MODELS)
def test_round_trips(variant: str, exports: dict[str, Path], tmp_path: Path) -> None:
    source, _ = source_and_parts(variant)
    found = verify_huggingface(source, exports[variant])
    assert found.num_tensors == len(load_file(exports[variant] / "model.safetensors"))
    back = open_huggingface(exports[variant])
    assert back.config == source.config
    for name, tensor in source.tensors.items():
        assert torch.equal(back.read(name), tensor), name
    loaded(exports[variant]).save_pretrained(tmp_path / "saved")  # by transformers
    again = open_huggingface(tmp_path / "saved")
    assert all(torch.equal(again.read(name), tensor) for name, tensor in source.tensors.items())


@pytest.mark.multiprocess
def test_real_ranks_compute_what_transformers_does_and_give_it_back(tmp_path: Path) -> None:
    """Both variants from what transformers saved into tp 1, 2, 4 and pp 1, 2, 3, sp, ZeRO 0 to 3, and back."""
    layouts: dict[str, dict[str, Any]] = {
        "tp4_sp": {"tp": 4, "sequence_parallel": True},
        "tp2_pp2_interleaved": {"tp": 2, "pp": 2, "virtual_stages": 3, "zero": 0},
        "tp2_dp2_zero3": {"tp": 2, "dp": 2, "zero": 3},
        "pp3": {"pp": 3},
        "dp2_zero2": {"dp": 2, "zero": 2},
    }
    cases = {}
    for variant, config in MODELS.items():
        deeper = dataclasses.replace(config, num_layers=6 - (variant == "nano"))  # pp 1, 2, 3 and 6 stages
        export_huggingface(uneven(deeper), tmp_path / "ours" / variant, vocabulary_folder=None)
        loaded(tmp_path / "ours" / variant).save_pretrained(tmp_path / variant)
        cases |= {f"{variant}_{name}": {"model": variant, **sizes} for name, sizes in layouts.items()}

    def logits(variant: str, ids_BL: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = loaded(tmp_path / "ours" / variant)(ids_BL).logits
        return found

    through_real_ranks(tmp_path, cases, logits)


def test_a_user_without_xlmega_loads_it_and_generates(exports: dict[str, Path]) -> None:
    program = (
        "import sys, torch, transformers\n"
        "for folder in sys.argv[1:]:\n"
        "    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)\n"
        "    assert type(model).__module__.startswith('transformers_modules.'), type(model)\n"
        "    ids = torch.tensor([[1, 2, 3]])\n"
        "    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, pad_token_id=0)\n"
        "    model.save_pretrained(folder + '-again')\n"
        "    assert found.shape == (1, 7) and model(ids).senses.shape == (1, 4, 3, 32)\n"
        "assert not any(name.split('.')[0] == 'xlmega' for name in sys.modules)\n"
    )
    folders = [str(folder) for folder in exports.values()]
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", program, *folders], check=True)
    assert all((Path(f"{folder}-again") / "modeling_backpack.py").is_file() for folder in folders)


def test_code_in_a_directory_is_not_run_by_an_import(exports: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in exports["nano"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in folder.glob("*.py"):
        path.write_text("raise SystemExit('the code was run')\n")
    assert open_huggingface(folder).config == MODELS["nano"]
    verify_huggingface(source_and_parts("nano")[0], folder)


def test_the_published_port_is_read(exports: dict[str, Path], tmp_path: Path) -> None:
    """It calls itself a gpt2 and stores shared tensors under one of several names, masks too."""
    tensors = load_file(exports["original"] / "model.safetensors")
    tensors["backpack.word_embeddings.weight"] = tensors.pop("backpack.gpt2_model.wte.weight")
    tensors["lm_head.weight"] = tensors["backpack.word_embeddings.weight"].clone()
    tensors["backpack.gpt2_model.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": 101, "num_senses": 4}
    config = {"model_type": "gpt2", "architectures": ["BackpackGPT2LMHeadModel"], "n_inner": None, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model, (source, _) = open_huggingface(tmp_path), source_and_parts("original")
    assert model.config.layer_scaled_attention and model.config.backpack_variant == "original"
    assert all(torch.equal(model.read(name), tensor) for name, tensor in source.tensors.items())


def rows_by_part(tensor: torch.Tensor, groups: int, parts: int) -> torch.Tensor:
    """Rows (group, part, width) to (part, group, width)."""
    return tensor.unflatten(0, (groups, parts, -1)).transpose(0, 1).flatten(0, 2)


def flash_attention_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of the original's code, from the formulas of METHODS §4.2 and the modules it is made of."""
    words = tensors["embedding.word_embeddings.weight"]
    modules = {
        "embedding.position_embeddings": "gpt2_model.embeddings.position_embeddings",
        "decoder.layers.0.input_layernorm": "gpt2_model.ln_0",
        "decoder.layers.0.pre_mlp_layernorm": "gpt2_model.layers.0.norm1",
        "decoder.layers.1.input_layernorm": "gpt2_model.layers.0.norm2",
        "decoder.layers.1.pre_mlp_layernorm": "gpt2_model.layers.1.norm1",
        "decoder.final_layernorm": "gpt2_model.layers.1.norm2",
        "senses.query_key": "contextualization_attn.Wqkv",
        "senses.input_layernorm": "content_model.ln_0",
        "senses.mlp_layernorm": "content_model.layers.0.norm1",
        "senses.output_layernorm": "content_model.layers.0.norm2",
        "senses.mlp.linear_fc1": "content_model.layers.0.mlp.fc1",
        "senses.mlp.linear_fc2": "content_model.layers.0.mlp.fc2",
        "senses.expand": "content_model.final_mlp.fc1",
        "senses.output": "content_model.final_mlp.fc2",
    }
    for layer in (0, 1):
        for ours, theirs in (
            ("self_attention.linear_qkv", "mixer.Wqkv"),
            ("self_attention.linear_proj", "mixer.out_proj"),
            ("mlp.linear_fc1", "mlp.fc1"),
            ("mlp.linear_fc2", "mlp.fc2"),
        ):
            modules[f"decoder.layers.{layer}.{ours}"] = f"gpt2_model.layers.{layer}.{theirs}"
    state = {f"transformer.{p}embeddings.word_embeddings.weight": words for p in ("gpt2_model.", "", "content_model.")}
    state["lm_head.weight"] = words
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        if name != "embedding.word_embeddings.weight":
            state[f"transformer.{modules[module]}.{kind}"] = blocked(name, tensor)
    return state


def blocked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if "linear_qkv" in name:
        return rows_by_part(tensor, 4, 3)
    return rows_by_part(tensor, 4, 2) if "query_key" in name else tensor


def nano_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """By the names of nanoBackpack's code (METHODS §4.3), whose senses are the last axis."""
    context, senses = "backpack.contextualization_layer.", "backpack.sense_vector_layer."
    modules = {
        "embedding.word_embeddings": f"{context}transformer.wte",
        "embedding.position_embeddings": f"{context}transformer.wpe",
        "decoder.final_layernorm": f"{context}transformer.ln_f",
        "senses.query_key": f"{context}c_attn",
        "senses.mlp.linear_fc1": f"{senses}ff_1.c_fc",
        "senses.mlp.linear_fc2": f"{senses}ff_1.c_proj",
        "senses.mlp_layernorm": f"{senses}ln_1",
        "senses.expand": f"{senses}ff_2.c_fc",
        "senses.output": f"{senses}ff_2.c_proj",
        "senses.joint_layernorm": f"{senses}ln_2",
    }
    inner = {
        "input_layernorm": "ln_1",
        "self_attention.linear_qkv": "attn.c_attn",
        "self_attention.linear_proj": "attn.c_proj",
        "pre_mlp_layernorm": "ln_2",
        "mlp.linear_fc1": "mlp.c_fc",
        "mlp.linear_fc2": "mlp.c_proj",
    }
    state = {"wte.weight": tensors["embedding.word_embeddings.weight"]}
    state[f"{senses}wte.weight"] = state["backpack.logit_layer.lm_head.weight"] = state["wte.weight"]
    state[f"{context}bias"] = torch.ones(1, 1, 40, 40)
    for name, tensor in tensors.items():
        module, kind = name.rsplit(".", 1)
        if module.startswith("decoder.layers."):
            _, _, layer, rest = module.split(".", 3)
            theirs = f"{context}transformer.h.{layer}.{inner[rest]}"
        else:
            theirs = modules[module]
        if module in ("senses.output", "senses.joint_layernorm"):
            tensor = tensor.unflatten(0, (4, 32)).transpose(0, 1).flatten(0, 1)
        state[f"{theirs}.{kind}"] = blocked(name, tensor)
    return state


@pytest.mark.parametrize("variant", MODELS)
def test_their_authors_files_are_read(variant: str, tmp_path: Path) -> None:
    source, _ = source_and_parts(variant)
    if variant == "original":
        torch.save({"state_dict": flash_attention_state(source.tensors), "epoch": 1}, tmp_path / "last.pt")
        with pytest.raises(CheckpointError, match="how many heads"):
            open_foreign(tmp_path / "last.pt")
        (tmp_path / "config.json").write_text('{"n_head": 4}')
    else:
        arguments = {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 40, "bias": False, "n_sense_vector": 4}
        torch.save({"model": nano_state(source.tensors), "model_args": arguments}, tmp_path / "last.pt")
    model = open_foreign(tmp_path / "last.pt")
    expected = {**source.config.__dict__, "preset": "", "init_std": 0.02}
    assert model.config.__dict__ == expected
    assert set(model.names()) == set(logical_shapes(source.config))
    for name, tensor in source.tensors.items():
        assert torch.equal(model.read(name), tensor), name


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backpack.sense_vector_layer.ff_2.c_proj.weight": (129, 128)}, "no multiple of that"),
        ({"backpack.sense_vector_layer.ln_2.weight": (127,)}, "does not fit its config"),
        ({"backpack.sense_vector_layer.ff_2.c_proj.weight": (5 * 32, 128)}, "num_senses=5 must divide hidden_size=32"),
        ({"backpack.contextualization_layer.transformer.wte.weight": None}, r"lacks gpt2_model\.wte\.weight"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(
    change: dict[str, tuple[int, ...] | None], says: str, tmp_path: Path
) -> None:
    state = nano_state(source_and_parts("nano")[0].tensors)
    state |= {name: torch.ones(shape) for name, shape in change.items() if shape is not None}
    state = {name: tensor for name, tensor in state.items() if change.get(name, ()) is not None}
    torch.save({"model": state, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=says):
        open_foreign(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("name", "value"), [("num_senses", "4"), ("num_senses", 4.0), ("n_head", 0), ("layer_norm_epsilon", "small")]
)
def test_a_config_of_the_wrong_kinds_is_refused(
    name: str, value: object, exports: dict[str, Path], tmp_path: Path
) -> None:
    stored = json.loads((exports["nano"] / "config.json").read_text()) | {name: value}
    (tmp_path / "config.json").write_text(json.dumps(stored))
    theirs = name.replace("n_head", "num_attention_heads")
    with pytest.raises(CheckpointError, match=f"{theirs} is {value!r}, but must be a"):
        read_config(tmp_path)


def test_a_strange_tensor_is_refused(tmp_path: Path) -> None:
    state = nano_state(source_and_parts("nano")[0].tensors) | {"backpack.knowledge.weight": torch.zeros(2)}
    torch.save({"model": state, "model_args": {"n_head": 4}}, tmp_path / "ckpt.pt")
    with pytest.raises(CheckpointError, match=r"has not: backpack\.knowledge\.weight"):
        open_foreign(tmp_path / "ckpt.pt")
