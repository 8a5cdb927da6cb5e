"""What every procedure has, and those that keep a draw by its rank.

`mass_after` serves the theory, where [0, 1] is cut into cells and a policy is the mass of each
(`masses.py`, `cells.py`); the solver for a procedure's optimum (`optimum.py`) needs nothing else.
`weights` and `samples` serve the evaluation (`winrate.py`).
"""

import math
import sys
from itertools import accumulate

import torch
from torch import Tensor

from minictrl.calibration import ranks
from minictrl.procedures.cells import cdf


class Procedure:
    """An inference-time procedure with N (`n`) draws, at most `largest_n` of them in a run."""

    largest_n = 1000

    def mass_after(self, mass: Tensor, edges: Tensor, n: int) -> Tensor:
        """The mass of each cell after it (..., G), differentiable in `mass` (..., G).

        edges: (..., G + 1) of the cells, where pi_ref is uniform. Within a cell all draws tie.
        """
        raise NotImplementedError

    def weights(self, select: Tensor, n: int, select_ref: Tensor | None = None) -> Tensor:
        """(P, M) the probability that each of M samples is the one kept, over all N-subsets.

        select: (P, M) scores of the samples; equal ones share theirs equally. select_ref: (P, M')
        scores of pi_ref's samples; None where the samples are pi_ref's own. Raises ValueError on a
        procedure that has none.
        """
        raise ValueError(
            f"{type(self).__module__} has no `weights`, without which no run could be evaluated; "
            "add them to its file"
        )

    def samples(self, n: int) -> int:
        """The smallest M that `weights` can do with."""
        return n


class ByRank(Procedure):
    """Keeps the draw of rank j of N, 1 the lowest, with probability `rank_weights(N)[j - 1]`.

    The draw that is kept lies in the lowest share F of a distribution with probability E[W_k]: k is
    how many of the N draws lie there, W_k the sum of the weights of ranks 1..k. k is binomial(N, F)
    for a density, hypergeometric for N of M samples.
    """

    def rank_weights(self, n: int) -> list[float]:
        """N weights, nowhere negative, in any scale."""
        raise NotImplementedError

    def cumulative(self, n: int) -> list[float]:
        """W_0 .. W_N, from 0 to 1. Raises ValueError on bad weights."""
        weights = list(self.rank_weights(n) or [])
        if len(weights) != n or min(weights) < 0 or not 0 < sum(weights) < math.inf:
            raise ValueError(
                f"rank_weights({n}) of {type(self).__module__} gave {str(weights)[:60]}: return "
                f"{n} weights, one per rank, nowhere negative and not all 0"
            )
        total = list(accumulate(weights, initial=0))
        return [each / total[-1] for each in total]

    def mass_after(self, mass: Tensor, edges: Tensor, n: int) -> Tensor:
        F, W = cdf(mass), self.cumulative(n)
        kept = torch.zeros_like(F)  # up to a constant, which diff() removes
        for k, each in sparse(W)[1]:
            ways = math.comb(n, k)
            if ways > sys.float_info.max:
                raise ValueError(
                    f"n {n}: too many draws to be ranked; use at most {self.largest_n}"
                )
            kept = kept + each * ways * F**k * (1 - F) ** (n - k)
        return kept.diff()

    def weights(self, select: Tensor, n: int, select_ref: Tensor | None = None) -> Tensor:
        M, W = select.shape[1], self.cumulative(n)

        constant, terms = sparse(W)
        subsets = math.comb(M, n)

        def kept(m: int) -> float:
            ways = ((math.comb(m, k) * math.comb(M - m, n - k), each) for k, each in terms)
            return constant + sum(each * (way / subsets) for way, each in ways)

        return by_rank(select, [kept(m) for m in range(M + 1)])


def sparse(W: list[float]) -> tuple[int, list[tuple[int, float]]]:
    """W as a constant c, 0 or 1, and the few [(k, W_k - c)] that aren't 0, so that Best-of-N is a
    sum of one term and not of N.
    """
    constant = 0 if W.count(0) >= W.count(1) else 1
    return constant, [(k, each - constant) for k, each in enumerate(W) if each != constant]


def by_rank(select: Tensor, lowest: list[float]) -> Tensor:
    """(P, M) weights from ranks; equal scores share theirs equally.

    lowest[m]: the probability that the response kept is among the m lowest, m = 0..M.
    """
    below, up_to = ranks(select, select)  # (P, M)
    lowest = torch.tensor(lowest, dtype=select.dtype)
    return (lowest[up_to] - lowest[below]) / (up_to - below)
