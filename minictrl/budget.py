"""From nats to beta: the beta of a KL budget, and what keeps a run to it."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from minictrl.checks import OutOfReach, number, positive, samples_rewards
from minictrl.procedures import cells

# of the controller
DRIFT = 0.2  # share of the error that the target takes over at each step
ERROR_BOUNDS = (-0.5, 1.5)  # of log(kl_ref / kl): a step asks for 0.22 to 1.65 times the target
TARGET_BOUNDS = (1 / 20, 4)  # of target / kl
TRIES = 6  # of a KL that is in reach


class Budget:
    """The beta of each step: fixed, or steered so that the measured KL ends at `kl` nats.

    The theory's beta holds for a policy that reaches the optimum. A trained one lags behind it:
    with that beta exp10 ends at half of its budget. So a step asks the theory for the beta of a
    larger or smaller KL,

        beta = beta_at(target * kl / kl_ref),  kl_ref the KL of the step's rollout.

    kl / kl_ref reacts at once; `target` starts at `kl` and drifts by (kl / kl_ref)^DRIFT a step (a
    proportional-integral controller, in logarithms). Steering a KL and not beta makes a step mean
    the same for every transform. log(kl_ref / kl) and target / kl are kept within their bounds.

    beta_at: KL -> beta, by the theory of the run's method. beta: fixed, where kl is None.
    """

    def __init__(
        self, kl: float | None, beta_at: Callable[[float], float], beta: float | None = None
    ):
        self.kl = self.target = None if kl is None else positive("kl", kl)  # nats
        self.beta_at = beta_at
        self.beta = beta_at(kl) if beta is None else positive("beta", beta)

    def follow(self, kl_ref: float) -> float:
        """The beta of an update, from the KL of its rollout in nats.

        If the KL to ask for is out of reach, of the theory or of K samples, it tries KLs ever
        nearer to the budget and takes the first that is not. `target` is moved back to match.
        """
        if self.kl is None:
            return self.beta
        kl_ref = number("kl_ref", kl_ref)
        error = float(np.clip(math.log(max(kl_ref, 1e-9) / self.kl), *ERROR_BOUNDS))
        moved = self.target / self.kl * math.exp(-DRIFT * error)
        self.target = self.kl * float(np.clip(moved, *TARGET_BOUNDS))
        asked = self.target * math.exp(-error)
        for _ in range(TRIES):
            try:
                self.beta = self.beta_at(asked)
                return self.beta
            except OutOfReach:
                asked = math.sqrt(asked * self.kl)  # half of the way back, in logarithms
                self.target = asked * math.exp(error)
        self.target, self.beta = self.kl, self.beta_at(self.kl)
        return self.beta


def empirical_beta(r_ref: Tensor, kl: float) -> float:
    """beta at which pi_ref e^{r / beta} / Z is `kl` nats from pi_ref, on average over prompts.

    The KL is that of pi_ref's own K samples with weights e^{r / beta} / Z from equal weights.
    r_ref: (P, K) rewards, raw or Phi(C_hat). Raises OutOfReach on a KL that K samples don't reach.
    """
    positive("kl", kl)
    r = samples_rewards(r_ref)
    r = r - r.amax(1, keepdim=True)  # so that the best keep their digits
    size = r.abs().max().item() or 1.0  # so that nothing over- or underflows
    r = r / size
    ref = torch.full_like(r, 1 / r.shape[1])
    largest = abs(cells.largest_kl(r, ref))  # of a policy on the best samples alone
    if kl > (1 - 1e-6) * largest:
        raise OutOfReach(
            f"--kl {kl}: these rewards reach {largest:.2f} nats with {r.shape[1]} samples; use a "
            "smaller KL, more samples (--K), or rewards that differ more"
        )
    return size / cells.tilt_to_kl(r, kl, ref)[1]
