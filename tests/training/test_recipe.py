"""Recipes: the shipped ones, overrides on top, and what may change when a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlmega import config
from xlmega.errors import ConfigError
from xlmega.training.recipe import FREE_ON_RESUME, RECIPES, Recipe, build_recipe, differences, read_recipe, recipe_path

pytestmark = pytest.mark.torch
SMALL = {"model": {"preset": "xglm_tiny"}, "training": {"total_steps": 10, "batch_windows": 4}}


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_good_and_say_where_they_are_from(path: Path) -> None:
    recipe = read_recipe(path.stem)
    assert config.build(Recipe, config.to_table(recipe)) == recipe
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert recipe.data.root == ""


def test_default_then_preset_then_recipe_then_override() -> None:
    recipe = read_recipe("xglm_tiny", ["model.num_layers=2", "training.seed=5", "data.root=tokens"])
    assert (recipe.model.num_layers, recipe.model.hidden_size, recipe.model.family) == (2, 256, "xglm")
    assert (recipe.training.seed, recipe.data.root, recipe.optimizer.beta2) == (5, "tokens", 0.95)
    other = read_recipe("xglm_tiny", ["model.preset=languini_mini", "model.num_layers=2"])
    assert (other.model.family, other.model.num_heads, other.model.head_dim) == ("gpt", 8, 32)


def test_a_path_and_a_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text('[model]\npreset = "xglm_tiny"\n[training]\ntotal_steps = 3\nbatch_windows = 2\n')
    assert read_recipe(str(mine)).training.total_steps == 3
    assert recipe_path("xglm_tiny").is_file()
    with pytest.raises(ConfigError, match="no recipe 'xglm_tinny'. Did you mean 'xglm_tiny'"):
        recipe_path("xglm_tinny")
    with pytest.raises(ConfigError, match="there is no file"):
        read_recipe(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data.p_clon=0.5"], "has no key 'data.p_clon'"),
        (["model.preset=xglm_tinny"], "Did you mean 'xglm_tiny'"),
        (["training.total_steps=1e3"], "'training.total_steps' must be a whole number, but 1000.0"),
        (["training.total_steps=0"], "training.total_steps must be at least 1"),
        (["training.seed=-1"], "training.seed must not be negative"),
        (["training.keep_checkpoints=0", "training.keep_every_steps=100"], "keep_checkpoints=0 keeps every checkpoint"),
        (["training.keep_every_steps=15", "training.save_every_steps=10"], "must be a multiple of save_every_steps=10"),
        (["training.keep_best=valid"], "keep_best is 'SET/FIGURE' with FIGURE one of nats_per_token, bits_per_byte"),
        (
            ["training.keep_best=valid/bits_per_byte", "training.validate_every_steps=0"],
            "validations at saved",
        ),
        (["optimizer.min_learning_rate=1"], "is above learning_rate"),
        (["optimizer.min_learning_rate=-1"], "min_learning_rate must not be negative"),
        (["optimizer.learning_rate=0", "optimizer.min_learning_rate=0"], "learning_rate must be positive"),
        (["optimizer.beta1=1"], r"beta1 must be in \[0, 1\)"),
        (["optimizer.schedule=cos"], "one of 'cosine', 'linear', 'constant'"),
        (["data.languages={en = 0.0, fr = 1.0}"], "data.languages.en is 0"),
        (["data.languages={en = 1.0}"], "data.temperature=2.0 would be ignored"),
        (["model=3"], "'model' is a table of keys"),
        (["optimizer.beta1=2", "training.total_steps=-1", "model.droput=1", "data.temperature=0"], "4 problems"),
    ],
)
def test_recipes_that_cannot_be(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read_recipe("xglm_tiny", overrides)


def test_differences_that_matter() -> None:
    old = config.to_table(build_recipe(SMALL))
    free = {"training": {"log_every_steps": 7, "save_every_steps": 3, "keep_checkpoints": 0}, "data": {"root": "moved"}}
    training = {**SMALL["training"], **free["training"]}
    new = config.to_table(build_recipe({**SMALL, "training": training, "data": free["data"]}))
    assert differences(old, new) == {}
    other = config.to_table(
        build_recipe({**SMALL, "training": {**SMALL["training"], "seed": 3}, "data": {"languages": {"en": 1.0}}})
    )
    assert differences(old, other) == {"data.languages": "{} -> {'en': 1.0}", "training.seed": "0 -> 3"}
    assert differences({"a": 1}, {"b": 2}) == {"a": "1 -> None", "b": "None -> 2"}


def test_free_keys_exist() -> None:
    table = config.to_table(build_recipe(SMALL))
    for key in FREE_ON_RESUME:
        outer, inner = key.split(".")
        assert inner in table[outer]
