"""Transforms Phi of the calibrated reward (Sec. 4): a name of the command line -> a function on
tensors in [0, 1].

A new transform is one function in CLOSED_FORMS. Chosen where the paper leaves it open: `log` bounds
u below by 1/(2K), half of the smallest positive C_hat, for an empirical C_hat of 0 has no
logarithm.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from minictrl import theory
from minictrl.calibration import calibrated_reward
from minictrl.procedures import at_least_1

Phi = Callable[[Tensor], Tensor]

MAX_T = 80  # e^80 is still a float32
FLOOR = 10.0  # nats


def identity(u: Tensor) -> Tensor:
    """The best for the standard win rate (IPO)."""
    return u


def log(u: Tensor) -> Tensor:
    """Best-of-N distillation: beta = 1/(N - 1) is Best-of-N itself."""
    return u.log()


def exp(t: float) -> Phi:
    """Exponential tilting (Eq. 11): sign(t) e^{t u}; t > 0 rewards the top, t < 0 punishes the
    bottom.
    """
    return lambda u: (t * u).exp() if t > 0 else -(t * u).exp()


# Uncalibrated RLHF and what lies between: (r (B, M), r_ref (B, K)) -> reward. A constant per prompt
# moves no optimum.
RAW = {
    "none": lambda r, r_ref: r,
    "median": lambda r, r_ref: r - r_ref.median(1, keepdim=True).values,
    "standardised": lambda r, r_ref: (
        (r - r_ref.mean(1, keepdim=True)) / r_ref.std(1, keepdim=True).clamp(min=1e-6)
    ),
}


def ladder(name: str, transform: Phi | None, r: Tensor, r_ref: Tensor) -> tuple[Tensor, Tensor]:
    """C_hat and Phi(C_hat) of rewards r (B, M) against r_ref (B, K): (B, M) each. transform:
    `get_transform` of the name; where it is None, RAW's reward stands for Phi(C_hat)."""
    C_hat = calibrated_reward(r, r_ref)
    return C_hat, RAW[name](r, r_ref) if transform is None else transform(C_hat)


def in_nats(Phi_C: Tensor, transform: Phi | None, beta: float) -> Tensor:
    """R = Phi(C_hat) / beta, the objective in units of the KL, nowhere more than FLOOR below R at
    C_hat = 1 (RAW: no floor).

    Where the optimum pi_ref e^R / Z has less than e^-FLOOR of pi_ref's mass, it doesn't matter how
    much less: at 1 nat the floor costs exp-10 .0002 of its Worst-of-4 win rate. Without it R is
    -1,043 at C_hat = 0, and a few samples there are all of the gradient.
    """
    R = Phi_C / beta
    return R if transform is None else R.clamp(min=float(transform(torch.ones(1))) / beta - FLOOR)


CLOSED_FORMS: dict[str, Phi] = {"identity": identity, "log": log}


def get_transform(
    name: str,
    *,
    procedure: str | theory.Procedure = "bon",
    n: int = 4,
    beta: float | None = None,
    K: int | None = 100,
) -> Phi | None:
    """Phi by name: an increasing function on tensors in [0, 1], any shape, dtype and device kept.
    None for those of RAW.

    `none` is uncalibrated RLHF: there is no Phi, the raw reward is used. bon_fp, won_fp and optimal
    are the fixed points of Corollary 2 and Theorem 1, solved at this n and beta (optimal: for this
    procedure). K: samples of the calibration, for log's bound at 1/(2K); None, where u is C itself,
    for no bound. Raises ValueError on bad input.
    """
    if K is not None:
        at_least_1("K", K)
    tilt = re.fullmatch(r"exp([+-]?(\d+\.?\d*|\.\d+))", name)
    if name in RAW:
        return None
    if name in theory.FIXED_POINTS:
        if beta is None:
            raise ValueError(
                f"transform {name!r} is solved at the run's beta; pass beta, theory.beta_for_kl has it"
            )
        return theory.fixed_point(name, procedure, n, beta)
    if tilt:
        t = float(tilt[1])
        if not 0 < abs(t) <= MAX_T:
            raise ValueError(
                f"transform {name!r}: t must be within {MAX_T} of 0, not 0; use exp10 or identity"
            )
        return exp(t)
    if name not in CLOSED_FORMS:
        known = ", ".join([*CLOSED_FORMS, *theory.FIXED_POINTS, *RAW])
        raise ValueError(f"unknown transform {name!r}; known: exp<t> (exp5, exp-10, …), {known}")
    if name == "log" and K is not None:
        return lambda u: log(u.clamp(min=1 / (2 * K)))
    return CLOSED_FORMS[name]
