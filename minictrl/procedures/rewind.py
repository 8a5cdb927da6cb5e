"""Rewind-and-repeat (App. G): draw until u >= 0.85, at most N times; the last draw is kept.

In an evaluation the threshold is a quantile of M samples, so the win rate is not exact as those of
procedures by rank are: for exp10 at 1 nat it is off by 4 points at N = 2 and M = 3, by 0.7 at M =
32, and by 0.1 at M = 256.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from minictrl.procedures import base
from minictrl.procedures.cells import REWIND_QUANTILE


class Procedure(base.Procedure):
    def mass_after(self, mass: Tensor, edges: Tensor, n: int) -> Tensor:
        # a cell that the threshold lies in is above it, because its draws tie
        above = (edges[..., 1:] > REWIND_QUANTILE + 1e-9).to(mass)
        q = (mass * (1 - above)).sum(-1, keepdim=True)  # a draw falls below it
        draws = (q ** torch.arange(n)).sum(-1, keepdim=True)  # on average, (1 - q^N) / (1 - q)
        return mass * (above * draws + (1 - above) * q ** (n - 1))

    def weights(self, select: Tensor, n: int, select_ref: Tensor | None = None) -> Tensor:
        """The first draw at or above pi_ref's threshold, else the N-th."""
        if select_ref is None:
            return own_weights(select, n)
        M = select.shape[1]
        above = select >= threshold_of(select_ref)[:, None]
        below = (~above).sum(1, keepdim=True)  # (P, 1)
        tries = torch.arange(n)
        # C(below, N) / C(M, N)
        fails = ((below - tries).clamp(min=0) / (M - tries)).prod(1, keepdim=True)
        return split(above, ~above, fails)


def own_weights(select: Tensor, n: int) -> Tensor:
    """`weights` by the samples' own threshold, so that pi_ref against itself wins 1/2.

    All N draws fail with probability q^N. The threshold is a percentile of the samples, so the
    share of them below it is fixed; what varies is q, pi_ref's mass there, which is
    Beta(below, M + 1 - below): E[q^N] stands for q^N. The sample at the threshold is no fair draw
    of those below it: one sample's weight is taken from those that tie with it.
    """
    M, threshold = select.shape[1], threshold_of(select)[:, None]
    if n == 1:
        return torch.full(select.shape, 1 / M, dtype=torch.float64)
    above = select >= threshold
    below = (~above).sum(1, keepdim=True)
    tries = torch.arange(n)
    fails = ((below + tries) / (M + 1 + tries)).prod(1, keepdim=True)
    at = torch.nextafter(threshold, torch.full_like(threshold, -math.inf))
    tied = (~above & (select == at)).double()
    fair = (~above).double() - tied / tied.sum(1, keepdim=True).clamp(min=1) * (below > 1)
    return split(above, fair, fails)


def split(above: Tensor, below: Tensor, fails: Tensor) -> Tensor:
    """(P, M) weights: `fails` (P, 1) of them on the samples below, in equal shares."""
    fails = torch.where(above.any(1, keepdim=True), fails.double(), 1.0)
    kept_above = (1 - fails) / above.sum(1, keepdim=True).clamp(min=1)
    kept_below = fails / below.sum(1, keepdim=True).clamp(min=1)
    return above * kept_above + below * kept_below


def threshold_of(select_ref: Tensor) -> Tensor:
    """(P,) the 85th percentile of each prompt's select_ref (P, M): just above the sample there.

    Given that sample, those above it are a fair draw of pi_ref's upper 15 %. If it counted itself,
    pi would gain 4 points at M = 64. Where samples tie with it, it is the threshold.
    """
    M = select_ref.shape[1]
    order = pad(select_ref.sort(1).values, (1, 0), value=-math.inf)
    k = min(round(REWIND_QUANTILE * (M + 1)), M - 1)  # its level is k / (M + 1) on average
    at, after = order[:, k], order[:, k + 1]
    return torch.where(at == after, at, torch.nextafter(at, after))
