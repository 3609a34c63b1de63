"""What `analysis.senses` found, for people: tables as text and HTML, and pictures.

In: a SenseBook and a `Wishes` of what to look at. Out: files in a new folder, which appears whole or not at all:
words.txt, .html and .png, distribution.tsv and .png, similarity.tsv, usage.txt, steering.txt, where they are asked for.
With `training.report` the only file that may import matplotlib.
"""

from __future__ import annotations

import html
import math
import os
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from xlmega.analysis.senses import (
    SenseBook,
    Similarity,
    WordSenses,
    lexical_similarity,
    next_tokens,
    sense_distribution,
    steering_factors,
    token_languages,
    top_tokens,
    usage,
)
from xlmega.data.indexed import open_corpus
from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.text.records import read_text_lines
from xlmega.weights.directory import published, write_text

PICTURE_WORDS = 40
"""Words of one picture; the tables have them all."""


@dataclass(frozen=True)
class Wishes:
    """What to look at; what is empty is left out."""

    words: tuple[tuple[str, str], ...] = ()
    """(language, word) pairs whose senses are told by their likeliest tokens."""
    pairs: tuple[tuple[str, str], ...] = ()
    """Words and their translations, whose senses are compared with each other."""
    similarity: tuple[tuple[str, str, float], ...] = ()
    """Pairs of words with people's scores of how alike they are."""
    tokens: Path | None = None
    """A token folder: tells which tokens are of which language, and how the senses are used there."""
    split: str = "valid"
    usage_windows: int = 0
    """Windows of each language on which the use of senses is measured."""
    steer: tuple[tuple[str, int, float], ...] = ()
    """(word, sense, factor): what is multiplied before `prompt` is continued."""
    prompt: str = ""
    count: int = 5
    """Tokens of each sense."""

    def problems(self) -> Iterator[str]:
        if not (self.words or self.pairs or self.similarity or self.usage_windows or self.prompt):
            yield "nothing to look at: give words, pairs, a similarity list, usage windows, or a prompt to steer."
        if self.usage_windows < 0:
            yield f"usage_windows must be at least 0, but is {self.usage_windows}."
        if self.count < 1:
            yield f"count must be at least 1, but is {self.count}."
        if self.usage_windows and self.tokens is None:
            yield "usage is measured on text: give a token folder."
        if self.tokens is not None and not (self.words or self.usage_windows):
            yield "a token folder serves words and usage windows alone: give those, or leave it out."
        if self.steer and not self.prompt:
            yield "steering changes how a prompt goes on: give a prompt."


REPORTS = ("words.txt", "distribution.tsv", "similarity.tsv", "usage.txt", "steering.txt")
"""One of them is in every folder that `inspect` writes."""
_BESIDE = ("words.html", "words.png", "distribution.png")


