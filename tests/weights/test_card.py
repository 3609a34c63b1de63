"""Model cards: what a checkpoint tells of its run, and recipes as TOML that reads back."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from xlmega import config
from xlmega.config import tomllib
from xlmega.models.config import model_config
from xlmega.training.recipe import read_recipe
from xlmega.weights.card import as_toml, card_of, model_card

pytestmark = pytest.mark.torch


def test_a_recipe_reads_back_from_its_card() -> None:
    table = config.to_table(
        read_recipe(
            "xglm_tiny", ["data.languages={fr = 3, 'zh-Hans' = 1.5}", "data.temperature=1.0", "data.root=tokens/x"]
        )
    )
    assert tomllib.loads(as_toml(table)) == table
    assert as_toml({"a": 1, "b": {"c d": [True, 'quote "it"'], "none": None}}) == (
        'a = 1\n\n[b]\n"c d" = [true, "quote \\"it\\""]\n'
    )


def test_a_card_names_data_languages_and_tokens_seen() -> None:
    facts = {
        "recipe": {"data": {"root": "tokens/pydocs"}, "training": {"total_steps": 100}},
        "tokens_by_language": {"fr": 3000, "no": 1000},
    }
    text = model_card(model_config(preset="pythia_70m"), "bfloat16", card_of(facts, 100), vocabulary_size=50_277)
    assert '- "no"' in text and "- Step: 100\n" in text and "| fr | 3,000 |" in text and "| all | 4,000 |" in text
    assert "Token files `pydocs`" in text and "[training]\ntotal_steps = 100\n```" in text
    assert "Ids 50,277 to 50,303 are rows that the tokenizer never produces" in text
    assert card_of({}, 3) == {"step": 3}
