"""BoNBoN (Gui et al. 2024): SFT on the best of n reference samples, IPO on best and worst."""

from torch import Tensor

from minictrl.batch import Batch
from minictrl.checks import whole
from minictrl.methods.base import pairs
from minictrl.methods.bond import BestOf
from minictrl.methods.ipo import Method as Ipo
from minictrl.methods.ipo import ipo_loss
from minictrl.reference import Reference


class Method(BestOf, Ipo):
    """n is the one whose Best-of-n has the budget's KL."""

    def rows(self, reference: Reference, beta: float) -> Batch:
        self.n = self.best_of(beta)
        return pairs(reference, self.n, self.config.seed)

    def loss(self, logprobs: Tensor, values: None, batch: Batch) -> tuple[Tensor, dict]:
        best, worst = logprobs.sum(-1).T
        ref_best, ref_worst = batch.ref_logprobs.sum(-1).T
        return bonbon_loss(best, worst, ref_best, ref_worst, n=self.n), {}


def bonbon_beta(n: int) -> float:
    """beta*_n = 1 / (2 (n-1) sum_{k<n} 1/k): the tau whose target is Best-of-n's mean h.

    log pi/pi_ref of Best-of-n is log n + (n-1) log C, and E[log C(best) - log C(worst)] is
    sum_{k<n} 1/k. Raises ValueError on n < 2.
    """
    n = whole("n", n, 2)  # the best and the worst of n are two responses
    return 1 / (2 * (n - 1) * sum(1 / k for k in range(1, n)))


def bonbon_loss(
    best_logprobs: Tensor,
    worst_logprobs: Tensor,
    ref_best_logprobs: Tensor,
    ref_worst_logprobs: Tensor,
    n: int,
    alpha: float = 0.005,
) -> Tensor:
    """alpha SFT(best of n) + (1 - alpha) IPO(best, worst of n), tau = beta*_n. All (B,), nats."""
    ipo = ipo_loss(
        best_logprobs, worst_logprobs, ref_best_logprobs, ref_worst_logprobs, tau=bonbon_beta(n)
    )
    return alpha * -best_logprobs.mean() + (1 - alpha) * ipo
