"""The theory of InfAlign on one axis: win rates of any procedure, KL, the beta for a KL, optimal transforms.

With a continuous reward (Theorems 2 to 4) a policy is, for each prompt, a density f on the calibrated reward
u = C(x, y), and pi_ref is the uniform one. CTRL's policy is f = e^{Phi(u)/beta} / Z. All in float64 on the CPU.

[0, 1] is cut into cells; a policy is the mass of each, and a procedure maps masses to masses: the paper's T, with a
tie inside a cell. A continuous policy has many narrow cells, an empirical calibration K + 1 wide ones, a tabular
problem one for each distinct reward. A new procedure is one function below and its name in PROCEDURES.
"""

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from operator import index
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from minictrl import cells
from minictrl.cells import REWIND_QUANTILE, cdf, midpoints

Transform = str | Callable[[Tensor], Tensor]
Procedure = Callable[[Tensor, Tensor, int], Tensor]

FINE = 32_000  # cells for a Phi in closed form: KL and win rate to 1e-7
COARSE = 4_000  # cells of the solver, which visits them a hundred times: KL to 1e-5, win rate to 1e-6
POINTS = 400_000  # midpoint grid of optimal_transform: for large N the optimum has a spike at u = 1, 1e-4 wide and less
MAX_KL = 16.0  # nats; a policy beyond it lives on the last 1e-7 of [0, 1], where the cells end
MAX_STEPS = 1000  # of the solver; up to N = 256 and down to beta = .005 it takes at most 150
CONVERGED = 1e-5  # nats; the solver stops at 1e-8, or where rounding stops it, and fails above this
FIXED_POINTS = {"bon_fp": "bon", "won_fp": "won", "optimal": None}  # -> what it is for; None: the procedure at hand


# ---- procedures: mass (..., G) of each cell, the cells' edges u (..., G + 1), N -> mass after the procedure ----


def standard(mass: Tensor, u: Tensor, n: int) -> Tensor:
    """One draw."""
    return mass


def bon(mass: Tensor, u: Tensor, n: int) -> Tensor:
    """The best of N draws (Lemma 5)."""
    return cdf(mass).pow(n).diff()


def won(mass: Tensor, u: Tensor, n: int) -> Tensor:
    """The worst of N draws (Lemma 5)."""
    return -(1 - cdf(mass)).pow(n).diff()


def rewind(mass: Tensor, u: Tensor, n: int) -> Tensor:
    """Rewind-and-repeat (App. G): draw until u >= .85, at most N times; the last draw is kept."""
    above = ((u[..., 1:] - REWIND_QUANTILE) / u.diff()).clamp(0, 1)  # share of each cell above the threshold
    q = (mass * (1 - above)).sum(-1, keepdim=True)  # a draw falls below it
    draws = (q ** torch.arange(n)).sum(-1, keepdim=True)  # how many are made on average, (1 - q^N) / (1 - q)
    return mass * (above * draws + (1 - above) * q ** (n - 1))


PROCEDURES: dict[str, Procedure] = {"standard": standard, "bon": bon, "won": won, "rewind": rewind}


# ---- win rate and KL of a density ----


def mass_win_rate(mass: Tensor, ref: Tensor, procedure: str | Procedure, n: int) -> Tensor:
    """W^T(pi > pi_ref) of Definition 4, from the masses of pi and pi_ref on the same ordered cells; differentiable.

    mass, ref: (..., G), each summing to 1 over the cells. Within a cell all tie, and a tie counts one half.
    Returns a scalar, the mean over any leading dimensions: prompts, or the procedures of a mix.
    """
    T, u = _procedure(procedure), cdf(ref)
    ref_after = T(ref, u, n)
    return (T(mass, u, n) * (ref_after.cumsum(-1) - ref_after / 2)).sum(-1).mean()


