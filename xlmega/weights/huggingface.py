"""Logical models to Hugging Face directories and back; the only file that imports transformers.

In: any LogicalTensors and, if there is one, a vocabulary folder. Out: a directory that AutoModelForCausalLM and
AutoTokenizer load by themselves: safetensors, config.json, generation_config.json, tokenizer.json, a model card, and a
copy of the vocabulary. The other way, such a directory (or one of facebook/xglm-* or gpt2 in safetensors) read lazily
as LogicalTensors. What a family lacks and how its weights make up for it stands in `xlmega.weights.names`; the note
under "xlmega" in config.json lets an import undo it.

Guaranteed: every tensor but a folded word embedding goes there and back bit for bit; the exported model computes the
logical model's logits; memory holds one tensor at a time; a directory appears whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.models.config import XGLM_POSITION_OFFSET, ModelConfig
from xlmega.text.vocabulary import Vocabulary, load_vocabulary
from xlmega.weights.directory import (
    SHARD_BYTES,
    TensorFolder,
    TensorStore,
    cast,
    check_complete,
    check_shapes,
    copy_folder,
    dtype_named,
    published,
    write_json,
    write_tensors,
    write_text,
)
from xlmega.weights.names import (
    FAMILIES,
    XGLM_LAYERNORM_EPSILON,
    LogicalTensors,
    Row,
    family_table,
    folded_scale,
    logical_shapes,
    xglm_scale,
    zero_heads,
)
from xlmega.weights.tokenizer_json import tokenizer_files

ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new"}
_THEIR_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

# What older releases of these families stored beside the parameters: masks and computed position tables.
_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias)$|\.embed_positions\.weights$")

# Text on which --verify compares the two tokenizers.
SAMPLES = (
    "Hello, world!  Two  spaces, a\ttab,\n\n\tand lines. ",
    "L'été à la plage: ¿qué tal? Zażółć gęślą jaźń. Привіт, світе!",
    "日本語の文章と中文句子。 한국어 문장입니다. \u3000 நன்றி สวัสดี",
    "🤖👩🏽‍🚀 \u200b\u00a0\r\n \x00 <D> <pad> <unk> <0x0A> ▁",
    "",
)


def export_huggingface(
    source: LogicalTensors,
    output: Path,
    *,
    vocabulary_folder: Path | None,
    dtype: str = "float32",
    card: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write `source` to the directory `output` for transformers; returns the files written.

    `card` is what the model card says beyond the model's own numbers: name, data, languages (a list, or a table of
    tokens per language), step, recipe (TOML text); any further key becomes a line. A ConfigError says why a family
    cannot compute the model; a CheckpointError, that `output` is occupied or a value does not fit `dtype`.
    """
    config, stored = source.config, dtype_named(dtype)
    table = family_table(config)
    check_complete(source)
    vocabulary = None if vocabulary_folder is None else _fitting_vocabulary(vocabulary_folder, config)
    with published(output, overwrite=overwrite) as part:
        files = write_tensors(part, their_shapes(config, table), _their_tensors(source, table), stored, shard_bytes)
        files.append(write_json(part / "config.json", huggingface_config(config, vocabulary, dtype)))
        files.append(write_json(part / "generation_config.json", {"_from_model_config": True, **_markers(vocabulary)}))
        files.append(write_text(part / "README.md", model_card(config, dtype, card or {})))
        if vocabulary_folder is not None and vocabulary is not None:
            for name, value in tokenizer_files(vocabulary, config.max_positions).items():
                files.append(write_json(part / name, value))
            files.extend(copy_folder(vocabulary_folder, part / "vocabulary"))
    return [output / path.relative_to(part) for path in files]


