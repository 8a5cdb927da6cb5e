"""The optimum of any procedure (Theorem 1): mirror ascent on the win rate, and its Phi as a
function on [0, 1].
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minictrl.procedures import PROCEDURES, Procedure, cells, get_procedure, mass_win_rate
from minictrl.procedures.cells import cdf

# cells of the solver, which visits them a hundred times: KL to 1e-5, win rate to 1e-6
COARSE = 4_000
MAX_STEPS = 1000  # up to N = 256 and down to beta = .005 it takes at most 150
CONVERGED = 1e-5  # nats; the solver stops at 1e-8, or where rounding stops it, and fails above this
# -> what it is for; None: the procedure at hand
FIXED_POINTS = {"bon_fp": "bon", "won_fp": "won", "optimal": None}


class Optimum(NamedTuple):
    log_ratio: Tensor  # (G,) log pi/pi_ref of each cell
    Phi: Tensor  # (G,) derivative of the win rate in the density there, Phi(1) = 0
    beta: float
    kl: float  # nats
    win_rate: float
    residual: float  # standard deviation of log pi/pi_ref - Phi/beta, nats: 0 at the fixed point


def ascend(
    procedure: str | Procedure,
    n: int,
    ref: Tensor,
    *,
    beta: float | None = None,
    kl: float | None = None,
) -> Optimum:
    """Maximises W^T - beta KL, or W^T at a given KL, by mirror ascent with backtracking: Theorem
    1's EM, damped.

    log f <- (1 - eta) log f + eta Phi_f / beta, renormalised; Phi_f, the derivative of the win
    rate, is autograd's. eta = 1 is the paper's iteration, which oscillates for Best-of-N: here a
    step that lowers the objective is halved. Given `kl`, 1/beta is what keeps the step at that KL.
    ref: (G,) mass of pi_ref. ValueError if it does not converge.
    """
    T = get_procedure(procedure)

    def evaluate(log_ratio: Tensor) -> tuple[Tensor, Tensor, float]:
        mass = (ref * log_ratio.exp()).requires_grad_()
        win = mass_win_rate(mass, ref, T, n)
        (Phi,) = torch.autograd.grad(win, mass)
        return mass.detach(), Phi - Phi[-1], win.item()

    if kl is None:
        log_ratio, scale = torch.zeros_like(ref), 1 / beta
        mass, Phi, win = evaluate(log_ratio)
    else:
        # from the optimum of the standard win rate
        log_ratio, _ = cells.tilt_to_kl(cells.centres(ref), kl, ref)
        mass, Phi, win = evaluate(log_ratio)
        rise = mass * (Phi - (mass * Phi).sum())
        # least squares for log f = scale Phi + const
        scale = ((rise * log_ratio).sum() / (rise * Phi).sum()).item()
    eta = 1.0
    for _ in range(MAX_STEPS):
        # Weighed by where the policy is and where it should be: one that has collapsed is 0 off by
        # its own measure.
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
            # share of the gap; gap has weighted mean 0
            left = (weight * gap * trial_gap).sum().item() / residual**2
            # the step that, by the last one, would have left no gap
            eta = min(1.0, eta / max(0.1, 1 - left))
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
def solve(T: Procedure, n: int, beta: float | None = None, kl: float | None = None) -> Optimum:
    best = ascend(T, n, cells.grid(COARSE), beta=beta, kl=kl)
    rise = max(
        best.log_ratio[0] - best.log_ratio[1], best.log_ratio[-1] - best.log_ratio[-2]
    ).item()
    if beta is not None and rise > 0.05:  # the density should be flat across a cell of 2e-9
        raise ValueError(
            f"beta {beta:g}, n {n}: the optimum is a spike narrower than 1e-9; use a larger beta"
        )
    return best


def frontier(T: Procedure, n: int, kl: float) -> Optimum:
    """The optimum at this KL, or at less where that wins already: for large N nothing is left to
    solve for beyond.
    """
    try:
        return solve(T, n, kl=kl)
    except ValueError:
        less = frontier(T, n, kl / 2) if kl > 1e-3 else None
        if less is None or less.win_rate < 1 - 1e-5:
            raise
        return less


def solved_for(name: str, T: Procedure) -> Procedure:
    return PROCEDURES[FIXED_POINTS[name]] if FIXED_POINTS[name] else T


def interpolated(best: Optimum) -> Callable[[Tensor], Tensor]:
    """Phi between the cells' centres."""
    ref = cells.grid(COARSE)
    # rewind's u = .85 belongs to the cell above
    edges, centres = cdf(ref) - 1e-13, cells.centres(ref)
    slope = cells.slopes(best.Phi, centres)

    def Phi(u: Tensor) -> Tensor:
        x = u.detach().double().cpu().contiguous()
        i = torch.searchsorted(edges, x, right=True).sub(1).clamp(0, len(ref) - 1)
        return (best.Phi[i] + slope[i] * (x - centres[i])).to(u)

    return Phi
