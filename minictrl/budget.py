"""From nats to beta: the beta of a KL budget, and what keeps a run to it."""

import math
from collections.abc import Callable

from torch import Tensor

from minictrl import theory
from minictrl.procedures.masses import positive


def beta_for(transform: str, kl: float, *, procedure: str, n: int, K: int) -> float:
    """beta at which the optimum of this transform is `kl` nats from pi_ref (Theorem 3).

    Raises ValueError on a KL out of reach of the theory or of K samples.
    """
    if kl >= math.log(K + 1):
        raise ValueError(
            f"--kl {kl:g} is out of reach of {K} samples, whose C_hat takes {K + 1} values: ask "
            f"for less than {math.log(K + 1):.2f}, or take more samples (--K)"
        )
    return theory.beta_for_kl(transform, kl, procedure=procedure, n=n)


def empirical_beta(r_ref: Tensor, kl: float) -> float:
    """beta at which pi_ref e^{r / beta} / Z is `kl` nats from pi_ref, on average over prompts.

    r_ref: (P, K) rewards, raw or Phi(C_hat), as far as K samples can tell. Raises ValueError on a
    KL that they don't reach.
    """
    positive("kl", kl)
    r = r_ref.double() - r_ref.double().mean(1, keepdim=True)
    K = r.shape[1]

    def kl_at(log_beta: float) -> float:
        R = r / math.exp(log_beta)
        mean = (R.softmax(1) * R).sum(1)
        return float((mean - R.logsumexp(1) + math.log(K)).mean())

    spread = math.log(float(r.std()) + 1e-12)
    low, high = spread - 12, spread + 12
    if kl_at(low) < kl:
        raise ValueError(
            f"--kl {kl}: these rewards reach {kl_at(low):.2f} nats with {K} samples; use a smaller "
            "KL, more samples (--K), or rewards that differ more"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_at(middle) > kl else (low, middle)
    return math.exp((low + high) / 2)


class Budget:
    """beta of each step: fixed, or what keeps the measured KL to a budget of `kl` nats.

    beta is the multiplier of the constraint KL = budget. The theory's holds for the best policy
    there is. One that doesn't get there has another: with the theory's, exp10 ends at half of its
    budget. So beta is the theory's for another KL, which makes the steps alike for all transforms:
    target * kl / kl_ref, where `target` starts at the budget and moves slowly against
    log(kl_ref / kl) (a proportional-integral controller, in logarithms).

    beta_at: KL -> beta, by the theory of the run's method. beta: fixed, where kl is None.
    """

    def __init__(
        self, kl: float | None, beta_at: Callable[[float], float], beta: float | None = None
    ):
        self.kl = self.target = kl  # nats
        self.beta_at = beta_at
        self.beta = beta or beta_at(kl)

    def follow(self, kl_ref: float) -> float:
        """The beta for an update, from the KL that its rollout has; what is out of reach starts
        anew at the budget."""
        if self.kl is None:
            return self.beta
        off = min(1.5, max(-0.5, math.log(max(kl_ref, 1e-9) / self.kl)))
        self.target = min(4 * self.kl, max(self.kl / 20, self.target * math.exp(-0.1 * off)))
        try:
            self.beta = self.beta_at(self.target * math.exp(-off))
        except ValueError:  # out of reach of the theory, or of K samples
            self.target, self.beta = self.kl, self.beta_at(self.kl)
        return self.beta
