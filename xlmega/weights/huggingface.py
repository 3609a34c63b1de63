"""Logical models to Hugging Face directories and back; the only file that imports transformers.

In: any LogicalTensors and, if there is one, a vocabulary folder. Out: a directory that AutoModelForCausalLM and
AutoTokenizer load by themselves: safetensors, config.json, generation_config.json, tokenizer.json, a model card, and a
copy of the vocabulary. The other way, such a directory (or one that transformers saved: XGLM, GPT-2, GPT-NeoX, BLOOM,
Llama) read lazily as LogicalTensors. What a family lacks and how its weights make up for it stands in
`weights.families`; the note under "xlmega" in config.json lets an import undo it.

Guaranteed: every tensor but a folded word embedding goes there and back bit for bit; the exported model computes the
logical model's logits; memory holds one tensor at a time; a directory appears whole or not at all.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.models.config import XGLM_POSITION_OFFSET, ModelConfig
from xlmega.text.vocabulary import Vocabulary, load_vocabulary
from xlmega.weights.card import model_card
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
from xlmega.weights.families import family_of, family_table
from xlmega.weights.family_configs import from_theirs, to_table
from xlmega.weights.forward import plain_model
from xlmega.weights.names import OUTPUT_LAYER, LogicalTensors, Row, logical_shapes, parts_of
from xlmega.weights.tokenizer_json import tokenizer_files

# What older releases of these families stored beside the parameters: masks and computed position tables.
_BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.embed_positions\.weights$|\.rotary_emb\.inv_freq$")

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
        markers = _markers(vocabulary, config)
        files.append(write_json(part / "config.json", to_table(config, dtype, markers)))
        files.append(write_json(part / "generation_config.json", {"_from_model_config": True, **markers}))
        known = None if vocabulary is None else vocabulary.size
        files.append(write_text(part / "README.md", model_card(config, dtype, card or {}, known)))
        if vocabulary_folder is not None and vocabulary is not None:
            for name, value in tokenizer_files(vocabulary, config.max_positions).items():
                files.append(write_json(part / name, value))
            files.extend(copy_folder(vocabulary_folder, part / "vocabulary"))
        files.extend(write_text(part / name, text) for name, text in _code_of(config).items())
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
        family = family_of(self.config)
        prefix = family.prefix
        # The bare base model (openai's gpt2 is one) has the same tensors without the prefix.
        bare = not any(name.startswith(prefix) for name in self._tensors.shapes)
        self._stored = {
            theirs: theirs.removeprefix(prefix) if bare else theirs for row in table for theirs in row.theirs
        }
        ignored = {family.head}  # a tied head, stored once more
        for name, others in family.aliases.items():
            present = [one for one in (self._stored[name], *others) if one in self._tensors.shapes]
            self._stored[name] = present[0] if present else name
            ignored |= {name, *others}
        wanted = {self._stored[name]: shape for name, shape in their_shapes(self.config, table).items()}
        ignored -= wanted.keys()
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
        return row.to_logical([self.read_theirs(theirs) for theirs in row.theirs]).contiguous()

    def read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        """A slice of the logical tensor in fp32; only that is read where the family stores the tensor as it is."""
        row = self._rows[name]
        if row.by_rows:
            return row.to_logical([self._read_slice(row.theirs[0], slices)]).float()
        return self.read(name)[slices].float()

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Some rows of the logical tensor, as stored."""
        row = self._rows[name]
        if row.by_rows:
            return row.to_logical([self._read_slice(row.theirs[0], (rows,))])
        return self.read(name)[rows]

    def read_theirs(self, name: str) -> torch.Tensor:
        """A tensor by the family's name, as stored."""
        return self._real(name, self._tensors.read(self._stored[name]))

    def _read_slice(self, name: str, slices: tuple[slice, ...]) -> torch.Tensor:
        return self._real(name, self._tensors.read_slice(self._stored[name], slices))

    def _real(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, unless its values are codes of a quantization: taken for weights they would be a wrong model."""
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise CheckpointError(
                f"'{self.folder}' has {self._stored[name]} as {tensor.dtype}: quantized weights are not read. "
                "float16, bfloat16, float32 and float64 are; take the model as it was before it was quantized."
            )
        return tensor


def open_huggingface(path: Path) -> HuggingFaceDirectory:
    """A Hugging Face directory as LogicalTensors; refuses what is of no family of ours, with the reason."""
    return HuggingFaceDirectory(path)


# How far the logits of a reloaded export may lie from the source's, in units of the largest logit (at least 1), by the
# stored dtype; its token losses may lie twice as far, in nats. Both are computed in fp32: where float32 is stored only
# the order of sums differs, else the rounding of the stored weights is what is seen.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Verified:
    """What `verify_huggingface` found to be true."""

    num_tensors: int
    """Tensors that transformers loaded with exactly the source's values."""
    logit_difference: float
    """Largest absolute difference between transformers' logits and those of the source, on arbitrary ids."""
    largest_logit: float
    loss_difference: float
    """Largest absolute difference between the two losses of a token, in nats."""
    num_samples: int
    """Texts that both tokenizers gave the same ids; 0 without a vocabulary."""

    def describe(self) -> str:
        """One line for a person."""
        return (
            f"{self.num_tensors} tensors equal, {self.num_samples} texts tokenized alike, largest difference of a "
            f"logit {self.logit_difference:.2e} (logits reach {self.largest_logit:.3g}) and of a token's loss "
            f"{self.loss_difference:.2e} nats"
        )


def verify_huggingface(source: LogicalTensors, output: Path) -> Verified:
    """Load `output` with transformers, as a user would, and compare it with `source`; CheckpointError if they differ.

    Tensors and token ids must be equal, logits and losses within TOLERANCES. Holds the whole model in memory, in fp32.
    """
    transformers = _transformers()

    loading: Any = transformers.AutoModelForCausalLM.from_pretrained(
        output, dtype="auto", local_files_only=True, output_loading_info=True
    )
    model, report = loading
    loose = [f"{kind}: {sorted(report[kind])}" for kind in ("missing_keys", "unexpected_keys") if report.get(kind)]
    if loose:
        raise CheckpointError(f"transformers does not load all of '{output}': {'; '.join(loose)}.")
    loaded = model.state_dict()
    for row in (table := family_table(source.config)):
        if row.logical == OUTPUT_LAYER:  # GPT-NeoX's has another name in its files than in its code
            loaded[row.theirs[0]] = model.get_output_embeddings().weight.detach()
    compared: dict[str, int] = {}
    for name, part in _their_tensors(source, table):
        first = compared.get(name, 0)
        compared[name] = first + len(part)
        if not torch.equal(loaded[name][first : compared[name]], cast(part, loaded[name].dtype, name)):
            raise CheckpointError(f"'{output}' has other values in '{name}' than its source: export it again.")
    tolerance = TOLERANCES[model.dtype]
    length = min(64, source.config.max_positions)
    ids_BL = torch.arange(2 * length).mul(7919).remainder(source.config.vocab_size).view(2, length)
    with torch.no_grad():
        theirs_BLV = model.eval().float()(input_ids=ids_BL).logits
    del model, loaded
    ours = plain_model(source, resident=False)
    ours_BLV = F.linear(ours.hidden(ids_BL), ours.head())
    largest = ours_BLV.abs().max().item()
    difference = (theirs_BLV - ours_BLV).abs().max().item()
    losses = (_token_losses(theirs_BLV, ids_BL) - _token_losses(ours_BLV, ids_BL)).abs().max().item()
    unit = max(1.0, largest)
    if not (difference <= tolerance * unit and losses <= 2 * tolerance * unit):
        raise CheckpointError(
            f"'{output}' computes other logits than its source: they differ by {difference:.3g} and losses by "
            f"{losses:.3g} nats, where {tolerance:g} times the largest logit, {largest:.3g}, would be rounding."
        )
    return Verified(len(compared), difference, largest, losses, _verify_tokenizer(output))


def _token_losses(logits_BLV: torch.Tensor, ids_BL: torch.Tensor) -> torch.Tensor:
    """[B, L - 1]: nats of each token but the first, given those before it."""
    return F.cross_entropy(logits_BLV[:, :-1].transpose(1, 2), ids_BL[:, 1:], reduction="none")


def _verify_tokenizer(output: Path) -> int:
    if not (output / "tokenizer.json").is_file():
        return 0
    transformers = _transformers()

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
    """The family's tensors in the order of `table`; large ones in consecutive parts of the same name."""
    for row in table:
        if row.by_rows:
            for part in parts_of(source, row.logical):
                yield row.theirs[0], row.to_theirs(part)[0]
        else:
            yield from zip(row.theirs, row.to_theirs(source.read(row.logical)), strict=True)


def _code_of(config: ModelConfig) -> dict[str, str]:
    """The files that an export brings along where transformers has no code of its own for the family."""
    if not (package := family_of(config).code):
        return {}
    files = importlib.resources.files(package).iterdir()
    return {
        file.name: file.read_text(encoding="utf-8")
        for file in sorted(files, key=lambda file: file.name)
        if file.name.endswith(".py") and file.name != "__init__.py"
    }


@functools.lru_cache
def _transformers() -> Any:
    """transformers, which knows our own families: code that an exported directory brings along is never run here."""
    import transformers

    from xlmega.weights.backpack_code.configuration_backpack import BackpackConfig
    from xlmega.weights.backpack_code.modeling_backpack import BackpackForCausalLM, BackpackModel

    transformers.AutoConfig.register("backpack", BackpackConfig, exist_ok=True)
    transformers.AutoModel.register(BackpackConfig, BackpackModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(BackpackConfig, BackpackForCausalLM, exist_ok=True)
    return transformers


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory; refuses what our decoders do not compute."""
    transformers = _transformers()
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"'{folder}' is not a Hugging Face directory: it has no config.json.")
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "num_senses" in stored and stored.get("model_type") != "backpack":
            # The published Backpack calls itself a gpt2; what its config leaves out is as ours leaves it out.
            stored = {key: value for key, value in stored.items() if key not in ("model_type", "auto_map")}
            theirs = transformers.AutoConfig.for_model("backpack", **stored)
        else:
            theirs = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever a damaged or newer config makes transformers raise is the file's fault
        raise CheckpointError(f"transformers cannot read '{folder / 'config.json'}': {error}") from error
    return from_theirs(folder, theirs)


def _fitting_vocabulary(folder: Path, config: ModelConfig) -> Vocabulary:
    vocabulary = load_vocabulary(folder)
    if vocabulary.size > config.vocab_size:
        raise DataError(f"'{folder}' has {vocabulary.size} pieces, but the model knows {config.vocab_size} ids.")
    if config.family == "xglm" and (vocabulary.pad_id or 0) >= XGLM_POSITION_OFFSET:
        raise ConfigError(f"XGLM in transformers needs a pad id of 0 or 1; '{folder}' has {vocabulary.pad_id}.")
    return vocabulary


def _markers(vocabulary: Vocabulary | None, config: ModelConfig) -> dict[str, int | None]:
    # A document follows the end of the one before it, so the same id also begins a text made from nothing.
    if vocabulary is None:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    start = {"decoder_start_token_id": vocabulary.eod_id} if config.family == "xglm" else {}
    return {
        **start,
        "bos_token_id": vocabulary.eod_id,
        "eos_token_id": vocabulary.eod_id,
        "pad_token_id": vocabulary.pad_id,
    }


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
    transformers = _transformers()

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
