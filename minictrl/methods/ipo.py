"""IPO (Azar et al. 2023): a regression on random pairs of reference samples, offline.

Departure: the samples of a prompt are paired once per run, not anew for every epoch.
"""

from torch import Tensor

from minictrl.batch import Batch
from minictrl.checks import positive
from minictrl.methods.base import Offline, checked, pairs
from minictrl.reference import Reference


class Method(Offline):
    """The reward says which of a pair is preferred; tau is beta."""

    transform = "identity"

    def rows(self, reference: Reference, beta: float) -> Batch:
        self.tau = beta
        return pairs(reference, 2, self.config.seed)

    def loss(self, logprobs: Tensor, values: None, batch: Batch) -> tuple[Tensor, dict]:
        chosen, rejected = logprobs.sum(-1).T
        ref_chosen, ref_rejected = batch.ref_logprobs.sum(-1).T
        return ipo_loss(chosen, rejected, ref_chosen, ref_rejected, tau=self.tau), {}


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    tau: float,
) -> Tensor:
    """(h - 1 / (2 tau))^2, h = log pi/pi_ref of the chosen minus that of the rejected (Azar
    et al. 2023, Eq. 17).

    All (B,), sums over the response's tokens in nats. Mean over pairs. On pairs drawn from pi_ref
    the optimum is pi_ref e^{C / tau} / Z: tau is beta. Raises ValueError on shapes or a tau <= 0.
    """
    chosen, rejected, ref_chosen, ref_rejected = checked(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    positive("tau", tau)
    h = (chosen - ref_chosen) - (rejected - ref_rejected)
    return (h - 1 / (2 * tau)).square().mean()
