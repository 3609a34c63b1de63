"""What a run did, for people to read: its directory in; tables, a plot and samples of text out. The door of matplotlib.

In: RUN/run.json, RUN/metrics.jsonl, RUN/checkpoints and, for samples, a Hugging Face export of it. Out: lines of text,
`loss.png` and `report.txt`. Nothing is trained or scored again: each figure is one that the run wrote down. A run that
still goes on can be read: a last line that is half written is left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlmega.data.indexed import open_corpus, splits
from xlmega.errors import CheckpointError, DataError
from xlmega.text.vocabulary import load_vocabulary
from xlmega.training.checkpoint import folder_of, list_checkpoints
from xlmega.training.inspection import checkpoint_lines
from xlmega.weights.directory import check_free
from xlmega.weights.huggingface import sample_text

PROMPT_TOKENS = 12
SAMPLE_TOKENS = 40


@dataclass(frozen=True)
class History:
    """metrics.jsonl: the records of steps, and of validations by the name of their set, each by ascending step."""

    steps: tuple[dict[str, Any], ...]
    validations: dict[str, tuple[dict[str, Any], ...]]

    @property
    def languages(self) -> list[str]:
        """Every language that was trained on or validated."""
        scored = [record["by_language"] for records in self.validations.values() for record in records]
        trained = [record.get("loss_by_language", {}) for record in self.steps]
        return sorted({language for by_language in (*scored, *trained) for language in by_language})


def read_facts(run: Path) -> dict[str, Any]:
    """run.json: the resolved recipe, layout and versions."""
    path = run / "run.json"
    if not path.is_file():
        raise CheckpointError(f"'{run}' is not a run directory: it has no run.json. Give what --output was.")
    try:
        facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"'{path}' is damaged: {error}.") from None
    return facts


def read_history(run: Path) -> History:
    """What metrics.jsonl holds; nothing yet is no error, a damaged line before the last is one."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    steps: dict[int, dict[str, Any]] = {}
    validations: dict[str, dict[int, dict[str, Any]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if "save_failed" in record or "save_note" in record:
                continue
            kind = validations.setdefault(record["validation"], {}) if "validation" in record else steps
            kind[record["step"]] = record  # a run that was resumed may tell a step twice: the later one counts
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise CheckpointError(f"'{path}', line {number}, is no record of a run: {line[:80]!r}.") from None
    return History(
        tuple(steps[step] for step in sorted(steps)),
        {name: tuple(found[step] for step in sorted(found)) for name, found in sorted(validations.items())},
    )


# -------------------------------------------------------------------- text


def describe(run: Path, *, verify: bool = False) -> Iterator[str]:
    """What a run directory holds, line by line: the run, its course, its scores and its checkpoints.

    With `verify` every checkpoint is hashed.
    """
    facts, history = read_facts(run), read_history(run)
    recipe = facts.get("recipe", {})
    model, plan = recipe.get("model", {}), recipe.get("training", {})
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())
    yield f"{run}: {model.get('preset') or model.get('family')}, {facts.get('layout')}, seed {plan.get('seed')}"
    yield f"  data {recipe.get('data', {}).get('root')}"
    yield f"  {versions}"
    if history.steps:
        last = history.steps[-1]
        yield (
            f"steps: {last['step']} of {plan.get('total_steps')}, loss {history.steps[0]['loss']:.4f} -> "
            f"{last['loss']:.4f}, {last.get('tokens', 0):,} tokens, "
            f"{_median([record['tokens_per_second'] for record in history.steps]):,.0f} tokens/s (median)"
        )
    else:
        yield f"steps: 0 of {plan.get('total_steps')}"
    for name in history.validations:
        yield from ("", *before_and_after(history, name))
    yield ""
    yield from checkpoint_lines(run, verify=verify)


def before_and_after(history: History, name: str) -> Iterator[str]:
    """A table of one validation set: each language's first and last scores."""
    records = history.validations[name]
    first, last = records[0], records[-1]
    yield f"validation '{name}': step {first['step']} -> step {last['step']}"
    rows = [["language", "nats/token", "", "bits/byte", "", "tokens"]]
    # The whole set stands last, under a name that no language has.
    pairs = [(language, first["by_language"].get(language), scores) for language, scores in last["by_language"].items()]
    whole = {"tokens": sum(scores.get("tokens", 0) for scores in last["by_language"].values()), **last}
    same = first["by_language"].keys() == last["by_language"].keys()  # else two means over different languages
    for language, before, after in [*pairs, ("all", first if same else None, whole)]:
        row = [language]
        for unit in ("nats_per_token", "bits_per_byte"):
            row += ["-" if before is None else f"{before[unit]:.3f} ->", f"{after[unit]:.3f}"]
        rows.append([*row, f"{after.get('tokens', 0):,.0f}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield "  " + "  ".join(cells).rstrip()


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


# -------------------------------------------------------------------- plot


def plot(history: History, path: Path) -> None:
    """Each language's training loss as a line and its validation loss as points, over steps, as a PNG."""
    import matplotlib.backends.backend_agg as agg  # here, for only this needs it
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120)
    canvas = agg.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    palette, markers = colormaps["tab10" if len(history.languages) <= 10 else "tab20"], "osD^v"
    for index, language in enumerate(history.languages):
        colour = palette(index % palette.N)
        trained = [
            (record["step"], record["loss_by_language"][language])
            for record in history.steps
            if language in record.get("loss_by_language", {})
        ]
        axes.plot(*_columns(trained), color=colour, linewidth=1, alpha=0.8, label=language)
        for marker, records in zip(markers, history.validations.values(), strict=False):
            scored = [
                (record["step"], record["by_language"][language]["nats_per_token"])
                for record in records
                if language in record["by_language"]
            ]
            axes.plot(*_columns(scored), marker, color=colour, markeredgecolor="black", markersize=6)
    for marker, name in zip(markers, history.validations, strict=False):
        axes.plot([], [], marker, color="white", markeredgecolor="black", label=f"validation '{name}'")
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend(ncol=2, fontsize="small")
    figure.tight_layout()
    part = path.with_name(path.name + ".part")
    canvas.print_figure(part, format="png")
    part.replace(path)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


# -------------------------------------------------------------------- report


def report(
    run: Path, output: Path, *, export: Path | None = None, seed: int = 0, overwrite: bool = False
) -> Iterator[str]:
    """Write loss.png and report.txt to the folder `output`, and give the report's lines as they come to be.

    With `export`, transformers loads it and continues the beginning of a validation document in each language.
    """
    facts, history = read_facts(run), read_history(run)
    if not history.steps:
        raise CheckpointError(f"'{run}' has trained no step yet, so there is nothing to report.")
    check_free(output, overwrite=overwrite, replaces=("report.txt", "loss.png"))
    output.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for line in _report_lines(run, output, export, facts, history, seed):
        lines.append(line)
        yield line
    part = output / "report.txt.part"
    part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    part.replace(output / "report.txt")


def _report_lines(
    run: Path, output: Path, export: Path | None, facts: Mapping[str, Any], history: History, seed: int
) -> Iterator[str]:
    last = history.steps[-1]
    yield f"{last['step']} steps, {last.get('tokens', 0):,} tokens, layout {facts.get('layout')}"
    for name in history.validations:
        yield from ("", *before_and_after(history, name))
    if export is not None:
        yield from ("", "text by the exported model, loaded with transformers (the prompt stands before the bar):")
        yield from _samples(run, export, facts, seed)
    plot(history, output / "loss.png")
    newest = list_checkpoints(run)[-1:]
    places = {
        "plot": output / "loss.png",
        "this report": output / "report.txt",
        "every step's figures": run / "metrics.jsonl",
        "recipe, layout, versions": run / "run.json",
        "vocabulary": run / "vocabulary",
        **({"checkpoint": folder_of(run, newest[0])} if newest else {}),
        **({"for transformers": export} if export is not None else {}),
    }
    yield from ("", "where it lies:", *(f"  {what:<25} {place}" for what, place in places.items()))


def _samples(run: Path, export: Path, facts: Mapping[str, Any], seed: int) -> Iterator[str]:
    prompts = _prompts(run, Path(facts.get("recipe", {}).get("data", {}).get("root", "")))
    texts = sample_text(export, list(prompts.values()), max_new_tokens=SAMPLE_TOKENS, seed=seed)
    for (language, prompt), text in zip(prompts.items(), texts, strict=True):
        yield f"  {language}: {_on_a_line(prompt)}|{_on_a_line(text)}"


def _prompts(run: Path, root: Path) -> dict[str, str]:
    """The beginning of the first long enough validation document of each language; empty where the tokens are gone."""
    try:
        names = splits(root)
        corpus = open_corpus(root, next((name for name in names if name != "train"), "train"))
        vocabulary = load_vocabulary(run / "vocabulary")
    except DataError:
        return {"": ""}
    prompts = {}
    for language, tokens in corpus.items():
        starts = tokens.document_starts
        first = next((k for k in range(len(starts) - 1) if starts[k + 1] - starts[k] > PROMPT_TOKENS), 0)
        ids = tokens.tokens[starts[first] : starts[first + 1]][:PROMPT_TOKENS]
        prompts[language] = vocabulary.decode(ids.tolist())
    return prompts


def _on_a_line(text: str) -> str:
    return text.replace("\n", " / ")
