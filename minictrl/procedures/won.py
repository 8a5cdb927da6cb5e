"""Worst-of-N: the draw with the lowest reward of N, a model of jailbreaking (Lemma 5)."""

import math

from torch import Tensor

from minictrl.procedures.bon import by_rank
from minictrl.procedures.cells import cdf


def mass_after(mass: Tensor, edges: Tensor, n: int) -> Tensor:
    return -(1 - cdf(mass)).pow(n).diff()


def weights(select: Tensor, n: int, threshold: Tensor | None) -> Tensor:
    """Best-of-N's in the reverse order."""
    M = select.shape[1]
    return by_rank(select, [1 - math.comb(M - m, n) / math.comb(M, n) for m in range(M + 1)])
