"""What holds of the repository as a whole: names, floors, shipped settings, pinned versions, the README's commands."""

from __future__ import annotations

import importlib.metadata
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import setuptools
from packaging.requirements import Requirement

from xlmega.parallel.layout import Layout
from xlmega.training.recipe import RECIPES, read_recipe
from xlmega.training.runtime import check_pair, read_runtime

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DS_CONFIGS = {"zero1_bf16": 1, "zero1_pipeline_bf16": 1, "zero2_bf16": 2, "zero3_offload": 3, "cpu_debug": 1}
# Packages that users have beside ours and that need not be installed here.
ELSEWHERE = {"datasets", "evaluate", "accelerate", "lm_eval", "apex", "transformer_engine", "mpi4py", "wandb"}


@pytest.mark.parametrize("folder", ["xlmega", "tools"])
def test_no_module_hides_another_package(folder: str) -> None:
    """A script's own folder comes first on sys.path."""
    ours = {path.stem for path in (ROOT / folder).iterdir() if path.suffix == ".py" or path.is_dir()} - {"__pycache__"}
    taken = {*sys.stdlib_module_names, *importlib.metadata.packages_distributions(), *ELSEWHERE} - {"xlmega"}
    assert ours and not ours & taken
    assert ours - {"__init__"} == {name for name in ours if re.fullmatch(r"[a-z][a-z0-9_]*", name)}


def test_tools_are_verb_noun_and_flags_snake_case() -> None:
    for path in (ROOT / "tools").glob("*.py"):
        assert re.fullmatch(r"[a-z0-9]+_[a-z0-9_]+", path.stem), path
    for path in [*(ROOT / "tools").glob("*.py"), ROOT / "xlmega" / "pretrain.py"]:
        for flag in flags_of(path):
            assert re.fullmatch(r"--[a-z0-9_]+", flag), (path, flag)


def test_a_module_imports_only_from_lower_floors(tmp_path: Path) -> None:
    """The contracts hold, and do not hold of a copy in which text/ imports deepspeed and data/ imports training."""

    def lint(folder: Path) -> str:
        command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
        return subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout

    assert "0 broken" in lint(ROOT)
    shutil.copytree(ROOT / "xlmega", tmp_path / "xlmega", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for module, line in (("text/corpus.py", "import deepspeed"), ("data/blend.py", "import xlmega.training.recipe")):
        path = tmp_path / "xlmega" / module
        path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    told = lint(tmp_path)
    assert "xlmega.text.corpus -> deepspeed" in told and "xlmega.data.blend -> xlmega.training.recipe" in told


def test_the_shipped_ds_configs_can_be_obeyed() -> None:
    found = {path.stem: read_runtime(path) for path in (ROOT / "ds_configs").glob("*.json")}
    assert {name: runtime.zero_stage for name, runtime in found.items()} == DS_CONFIGS
    for name, runtime in found.items():
        assert runtime.precision == ("fp32" if name == "cpu_debug" else "bf16")
        check_pair(runtime, Layout(tp=2, pp=2 if runtime.zero_stage < 2 else 1, dp=2))
        assert f"`{name}`" in README
    assert found["zero3_offload"].offload_optimizer


def test_the_shipped_recipes_resolve_and_say_what_they_are() -> None:
    paths = sorted(RECIPES.glob("*.toml"))
    assert {"quickstart", "xglm_tiny"} <= {path.stem for path in paths}
    for path in paths:
        read_recipe(path.stem)
        assert path.read_text(encoding="utf-8").startswith("# "), path


def test_every_direct_dependency_has_a_tested_version_in_range(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    assert given["python_requires"] == ">=3.10,<3.13"
    needed = [Requirement(text) for text in [*given["install_requires"], *given["extras_require"]["dev"]]]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for need in needed:
        pins = [pin for pin in pinned if pin.name == need.name]
        for python in ("3.10", "3.11", "3.12"):
            environment = {"python_version": python}
            if need.marker is None or need.marker.evaluate(environment):
                fitting = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
                assert len(fitting) == 1, (need.name, python)
                version = str(fitting[0].specifier).removeprefix("==")
                assert need.specifier.contains(version), (need, version)
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in pinned if pin.marker is None}
    for name in ("torch", "megatron-core", "deepspeed"):
        assert f"{name} {versions[name]}" in " ".join(README.split())


# -------------------------------------------------------------------- README


def flags_of(script: Path) -> set[str]:
    """The options that a script's parser declares."""
    return set(re.findall(r'add_argument\(\s*"(--[^"]+)"', script.read_text(encoding="utf-8")))


def readme_commands() -> list[list[str]]:
    """Every command of ours in a code block, or standing in a table or a sentence, as words."""
    blocks = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`((?:python|deepspeed|torchrun|srun|mpirun|make) [^`\n]*)`", README)
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_readmes_commands_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    scripts = 0
    for words in readme_commands():
        if words[0] == "make":
            assert words[1] in targets, words
        if words[0] == "sbatch":
            assert any(word.startswith("slurm/") and (ROOT / word).is_file() for word in words), words
            continue
        script = next((ROOT / word for word in words if word.endswith(".py")), None)
        if script is None:
            assert words[0] in ("make", "pip"), words
            continue
        scripts += 1
        assert script.is_file(), words
        given = [word for word in words[words.index(str(script.relative_to(ROOT))) :] if word.startswith("--")]
        assert set(given) <= flags_of(script), words
        for option, value in pairwise(words):
            if option == "--ds_config":
                assert (ROOT / value).is_file(), words
    assert scripts >= 10


def test_the_readmes_options_and_overrides_are_known() -> None:
    """Lines that say 'planned' may name what is to come; all else is there."""
    lines = [line for line in README.splitlines() if "planned" not in line]
    left_of_table = README.index("## Coming from")
    assert {"--resume", "--stop_at", "--dry_run"} <= set(re.findall(r"--[a-z_]+", README[:left_of_table]))
    overrides = [re.findall(r"--set ('[^']+'|[a-z_]+\.[^\s`]+)", line) for line in lines]
    assert sum(map(len, overrides)) >= 5
    for together in overrides:
        read_recipe("xglm_tiny", [text.strip("'") for text in together])
    for path in re.findall(r"`((?:xlmega|tools)/[\w/]+\.py)`", "\n".join(lines)):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"^\| `--([a-z_]+)", README[:left_of_table], flags=re.MULTILINE):
        assert f"--{name}" in flags_of(ROOT / "xlmega" / "pretrain.py")


def test_ds_configs_hold_no_unknown_keys() -> None:
    allowed = {"train_micro_batch_size_per_gpu", "bf16", "fp16", "zero_optimization"}
    for path in (ROOT / "ds_configs").glob("*.json"):
        assert set(json.loads(path.read_text(encoding="utf-8"))) <= allowed, path
