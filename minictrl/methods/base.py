"""What every method has: its transform, its beta and its loss; and the two kinds of methods."""

import math
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from minictrl import budget, ppo, theory, winrate
from minictrl.batch import Batch
from minictrl.checks import OutOfReach, at_least_float32, finite, same_shape, unchanged, whole
from minictrl.config import Config
from minictrl.procedures import get_procedure
from minictrl.procedures.masses import mass_win_rate
from minictrl.procedures.optimum import FIXED_POINTS
from minictrl.reference import Reference
from minictrl.transforms import RAW, Transform, get_transform

HUGE = 1e6  # nats, of R with a --beta that was given
LARGEST = 1e12  # nats, of any R


class Method:
    """A method with the settings of its run. `Online` and `Offline` say what else one has.

    transform: the name of the Phi that its optimum has, None where it is the run's to choose, and
    then `default_transform` is taken. uses_baseline: whether the loss reads advantages, so that
    --baseline matters. compares_reference: whether a prompt's K samples are compared with each
    other, so that K is at least 2. calibrated: whether it refuses a raw reward.
    """

    online: bool
    uses_baseline: bool
    transform: str | None = None
    default_transform = "identity"
    compares_reference = calibrated = False

    def __init__(self, config: Config):
        self.config = config
        # at the start; a step's is beta_at's
        self.beta = config.beta or self.beta_for(config.kl)  # None where the reward is raw
        self.Phi = self.Phi_at(self.beta)

    def Phi_at(self, beta: float | None) -> Transform:
        """The run's transform; a fixed point is solved at this beta."""
        c = self.config
        return get_transform(c.transform, procedure=c.procedure, n=c.n, beta=beta, K=c.K)

    @classmethod
    def check(cls, config: Config) -> None:
        """Raises ValueError on settings that the method or the procedure can't have; warns of a Phi
        for another procedure.
        """
        if cls.calibrated and config.transform in RAW:
            raise ValueError(
                f"--transform {config.transform}: {config.method} needs a calibrated reward"
            )
        procedure = get_procedure(config.procedure)
        if config.n > procedure.largest_n:
            raise ValueError(
                f"--n {config.n}: too many draws for {config.procedure}; use at most "
                f"{procedure.largest_n}"
            )
        check_procedure(config.procedure, config.n)
        solved_for = FIXED_POINTS.get(config.transform) or config.procedure
        if solved_for != config.procedure:
            warnings.warn(
                f"--transform {config.transform} is the optimum for --procedure {solved_for}, and "
                f"the run's is {config.procedure}",
                stacklevel=2,
            )
        if cls.transform is None and (config.transform, config.procedure) == ("optimal", "rewind"):
            warnings.warn(
                "--transform optimal --procedure rewind: a policy that is trained so falls behind "
                "pi_ref (docs/notes.md); use exp10",
                stacklevel=2,
            )
        if config.K < 2 and (cls.compares_reference or config.transform == "standardised"):
            raise ValueError(f"--K {config.K}: a prompt's samples are compared; use at least 2")

    def beta_for(self, kl: float, r_ref: Tensor | None = None) -> float | None:
        """beta for a KL in nats, by the theory of what the method converges to (Theorem 3).

        Calibrated rewards without ties: the theory of infinitely many samples. With K = 100 the
        optimum at that beta is farther than asked: at 1 nat exp10's ends at 1.06, bon_fp's at 1.27.
        Offline methods and TRL see this; online the controller corrects it.
        Raw rewards, or ties: the beta that puts pi_ref's own samples, r_ref (P, K), at that KL
        (`budget.empirical_beta`); without r_ref None for raw rewards. Raises OutOfReach on a KL
        that the theory or K samples don't reach.
        """
        c = self.config
        if c.transform in RAW and r_ref is None:
            if kl >= math.log(c.K):
                raise OutOfReach(
                    f"--kl {kl:g}: {c.K} samples without their calibration reach less than "
                    f"{math.log(c.K):.2f} nats; use a smaller --kl, or more samples (--K)"
                )
            return None
        if r_ref is not None and self.by_samples(r_ref):
            return self.beta_of_samples(kl, r_ref)
        if c.kl is not None and kl > c.kl:  # a step's, to bring a policy that lags to the budget
            kl = min(kl, theory.MAX_KL)
        elif kl >= math.log(c.K + 1):
            raise OutOfReach(
                f"--kl {kl:g} is out of reach of {c.K} samples, whose C_hat takes {c.K + 1} "
                f"values: ask for less than {math.log(c.K + 1):.2f}, or take more samples (--K)"
            )
        return theory.beta_for_kl(c.transform, kl, procedure=c.procedure, n=c.n)

    def by_samples(self, r_ref: Tensor) -> bool:
        """Whether pi_ref's samples give the beta, and not the theory: of raw rewards, or ties."""
        c = self.config
        return c.transform in RAW or theory.tied(r_ref, c.procedure, c.n)

    def beta_at(self, kl: float, r_ref: Tensor) -> float:
        """`beta_for` a step that asks for this KL. A fixed point is solved anew, at that beta;
        where pi_ref's samples give the beta, its Phi stays.
        """
        beta = self.beta_for(kl, r_ref)
        if self.config.transform in FIXED_POINTS and not self.by_samples(r_ref):
            self.Phi = self.Phi_at(beta)
        return beta

    def beta_of_samples(self, kl: float, r_ref: Tensor) -> float:
        """`beta_for` raw rewards, or ties."""
        return budget.empirical_beta(self.Phi.of_rewards(r_ref, r_ref), kl)

    def check_beta(self, beta: float | None, r_ref: Tensor) -> None:
        """Raises ValueError on a --beta at which R, of pi_ref's samples r_ref (P, K), is huge. None
        is that of a KL budget, which follows from the rewards, far outliers too.
        """
        if beta is None:
            return
        R = self.R_of_reference(r_ref, beta).abs().max()
        if not R <= HUGE:
            raise ValueError(
                f"--beta {beta:g}: R = Phi / beta is up to {R:.2g} nats, which nothing can follow; "
                "use a larger --beta, or --kl"
            )

    def R_of_reference(self, r_ref: Tensor, beta: float) -> Tensor:
        """R (P, K) of pi_ref's own samples, in nats."""
        return self.Phi.in_nats(self.Phi.of_rewards(r_ref, r_ref), beta, r_ref)

    def loss(
        self, logprobs: Tensor, values: Tensor | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, its statistics) of a batch, from its log-probabilities and values (B, T)."""
        raise NotImplementedError


class Online(Method):
    """Draws G responses per prompt from the current policy; R says what is good, PPO the rest.

    least_G: how many a prompt needs.
    """

    online = uses_baseline = True
    least_G = 1

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        if config.G < cls.least_G:
            raise ValueError(
                f"--G {config.G}: {config.method} compares a response with the prompt's other "
                f"samples; use at least {cls.least_G}"
            )
        within = config.baseline == "loo" and config.transform in RAW  # its own prompt's
        others = config.G if within else config.batch * config.G
        if cls.uses_baseline and config.baseline != "prefix" and others < 2:
            raise ValueError(
                f"--G {config.G}: a response is compared with the prompt's other samples, or with "
                "those of the other prompts; use at least 2"
            )

    def reward(self, r: Tensor, r_ref: Tensor, Phi_C: Tensor, beta: float) -> Tensor:
        """R (P, G): what each response is worth before its KL, in nats: Phi(C_hat) / beta here,
        another score / beta in other methods. A baseline and the KL are taken off later.

        r: (P, G) rewards. r_ref: (P, K) those of pi_ref. Phi_C: (P, G) Phi(C_hat).
        """
        return self.Phi.in_nats(Phi_C, beta, r_ref)

    def with_loss_inputs(self, batch: Batch, reference: Reference, beta: float) -> Batch:
        """The batch, with what else the loss reads. reference: the samples of its prompts."""
        return batch

    def loss(
        self, logprobs: Tensor, values: Tensor | None, batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The clipped surrogate, plus the value head's error where there is one."""
        loss, stats = ppo.policy_loss(
            logprobs, batch.old_logprobs, batch.advantages, batch.mask, self.config.clip
        )
        return with_value_loss(loss, stats, values, batch)