class HuggingFaceDirectory:
    """A family's tensors under its own names, as LogicalTensors in the dtype in which they are stored.

    They are the safetensors beside `folder`/config.json; or `config` and `tensors` say otherwise.
    """

    def __init__(self, folder: Path, config: ModelConfig | None = None, tensors: TensorStore | None = None) -> None:
        self.folder = folder
        self.config = read_config(folder) if config is None else config
        self._tensors = TensorFolder(folder) if tensors is None else tensors
        self._shapes = logical_shapes(self.config)
        table = family_table(self.config)
        self._rows = {row.logical: row for row in table}
        prefix = FAMILIES[self.config.family].prefix
        # The bare base model (openai's gpt2 is one) has the same tensors without the prefix.
        bare = not any(name.startswith(prefix) for name in self._tensors.shapes)
        self._stored = {
            theirs: theirs.removeprefix(prefix) if bare else theirs for row in table for theirs in row.theirs
        }
        wanted = {self._stored[name]: shape for name, shape in their_shapes(self.config, table).items()}
        ignored = {"lm_head.weight"} - wanted.keys()  # a tied head, stored once more
        found = {
            name: shape
            for name, shape in self._tensors.shapes.items()
            if name in wanted or not (name in ignored or _BUFFERS.search(name))
        }
        check_shapes(folder, found, wanted)

    @property
    def vocabulary_folder(self) -> Path | None:
        """The copy of the vocabulary that an export of ours holds."""
        folder = self.folder / "vocabulary"
        return folder if folder.is_dir() else None

    def names(self) -> list[str]:
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def read(self, name: str) -> torch.Tensor:
        row = self._rows[name]
        return row.to_logical([self._tensors.read(self._stored[theirs]) for theirs in row.theirs]).contiguous()

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the logical tensor in fp32; only that is read where the family stores the tensor as it is."""
        row = self._rows[name]
        if len(row.theirs) == 1 and not row.pieces:
            return self._tensors.read_slice(self._stored[row.theirs[0]], slices).float()
        return self.read(name)[slices].float()

    def read_theirs(self, name: str) -> torch.Tensor:
        """A tensor by the family's name, as stored."""
        return self._tensors.read(self._stored[name])


def open_huggingface(path: Path) -> HuggingFaceDirectory:
    """A Hugging Face directory as LogicalTensors; refuses what is not XGLM or GPT-2, with the reason."""
    return HuggingFaceDirectory(path)


@dataclass(frozen=True)
class Verified:
    """What `verify_huggingface` found to be true."""

    num_tensors: int
    """Tensors that transformers loaded with exactly the source's values."""
    mean_loss: float
    """Of the reloaded model on arbitrary ids: finite; near log(vocab_size) or above, for the ids mean nothing."""
    num_samples: int
    """Texts that both tokenizers gave the same ids; 0 without a vocabulary."""


def verify_huggingface(source: LogicalTensors, output: Path) -> Verified:
    """Load `output` with transformers, as a user would, and compare it with `source`; CheckpointError if they differ.

    Holds the whole model in memory.
    """
    import transformers

    loading: Any = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype="auto", local_files_only=True, output_loading_info=True
    )
    model, report = loading
    loose = [f"{kind}: {sorted(report[kind])}" for kind in ("missing_keys", "unexpected_keys") if report.get(kind)]
    if loose:
        raise CheckpointError(f"transformers does not load all of '{output}': {'; '.join(loose)}.")
    loaded, num_tensors = model.state_dict(), 0
    for name, tensor in _their_tensors(source, family_table(source.config)):
        if not torch.equal(loaded[name], cast(tensor, loaded[name].dtype, name)):
            raise CheckpointError(f"'{output}' has other values in '{name}' than its source: export it again.")
        num_tensors += 1
    ids = torch.arange(min(64, source.config.max_positions)).mul(7919).remainder(source.config.vocab_size)[None]
    with torch.no_grad():
        loss = model.eval().float()(input_ids=ids, labels=ids).loss.item()
    if not math.isfinite(loss):
        raise CheckpointError(f"'{output}' loads, but its loss is {loss}.")
    return Verified(num_tensors, loss, _verify_tokenizer(output))


