"""Soft Best-of-N (arXiv 2505.03156): one of N draws, with probability in proportion to
exp(C / temperature).

C is the calibrated reward, a rank under pi_ref, so that one temperature means the same for every
prompt and reward model; a temperature near 0 is Best-of-N, a large one the standard procedure.

A softmax is an argmax with Gumbel noise: the draw with the highest C / temperature + noise is kept.
The largest of draws with logits a_i is below z with probability exp(-sum_i e^{a_i - z}); integrals
over z are sums, because the trapezoid rule errs by e^{-pi^2 / STEP} there.
"""

import torch
from torch import Tensor

from minictrl.calibration import calibrated_reward
from minictrl.procedures import base

STEP = 1 / 2  # of z; the error is 3e-9
PROMPTS = 64  # at a time


class Procedure(base.Procedure):
    largest_n = 256  # its memory grows as n^2

    def __init__(self, temperature: float = 0.1):
        self.temperature = temperature
        # logits are from 0 to 1 / temperature; what lies beyond is below 1e-11
        self.z = torch.arange(-4, 1 / temperature + 26, STEP, dtype=torch.float64)

    def mass_after(self, mass: Tensor, edges: Tensor, n: int) -> Tensor:
        logits = (edges[..., 1:] + edges[..., :-1]) / 2 / self.temperature
        kept = torch.zeros_like(mass)
        for z in self.z:  # the noisy logit of the draw that is kept
            rate = (logits - z).exp()
            below = (-rate).exp()
            kept = kept + rate * below * (mass * below).sum(-1, keepdim=True) ** (n - 1)
        kept = mass * kept
        return kept / kept.sum(-1, keepdim=True)

    def weights(self, select: Tensor, n: int, select_ref: Tensor | None = None) -> Tensor:
        C_hat = calibrated_reward(select, select if select_ref is None else select_ref)
        parts = (C_hat.double() / self.temperature).split(PROMPTS)
        return torch.cat([self.chosen(logits, n) for logits in parts]).to(select)

    def chosen(self, logits: Tensor, n: int) -> Tensor:
        """(P, M) the softmax of each of logits (P, M) among n of them, a mean over all n-subsets.

        It is the derivative of the mean of the largest noisy logit, E = const - integral of P(all
        are below z) dz.
        """
        logits = logits.detach().requires_grad_()
        with torch.enable_grad():
            below = (-(logits.T[..., None] - self.z).exp()).exp()  # (M, P, z)
            E = -STEP * mean_product(below, n).sum()
            (weights,) = torch.autograd.grad(E, logits)
        return weights / weights.sum(1, keepdim=True)


def mean_product(x: Tensor, n: int) -> Tensor:
    """(P, Z) the mean over all n-subsets of M of the products of their x (M, P, Z)."""
    k = torch.arange(1, n + 1, dtype=x.dtype)[:, None, None]
    empty = torch.ones_like(x[:1])  # the empty subset's
    means = torch.zeros_like(x[:1]).expand(n, -1, -1)  # over the k-subsets of the first m
    for m, with_m in enumerate(x, 1):
        one_less = torch.cat([empty, means[:-1]])
        means = ((m - k).clamp(min=0) * means + k * with_m * one_less) / m
    return means[-1]