def inspect(book: SenseBook, wishes: Wishes, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write the folder `output`; the files written."""
    if problems := list(wishes.problems()):
        raise ConfigError(" ".join(problems))
    if output.is_dir() and (others := sorted({path.name for path in output.iterdir()} - {*REPORTS, *_BESIDE})):
        raise CheckpointError(
            f"'{output}' is not empty: it has {', '.join(others[:3])}, which this command did not write and does not "
            "replace. Choose another --output."
        )
    with published(output, overwrite=overwrite, replaces=REPORTS) as part:
        files = list(_written(book, wishes, part))
    return [output / path.relative_to(part) for path in files]


def _written(book: SenseBook, wishes: Wishes, folder: Path) -> Iterator[Path]:
    corpus = {} if wishes.tokens is None else open_corpus(wishes.tokens, wishes.split)
    for tokens in corpus.values():
        if tokens.manifest.vocabulary_hash != book.vocabulary.hash:
            raise DataError(f"'{wishes.tokens}' was tokenized with another vocabulary than the model's.")
    if wishes.words:
        size = book.vocabulary.size
        counts = {code: np.bincount(tokens.tokens, minlength=size)[:size] for code, tokens in corpus.items()}
        masks = token_languages(counts) if counts else {}
        found = [top_tokens(book, word, language, masks, wishes.count) for language, word in wishes.words]
        yield write_text(folder / "words.txt", words_as_text(found))
        yield write_text(folder / "words.html", words_as_html(found))
        yield words_picture(found, folder / "words.png")
    if wishes.pairs:
        matrix = sense_distribution(book, wishes.pairs)
        rows = "\n".join("\t".join(f"{value:.4f}" for value in row) for row in matrix)
        yield write_text(folder / "distribution.tsv", rows + "\n")
        yield distribution_picture(matrix, len(wishes.pairs), folder / "distribution.png")
    if wishes.similarity:
        yield write_text(folder / "similarity.tsv", similarity_table(lexical_similarity(book, wishes.similarity)))
    if wishes.usage_windows:
        lines = []
        for code, tokens in corpus.items():
            length = book.config.max_positions
            windows = [tokens.tokens[k * length : (k + 1) * length + 1] for k in range(wishes.usage_windows)]
            windows = [window for window in windows if len(window) > 1]
            if not windows:
                raise DataError(f"'{wishes.tokens}' has no text of '{code}' in its split '{wishes.split}'.")
            lines += [f"{code}:", *(f"  {line}" for line in usage(book, windows).describe())]
        yield write_text(folder / "usage.txt", "\n".join(lines) + "\n")
    if wishes.prompt:
        yield write_text(folder / "steering.txt", _steering(book, wishes))


def _steering(book: SenseBook, wishes: Wishes) -> str:
    plain = next_tokens(book, wishes.prompt, count=10)
    steered = next_tokens(book, wishes.prompt, steering_factors(book, wishes.steer), count=10)
    lines = [f"after {wishes.prompt!r}", *(f"  {word!r}, sense {k}: x {factor:g}" for word, k, factor in wishes.steer)]
    lines += [f"{'as it is':<34}steered"]
    lines += [f"{a!r:<24}{p:8.4f}  {b!r:<24}{q:8.4f}" for (a, p), (b, q) in zip(plain, steered, strict=True)]
    return "\n".join(lines) + "\n"


# -------------------------------------------------------------------- tables


def words_as_text(found: Sequence[WordSenses]) -> str:
    """One block a word, one line a sense and language."""
    lines = []
    for one in found:
        lines.append(f"{one.word} ({one.language})")
        for k, by_language in enumerate(one.senses):
            for code, tokens in by_language.items():
                told = ", ".join(f"{visible(text)} {value:.2f}" for text, value in tokens)
                lines.append(f"  sense {k}{' ' + code if code else ''}: {told}")
    return "\n".join(lines) + "\n"


def words_as_html(found: Sequence[WordSenses]) -> str:
    """A table with a row for each word and sense, a column for each language."""
    codes = list(found[0].senses[0])
    head = "".join(f"<th>{html.escape(code or 'tokens')}</th>" for code in codes)
    rows = []
    for one in found:
        for k, by_language in enumerate(one.senses):
            first = f'<th rowspan="{len(one.senses)}">{html.escape(one.word)}<br>{html.escape(one.language)}</th>'
            cells = "".join(
                "<td>" + ", ".join(f"{html.escape(visible(t))} <small>{v:.2f}</small>" for t, v in tokens) + "</td>"
                for tokens in by_language.values()
            )
            rows.append(f"<tr>{first if k == 0 else ''}<td>{k}</td>{cells}</tr>")
    style = "body{font-family:sans-serif}td,th{border:1px solid #bbb;padding:2px 6px;text-align:left}"
    style += "table{border-collapse:collapse}small{color:#777}"
    return (
        f'<!DOCTYPE html><html><head><meta charset="utf-8"><title>Senses</title><style>{style}</style></head><body>'
        f"<table><tr><th>word</th><th>sense</th>{head}</tr>{''.join(rows)}</table></body></html>\n"
    )


def visible(text: str) -> str:
    """A token without the space it begins with; what cannot be seen is spelt out."""
    shown = text.strip() or repr(text)
    return "".join(c if unicodedata.category(c)[0] not in "CZ" or c == " " else f"\\u{ord(c):04x}" for c in shown)


def similarity_table(found: Similarity) -> str:
    """Tab-separated: sense, Spearman's and Pearson's correlation."""
    rows = [f"{name}\t{value:.4f}\t{found.pearson[name]:.4f}" for name, value in found.spearman.items()]
    return "\n".join([f"{found.pairs} pairs\tspearman\tpearson", *rows]) + "\n"


# -------------------------------------------------------------------- pictures


def words_picture(found: Sequence[WordSenses], path: Path) -> Path:
    """The words' senses as a table; of more than 40 words the first 40."""
    found = found[:PICTURE_WORDS]
    num_senses, codes = len(found[0].senses), list(found[0].senses[0])
    columns = num_senses * len(codes)
    figure, axes = _figure(max(6.0, 1.2 + 1.5 * columns), max(2.0, 0.8 + 0.62 * len(found)))
    axes.axis("off")
    cells = [
        [
            "\n".join(visible(text)[:14] for text, _ in by_language[code][:3])
            for by_language in one.senses
            for code in codes
        ]
        for one in found
    ]
    heads = [f"{k}{' ' + code if code else ''}" for k in range(num_senses) for code in codes]
    table = axes.table(
        cellText=cells,
        rowLabels=[f"{one.word} ({one.language})" for one in found],
        colLabels=heads,
        loc="upper center",
        cellLoc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(6)
    table.scale(1.0, 2.6)
    return _save(figure, path)


def distribution_picture(matrix: npt.NDArray[np.float64], num_pairs: int, path: Path) -> Path:
    """The k x k cosines as colours with their values."""
    size = len(matrix)
    figure, axes = _figure(2.5 + 0.45 * size, 2.0 + 0.45 * size)
    limit = max(1e-6, float(np.abs(matrix).max()))
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set_xticks(range(size))
    axes.set_yticks(range(size))
    axes.set_xlabel("sense of the translation")
    axes.set_ylabel("sense of the word")
    axes.set_title(f"mean cosine over {num_pairs} pairs of words", fontsize=9)
    for row, column in np.ndindex(matrix.shape):
        dark = abs(matrix[row, column]) > 0.6 * limit
        axes.text(
            column, row, f"{matrix[row, column]:.2f}", ha="center", va="center", fontsize=6, color="w" if dark else "k"
        )
    figure.colorbar(image, shrink=0.8)
    return _save(figure, path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 60.0), min(height, 60.0)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _save(figure: Any, path: Path) -> Path:
    with path.open("wb") as file, warnings.catch_warnings():
        # Scripts that matplotlib has no letters for are boxes in a picture; the tables beside it have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font", category=UserWarning)
        figure.savefig(file, format="png", dpi=120)
        file.flush()
        os.fsync(file.fileno())
    return path


# -------------------------------------------------------------------- lists of words


def read_table(path: Path, columns: int, numbers: int = 0) -> list[tuple[Any, ...]]:
    """Rows of a tab-separated file: words, and in the last `numbers` columns numbers. Lines with # are remarks."""
    rows: list[tuple[Any, ...]] = []
    for number, line in enumerate(read_text_lines(path), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [field.strip() for field in line.split("\t")]
        try:
            if len(fields) != columns or not all(fields):
                raise ValueError
            values = [float(field) for field in fields[columns - numbers :]]
            if not all(math.isfinite(value) for value in values):
                raise ValueError
        except ValueError:
            words = "words" if not numbers else f"words and {numbers} number{'s' if numbers > 1 else ''} at the end"
            raise DataError(
                f"{path}:{number} must be {columns} columns of {words}, parted by tabs: {line!r}."
            ) from None
        rows.append((*fields[: columns - numbers], *values))
    if not rows:
        raise DataError(f"'{path}' holds no rows.")
    return rows
