"""The model card: what an exported model is, what it was trained on, and what the export wrote into its weights.

In: a ModelConfig and a table of what else is known. Out: Markdown with the front matter that Hugging Face's hub reads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from xlmega.models.config import ModelConfig
from xlmega.weights.families import folded_scale, zero_heads

# Keys of a card that have a place of their own; any further key becomes a line.
KNOWN = ("name", "languages", "recipe", "data")


def model_card(config: ModelConfig, dtype: str, card: Mapping[str, Any], vocabulary_size: int | None = None) -> str:
    """README.md. `card`: name, data, languages (a list, or a table of tokens seen per language), step, recipe (TOML).

    `vocabulary_size` is the number of ids that the exported tokenizer can produce.
    """
    languages = card.get("languages", ())
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if languages:
        head += ["language:", *(f"- {json.dumps(code)}" for code in sorted(languages))]
    head += ["tags:", "- xlmega", "---", ""]
    keys = f" ({config.kv_heads} of keys)" if config.kv_heads != config.num_heads else ""
    shape = (
        f"{config.num_layers} layers, hidden size {config.hidden_size}, {config.num_heads} heads{keys} of "
        f"{config.head_dim}, feed-forward {config.ffn_hidden_size}, {config.max_positions} positions, "
        f"{config.vocab_size:,} ids"
    )
    lines = [
        f"# {card.get('name') or config.preset or config.family}",
        "",
        "A causal language model trained with xlmega.",
        "",
        f"- Parameters: {config.num_parameters():,} ({dtype})",
        f"- Shape: {shape}",
    ]
    if config.backpack_variant:
        lines += [
            f"- Senses: {config.num_senses} of each token ({config.backpack_variant} Backpack)",
            "- Loads with code of its own: `trust_remote_code=True`, for AutoModelForCausalLM and AutoTokenizer alike",
        ]
    if vocabulary_size is not None and vocabulary_size < config.vocab_size:
        lines.append(
            f"- Ids {vocabulary_size:,} to {config.vocab_size - 1:,} are rows that the tokenizer never produces; they "
            "take part in the softmax as they did in training."
        )
    lines += [f"- {key.replace('_', ' ').capitalize()}: {value}" for key, value in card.items() if key not in KNOWN]
    lines += _written_into(config)
    if card.get("data") or languages:
        lines += ["", "## Training data", ""]
    if card.get("data"):
        lines += [str(card["data"]), ""]
    if isinstance(languages, Mapping):
        lines += ["| language | tokens seen |", "|---|---:|"]
        lines += [f"| {code} | {count:,} |" for code, count in sorted(languages.items())]
        lines.append(f"| all | {sum(languages.values()):,} |")
    if card.get("recipe"):
        lines += ["", "## Recipe", "", "```toml", str(card["recipe"]).strip(), "```"]
    return "\n".join(head + lines) + "\n"


def card_of(facts: Mapping[str, Any], step: int) -> dict[str, Any]:
    """What a checkpoint's `facts` tell of its run, as a card: step, data, tokens seen per language, recipe."""
    recipe = facts.get("recipe", {})
    card: dict[str, Any] = {"step": step}
    if root := recipe.get("data", {}).get("root"):
        card["data"] = f"Token files `{PurePath(root).name}`; what was seen of each language is below."
    if languages := facts.get("tokens_by_language"):
        card["languages"] = dict(languages)
    if recipe:
        card["recipe"] = as_toml(recipe)
    return card


def as_toml(tables: Mapping[str, Any]) -> str:
    """Tables of plain values as TOML; what is None is left out."""
    plain = [
        f"{_key(key)} = {_value(value)}"
        for key, value in tables.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    parts = ["\n".join(plain)] if plain else []
    for name, table in tables.items():
        if isinstance(table, Mapping):
            lines = [f"{_key(key)} = {_value(value)}" for key, value in table.items() if value is not None]
            parts.append("\n".join([f"[{_key(name)}]", *lines]))
    return "\n\n".join(parts) + "\n"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)  # inf and nan are spelt as in Python


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


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
