"""TEA (Li, Qian and Mou 2026, arXiv 2605.10716): PKPO for an n beyond the G samples of a prompt.

The best of n is not among G < n draws, so the upper tail is extrapolated to it. Of the paper only
the abstract was at hand: the tail's model and the estimator are ours. The model is that of the best
of n itself: g = C^n, and so C, has a power law for its distribution near 1. It holds for pi_ref,
for its Best-of-n, and to first order wherever pi / pi_ref hardly changes over the last 1/G of C.
"""

import math

import torch
from torch import Tensor

from minictrl.checks import at_least_float32
from minictrl.methods.pkpo import Method as Pkpo


class Method(Pkpo):
    """PKPO as it is for n <= G."""

    least_G = 2

    @staticmethod
    def largest_n(G: int) -> float:
        return math.inf

    def advantages(self, g: Tensor, n: int) -> Tensor:
        if n <= g.shape[1]:
            return super().advantages(g, n)
        return tail_extrapolated_advantages(g, n)


def tail_extrapolated_advantages(g: Tensor, n: int) -> Tensor:
    """n (g_i - best of n - 1 others)_+, the others' best extrapolated from that of G - 1.

    g: (P, G) in [0, 1], n >= G >= 2. PKPO's advantage with its baseline, for G = n. Where P(g <= s)
    is s^c, with any c, the best of n - 1 is distributed as (the best of G - 1)^{(G - 1)/(n - 1)},
    and the advantages are unbiased. A group has one that is not 0 with probability G / n: the price
    is variance. Returns (P, G).
    """
    G = g.shape[1]
    if not 2 <= G <= n:
        raise ValueError(f"g is {tuple(g.shape)} and n is {n}: must be (prompts, 2 to n samples)")
    if not ((g >= 0) & (g <= 1)).all():
        raise ValueError("g has values outside [0, 1]; give probabilities of a win")
    g = at_least_float32(g)
    best = g.double().topk(2, dim=1)
    itself = torch.arange(G, device=g.device) == best.indices[:, :1]
    others = torch.where(itself, best.values[:, 1:], best.values[:, :1])  # (P, G)
    return (n * (g - others ** ((G - 1) / (n - 1))).clamp(min=0)).to(g)