def _verify_tokenizer(output: Path) -> int:
    if not (output / "tokenizer.json").is_file():
        return 0
    import transformers

    vocabulary = load_vocabulary(output / "vocabulary")
    tokenizer = transformers.AutoTokenizer.from_pretrained(output, local_files_only=True)
    for text in SAMPLES:
        theirs, ours = tokenizer(text, add_special_tokens=False)["input_ids"], list(vocabulary.encode(text))
        if theirs != ours:
            raise CheckpointError(f"'{output}' tokenizes {text!r} as {theirs}, but its vocabulary as {ours}.")
    return len(SAMPLES)


def their_shapes(config: ModelConfig, table: Sequence[Row]) -> dict[str, tuple[int, ...]]:
    """The family's tensors with their shapes, in the order of `table`: the rows applied to tensors without data."""
    shapes = logical_shapes(config)
    result: dict[str, tuple[int, ...]] = {}
    for row in table:
        parts = row.to_theirs(torch.empty(shapes[row.logical], device="meta"))
        result |= {name: tuple(part.shape) for name, part in zip(row.theirs, parts, strict=True)}
    return result


def _their_tensors(source: LogicalTensors, table: Iterable[Row]) -> Iterator[tuple[str, torch.Tensor]]:
    for row in table:
        yield from zip(row.theirs, row.to_theirs(source.read(row.logical)), strict=True)


