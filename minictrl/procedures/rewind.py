"""Rewind-and-repeat (App. G): draw until u >= 0.85, at most N times; the last draw is kept."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from minictrl.procedures.cells import REWIND_QUANTILE


def mass_after(mass: Tensor, edges: Tensor, n: int) -> Tensor:
    # the share of each cell that lies above the threshold
    above = ((edges[..., 1:] - REWIND_QUANTILE) / edges.diff()).clamp(0, 1)
    q = (mass * (1 - above)).sum(-1, keepdim=True)  # a draw falls below it
    draws = (q ** torch.arange(n)).sum(-1, keepdim=True)  # made on average, (1 - q^N) / (1 - q)
    return mass * (above * draws + (1 - above) * q ** (n - 1))


def weights(select: Tensor, n: int, threshold: Tensor) -> Tensor:
    """The first draw at or above the threshold, else the N-th."""
    M, above = select.shape[1], select >= threshold[:, None]
    passing = above.sum(1, keepdim=True)  # (P, 1)
    fails = [math.comb(M - count, n) / math.comb(M, n) for count in range(M + 1)]
    fails = torch.tensor(fails, dtype=select.dtype)[passing]
    kept_above = (1 - fails) / passing.clamp(min=1)
    kept_below = fails / (M - passing).clamp(min=1)
    return torch.where(above, kept_above, kept_below)


def threshold_of(select_ref: Tensor) -> Tensor:
    """(P,) the 85th percentile of each prompt's select_ref (P, M): just above the sample there.

    Given that sample, those above it are a fair draw of pi_ref's upper 15 %. If it counted itself,
    pi would gain 4 points at M = 64. Where samples tie with it, it is the threshold.
    """
    order = pad(select_ref.sort(1).values, (1, 0), value=-math.inf)
    k = min(round(REWIND_QUANTILE * select_ref.shape[1]), select_ref.shape[1] - 1)
    at, after = order[:, k], order[:, k + 1]
    return torch.where(at == after, at, torch.nextafter(at, after))
