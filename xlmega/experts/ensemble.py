"""Experts as one Scorer: probabilities mixed with weights that depend on the position, and text made from the mixture.

    p(target) = sum over experts of w_e p_e(target)

Mixed in probability space, in float64. Only experts with weight are asked, and of a text only as far as their last
position with weight, so top-2 of eight costs little more than two. Experts are loaded when they are first needed and at
most `resident` are in memory; every other pass goes through them in the opposite order, so that the last stays useful.
With several devices expert e lives on device e mod their number, and devices work at the same time.
Source: METHODS §2.8.

Shape letters: B texts, L positions, E experts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from xlmega.errors import ConfigError
from xlmega.evaluation.scoring import Scorer
from xlmega.experts.weighing import Weighing, WeighingSettings


class ExpertPool:
    """Scorers that are made when needed; the least recently used goes when more than `resident` are there."""

    def __init__(self, makers: Sequence[Callable[[], Scorer]], resident: int = 0, num_devices: int = 1) -> None:
        if not makers:
            raise ConfigError("an ensemble needs at least one expert.")
        if resident < 0:
            raise ConfigError(f"resident={resident} experts cannot be in memory; 0 keeps all.")
        self._makers = list(makers)
        self._resident = resident or len(makers)
        self._loaded: dict[int, Scorer] = {}
        self._backwards = False
        self.loads = 0
        """How often an expert has been loaded."""
        self.num_devices = num_devices

    def __len__(self) -> int:
        return len(self._makers)

    def expert(self, number: int) -> Scorer:
        """The scorer of an expert, loaded if it is not there."""
        if number in self._loaded:
            self._loaded[number] = self._loaded.pop(number)  # the newest stands last
        else:
            while len(self._loaded) >= self._resident:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[number] = self._makers[number]()
            self.loads += 1
        return self._loaded[number]

    def each(self, wanted: Sequence[int], work: Callable[[int, Scorer], None]) -> None:
        """Call `work` for every wanted expert, one at a time on each device."""
        order = sorted(wanted, reverse=self._backwards)
        self._backwards = not self._backwards
        if self.num_devices == 1:
            for number in order:
                work(number, self.expert(number))
            return
        scorers = {number: self.expert(number) for number in order}  # loading is not for several threads

        def on_device(device: int) -> None:
            for number in order:
                if number % self.num_devices == device:
                    work(number, scorers[number])

        with ThreadPoolExecutor(self.num_devices) as threads:
            for done in [threads.submit(on_device, device) for device in range(self.num_devices)]:
                done.result()


class EnsembleScorer:
    """Experts and a rule as a Scorer."""

    def __init__(self, pool: ExpertPool, weighing: Weighing) -> None:
        assert len(pool) == weighing.num_experts, (len(pool), weighing.num_experts)
        self.pool, self.weighing = pool, weighing
        first = pool.expert(0)
        self.vocab_size, self.max_positions = first.vocab_size, first.max_positions

    def routed(self, expert: int) -> EnsembleScorer:
        """One expert alone, as for a language that is known to be its; a Scorer over the same pool."""
        one_hot = tuple(float(k == expert) for k in range(len(self.pool)))
        return EnsembleScorer(self.pool, Weighing(WeighingSettings("fixed", prior=one_hot), len(self.pool)))

    def log_probabilities(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
        """fp32 [B, L] of the mixture."""
        _, mixed = self.scored(inputs_BL, targets_BL)
        return mixed

    def scored(self, inputs_BL: torch.Tensor, targets_BL: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
        """(weights float64 [B, L, E], fp32 [B, L] log p of the mixture)."""
        weights = self.weighing.before_experts(inputs_BL.tolist(), inputs_BL.shape[1])
        log_p = np.full(weights.shape, -np.inf)
        asked = np.ones_like(weights, dtype=bool) if self.weighing.uses_experts else weights > 0.0

        def ask(number: int, scorer: Scorer) -> None:
            needs = asked[:, :, number]
            rows = np.flatnonzero(needs.any(axis=1))
            ends = needs.shape[1] - np.argmax(needs[rows, ::-1], axis=1)
            # Rows that are needed to about the same place share a pass.
            order = np.argsort(-ends, kind="stable")
            for group in np.array_split(order, min(len(order), _groups(ends))):
                chosen, end = rows[group], int(ends[group].max())
                found = scorer.log_probabilities(inputs_BL[chosen, :end], targets_BL[chosen, :end])
                log_p[chosen, :end, number] = found.double().numpy()

        self.pool.each(np.flatnonzero(asked.any(axis=(0, 1))).tolist(), ask)
        weights = self.weighing.with_experts(weights, log_p)
        with np.errstate(divide="ignore"):
            scores = np.where(weights > 0.0, np.log(weights) + log_p, -np.inf)
        mixed = torch.from_numpy(scores).logsumexp(2).float()
        return weights, mixed

    def next_distribution(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        """fp32 [B, V] of the mixture."""
        weights_BE = self._weights_at(inputs_BL, lengths_B)
        mixed = np.full((len(lengths_B), self.vocab_size), -np.inf)

        def ask(number: int, scorer: Scorer) -> None:
            rows = np.flatnonzero(weights_BE[:, number] > 0.0)
            found = scorer.next_distribution(inputs_BL[rows], lengths_B[rows]).double().numpy()
            found += np.log(weights_BE[rows, number])[:, None]
            mixed[rows] = np.logaddexp(mixed[rows], found)

        for number in np.flatnonzero(weights_BE.any(axis=0)).tolist():
            ask(number, self.pool.expert(number))
        return torch.from_numpy(mixed).float()

    def _weights_at(self, inputs_BL: torch.Tensor, lengths_B: torch.Tensor) -> np.ndarray:
        """float64 [B, E]: the weights for the id that follows each text."""
        result = np.empty((len(lengths_B), len(self.pool)))
        for row, length in enumerate(lengths_B.tolist()):
            ids = inputs_BL[row, :length]
            weights = self.weighing.before_experts([ids.tolist()], length)
            if self.weighing.uses_experts:
                targets = torch.cat([ids[1:], ids[:1]])[None]  # the last is not looked at
                log_p = np.empty((1, length, len(self.pool)))

                def ask(number: int, scorer: Scorer, ids=ids, targets=targets, log_p=log_p) -> None:  # type: ignore[no-untyped-def]
                    log_p[..., number] = scorer.log_probabilities(ids[None], targets).double().numpy()

                self.pool.each(range(len(self.pool)), ask)
                weights = self.weighing.with_experts(weights, log_p)
            result[row] = weights[0, -1]
        return result


def _groups(ends: np.ndarray) -> int:
    """One pass where all rows are needed to about the same place, else up to four."""
    return 1 if ends.min() * 1.25 >= ends.max() else min(4, len(ends))


def generate(
    scorer: Scorer,
    prompt: Sequence[int],
    num_tokens: int,
    *,
    eod_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[int]:
    """At most `num_tokens` ids that follow `prompt`, until an end of document. Temperature 0 takes the most probable.

    A prompt begins with an end-of-document id, as texts do in training."""
    if num_tokens < 1 or temperature < 0.0 or not 0.0 < top_p <= 1.0:
        raise ConfigError(
            f"num_tokens={num_tokens} must be at least 1, temperature={temperature} not negative and top_p={top_p} "
            "above 0 and at most 1."
        )
    generator = np.random.default_rng(seed)
    ids = list(prompt)
    made: list[int] = []
    while len(made) < num_tokens:
        seen = torch.tensor([ids[-scorer.max_positions :]])
        log_p = scorer.next_distribution(seen, torch.tensor([seen.shape[1]]))[0].double().numpy()
        if temperature == 0.0:
            new = int(np.argmax(log_p))
        else:
            scores = log_p / temperature
            p = np.exp(scores - scores.max())
            order = np.argsort(-p, kind="stable")
            shares = np.cumsum(p[order] / p.sum())
            p[order[1:][shares[:-1] >= top_p]] = 0.0
            new = int(generator.choice(len(p), p=p / p.sum()))
        if new == eod_id:
            break
        made.append(new)
        ids.append(new)
    return made
