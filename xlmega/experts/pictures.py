"""A tree of languages and a table of scores as pictures; matplotlib is imported here and in training.report only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.errors import ConfigError
from xlmega.experts.typology import LanguageTree


def draw_tree(tree: LanguageTree, path: Path) -> None:
    """The tree with its languages at the left and joins to the right at their distances; PNG, SVG or PDF by suffix."""
    order = _leaves(tree)
    height = {code: float(k) for k, code in enumerate(order)}
    figure, axes = _figure((7.0, 0.8 + 0.28 * len(order)))
    place: dict[tuple[str, ...], tuple[float, float]] = {(code,): (0.0, height[code]) for code in order}
    for level, widths in zip(tree.levels, tree.distances, strict=True):
        for cluster, width in zip(level, widths, strict=True):
            if cluster in place:
                continue
            parts = [part for part in place if set(part) <= set(cluster) and not _inside(part, place, cluster)]
            right = max([width, *(place[part][0] for part in parts)])
            for part in parts:
                axes.plot([place[part][0], right], [place[part][1]] * 2, color="#30638e", lw=1.4)
            ends = [place[part][1] for part in parts]
            axes.plot([right, right], [min(ends), max(ends)], color="#30638e", lw=1.4)
            place[cluster] = (right, float(np.mean(ends)))
    axes.set_yticks(range(len(order)), order)
    axes.set_xlabel("typological distance at which clusters join")
    axes.set_xlim(left=0.0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _save(figure, path)


def draw_matrix(
    values: npt.NDArray[np.float64], rows: Sequence[str], columns: Sequence[str], path: Path, *, label: str
) -> None:
    """A heat map with its figures in it: colour is the value relative to the least of its column."""
    figure, axes = _figure((1.8 + 0.62 * len(columns), 1.2 + 0.34 * len(rows)))
    shade = np.log(values / np.nanmin(values, axis=0))
    axes.imshow(shade, cmap="YlOrRd", aspect="auto", vmin=0.0)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    dark = np.nanmax(shade) * 0.6
    for row, column in np.ndindex(*values.shape):
        if np.isfinite(values[row, column]):
            colour = "white" if shade[row, column] > dark > 0 else "black"
            axes.text(column, row, f"{values[row, column]:.4g}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_title(label, fontsize=9)
    _save(figure, path)


def _leaves(tree: LanguageTree) -> list[str]:
    """Languages in an order in which no two lines of the tree cross."""
    order: list[str] = [code for cluster in tree.levels[-1] for code in cluster]
    for level in tree.levels[-2::-1]:
        rank = {code: k for k, code in enumerate(order)}
        order = [code for cluster in sorted(level, key=lambda c: min(rank[x] for x in c)) for code in cluster]
    return order


def _inside(part: tuple[str, ...], place: dict[tuple[str, ...], Any], cluster: tuple[str, ...]) -> bool:
    return any(set(part) < set(other) <= set(cluster) for other in place)


def _figure(size: tuple[float, float]) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=size, layout="constrained")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the picture '{path}' cannot be written: {error}") from None
    finally:
        pyplot.close(figure)
