"""TPO, Target Policy Optimization (Kaddour 2026, arXiv 2604.06159), on the reference samples.

Among n samples of a prompt the target's shares are q_i ~ p_i e^{R_i}, p_i those of the policy that
drew them, and the policy's own shares are fitted to q by cross-entropy. Nothing is known of log Z,
it cancels, and the gradient by a log-probability is at most 1: a gentler `qrpo`.

Departures: the policy that drew them is pi_ref and stays it, so that the optimum is CTRL's; R is
Phi(C_hat) / beta, not a standardised reward; and shares are relative to pi_ref, e^{log pi/pi_ref}.
(By pi itself the likeliest of n responses, the shortest, would have nearly all.)

TRL's TPO is another method, Triple Preference Optimization (arXiv 2405.16681): it has no reference
policy, so no KL to keep to.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minictrl.batch import Batch
from minictrl.config import Config
from minictrl.methods.base import checked, partition, side_by_side
from minictrl.methods.qrpo import Method as Qrpo
from minictrl.methods.qrpo import reference_R
from minictrl.reference import Reference


class Method(Qrpo):
    """A row is a group of n = G samples of one prompt."""

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if not 2 <= config.G <= config.K:
            raise ValueError(
                f"--G {config.G}: tpo compares groups of G among the --K {config.K} reference "
                f"samples; use 2 to {config.K}"
            )

    @property
    def rows_per_step(self) -> int:
        return self.config.batch

    def rows(self, reference: Reference, beta: float) -> Batch:
        generator = torch.Generator().manual_seed(self.config.seed)
        index = partition(*reference.r_ref.shape, self.config.G, generator)
        R = reference_R(self, reference.r_ref, beta).gather(1, index.flatten(1))
        rows = side_by_side(reference, index)
        return replace(rows, R=R.view(rows.mask.shape[:2]).float())

    def loss(self, logprobs: Tensor, values: None, batch: Batch) -> tuple[Tensor, dict]:
        return tpo_loss(logprobs.sum(-1), batch.ref_logprobs.sum(-1), batch.R), {}


def tpo_loss(logprobs: Tensor, ref_logprobs: Tensor, R: Tensor) -> Tensor:
    """KL(q || p) in nats, q = softmax(R), p = softmax(log pi/pi_ref), mean over groups.

    All (B, n), log-probabilities summed over the response's tokens. It is the cross-entropy minus
    its smallest value. 0 only for the tilt pi ~ pi_ref e^R on the samples of a group. Raises
    ValueError on shapes.
    """
    logprobs, ref_logprobs, R = checked(2, logprobs=logprobs, ref_logprobs=ref_logprobs, R=R)
    log_q, log_p = R.log_softmax(1), (logprobs - ref_logprobs).log_softmax(1)
    return (log_q.exp() * (log_q - log_p)).sum(1).mean()