def win_rate(density: Tensor, procedure: str | Procedure, n: int) -> float:
    """Inference-time win rate over pi_ref of a policy with this density of u = C (Theorem 3, for any procedure).

    density: (G,) values on the midpoint grid u = (i + 1/2) / G, mean 1. n: draws N of the procedure, at least 1.
    Raises ValueError on a density that is negative or does not integrate to 1, an unknown procedure, n < 1.
    """
    mass, n = _mass(density), at_least_1("n", n)
    G = len(mass)
    slope = cells.slopes(mass, torch.arange(G)).clamp(-2 * mass, 2 * mass)  # linear inside its cells, nowhere negative
    u = torch.cat([torch.linspace(0, 1, G + 1, dtype=torch.float64), cdf(cells.grid(FINE))]).unique()
    i = (u * G).long().clamp(max=G - 1)
    t = u * G - i
    F = cdf(mass)[i] + t * (mass[i] + (t - 1) * slope[i] / 2)  # on cells so narrow that ties weigh nothing, for any n
    return mass_win_rate(F.diff().clamp(min=0), u.diff(), procedure, n).item()


def kl(density: Tensor) -> float:
    """KL(pi || pi_ref) in nats of a density (G,) on the midpoint grid (Eq. 10). Raises ValueError as win_rate does."""
    mass = _mass(density)
    return torch.special.xlogy(mass, mass * len(mass)).sum().item()


# ---- trade-off of a transform ----