def huggingface_config(config: ModelConfig, vocabulary: Vocabulary | None, dtype: str) -> dict[str, Any]:
    """config.json as the family wants it, with what an import needs to undo under 'xlmega'."""
    heads = config.num_heads + zero_heads(config)
    shared = {
        "model_type": FAMILIES[config.family].model_type,
        "activation_function": ACTIVATIONS[config.activation],
        "tie_word_embeddings": config.tied,
        "vocab_size": config.vocab_size,
        "use_cache": True,
        "torch_dtype": dtype,
        **_markers(vocabulary),
    }
    note = {
        "format_version": 1,
        "preset": config.preset,
        "residual_init": config.residual_init,
        "embedding_scale": config.embedding_scale,
        "folded_embedding_scale": folded_scale(config),
        "num_heads": config.num_heads,
        "num_zero_heads": zero_heads(config),
    }
    if config.family == "xglm":
        family = {
            "architectures": ["XGLMForCausalLM"],
            "d_model": config.hidden_size,
            "ffn_dim": config.ffn_hidden_size,
            "num_layers": config.num_layers,
            "attention_heads": heads,
            "max_position_embeddings": config.max_positions,
            "scale_embedding": bool(xglm_scale(config)),
            "dropout": config.dropout,
            "attention_dropout": config.attention_dropout,
            "activation_dropout": 0.0,
            "layerdrop": 0.0,
            "init_std": config.init_std,
        }
        if vocabulary is not None:
            family["decoder_start_token_id"] = vocabulary.eod_id
    else:
        family = {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": config.hidden_size,
            "n_inner": config.ffn_hidden_size,
            "n_layer": config.num_layers,
            "n_head": heads,
            "n_positions": config.max_positions,
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "attn_pdrop": config.attention_dropout,
            "layer_norm_epsilon": config.layernorm_epsilon,
            "initializer_range": config.init_std,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        }
    return {**family, **shared, "xlmega": note}


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory; refuses what our decoders do not compute."""
    import transformers

    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' is not a Hugging Face directory: it has no config.json.")
    try:
        theirs = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged or newer config makes transformers raise is the file's fault
        raise CheckpointError(f"transformers cannot read '{folder / 'config.json'}': {error}") from error
    readers = {"xglm": _from_xglm, "gpt2": _from_gpt2}
    if theirs.model_type not in readers:
        raise CheckpointError(f"'{folder}' is a '{theirs.model_type}'. Models of these kinds can be read: xglm, gpt2.")
    _refuse(folder, _common_obstacles(theirs))
    config = readers[theirs.model_type](folder, theirs)
    note = getattr(theirs, "xlmega", None)
    return config if note is None else _with_note(folder, config, note)


def _common_obstacles(theirs: Any) -> Iterator[str]:
    if theirs.activation_function not in _THEIR_ACTIVATIONS:
        yield f"activation_function is '{theirs.activation_function}'; known: {', '.join(_THEIR_ACTIVATIONS)}."
    if theirs.add_cross_attention:
        yield "add_cross_attention is true; only decoders without an encoder can be read."
    if theirs.hidden_size % theirs.num_attention_heads:
        yield f"hidden size {theirs.hidden_size} is not a multiple of the {theirs.num_attention_heads} heads."


def _from_xglm(folder: Path, theirs: Any) -> ModelConfig:
    if theirs.pad_token_id is not None and theirs.pad_token_id >= XGLM_POSITION_OFFSET:
        # transformers zeroes this row of the position table, and from 2 on a token stands there.
        position = theirs.pad_token_id - XGLM_POSITION_OFFSET
        _refuse(
            folder, [f"pad_token_id is {theirs.pad_token_id}, which blanks position {position}; it must be 0 or 1."]
        )
    return ModelConfig(
        family="xglm",
        num_layers=theirs.num_layers,
        hidden_size=theirs.d_model,
        ffn_hidden_size=theirs.ffn_dim,
        num_heads=theirs.attention_heads,
        head_dim=theirs.d_model // theirs.attention_heads,
        max_positions=theirs.max_position_embeddings,
        positions="sinusoidal",
        tied=theirs.tie_word_embeddings,
        embedding_scale=math.sqrt(theirs.d_model) if theirs.scale_embedding else 1.0,
        activation=_THEIR_ACTIVATIONS[theirs.activation_function],  # type: ignore[arg-type]
        vocab_size=theirs.vocab_size,
        layernorm_epsilon=XGLM_LAYERNORM_EPSILON,
        dropout=float(theirs.dropout),
        attention_dropout=float(theirs.attention_dropout),
        init_std=theirs.init_std,
    )


def _from_gpt2(folder: Path, theirs: Any) -> ModelConfig:
    if not theirs.scale_attn_weights or theirs.scale_attn_by_inverse_layer_idx:
        _refuse(folder, ["scale_attn_weights must be true and scale_attn_by_inverse_layer_idx false."])
    return ModelConfig(
        family="gpt",
        num_layers=theirs.n_layer,
        hidden_size=theirs.n_embd,
        ffn_hidden_size=4 * theirs.n_embd if theirs.n_inner is None else theirs.n_inner,
        num_heads=theirs.n_head,
        head_dim=theirs.n_embd // theirs.n_head,
        max_positions=theirs.n_positions,
        positions="learned",
        tied=theirs.tie_word_embeddings,
        embedding_scale=1.0,
        activation=_THEIR_ACTIVATIONS[theirs.activation_function],  # type: ignore[arg-type]
        vocab_size=theirs.vocab_size,
        layernorm_epsilon=theirs.layer_norm_epsilon,
        dropout=float(theirs.resid_pdrop),
        attention_dropout=float(theirs.attn_pdrop),
        init_std=theirs.initializer_range,
    )


def _with_note(folder: Path, config: ModelConfig, note: Mapping[str, Any]) -> ModelConfig:
    # The note only adds what config.json cannot say; sizes stay the family's own, which the user may have changed.
    try:
        scale = note["embedding_scale"] if note["folded_embedding_scale"] != 1.0 else config.embedding_scale
        if note["num_heads"] + note["num_zero_heads"] != config.num_heads:
            raise ValueError(f"its heads do not add up to {config.num_heads}")
        return dataclasses.replace(
            config,
            preset=note["preset"],
            residual_init=note["residual_init"],
            embedding_scale=scale,
            num_heads=note["num_heads"],
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"'{folder / 'config.json'}' has a damaged 'xlmega' note: {error!r}.") from None


def _refuse(folder: Path, problems: Iterable[str]) -> None:
    found = list(problems)
    if found:
        raise CheckpointError("\n  ".join([f"'{folder}' cannot be read as a model of ours:", *found]))


def _fitting_vocabulary(folder: Path, config: ModelConfig) -> Vocabulary:
    vocabulary = load_vocabulary(folder)
    if vocabulary.size > config.vocab_size:
        raise DataError(f"'{folder}' has {vocabulary.size} pieces, but the model knows {config.vocab_size} ids.")
    if config.family == "xglm" and (vocabulary.pad_id or 0) >= XGLM_POSITION_OFFSET:
        raise ConfigError(f"XGLM in transformers needs a pad id of 0 or 1; '{folder}' has {vocabulary.pad_id}.")
    return vocabulary


def _markers(vocabulary: Vocabulary | None) -> dict[str, int | None]:
    # A document follows the end of the one before it, so the same id also begins a text made from nothing.
    if vocabulary is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return {
        "bos_token_id": vocabulary.eod_id,
        "eos_token_id": vocabulary.eod_id,
        "pad_token_id": vocabulary.pad_id,
    }


def model_card(config: ModelConfig, dtype: str, card: Mapping[str, Any]) -> str:
    """README.md: what the model is, what it was trained on, and what the export had to write into the weights."""
    languages = card.get("languages", ())
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if languages:
        head += ["language:", *(f"- {json.dumps(code)}" for code in sorted(languages))]
    head += ["tags:", "- xlmega", "---", ""]
    shape = (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, {config.num_heads} heads of {config.head_dim}, "
        f"feed-forward {config.ffn_hidden_size}, {config.max_positions} positions, {config.vocab_size:,} ids"
    )
    lines = [
        f"# {card.get('name') or config.preset or config.family}",
        "",
        "A causal language model trained with xlmega.",
        "",
        f"- Parameters: {config.num_parameters():,} ({dtype})",
        f"- Shape: {shape}",
    ]
    known = ("name", "languages", "recipe")
    lines += [f"- {key.replace('_', ' ').capitalize()}: {value}" for key, value in card.items() if key not in known]
    lines += [*_written_into(config)]
    if isinstance(languages, Mapping):
        lines += ["", "## Training data", "", "| language | tokens |", "|---|---:|"]
        lines += [f"| {code} | {count:,} |" for code, count in sorted(languages.items())]
    if card.get("recipe"):
        lines += ["", "## Recipe", "", "```toml", str(card["recipe"]).strip(), "```"]
    return "\n".join(head + lines) + "\n"


def _written_into(config: ModelConfig) -> list[str]:
    found = []
    if folded_scale(config) != 1.0:
        found.append(
            f"The model multiplies word embeddings by {config.embedding_scale:.6g}. This family's code does not, so "
            "the stored word embedding is already multiplied."
        )
    if zero_heads(config):
        found.append(
            f"The model's attention is narrower than its hidden size. {zero_heads(config)} of its "
            f"{config.num_heads + zero_heads(config)} heads are all-zero: they add nothing, and gradients keep them so."
        )
    return ["", "## Differences from the trained weights", "", *(f"- {line}" for line in found)] if found else []


def sample_text(
    export: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 40,
    temperature: float = 0.8,
    top_k: int = 40,
    seed: int = 0,
) -> list[str]:
    """How the exported model goes on after each prompt at a document's beginning; transformers does it all."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(export, local_files_only=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32, local_files_only=True)
    texts = []
    with torch.random.fork_rng(devices=[]):  # transformers samples with the global generator
        for prompt in prompts:
            torch.manual_seed(seed)
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
            found = model.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                temperature=temperature,
                top_k=top_k,
                max_new_tokens=max_new_tokens,
            )
            texts.append(str(tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)))
    return texts
