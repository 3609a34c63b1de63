"""What evaluation knows of a model: a Scorer, which says how probable the ids of a text are.

In: ids, right-padded to a rectangle; a causal model needs no mask, for what follows a position cannot change it.
Out: natural logarithms of probabilities in fp32. A logical model is a Scorer, and so is an ensemble of Scorers.
Guaranteed: the figures of a text do not depend on what it is batched with, beyond rounding.

Shape letters: B texts, L positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from xlmega.errors import CheckpointError, ConfigError, DataError
from xlmega.weights.forward import plain_model
from xlmega.weights.names import LogicalTensors

# Logits that are held at once: 128 MB in fp32.
LOGIT_ELEMENTS = 1 << 25
# Sequences that are sorted by length together.
READ_AHEAD = 512


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


def token_scores(
    scorer: Scorer, sequences: Iterable[npt.NDArray[Any]], batch_tokens: int = 8192
) -> Iterator[npt.NDArray[np.float64]]:
    """For every sequence of ids, in order: log p of each id after the first, given those before it.

    Sequences of about one length share a batch, of at most `batch_tokens` positions or one sequence. A sequence has at
    least 2 ids and at most `scorer.max_positions` + 1.
    """
    waiting: list[npt.NDArray[Any]] = []
    for ids in sequences:
        _check(ids, scorer)
        waiting.append(ids)
        if len(waiting) == READ_AHEAD:
            yield from _scored(scorer, waiting, batch_tokens)
            waiting = []
    yield from _scored(scorer, waiting, batch_tokens)


def _scored(scorer: Scorer, sequences: list[npt.NDArray[Any]], batch_tokens: int) -> list[npt.NDArray[np.float64]]:
    results: list[Any] = [None] * len(sequences)
    for batch in _batches([len(ids) - 1 for ids in sequences], batch_tokens):
        longest = len(sequences[batch[0]])
        ids_BL = torch.zeros(len(batch), longest, dtype=torch.int64)
        for row, index in enumerate(batch):
            ids_BL[row, : len(sequences[index])] = torch.from_numpy(np.asarray(sequences[index], dtype=np.int64))
        found_BL = scorer.log_probabilities(ids_BL[:, :-1], ids_BL[:, 1:]).double().numpy()
        for row, index in enumerate(batch):
            results[index] = found_BL[row, : len(sequences[index]) - 1]
    return results


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of sequences, the longest first, so that a batch that fits in memory at the start is the largest."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    while order:
        count = max(1, batch_tokens // lengths[order[0]])
        yield order[:count]
        order = order[count:]


def _check(ids: npt.NDArray[Any], scorer: Scorer) -> None:
    assert len(ids) >= 2, len(ids)
    if len(ids) - 1 > scorer.max_positions:
        raise ConfigError(
            f"a sequence of {len(ids) - 1} inputs is beyond the model's {scorer.max_positions} positions."
        )
    if ids.min() < 0 or ids.max() >= scorer.vocab_size:
        raise DataError(
            f"ids from {ids.min()} to {ids.max()} are not all below the model's {scorer.vocab_size}: the text was "
            "encoded with another vocabulary than the model's."
        )


def device_named(name: str) -> torch.device:
    """A device that is there; a ConfigError for another."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = (str(error).splitlines() or ["it is not there"])[0]
        raise ConfigError(f"device '{name}' cannot be used: {reason}. 'cpu' always can.") from None
    return device


class LogicalScorer:
    """A logical model as a Scorer, on one device and torch alone."""

    def __init__(
        self, source: LogicalTensors, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
    ) -> None:
        self._model = plain_model(source, dtype=dtype, device=device)
        self.vocab_size = source.config.vocab_size
        self.max_positions = source.config.max_positions

    @torch.inference_mode()
    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        """fp32 [B, L]; logits are formed for a part of the positions at a time."""
        hidden_ND = self._model.hidden(inputs_BL).flatten(0, 1)
        head_VD, targets_N = self._model.head(), targets_BL.flatten().to(hidden_ND.device)
        out_N = torch.empty(len(targets_N))
        rows = max(1, LOGIT_ELEMENTS // self.vocab_size)
        for first in range(0, len(targets_N), rows):
            part = slice(first, first + rows)
            logits_NV = torch.nn.functional.linear(hidden_ND[part], head_VD).float()
            chosen_N = logits_NV.gather(1, targets_N[part, None])[:, 0]
            out_N[part] = (chosen_N - logits_NV.logsumexp(1)).cpu()
        return _numbers(out_N).view(targets_BL.shape)

    @torch.inference_mode()
    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B, V]."""
        hidden_BLD = self._model.hidden(inputs_BL)
        last_BD = hidden_BLD[torch.arange(len(lengths_B)), lengths_B - 1]
        return _numbers(torch.nn.functional.linear(last_BD, self._model.head()).float().log_softmax(1).cpu())


def _numbers(log_p: torch.Tensor) -> torch.Tensor:
    if log_p.isnan().any():
        raise CheckpointError(
            "the model's probabilities are not numbers: its weights are not finite, or too large for the precision "
            "that it runs in. float32 reaches farthest; a checkpoint before this one may be whole."
        )
    return log_p