def tradeoff(
    transform: Transform, procedure: str | Procedure, n: int, betas: Iterable[float], *, K: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """KL [nats] and win rate of f = e^{Phi/beta} / Z for each beta (Theorem 3): float64 arrays of len(betas).

    transform: a name of the command line, or Phi itself, a function on tensors in [0, 1]. bon_fp, won_fp and optimal
    are solved anew for each beta and this n. K: the empirical calibration with K samples (Eq. 12), mean over prompts.
    Beyond MAX_KL the KL is a lower bound and the win rate 1 for all purposes.
    """
    T, n, points = _procedure(procedure), at_least_1("n", n), []
    for beta in betas:
        if transform in FIXED_POINTS:
            best = _optimum(_solved_for(transform, T), n, beta=_positive("beta", beta))
            if K is None:
                win = mass_win_rate(*_spread(best.log_ratio, cells.grid(COARSE)), T, n).item()
                points.append((best.kl, win))
                continue
        Phi, ref = _cells(_interpolated(best) if transform in FIXED_POINTS else transform, K)
        log_ratio = cells.tilt(Phi, 1 / _positive("beta", beta), ref)
        points.append((cells.kl(log_ratio, ref), mass_win_rate(*_spread(log_ratio, ref, K), T, n).item()))
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def beta_for_kl(transform: Transform, kl: float, *, procedure: str | Procedure = "bon", n: int = 4) -> float:
    """The beta at which the policy for `transform` is `kl` nats from pi_ref, to a relative 1e-7 in KL.

    bon_fp, won_fp and optimal depend on beta themselves: both are solved for together, for this procedure and n.
    Raises ValueError on a KL that is not positive or out of reach (the largest one is named).
    """
    T, n, kl = _procedure(procedure), at_least_1("n", n), _positive("kl", kl)
    if kl > MAX_KL:
        raise ValueError(f"kl {kl:g} is out of reach: the largest that is resolved is {MAX_KL:g} nats; ask for less")
    if transform not in FIXED_POINTS:
        Phi, ref = _cells(transform)
        return 1 / cells.tilt_to_kl(Phi, kl, ref)[1]
    best = _optimum(_solved_for(transform, T), n, kl=kl)
    if not best.residual < CONVERGED:
        missing = f"the win rate misses 1 by {1 - best.win_rate:.0e} there"
        raise ValueError(f"kl {kl:g} is out of reach of {transform} at n {n}: {missing}; ask for less")
    return best.beta


def at_kl(transform: Transform, kl: float, procedure: str | Procedure, n: int, *, K: int | None = None) -> float:
    """The win rate that theory gives this transform at a (measured) KL in nats: one point of its trade-off curve.

    A KL of 0, or below it by noise, is pi_ref: 1/2. Above MAX_KL it is the win rate at MAX_KL, 1 for all purposes.
    For a fixed point under another procedure or n than it was solved for, pass its Phi. K: as in tradeoff.
    """
    return mass_win_rate(*policy_at_kl(transform, kl, procedure, n, K=K), procedure, n).item()


def optimal_win_rate(kl: float, procedure: str | Procedure, n: int) -> float:
    """The best win rate that any policy has at this KL in nats: the frontier. 1/2 at a KL of 0 or below."""
    return at_kl("optimal", kl, procedure, n)


def policy_at_kl(
    transform: Transform, kl: float, procedure: str | Procedure, n: int, *, K: int | None = None
) -> tuple[Tensor, Tensor]:
    """(mass, ref): the mass of each cell under this transform's policy at this KL, and under pi_ref, as in at_kl.

    (G,) each, or (prompts, G) with K. ref is also the cells' width. procedure, n: what a fixed point is solved for.
    """
    T, n, kl = _procedure(procedure), at_least_1("n", n), min(float(kl), MAX_KL)
    if kl < 1e-9:
        return cells.grid(COARSE), cells.grid(COARSE)
    if transform in FIXED_POINTS:
        best = _frontier(_solved_for(transform, T), n, kl)
        if K is None:
            return _spread(best.log_ratio, cells.grid(COARSE))
        transform = _interpolated(best)
    Phi, ref = _cells(transform, K)
    return _spread(cells.tilt_to_kl(Phi, kl, ref)[0], ref, K)


# ---- the optimum of any procedure (Theorem 1) ----


class Optimum(NamedTuple):
    log_ratio: Tensor  # (G,) log pi/pi_ref of each cell
    Phi: Tensor  # (G,) derivative of the win rate in the density there, Phi(1) = 0
    beta: float
    kl: float  # nats
    win_rate: float
    residual: float  # standard deviation of log pi/pi_ref - Phi/beta, nats: 0 at the fixed point


def optimal_transform(procedure: str | Procedure, n: int, beta: float) -> tuple[Tensor, Tensor]:
    """(u, Phi) of the policy that maximises W^T - beta KL (Definition 5): the fixed point of Theorem 1 and Corollary 2.

    procedure: a name, or any differentiable function (mass, u, n) -> mass like those of PROCEDURES.
    Returns the midpoint grid u (POINTS,) and Phi on it with Phi(1) = 0, float64: the policy is f = e^{Phi/beta} / Z.
    Raises ValueError where the ascent does not converge or the policy is too narrow: never a Phi that is not optimal.
    """
    u = midpoints(POINTS)
    return u, fixed_point("optimal", procedure, n, beta)(u)


def fixed_point(name: str, procedure: str | Procedure, n: int, beta: float) -> Callable[[Tensor], Tensor]:
    """Phi of bon_fp, won_fp or optimal at this N and beta, as a function on tensors in [0, 1]."""
    T = _solved_for(name, _procedure(procedure))
    return _interpolated(_optimum(T, at_least_1("n", n), beta=_positive("beta", beta)))


def ascend(
    procedure: str | Procedure, n: int, ref: Tensor, *, beta: float | None = None, kl: float | None = None
) -> Optimum:
    """Maximises W^T - beta KL, or W^T at a given KL, by mirror ascent with backtracking: Theorem 1's EM, damped.

    log f <- (1 - eta) log f + eta Phi_f / beta, renormalised; Phi_f, the derivative of the win rate, is autograd's.
    eta = 1 is the paper's iteration, which oscillates for Best-of-N: here a step that lowers the objective is halved.
    Given `kl`, 1/beta is what keeps the step at that KL. ref: (G,) mass of pi_ref. ValueError if it does not converge.
    """
    T = _procedure(procedure)

    def evaluate(log_ratio: Tensor) -> tuple[Tensor, Tensor, float]:
        mass = (ref * log_ratio.exp()).requires_grad_()
        win = mass_win_rate(mass, ref, T, n)
        (Phi,) = torch.autograd.grad(win, mass)
        return mass.detach(), Phi - Phi[-1], win.item()

    if kl is None:
        log_ratio, scale = torch.zeros_like(ref), 1 / beta
        mass, Phi, win = evaluate(log_ratio)
    else:
        log_ratio, _ = cells.tilt_to_kl(cells.centres(ref), kl, ref)  # from the optimum of the standard win rate
        mass, Phi, win = evaluate(log_ratio)
        rise = mass * (Phi - (mass * Phi).sum())
        scale = ((rise * log_ratio).sum() / (rise * Phi).sum()).item()  # least squares for log f = scale Phi + const
    eta = 1.0
    for _ in range(MAX_STEPS):
        # Weighed by where the policy is and where it should be: one that has collapsed is 0 off by its own measure.
        weight = (mass + ref * cells.tilt(Phi, scale, ref).exp()) / 2
        gap = scale * Phi - log_ratio
        gap = gap - (weight * gap).sum()
        residual = (weight * gap**2).sum().sqrt().item()
        nothing_left = kl is not None and win > 1 - 1e-6  # any such policy at this KL will do
        if residual < 1e-8 or eta < 1e-10 or nothing_left:
            break
        if kl is None:
            trial, trial_scale = cells.tilt(Phi, eta * scale, ref, (1 - eta) * log_ratio), scale
        else:
            trial, trial_scale = cells.tilt_to_kl(Phi, kl, ref, (1 - eta) * log_ratio, eta * scale)
            trial_scale /= eta
        trial_mass, trial_Phi, trial_win = evaluate(trial)
        gain = trial_win - win - (cells.kl(trial, ref) - cells.kl(log_ratio, ref)) / trial_scale
        if abs(gain) < 1e-9:  # lost in rounding; the trapezoid rule along the step is exact there
            slope = Phi + trial_Phi - (log_ratio + trial) / trial_scale
            gain = ((trial_mass - mass) * (slope - (mass * slope).sum())).sum().item() / 2
        if gain >= 0:
            trial_gap = trial_scale * trial_Phi - trial
            left = (weight * gap * trial_gap).sum().item() / residual**2  # share of the gap; gap has weighted mean 0
            eta = min(1.0, eta / max(0.1, 1 - left))  # the step that, by the last one, would have left no gap
            log_ratio, scale, mass, Phi, win = trial, trial_scale, trial_mass, trial_Phi, trial_win
        else:
            eta /= 2
    if not (residual < CONVERGED or nothing_left):
        at = f"beta {beta:g}" if kl is None else f"kl {kl:g}"
        raise ValueError(
            f"{at}, n {n}: no fixed point found, the best is {residual:.0e} nats off (at most {CONVERGED:g} is); "
            "use a larger beta or a smaller KL"
        )
    return Optimum(log_ratio, Phi, 1 / scale, cells.kl(log_ratio, ref), win, residual)


@lru_cache(maxsize=512)
def _optimum(T: Procedure, n: int, beta: float | None = None, kl: float | None = None) -> Optimum:
    best = ascend(T, n, cells.grid(COARSE), beta=beta, kl=kl)
    rise = max(best.log_ratio[0] - best.log_ratio[1], best.log_ratio[-1] - best.log_ratio[-2]).item()
    if beta is not None and rise > 0.05:  # the density should be flat across a cell of 2e-9
        raise ValueError(f"beta {beta:g}, n {n}: the optimum is a spike narrower than 1e-9; use a larger beta")
    return best


def _frontier(T: Procedure, n: int, kl: float) -> Optimum:
    """The optimum at this KL, or at less where that wins already: for large N nothing is left to solve for beyond."""
    try:
        return _optimum(T, n, kl=kl)
    except ValueError:
        less = _frontier(T, n, kl / 2) if kl > 1e-3 else None
        if less is None or less.win_rate < 1 - 1e-5:
            raise
        return less


def _solved_for(name: str, T: Procedure) -> Procedure:
    return PROCEDURES[FIXED_POINTS[name]] if FIXED_POINTS[name] else T


def _interpolated(best: Optimum) -> Callable[[Tensor], Tensor]:
    """Phi between the cells' centres."""
    ref = cells.grid(COARSE)
    edges, centres = cdf(ref) - 1e-13, cells.centres(ref)  # rewind's u = .85 belongs to the cell above
    slope = cells.slopes(best.Phi, centres)

    def Phi(u: Tensor) -> Tensor:
        x = u.detach().double().cpu().contiguous()
        i = torch.searchsorted(edges, x, right=True).sub(1).clamp(0, len(ref) - 1)
        return (best.Phi[i] + slope[i] * (x - centres[i])).to(u)

    return Phi


# ---- small things ----


def _cells(transform: Transform, K: int | None = None) -> tuple[Tensor, Tensor]:
    """(Phi, ref): Phi (G,) of each cell and its mass under pi_ref, (G,), or (prompts, K + 1) where C_hat = k / K."""
    ref = cells.grid(FINE) if K is None else cells.spacings(at_least_1("K", K))
    u = cells.centres(ref) if K is None else torch.arange(K + 1, dtype=torch.float64) / K
    Phi = transform
    if isinstance(transform, str):
        from minictrl.transforms import get_transform  # here, for transforms imports this module

        Phi = get_transform(transform, K=K)
        if Phi is None:
            raise ValueError(f"transform {transform!r} has no theory: its KL depends on the reward; name another")
    values = torch.as_tensor(Phi(u), dtype=torch.float64)
    if values.shape != u.shape or not values.isfinite().all():
        raise ValueError(f"Phi must map u {tuple(u.shape)} to as many finite values; bound it near 0 and 1")
    return values, ref


def _spread(log_ratio: Tensor, ref: Tensor, K: int | None = None) -> tuple[Tensor, Tensor]:
    """(mass, ref), the wide cells of a finite K cut up: within a value of C_hat the true C still spreads uniformly."""
    mass = ref * log_ratio.exp()
    if K is None:
        return mass, ref
    parts = math.ceil(512 / (K + 1))
    return tuple(each.repeat_interleave(parts, -1) / parts for each in (mass, ref))


def _procedure(procedure: str | Procedure) -> Procedure:
    if not callable(procedure) and procedure not in PROCEDURES:
        known = ", ".join(PROCEDURES)
        raise ValueError(f"unknown procedure {procedure!r}; known: {known}, or a function (mass, u, n) -> mass")
    return procedure if callable(procedure) else PROCEDURES[procedure]


def at_least_1(name: str, n: int) -> int:
    """n as an int. Raises ValueError unless it is a whole number of at least 1."""
    if isinstance(n, bool) or not hasattr(n, "__index__") or index(n) < 1:
        raise ValueError(f"{name} {n!r}: must be a whole number of at least 1; use 1 for a single draw")
    return index(n)


def _positive(name: str, x: float) -> float:
    if not 0 < float(x) < math.inf:
        raise ValueError(f"{name} {float(x):g}: must be positive and finite; a KL of 1 is a start, beta follows")
    return float(x)


def _mass(density: Tensor) -> Tensor:
    f = torch.as_tensor(density, dtype=torch.float64)
    if f.ndim != 1 or len(f) < 2 or not f.isfinite().all() or f.min() < 0:
        raise ValueError(f"density {tuple(f.shape)}: must be (G > 1,), finite, nowhere negative; clamp it at 0")
    if abs(f.mean().item() - 1) > 1e-3:  # the midpoint rule's error on a coarse grid is allowed for, and divided out
        raise ValueError(f"density integrates to {f.mean().item():.6g}: must be 1 (its mean); divide it by that")
    return f / f.sum()
