"""The theory of InfAlign on one axis: win rates of any procedure, KL, the beta for a KL, optimal
transforms.

With a continuous reward (Theorems 2 to 4) a policy is, for each prompt, a density f on the
calibrated reward u = C(x, y), and pi_ref is the uniform one. CTRL's policy is f = e^{Phi(u)/beta} /
Z. All in float64 on the CPU. Procedures are in `procedures.py`, the solver for their optimum in
`optimum.py`.
"""

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from minictrl.procedures import (  # noqa: F401
    PROCEDURES,
    Procedure,
    at_least_1,
    cells,
    get_procedure,
    mass_win_rate,
)
from minictrl.procedures.cells import cdf, midpoints
from minictrl.procedures.optimum import (
    COARSE,
    CONVERGED,
    FIXED_POINTS,
    frontier,
    interpolated,
    solve,
    solved_for,
)

Transform = str | Callable[[Tensor], Tensor]

FINE = 32_000  # cells for a Phi in closed form: KL and win rate to 1e-7
# midpoint grid of optimal_transform: for large N the optimum has a spike at u = 1, 1e-4 wide and
# less
POINTS = 400_000
MAX_KL = 16.0  # nats; a policy beyond it lives on the last 1e-7 of [0, 1], where the cells end


# ---- win rate and KL of a density ----


def win_rate(density: Tensor, procedure: str | Procedure, n: int) -> float:
    """Inference-time win rate over pi_ref of a policy with this density of u = C (Theorem 3, for
    any procedure).

    density: (G,) values on the midpoint grid u = (i + 1/2) / G, mean 1. n: draws N of the
    procedure, at least 1. Raises ValueError on a density that is negative or does not integrate to
    1, an unknown procedure, n < 1.
    """
    mass, n = _mass(density), at_least_1("n", n)
    G = len(mass)
    # linear inside its cells, nowhere negative
    slope = cells.slopes(mass, torch.arange(G)).clamp(-2 * mass, 2 * mass)
    u = torch.cat(
        [torch.linspace(0, 1, G + 1, dtype=torch.float64), cdf(cells.grid(FINE))]
    ).unique()
    i = (u * G).long().clamp(max=G - 1)
    t = u * G - i
    # on cells so narrow that ties weigh nothing, for any n
    F = cdf(mass)[i] + t * (mass[i] + (t - 1) * slope[i] / 2)
    return mass_win_rate(F.diff().clamp(min=0), u.diff(), procedure, n).item()


def kl(density: Tensor) -> float:
    """KL(pi || pi_ref) in nats of a density (G,) on the midpoint grid (Eq. 10). Raises ValueError
    as win_rate does.
    """
    mass = _mass(density)
    return torch.special.xlogy(mass, mass * len(mass)).sum().item()


# ---- trade-off of a transform ----


