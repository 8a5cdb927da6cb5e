"""MaxRL (Tajwar et al. 2026, arXiv 2602.02710): the log of a prompt's expected reward.

For a binary reward that is the log-likelihood of success, log p, whose gradient is the usual one
divided by p: hard prompts weigh more. Here a response succeeds if it beats a draw of pi_ref, with
probability C_hat, so p is the prompt's standard win rate. Departure from the paper: the advantage
takes C_hat for the 0 or 1, and there is a KL.

The optimum of log E[C_hat] - beta KL is the identity transform's for beta p.
"""

import torch
from torch import Tensor

from minictrl import theory
from minictrl.methods.base import Online
from minictrl.procedures.cells import centres
from minictrl.transforms import get_transform


class Method(Online):
    """t: the objective is (1 / t) log E|Phi(C_hat)|."""

    transform = "identity"
    least_G = 2
    t = 1.0

    def beta_for(self, kl: float, r_ref: Tensor | None = None) -> float:
        """The transform's beta over |t E[Phi]| there, because the gradient of the log has 1 / E."""
        c, beta = self.config, super().beta_for(kl, r_ref)
        levels = None if r_ref is None else theory.tied_levels(r_ref, c.procedure, c.n)
        mass, ref = theory.policy_at_kl(c.transform, kl, "standard", 1, levels=levels)
        expected = (mass * get_transform(c.transform)(centres(ref))).sum(-1).mean()
        return beta / abs(self.t * float(expected))

    def R_of_reference(self, r_ref: Tensor, beta: float) -> Tensor:
        return self.reward(r_ref, r_ref, self.Phi.of_rewards(r_ref, r_ref), beta)

    def reward(self, r: Tensor, r_ref: Tensor, Phi_C: Tensor, beta: float) -> Tensor:
        return mean_normalised(Phi_C) / (self.t * beta)


def mean_normalised(x: Tensor) -> Tensor:
    """x / the group's mean - 1, the advantages of log E[x]. (P, G), of one sign; zeros get 0.

    For x in {0, 1} of mean p they are unbiased for the first G - 1 terms of the series
    log p = -sum_k (1 - p)^k / k: the more samples, the nearer to the logarithm.
    """
    mean = x.mean(1, keepdim=True)
    return torch.where(mean == 0, 0, x / mean - 1)
