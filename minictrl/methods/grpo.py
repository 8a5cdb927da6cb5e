"""GRPO (Shao et al. 2024): the raw reward, standardised within its group.

Departure from the paper: the KL goes into the return (k1, `ppo.token_rewards`), not into the loss
as k3, whose optimum is another policy; and the loss of a response is a sum over its tokens, not a
mean. `grpo_fixed.py` has the loss as published.
"""

import math

from torch import Tensor

from minictrl.checks import at_least_float32
from minictrl.methods.base import Online, check_samples
from minictrl.transforms import standardised


class Method(Online):
    transform = "none"
    least_G = 2

    def beta_for(self, kl: float, r_ref: Tensor | None = None) -> float:
        """A standardised reward is taken for a normal one of deviation 1: KL = 1 / (2 beta^2)."""
        return 1 / math.sqrt(2 * kl)

    def R_of_reference(self, r_ref: Tensor, beta: float) -> Tensor:
        return standardised(r_ref, r_ref) / beta

    def reward(self, r: Tensor, r_ref: Tensor, Phi_C: Tensor, beta: float) -> Tensor:
        return grpo_advantages(r) / beta


def grpo_advantages(returns: Tensor) -> Tensor:
    """(return - the group's mean) / the group's standard deviation (GRPO, Sec. 4.1.2). (P, G).

    The division forgets the scale of the reward, so beta means something else in each prompt, and
    it blows up the noise of a group that has nearly converged. Without it this would be (1 - 1/G)
    times `ppo.loo_advantages`. A group of equal returns gets 0.
    """
    check_samples("returns", returns, 2, least=2)
    return standardised(at_least_float32(returns), returns)
