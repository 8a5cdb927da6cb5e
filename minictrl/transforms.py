"""Transforms Phi of the calibrated reward (Sec. 4): a name of the command line -> a `Transform`.

A new transform is one function in CLOSED_FORMS, on tensors in [0, 1]; a reward without calibration
is a function of (r, r_ref) in RAW. Chosen where the paper leaves it open: `log` bounds u below by
1/(2K), the smallest C_hat above 0 (half a tie), because an empirical C_hat of 0 has no logarithm.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minictrl.calibration import calibrated_reward
from minictrl.checks import at_least_float32, positive, real, unchanged, whole
from minictrl.procedures.masses import MassMap, mass_map
from minictrl.procedures.optimum import FIXED_POINTS, fixed_point

MAX_T = 80  # e^80 is still a float32
FLOOR = 10.0  # nats


def identity(u: Tensor) -> Tensor:
    """The best for the standard win rate (IPO)."""
    return u


def log(u: Tensor) -> Tensor:
    """Best-of-N distillation: at beta = 1/(N - 1) the optimum is Best-of-N itself."""
    return u.log()


def exp(t: float) -> Callable[[Tensor], Tensor]:
    """Exponential tilting (Eq. 11): sign(t) e^{t u}.

    t > 0 rewards the top, t < 0 punishes the bottom.
    """
    return lambda u: (t * u).exp() if t > 0 else -(t * u).exp()


CLOSED_FORMS = {"identity": identity, "log": log}


def standardised(r: Tensor, r_ref: Tensor) -> Tensor:
    """(r - mean) / standard deviation of the prompt's r_ref; r - mean where these differ by no more
    than rounding.
    """
    exact = r_ref.double()
    std = exact.std(1, keepdim=True)
    std = torch.where(std > 1e-6 * exact.abs().amax(1, keepdim=True), std, 1.0)
    # the mean of equal rewards is not always their value
    equal = (exact == exact[:, :1]).all(1, keepdim=True)
    mean = torch.where(equal, exact[:, :1], exact.mean(1, keepdim=True))
    return ((r - mean) / std).to(at_least_float32(r))


# Uncalibrated RLHF and what lies between it and CTRL: (r (B, M), r_ref (B, K)) -> reward (B, M).
# A constant per prompt moves no optimum.
RAW = {
    "none": lambda r, r_ref: r,
    "median": lambda r, r_ref: r - r_ref.median(1, keepdim=True).values,
    "standardised": standardised,
}


@dataclass(frozen=True)
class Transform:
    """Phi: called with u (any shape, in [0, 1]) it gives Phi(u) in u's shape and device, as float32
    at least, because float16 ends at 65,504. Raises ValueError on u outside [0, 1].
    """

    name: str
    Phi: Callable[[Tensor], Tensor]

    def __call__(self, u: Tensor) -> Tensor:
        u = real("u", u)
        if not ((u >= 0) & (u <= 1)).all():
            raise ValueError(
                f"transform {self.name!r}: u has values outside [0, 1]; give calibrated rewards "
                "(`calibration.calibrated_reward`)"
            )
        return self.Phi(at_least_float32(u))

    def of_rewards(self, r: Tensor, r_ref: Tensor) -> Tensor:
        """Phi(C_hat) (B, M) of rewards r (B, M) against r_ref (B, K), in float64."""
        return self.Phi(calibrated_reward(r.double(), r_ref.double()))

    def in_nats(self, Phi_C: Tensor, beta: float, r_ref: Tensor) -> Tensor:
        """R = Phi(C_hat) / beta in nats, raised to log Z - FLOOR where it is lower.

        At that floor the optimum pi_ref e^R / Z keeps e^-FLOOR of pi_ref's probability; a lower R
        hardly changes it. Without a floor exp-10 at 1 nat has R = -1,043 at C_hat = 0, and a few
        such samples make up the whole gradient. Phi_C: (P, G). r_ref: (P, K) rewards of pi_ref's
        samples, whose mean e^R is the prompt's Z. Returns (P, G).
        """
        log_Z = log_partition(self.of_rewards(r_ref, r_ref) / beta)  # (P, 1)
        return (Phi_C / beta).clamp(min=(log_Z - FLOOR).to(Phi_C))


@dataclass(frozen=True)
class RawReward(Transform):
    """A reward that is not calibrated, for comparison: Phi maps (r, r_ref) to it."""

    def __call__(self, u: Tensor) -> Tensor:
        raise ValueError(
            f"transform {self.name!r} has no theory: its KL depends on the reward; name another"
        )

    def of_rewards(self, r: Tensor, r_ref: Tensor) -> Tensor:
        return self.Phi(r, r_ref)

    def in_nats(self, Phi_C: Tensor, beta: float, r_ref: Tensor) -> Tensor:
        return Phi_C / beta


def get_transform(
    name: str,
    *,
    procedure: str | MassMap = "bon",
    n: int = 4,
    beta: float | None = None,
    K: int | None = 100,
) -> Transform:
    """The transform of a name: Phi on tensors in [0, 1], or a reward of RAW, which has no such Phi.

    bon_fp, won_fp and optimal are the fixed points of Corollary 2 and Theorem 1, solved at this n
    and beta. procedure: what optimal is solved for, a name of `procedures/` or a function that maps
    probabilities of cells of [0, 1] (`procedures/masses.py`). K: samples of the calibration, for
    log's bound at 1/(2K); None, where u is the exact C, of infinitely many samples, for no bound.
    Raises ValueError on bad input.
    """
    given, name = name, str(name)
    mass_map(procedure)
    whole("n", n)
    if K is not None:
        whole("K", K)
    if beta is not None:
        positive("beta", beta)
    if sum(name in forms for forms in (CLOSED_FORMS, FIXED_POINTS, RAW)) > 1:
        raise ValueError(f"transform {name!r}: is the name of two; give yours another")
    if name in RAW:
        return RawReward(name, RAW[name])
    if name in FIXED_POINTS:
        if beta is None:
            raise ValueError(
                f"transform {name!r} is solved at the run's beta; pass beta, as "
                "theory.beta_for_kl gives it"
            )
        return Transform(name, fixed_point(name, procedure, n, beta))
    if name not in CLOSED_FORMS:
        t = tilt_of(name)
        if t is None:
            known = ", ".join(["exp<t> (exp5, exp-10, …)", *CLOSED_FORMS, *FIXED_POINTS, *RAW])
            raise ValueError(f"unknown transform {given!r}; known: {known}")
        if not 0 < abs(t) <= MAX_T:
            raise ValueError(f"transform {name!r}: use a t between -{MAX_T} and {MAX_T}, not 0")
        return Transform(name, exp(t))
    if name == "log" and K is not None:
        return Transform(name, lambda u: log(u.clamp(min=1 / (2 * K))))
    levels = torch.linspace(0, 1, 1 + 2 * (K or 10))  # of C_hat, with ties
    check_form(name, levels[1:] if K is None else levels)
    return Transform(name, CLOSED_FORMS[name])


def check_form(name: str, u: Tensor) -> None:
    """Raises ValueError on a closed form that isn't finite at each u (levels,), by itself."""
    whose, Phi = f"transform {name!r}: Phi", CLOSED_FORMS[name]
    with unchanged(whose, u=u):
        Phi_u, alone = Phi(u), Phi(u[-1:])
    floats = isinstance(Phi_u, Tensor) and Phi_u.is_floating_point()
    if not floats or Phi_u.shape != u.shape:
        raise ValueError(f"{whose} gives {str(Phi_u)[:60]}, no float tensor of u's shape")
    for level, value in zip(u.tolist(), Phi_u.tolist()):
        if not math.isfinite(value):
            raise ValueError(
                f"{whose}({level:g}) is {value}, and C_hat may be {level:g}: of K samples the best "
                "has 1, the worst 0; bound it there"
            )
    if not torch.allclose(alone, Phi_u[-1:]):
        raise ValueError(
            f"{whose}(1) is {alone.item():.4g} alone and {Phi_u[-1].item():.4g} beside other "
            "values of u; make it a function of each u by itself"
        )


def tilt_of(name: str) -> float | None:
    """The t of exp<t>; None of another name."""
    found = re.fullmatch(r"exp([+-]?(\d+\.?\d*|\.\d+))", name, re.ASCII)
    return float(found[1]) if found else None


def log_partition(R: Tensor) -> Tensor:
    """(P, 1) log Z of each prompt in nats, of Z = the mean of e^R over its samples of pi_ref.

    R: (P, K) in nats.
    """
    return R.logsumexp(-1, keepdim=True) - math.log(R.shape[-1])
