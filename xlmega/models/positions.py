"""Where a token stands, as the families say it: tables and turns that depend on sizes alone.

Out come sinusoids to add to embeddings, rotations of queries and keys, and slopes by which scores fall with distance.
Torch alone: the trained decoder and the plain forward pass (`weights.forward`) both use them.

Shape letters: L positions, B windows, H heads, K head_dim.
"""

from __future__ import annotations

import functools
import math

import torch

from xlmega.models.config import XGLM_POSITION_OFFSET


def sinusoidal_positions(num_positions: int, width: int) -> torch.Tensor:
    """fp32 [num_positions, width]: row p is position p + 2, sines in the first half and cosines in the second."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(math.log(10000.0) / (half - 1)))
    places = torch.arange(num_positions, dtype=torch.float32) + XGLM_POSITION_OFFSET
    angles = places[:, None] * frequencies[None, :]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """fp32 [num_heads]: how much the score of head h falls with each position of distance (Source: arXiv:2108.12409).

    2^(-8 k / n) for k = 1..n where n is a power of two; else those of the power of two below, then every second one of
    the power of two above.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * k / power) for k in range(1, power + 1)]
    slopes += [2.0 ** (-4.0 * k / power) for k in range(1, 2 * (num_heads - power), 2)]
    return torch.tensor(slopes, dtype=torch.float32)


@functools.lru_cache(maxsize=8)
def rotary_table(length: int, width: int, base: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 (cosines, sines) [length, 1, 1, width] of the angles position * base^(-2 i / width), i counted twice."""
    with torch.inference_mode(False):  # whoever asks first, training may use it later
        inverse = base ** (-torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
        angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * inverse
        angles = torch.cat([angles, angles], dim=1)[:, None, None]
        return angles.cos(), angles.sin()


def rotated(tensor_LBHK: torch.Tensor, rotary_dim: int, base: float) -> torch.Tensor:
    """Rotary positions on the first `rotary_dim` dimensions of a head; dimension i is paired with i + rotary_dim / 2.

    Turned in fp32: an angle of a late position has no digits to lose. Source: arXiv:2104.09864, in GPT-NeoX's order.
    """
    turned, kept = tensor_LBHK[..., :rotary_dim].float(), tensor_LBHK[..., rotary_dim:]
    cosines, sines = rotary_table(tensor_LBHK.shape[0], rotary_dim, base, tensor_LBHK.device)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosines + torch.cat([-second, first], dim=-1) * sines
    return torch.cat([turned.to(tensor_LBHK.dtype), kept], dim=-1)
