"""What evaluation knows of a model: a Scorer, which says how probable the ids of a text are.

In: ids, right-padded to a rectangle; a causal model needs no mask, for what follows a position cannot change it.
Out: natural logarithms of probabilities in fp32. A logical model is a Scorer, and so is an ensemble of Scorers.
Guaranteed: the figures of a text do not depend on what it is batched with, beyond rounding.

Shape letters: B texts, L positions, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch


class Scorer(Protocol):
    """A causal language model, or several as one."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        ...

    @property
    def max_positions(self) -> int:
        """Longest input."""
        ...

    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        """fp32 [B, L]: log p(targets[b, l] | inputs[b, : l + 1]), on the CPU."""
        ...

    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B, V]: log p(. | inputs[b, : lengths[b]]), on the CPU."""
        ...