def tradeoff(
    transform: Transform,
    procedure: str | Procedure,
    n: int,
    betas: Iterable[float],
    *,
    K: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """KL [nats] and win rate of f = e^{Phi/beta} / Z for each beta (Theorem 3): float64 arrays of
    len(betas).

    transform: a name of the command line, or Phi itself, a function on tensors in [0, 1]. bon_fp,
    won_fp and optimal are solved anew for each beta and this n. K: the empirical calibration with K
    samples (Eq. 12), mean over prompts. Beyond MAX_KL the KL is a lower bound and the win rate 1
    for all purposes.
    """
    T, n, points = get_procedure(procedure), at_least_1("n", n), []
    for beta in betas:
        if transform in FIXED_POINTS:
            best = solve(solved_for(transform, T), n, beta=_positive("beta", beta))
            if K is None:
                win = mass_win_rate(*_spread(best.log_ratio, cells.grid(COARSE)), T, n).item()
                points.append((best.kl, win))
                continue
        Phi, ref = _cells(interpolated(best) if transform in FIXED_POINTS else transform, K)
        log_ratio = cells.tilt(Phi, 1 / _positive("beta", beta), ref)
        points.append(
            (cells.kl(log_ratio, ref), mass_win_rate(*_spread(log_ratio, ref, K), T, n).item())
        )
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def beta_for_kl(
    transform: Transform, kl: float, *, procedure: str | Procedure = "bon", n: int = 4
) -> float:
    """The beta at which the policy for `transform` is `kl` nats from pi_ref, to a relative 1e-7 in
    KL.

    bon_fp, won_fp and optimal depend on beta themselves: both are solved for together, for this
    procedure and n. Raises ValueError on a KL that is not positive or out of reach (the largest one
    is named).
    """
    T, n, kl = get_procedure(procedure), at_least_1("n", n), _positive("kl", kl)
    if kl > MAX_KL:
        raise ValueError(
            f"kl {kl:g} is out of reach: the largest that is resolved is {MAX_KL:g} nats; ask for less"
        )
    if transform not in FIXED_POINTS:
        Phi, ref = _cells(transform)
        return 1 / cells.tilt_to_kl(Phi, kl, ref)[1]
    best = solve(solved_for(transform, T), n, kl=kl)
    if not best.residual < CONVERGED:
        missing = f"the win rate misses 1 by {1 - best.win_rate:.0e} there"
        raise ValueError(
            f"kl {kl:g} is out of reach of {transform} at n {n}: {missing}; ask for less"
        )
    return best.beta


def at_kl(
    transform: Transform, kl: float, procedure: str | Procedure, n: int, *, K: int | None = None
) -> float:
    """The win rate that theory gives this transform at a (measured) KL in nats: one point of its
    trade-off curve.

    A KL of 0, or below it by noise, is pi_ref: 1/2. Above MAX_KL it is the win rate at MAX_KL, 1
    for all purposes. For a fixed point under another procedure or n than it was solved for, pass
    its Phi. K: as in tradeoff.
    """
    return mass_win_rate(*policy_at_kl(transform, kl, procedure, n, K=K), procedure, n).item()


def optimal_win_rate(kl: float, procedure: str | Procedure, n: int) -> float:
    """The best win rate that any policy has at this KL in nats: the frontier. 1/2 at a KL of 0 or
    below.
    """
    return at_kl("optimal", kl, procedure, n)


def policy_at_kl(
    transform: Transform, kl: float, procedure: str | Procedure, n: int, *, K: int | None = None
) -> tuple[Tensor, Tensor]:
    """(mass, ref): the mass of each cell under this transform's policy at this KL, and under
    pi_ref, as in at_kl.

    (G,) each, or (prompts, G) with K. ref is also the cells' width. procedure, n: what a fixed
    point is solved for.
    """
    T, n, kl = get_procedure(procedure), at_least_1("n", n), min(float(kl), MAX_KL)
    if kl < 1e-9:
        return cells.grid(COARSE), cells.grid(COARSE)
    if transform in FIXED_POINTS:
        best = frontier(solved_for(transform, T), n, kl)
        if K is None:
            return _spread(best.log_ratio, cells.grid(COARSE))
        transform = interpolated(best)
    Phi, ref = _cells(transform, K)
    return _spread(cells.tilt_to_kl(Phi, kl, ref)[0], ref, K)


# ---- the optimum of any procedure (Theorem 1) ----


def optimal_transform(procedure: str | Procedure, n: int, beta: float) -> tuple[Tensor, Tensor]:
    """(u, Phi) of the policy that maximises W^T - beta KL (Definition 5): the fixed point of
    Theorem 1 and Corollary 2.

    procedure: a name, or any differentiable function (mass, u, n) -> mass like those of PROCEDURES.
    Returns the midpoint grid u (POINTS,) and Phi on it with Phi(1) = 0, float64: the policy is f =
    e^{Phi/beta} / Z. Raises ValueError where the ascent does not converge or the policy is too
    narrow: never a Phi that is not optimal.
    """
    u = midpoints(POINTS)
    return u, fixed_point("optimal", procedure, n, beta)(u)


def fixed_point(
    name: str, procedure: str | Procedure, n: int, beta: float
) -> Callable[[Tensor], Tensor]:
    """Phi of bon_fp, won_fp or optimal at this N and beta, as a function on tensors in [0, 1]."""
    T = solved_for(name, get_procedure(procedure))
    return interpolated(solve(T, at_least_1("n", n), beta=_positive("beta", beta)))


# ---- small things ----


def _cells(transform: Transform, K: int | None = None) -> tuple[Tensor, Tensor]:
    """(Phi, ref): Phi (G,) of each cell and its mass under pi_ref, (G,), or (prompts, K + 1) where
    C_hat = k / K.
    """
    ref = cells.grid(FINE) if K is None else cells.spacings(at_least_1("K", K))
    u = cells.centres(ref) if K is None else torch.arange(K + 1, dtype=torch.float64) / K
    Phi = transform
    if isinstance(transform, str):
        from minictrl.transforms import get_transform  # here, for transforms imports this module

        Phi = get_transform(transform, K=K)
        if Phi is None:
            raise ValueError(
                f"transform {transform!r} has no theory: its KL depends on the reward; name another"
            )
    values = torch.as_tensor(Phi(u), dtype=torch.float64)
    if values.shape != u.shape or not values.isfinite().all():
        raise ValueError(
            f"Phi must map u {tuple(u.shape)} to as many finite values; bound it near 0 and 1"
        )
    return values, ref


def _spread(log_ratio: Tensor, ref: Tensor, K: int | None = None) -> tuple[Tensor, Tensor]:
    """(mass, ref), the wide cells of a finite K cut up: within a value of C_hat the true C still
    spreads uniformly.
    """
    mass = ref * log_ratio.exp()
    if K is None:
        return mass, ref
    parts = math.ceil(512 / (K + 1))
    return tuple(each.repeat_interleave(parts, -1) / parts for each in (mass, ref))


def _positive(name: str, x: float) -> float:
    if not 0 < float(x) < math.inf:
        raise ValueError(
            f"{name} {float(x):g}: must be positive and finite; a KL of 1 is a start, beta follows"
        )
    return float(x)


def _mass(density: Tensor) -> Tensor:
    f = torch.as_tensor(density, dtype=torch.float64)
    if f.ndim != 1 or len(f) < 2 or not f.isfinite().all() or f.min() < 0:
        raise ValueError(
            f"density {tuple(f.shape)}: must be (G > 1,), finite, nowhere negative; clamp it at 0"
        )
    # the midpoint rule's error on a coarse grid is allowed for, and divided out
    if abs(f.mean().item() - 1) > 1e-3:
        raise ValueError(
            f"density integrates to {f.mean().item():.6g}: must be 1 (its mean); divide it by that"
        )
    return f / f.sum()
