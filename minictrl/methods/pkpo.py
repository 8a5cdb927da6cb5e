"""PKPO (Walder & Karkhanis 2025): the win rate after the procedure itself, without a transform.

Best-of-n's win rate is E[max of g over n draws], g = C_hat^n, Worst-of-n's E[min of g], g =
1 - (1 - C_hat)^n. Their unbiased estimates from G draws give each draw its reward.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minictrl.config import Config
from minictrl.methods.base import Online, check_samples


class Method(Online):
    transform = "optimal"

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.procedure == "rewind":
            raise ValueError("--procedure rewind: pkpo has standard, bon and won")
        if config.procedure != "standard" and config.n > config.G:
            raise ValueError(
                f"--n {config.n}: pkpo looks for the best of n among the --G {config.G} samples of "
                "a prompt; use a larger G or a smaller n"
            )

    def reward(self, r: Tensor, C_hat: Tensor, Phi_C: Tensor, beta: float) -> Tensor:
        n = 1 if self.config.procedure == "standard" else self.config.n
        if self.config.procedure == "won":
            return min_at_n_advantages(1 - (1 - C_hat) ** n, n, baseline=n > 1) / beta
        return max_at_n_advantages(C_hat**n, n, baseline=n > 1) / beta


def max_at_n_advantages(g: Tensor, n: int, baseline: bool = True) -> Tensor:
    """Advantages of E[max of g over n draws of pi], unbiased from G >= n draws.

    g: (P, G), for Best-of-n C_hat^n: its max@n *is* the win rate, so no transform is needed, and
    E[A | C = u] = n E[max(g(u), g of n-1 others)] = Phi_BoN(u) + const (Corollary 2, online).
    Returns (P, G), G s_i of the paper: the scale of `ppo.loo_advantages`, for a mean over
    responses. The KL is no part of the maximum: A / beta + loo_advantages(-sum of k1). baseline
    (n >= 2) subtracts from an n-subset's maximum that of its other n - 1. Never centre these by
    the group's mean: that multiplies them by 1 - n/G, against an unscaled KL.
    """
    check_samples("g", g, n, least=2 if baseline else 1)
    G = g.shape[1]
    values, order = g.double().sort(1)
    subsets = math.comb(G, n)

    def share(count: Callable[[int], int]) -> Tensor:
        """(G,) the share of the n-subsets, for the ranks i = 1..G."""
        shares = [count(i) / subsets for i in range(1, G + 1)]
        return torch.tensor(shares, dtype=values.dtype, device=g.device)

    if baseline:  # y_i is the best of a subset, y_j the second: n - 2 more from the j - 1 below
        second = share(lambda j: math.comb(j - 1, n - 2))
        below = second.cumsum(0) - second
        s = values * below - ((second * values).cumsum(1) - second * values)
    else:  # y_i is the best of its subset, or one of those below the best y_j
        best = share(lambda i: math.comb(i - 1, n - 1))
        with_i = values * share(lambda j: math.comb(j - 2, n - 2) if min(j, n) > 1 else 0)
        s = best * values + with_i.sum(1, keepdim=True) - with_i.cumsum(1)
    return torch.empty_like(s).scatter_(1, order, G * s).to(g)


def min_at_n_advantages(g: Tensor, n: int, baseline: bool = True) -> Tensor:
    """The same for E[min of g over n draws], for Worst-of-n: g = 1 - (1 - C_hat)^n."""
    return -max_at_n_advantages(-g, n, baseline)
