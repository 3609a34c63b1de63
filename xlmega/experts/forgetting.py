"""Trained experts in, lines that say how far each is and what old languages lost when a language was added, out.

What was lost is in the experts' own validations: the run that adds a language scores every language before its first
step and after its last, so no model is loaded here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xlmega.experts.branching import Experts
from xlmega.experts.plan import Expert


def summary(experts: Experts) -> Iterator[str]:
    """The state of every expert and, of rounds that added a language, what the old ones lost."""
    for state in experts.states():
        yield str(state)
    for expert in experts.experts:
        if expert.parent and experts.resolved.plan.rounds[int(expert.round.partition("-")[2]) - 1].add:
            yield from forgetting(experts.output, expert)


def forgetting(output: Path, expert: Expert) -> Iterator[str]:
    """Bits per byte of every language before and after a language was added, from the run's own validations."""
    first: dict[tuple[str, str], dict[str, float]] = {}
    last = first
    for record in _records(output / expert.name / "metrics.jsonl"):
        if "validation" in record:
            scores = {(record["validation"], code): one for code, one in record["by_language"].items()}
            first = first or scores
            last = scores
    for (name, code), before in sorted(first.items()):
        after = last[name, code]
        if "bits_per_byte" in before:
            new = "" if code in expert.languages else "  (not trained)"
            yield (
                f"{expert.name} {name}/{code}: {before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f} "
                f"bits per byte{new}"
            )


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)
