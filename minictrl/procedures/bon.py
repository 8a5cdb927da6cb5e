"""Best-of-N: the draw with the highest reward of N (Lemma 5)."""

import math

import torch
from torch import Tensor

from minictrl.procedures.cells import cdf


def mass_after(mass: Tensor, edges: Tensor, n: int) -> Tensor:
    return cdf(mass).pow(n).diff()


def weights(select: Tensor, n: int, threshold: Tensor | None) -> Tensor:
    """Rank i of M, 1 the lowest, is the best of N with probability C(i - 1, N - 1) / C(M, N)."""
    M = select.shape[1]
    return by_rank(select, [math.comb(m, n) / math.comb(M, n) for m in range(M + 1)])


def by_rank(select: Tensor, lowest: list[float]) -> Tensor:
    """(P, M) weights from ranks; equal scores share theirs equally.

    lowest[m]: the probability that the response kept is among the m lowest, m = 0..M.
    """
    order = select.sort(1).values
    below = torch.searchsorted(order, select)  # (P, M)
    up_to = torch.searchsorted(order, select, right=True)
    lowest = torch.tensor(lowest, dtype=select.dtype)
    return (lowest[up_to] - lowest[below]) / (up_to - below)
