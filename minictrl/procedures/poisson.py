"""Best-of-Poisson (arXiv 2506.19248): the best of 1 + Poisson(mu) draws; here mu = N - 1, so that
N are drawn on average.

On pi_ref its density is (1 + mu u) e^{mu (u - 1)}, close to the optimum of the standard win rate at
the same KL, which is e^{u / beta} / Z.
"""

import math

from torch import Tensor

from minictrl.procedures import base
from minictrl.procedures.cells import cdf

LEFT = 1e-4  # M samples are enough where more draws than M are rarer than this


class Procedure(base.Procedure):
    largest_n = 256  # beyond it the mixture takes minutes

    def mass_after(self, mass: Tensor, edges: Tensor, n: int) -> Tensor:
        F = cdf(mass)
        return (F * ((n - 1) * (F - 1)).exp()).diff()

    def weights(self, select: Tensor, n: int, select_ref: Tensor | None = None) -> Tensor:
        """Best-of-k's, mixed over k; more draws than M count as M."""
        M = select.shape[1]
        draws = [chance(k, n) for k in range(1, M)]
        draws.append(1 - sum(draws))

        def kept(m: int) -> float:
            shares = (math.comb(m, k) / math.comb(M, k) for k in range(1, M + 1))
            return sum(each * share for each, share in zip(draws, shares))

        return base.by_rank(select, [kept(m) for m in range(M + 1)])

    def samples(self, n: int) -> int:
        M, left = 0, 1.0
        while left > LEFT:
            M += 1
            left -= chance(M, n)
        return M


def chance(k: int, n: int) -> float:
    """The probability of k draws, 1 + Poisson(n - 1)."""
    if n == 1:
        return float(k == 1)
    return math.exp((k - 1) * math.log(n - 1) - (n - 1) - math.lgamma(k))
