"""BoND (J-BOND, Sessa et al. 2024): the log transform, plus SFT on the best of n reference samples.

Departures from the paper: the anchor is pi_ref, where J-BOND's is a moving average of the policy.
The backward KL uses the calibrated reward of K samples, where J-BOND's own reward looks at two
samples of the anchor. The forward KL's Best-of-n responses come from groups of n reference samples,
the same in each step of that n, not from fresh draws; n follows the step's beta.
"""

from dataclasses import replace

import torch
from torch import Tensor

from minictrl.batch import Batch
from minictrl.checks import OutOfReach
from minictrl.config import Config
from minictrl.methods.base import Method as Base
from minictrl.methods.base import Online, best_and_worst, with_value_loss
from minictrl.reference import Reference


class BestOf(Base):
    """Methods whose target is Best-of-n, for the n (not --n) whose KL is the budget's."""

    transform = "log"

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.beta:
            cls.check_n(f"--beta {config.beta:g}", config.beta, config.K)

    @classmethod
    def check_n(cls, asked: str, beta: float, K: int) -> None:
        """Raises OutOfReach unless K samples have a best of the n for this beta."""
        n = cls.best_of(beta)
        if n > K:
            raise OutOfReach(
                f"{asked} is out of reach of {K} samples: it is Best-of-{n}'s; use a smaller KL, a "
                "larger beta, or more samples (--K)"
            )

    @staticmethod
    def best_of(beta: float) -> int:
        """The n whose Best-of-n is nearest to the log transform at beta = 1/(n - 1)."""
        return max(2, round(1 / beta) + 1)

    def beta_for(self, kl: float, r_ref: Tensor | None = None) -> float:
        beta = super().beta_for(kl, r_ref)
        self.check_n(f"--kl {kl:g}", beta, self.config.K)
        return beta


class Method(BestOf, Online):
    """A row has two responses: pi's own, and one of pi_ref's best of n."""

    def with_loss_inputs(self, batch: Batch, reference: Reference, beta: float) -> Batch:
        P, G = len(reference.r_ref), self.config.G
        best, _ = best_and_worst(reference.r_ref, self.best_of(beta))  # (P, K // n)
        best = best[:, :G]
        best = best.repeat(1, -(-G // best.shape[1]))[:, :G]  # (P, G): again from the first if few
        prompt = torch.arange(P)[:, None]

        def beside(own: Tensor, reference: Tensor) -> Tensor:
            return torch.stack([own, reference[prompt, best].flatten(0, 1).to(own)], 1)  # (B, 2, T)

        tokens = beside(batch.tokens, reference.tokens)
        return replace(batch, tokens=tokens, mask=beside(batch.mask, reference.mask))

    def loss(
        self, logprobs: Tensor, values: Tensor | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = replace(batch, tokens=batch.tokens[:, 0], mask=batch.mask[:, 0])
        values = None if values is None else values[:, 0]
        loss, stats = super().loss(logprobs[:, 0], None, own)
        loss = jeffreys_loss(loss, best_logprobs=logprobs[:, 1].sum(1))
        return with_value_loss(loss, stats, values, own)


def jeffreys_loss(backward_loss: Tensor, best_logprobs: Tensor, weight: float = 0.5) -> Tensor:
    """weight KL(pi || Best-of-n) + (1 - weight) KL(Best-of-n || pi): Jeffreys divergence.

    backward_loss: scalar, `ppo.policy_loss` with R = (n-1) log C_hat, whose gradient is that of
    KL(pi || Best-of-n). best_logprobs: (B,) log pi in nats of the best of n reference samples; the
    forward KL is their SFT loss, up to a constant.
    """
    return weight * backward_loss + (1 - weight) * -best_logprobs.mean()
