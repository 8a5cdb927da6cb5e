"""PKPO (Walder & Karkhanis 2025): the win rate after the procedure itself, without a transform.

Best-of-n's win rate is E[max of g over n draws of pi], g(y) the probability that y beats the best
of n draws of pi_ref: C^n for a continuous reward. Worst-of-n's is E[min of g], g = 1 - (1 - C)^n.
g is estimated without bias from the K reference samples, and its maximum from G draws of pi.

Every baseline is made of other responses' returns, and those of the group depend on this response:
a bias of order 1 / batch, a tenth of the gradient at one prompt a step and nothing at 32.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from minictrl import theory
from minictrl.calibration import ranks
from minictrl.checks import at_least_float32, finite
from minictrl.config import Config
from minictrl.methods.base import Online, check_samples

STEP = 0.01  # of a KL, for a slope


class Method(Online):
    transform = "optimal"  # for beta and the theory alone: the reward has no Phi

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.procedure not in ("standard", "bon", "won"):
            raise ValueError(
                f"--procedure {config.procedure}: {config.method} has standard, bon and won"
            )
        if config.procedure == "standard":
            return
        if config.n > config.K:
            raise ValueError(
                f"--n {config.n}: more than the --K {config.K} reference samples; use a "
                "smaller n, or more samples"
            )
        if config.n > cls.largest_n(config.G):
            raise ValueError(
                f"--n {config.n}: {config.method} looks for the best of n among the --G {config.G} "
                f"samples of a prompt, for an n of at most {cls.largest_n(config.G)}; use a larger "
                "G, a smaller n, or --method tea, which extrapolates"
            )

    @staticmethod
    def largest_n(G: int) -> float:
        """The largest n that G samples have advantages for."""
        return G

    def beta_of_samples(self, kl: float, r_ref: Tensor) -> float:
        """The slope dW / dKL of the best win rate on the rewards' levels at this KL, which is the
        beta of that optimum. As the win rate nears 1 it falls to 0; so beta is at least a tenth of
        the transform's, else the last few failures would be worth any KL.
        """
        c, least = self.config, super().beta_of_samples(kl, r_ref) / 10
        levels, near = theory.levels_of(r_ref, spread=False), ((1 - STEP) * kl, (1 + STEP) * kl)
        low, high = (theory.at_kl(self.Phi, x, c.procedure, c.n, levels=levels) for x in near)
        return max((high - low) / (near[1] - near[0]), least)

    def reward(self, r: Tensor, r_ref: Tensor, Phi_C: Tensor, beta: float) -> Tensor:
        n = 1 if self.config.procedure == "standard" else self.config.n
        # min g = 1 - max (1 - C)^n: the best of n of the reward turned round
        sign = -1 if self.config.procedure == "won" else 1
        return sign * self.advantages(beats_best_of(sign * r, sign * r_ref, n), n) / beta

    def advantages(self, g: Tensor, n: int) -> Tensor:
        """(P, G) those of E[max of g over n draws of pi], from g (P, G)."""
        return max_at_n_advantages(g, n, baseline=n > 1)


def beats_best_of(r: Tensor, r_ref: Tensor, n: int) -> Tensor:
    """(P, G) unbiased estimates of P(y beats the best of n draws of pi_ref), a tie counting half.

    r: (P, G). r_ref: (P, K). The share of all n-subsets of the K samples: of L lower and E equal
    ones, [C(L, n) + C(L + E, n)] / (2 C(K, n)). (C_hat^n is biased: over pi_ref its mean
    is 16 % too large at n = 32, K = 100.)
    """
    check_samples("r_ref", r_ref, n)
    if r.dim() != 2 or len(r) != len(r_ref):
        raise ValueError(
            f"r is {tuple(r.shape)}, r_ref {tuple(r_ref.shape)}: must be rewards of the same "
            "prompts, (P, G) and (P, K)"
        )
    r, r_ref = finite("rewards", r=r, r_ref=r_ref)
    K = r_ref.shape[1]
    lower, up_to = ranks(r, r_ref)
    shares = r.new_tensor([math.comb(count, n) / math.comb(K, n) for count in range(K + 1)])
    return (shares[lower] + shares[up_to]) / 2


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
    g = at_least_float32(g)
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
