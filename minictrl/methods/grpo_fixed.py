"""GRPO's first outer iteration on the reference samples, with the loss as published (App. E.1).

The paper's controlled setting: the rollouts are pi_ref's K samples, the loss is the clipped
surrogate on standardised rewards plus k3, the mean over each response's tokens.
"""

from dataclasses import replace

from torch import Tensor

from minictrl import ppo
from minictrl.batch import Batch
from minictrl.methods.base import Offline
from minictrl.methods.grpo import Method as Grpo
from minictrl.methods.grpo import grpo_advantages
from minictrl.reference import Reference


class Method(Offline):
    transform = "none"
    beta_for, R_of_reference = Grpo.beta_for, Grpo.R_of_reference

    def rows(self, reference: Reference, beta: float) -> Batch:
        advantages = grpo_advantages(reference.r_ref).flatten() / beta
        return replace(reference.rows(), advantages=advantages)

    def loss(
        self, logprobs: Tensor, values: None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        mask, ref_logprobs = batch.mask, batch.ref_logprobs
        lengths = mask.sum(1)  # (B,)
        advantages = (batch.advantages / lengths)[:, None]
        loss, stats = ppo.policy_loss(logprobs, ref_logprobs, advantages, mask, self.config.clip)
        k3 = ppo.k3(logprobs, ref_logprobs).masked_fill(mask == 0, 0).sum(1) / lengths
        return loss + k3.mean(), stats
