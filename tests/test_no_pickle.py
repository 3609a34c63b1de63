"""No code of ours unpickles, evaluates or fetches code on any path: read from the syntax of every file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted([*(ROOT / "xlmega").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / "setup.py"])
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
BUILTINS = {"eval", "exec", "compile", "__import__"}


def offences(source: str) -> Iterator[str]:
    """What a source text does that could run what a file says, with its line."""
    for node in ast.walk(ast.parse(source)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"{where}: imports {name}" for name in names if name.split(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if function in BUILTINS:
            yield f"{where}: calls {function}"
        restricted = function == "torch.load" and given.get("weights_only") == "True"
        if function.startswith("torch.") and function.endswith("load") and not restricted:
            yield f"{where}: {function} without weights_only=True"
        if given.get("allow_pickle", "False") != "False":
            yield f"{where}: allow_pickle={given['allow_pickle']}"
        if given.get("trust_remote_code", "False") != "False":
            yield f"{where}: trust_remote_code={given['trust_remote_code']}"
        if None in given and function.endswith(("load", "from_pretrained")):
            yield f"{where}: {function} with options that cannot be seen here"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_here_runs_what_a_file_says(path: Path) -> None:
    assert list(offences(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "import torch\ntorch.load('x', weights_only=flag)",
        "import torch\ntorch.jit.load('x')",
        "import torch\ntorch.load('x', **options)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "AutoModel.from_pretrained('x', trust_remote_code=True)",
        "AutoModel.from_pretrained('x', **options)",
        "eval('1')",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert list(offences(line))


def test_the_scan_lets_plain_code_be() -> None:
    plain = "import torch, json\ntorch.load('x', weights_only=True)\nnp.load('x')\njson.load(f)\nre.compile('x')"
    assert list(offences(plain)) == []
