"""One document a window: a file of tokens seen as windows that begin with a document and hold no other.

In: the tokens of one language and split, a sequence length S. Out: window w holds at most S + 1 ids of one document;
it is padded where the document is shorter. A longer document is cut: its beginning alone (`split` off: window w is
document w), or its parts are windows one after the other, part p from its id p*S on, so that every token but a
document's first is a target exactly once. Where attention is reset instead, `document_numbers` says which tokens of a
packed window belong together.

Nothing is written. Without `split` nothing is built either; with it, the lengths in the .idx are read once when the
file is opened (4 bytes a document) and one sum kept for each BLOCK of documents, so memory is 8 bytes for BLOCK
documents.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from xlmega.data.indexed import IndexedTokens

BLOCK = 4096
"""Documents that share one stored sum."""


@dataclass(frozen=True, eq=False)
class DocumentWindows:
    """`count` windows of a file, from its window `first` on."""

    tokens: IndexedTokens
    sequence_length: int
    first: int
    count: int
    block_windows: NDArray[np.int64] | None
    """[blocks + 1]: how many windows the documents before each block make; None where a document is a window."""

    @property
    def total(self) -> int:
        """Windows of the whole file."""
        return self.tokens.num_documents if self.block_windows is None else int(self.block_windows[-1])

    def ids(self, window: int) -> NDArray[Any]:
        """The ids of window `first + window`, in the file's dtype: at least 1, at most S + 1."""
        assert 0 <= window < self.count, (window, self.count)
        document, part = self._place(self.first + window)
        start, end = self.tokens.document_span(document)
        start += part * self.sequence_length
        return np.asarray(self.tokens.tokens)[start : min(end, start + self.sequence_length + 1)]

    def _place(self, window: int) -> tuple[int, int]:
        """(document, part of it) of a window of the file."""
        if self.block_windows is None:
            return window, 0
        block = bisect_right(self.block_windows, window) - 1
        first = block * BLOCK
        lengths = self.tokens.document_lengths[first : first + BLOCK]
        ends = int(self.block_windows[block]) + np.cumsum(num_parts(lengths, self.sequence_length))
        document = int(np.searchsorted(ends, window, side="right"))
        before = int(ends[document - 1]) if document else int(self.block_windows[block])
        return first + document, window - before


def num_parts(lengths: NDArray[Any], sequence_length: int) -> NDArray[np.int64]:
    """[n]: how many windows documents of [n] lengths make; none for a document that has no target."""
    result: NDArray[np.int64] = -(-(lengths.astype(np.int64) - 1) // sequence_length)
    return result


def document_windows(tokens: IndexedTokens, sequence_length: int, *, split: bool) -> DocumentWindows:
    """All windows of a file."""
    blocks = None
    if split:
        lengths = tokens.document_lengths
        sums = [
            int(num_parts(lengths[first : first + BLOCK], sequence_length).sum())
            for first in range(0, len(lengths), BLOCK)
        ]
        blocks = np.concatenate([[0], np.cumsum(sums, dtype=np.int64)])
    windows = DocumentWindows(tokens, sequence_length, 0, 0, blocks)
    return DocumentWindows(tokens, sequence_length, 0, windows.total, blocks)


def document_numbers(length: int, starts: Sequence[NDArray[np.int64]]) -> NDArray[np.int32]:
    """[n, S]: which document of its window each input belongs to, 0, 1, ...; `starts[n]` are the places in window n
    (from 1) at which another document begins."""
    begins = np.zeros((len(starts), length), dtype=np.int32)
    for row, places in enumerate(starts):
        begins[row, places] = 1
    return np.cumsum(begins, axis=1, dtype=np.int32)