def with_value_loss(
    loss: Tensor, stats: dict[str, Tensor], values: Tensor | None, batch: Batch
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss plus the value head's error, where there is a value head. It trains the policy's
    layers too, which share the head's states.
    """
    if values is None:
        return loss, stats
    value_loss = ppo.value_loss(values, batch.returns, batch.mask)
    return loss + value_loss, stats | {"value_loss": value_loss}


class Offline(Method):
    """Trains on the reference samples of the calibration."""

    online = uses_baseline = False
    compares_reference = True

    @property
    def rows_per_step(self) -> int:
        return self.config.batch * self.config.G

    def rows(self, reference: Reference, beta: float) -> Batch:
        """The rows of one epoch, without their prompts."""
        raise NotImplementedError


# --- rows of offline methods ---


def pairs(reference: Reference, n: int, seed: int) -> Batch:
    """The best and the worst of each n reference samples, a row each: (B, 2, T)."""
    generator = torch.Generator().manual_seed(seed)
    return side_by_side(reference, torch.stack(best_and_worst(reference.r_ref, n, generator), 2))


def side_by_side(reference: Reference, index: Tensor) -> Batch:
    """Rows of n reference samples of one prompt: (B, n, T).

    index: (P, groups, n) which of a prompt's K samples.
    """
    P, K = reference.r_ref.shape
    of_all = K * torch.arange(P)[:, None, None] + index  # which of the P K
    rows = reference.rows(of_all.flatten(0, 1))
    return replace(rows, prompt_index=rows.prompt_index[:, 0])


def partition(P: int, K: int, n: int, generator: torch.Generator | None = None) -> Tensor:
    """(P, K // n, n) which of a prompt's K samples are in which group of n; some may be left over.

    Neighbours, or with a generator (on the CPU) at random.
    """
    order = torch.arange(K).expand(P, K)
    if generator is not None:
        order = torch.rand(P, K, generator=generator).argsort(1)
    return order[:, : K // n * n].reshape(P, K // n, n)


def best_and_worst(
    r_ref: Tensor, n: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The best and the worst of each group of n reference samples; n = 2: random pairs.

    r_ref: (P, K). Returns two index tensors (P, K // n) into a prompt's K samples. The groups are
    n neighbours (samples are i.i.d.), or with a generator (on the CPU) a random partition. Of equal
    rewards the first is called best, the last worst: among two, a coin flip, as IPO asks for.
    """
    check_samples("r_ref", r_ref, n, least=2)
    order = partition(*r_ref.shape, n, generator).to(r_ref.device)
    groups = r_ref.gather(1, order.flatten(1)).view_as(order)
    best = groups.argmax(2, keepdim=True)
    worst = n - 1 - groups.flip(2).argmin(2, keepdim=True)
    return order.gather(2, best)[..., 0], order.gather(2, worst)[..., 0]


# --- what a procedure, a method and a loss give and take ---


def check_procedure(name: str, n: int) -> None:
    """Raises ValueError on a procedure whose masses or weights can't be used."""
    halves = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    mass_win_rate(halves, halves.detach(), name, n)
    scores = torch.arange(2.0 * get_procedure(name).samples(n)).view(2, -1)
    with unchanged(f"procedure {name}: weights", select=scores):
        winrate.weights(scores, scores, name, n)


def check_R(R: Tensor, r: Tensor, method: str) -> None:
    """Raises ValueError unless R has a number to learn from for each of the rewards r (P, G)."""
    shape = tuple(r.shape)
    if not isinstance(R, Tensor) or R.shape != shape:
        got = tuple(R.shape) if isinstance(R, Tensor) else type(R).__name__
        raise ValueError(
            f"--method {method}: its R is {got}; return a tensor {shape}, one a reward"
        )
    if R.isnan().any():
        raise ValueError(f"--method {method}: its R is nan where rewards are numbers; mend it")
    largest = R.double().abs().max()
    if not largest < LARGEST:
        raise ValueError(
            f"rewards of up to {r.abs().max():.2g} make R = Phi / beta {largest:.2g} nats, whose "
            "gradients are no float32; return smaller ones"
        )


def checked(dim: int = 1, **tensors: Tensor) -> list[Tensor]:
    """The tensors as float32 at least. Raises ValueError unless all have one shape, (B,), or (B, n)
    with `dim` 2.
    """
    shape = "(B,)" if dim == 1 else "(B, n)"
    rule = f", {shape}: one number per response, log-probabilities summed over its tokens"
    same_shape(rule, dim, **tensors)
    if not next(iter(tensors.values())).numel():
        raise ValueError(f"{', '.join(tensors)}: empty; a loss is a mean over responses")
    return [at_least_float32(x) for x in tensors.values()]


def check_samples(name: str, x: Tensor, n: int, least: int = 1) -> None:
    """Raises ValueError unless x is finite and (prompts, samples), with at least n samples and n at
    least `least`.
    """
    if x.dim() != 2 or not least <= whole("n", n) <= x.shape[1]:
        raise ValueError(
            f"{name} is {tuple(x.shape)} and n is {n}: must be (prompts, samples) and {least} <= n "
            "<= samples; take more samples or a smaller n"
        )
    finite("values", **{name: x})
