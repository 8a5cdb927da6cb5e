"""The optimum of any procedure (Theorem 1): mirror ascent on the win rate, and its Phi as a
function on [0, 1].
"""

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from minictrl.checks import OutOfReach, positive, whole
from minictrl.procedures import cells
from minictrl.procedures.base import Procedure
from minictrl.procedures.cells import cdf
from minictrl.procedures.masses import MassMap, mass_map, mass_win_rate

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
    win_rate: float
    residual: float  # standard deviation of log pi/pi_ref - Phi/beta, nats: 0 at the fixed point


class _State(NamedTuple):
    """A policy on the way, and what the win rate says of it."""

    log_ratio: Tensor  # (G,)
    scale: float  # 1 / beta
    mass: Tensor  # (G,)
    Phi: Tensor  # (G,)
    win_rate: float

    def gap(self, ref: Tensor) -> tuple[Tensor, Tensor, float]:
        """(gap (G,), weight (G,), residual): log pi/pi_ref of the fixed point minus the policy's.

        Weighed by where the policy is and where it should be: by its own mass alone a policy that
        has collapsed onto one cell would seem to fit. residual: the weighed standard deviation of
        the gap, in nats.
        """
        target = ref * cells.tilt(self.Phi, self.scale, ref).exp()
        weight = (self.mass + target) / 2
        gap = self.scale * self.Phi - self.log_ratio
        gap = gap - (weight * gap).sum()
        return gap, weight, (weight * gap**2).sum().sqrt().item()

    def gain(self, trial: "_State", ref: Tensor) -> float:
        """What the objective gains by a step to `trial`."""
        more_kl = cells.kl(trial.log_ratio, ref) - cells.kl(self.log_ratio, ref)
        gain = trial.win_rate - self.win_rate - more_kl / trial.scale
        if abs(gain) >= 1e-9:
            return gain
        # a difference that rounding drowns: the gradient is integrated along the step instead, by
        # the trapezoid rule
        slope = self.Phi + trial.Phi - (self.log_ratio + trial.log_ratio) / trial.scale
        slope = slope - (self.mass * slope).sum()
        return ((trial.mass - self.mass) * slope).sum().item() / 2


def ascend(
    procedure: str | MassMap,
    n: int,
    ref: Tensor,
    *,
    beta: float | None = None,
    kl: float | None = None,
) -> Optimum:
    """Maximises W^T - beta KL, or W^T at a given KL, by mirror ascent: Theorem 1's EM, damped.

    log f <- (1 - eta) log f + eta Phi_f / beta, renormalised; Phi_f, the derivative of the win
    rate, is autograd's. eta = 1 is the paper's iteration, which oscillates for Best-of-N: here a
    step that lowers the objective is halved. Given `kl`, 1/beta is what keeps the step at that KL.
    ref: (G,) mass of pi_ref. Raises OutOfReach if it does not converge.
    """
    T = mass_map(procedure)
    if kl is None:
        state = _evaluate(T, n, ref, torch.zeros_like(ref), 1 / beta)  # pi_ref
    else:
        state = _at_kl(T, n, ref, kl)
    eta = 1.0
    for _ in range(MAX_STEPS):
        gap, weight, residual = state.gap(ref)
        nothing_left = kl is not None and state.win_rate > 1 - 1e-6  # any such policy will do
        if residual < 1e-8 or eta < 1e-10 or nothing_left:
            break
        base, step = (1 - eta) * state.log_ratio, eta * state.scale
        if kl is None:
            log_ratio, scale = cells.tilt(state.Phi, step, ref, base), state.scale
        else:
            log_ratio, scale = cells.tilt_to_kl(state.Phi, kl, ref, base, step)
            scale /= eta
        trial = _evaluate(T, n, ref, log_ratio, scale)
        if state.gain(trial, ref) >= 0:
            # a secant: a step of eta left this share of the gap, eta / (1 - left) would leave none
            left = (weight * gap * (scale * trial.Phi - log_ratio)).sum().item() / residual**2
            eta = min(1.0, eta / max(0.1, 1 - left))
            state = trial
        else:
            eta /= 2
    if not (residual < CONVERGED or nothing_left):
        at = f"beta {beta:g}" if kl is None else f"kl {kl:g}"
        raise OutOfReach(
            f"{at}, n {n}: no fixed point found, the best is {residual:.0e} nats off "
            f"(at most {CONVERGED:g} is); use a larger beta or a smaller KL"
        )
    return Optimum(state.log_ratio, state.Phi, 1 / state.scale, state.win_rate, residual)


@torch.enable_grad()
def _evaluate(T: MassMap, n: int, ref: Tensor, log_ratio: Tensor, scale: float) -> _State:
    mass = (ref * log_ratio.exp()).requires_grad_()
    win = mass_win_rate(mass, ref, T, n)
    (Phi,) = torch.autograd.grad(win, mass)
    return _State(log_ratio, scale, mass.detach(), Phi - Phi[-1], win.item())


def _at_kl(T: MassMap, n: int, ref: Tensor, kl: float) -> _State:
    """The optimum of the standard win rate at this KL, where the ascent at a given KL begins."""
    log_ratio, _ = cells.tilt_to_kl(cells.centres(ref), kl, ref)
    state = _evaluate(T, n, ref, log_ratio, 1.0)
    rise = state.mass * (state.Phi - (state.mass * state.Phi).sum())
    # least squares for log f = scale Phi + const
    scale = ((rise * log_ratio).sum() / (rise * state.Phi).sum()).item()
    return state._replace(scale=scale)


def solve(T: MassMap, n: int, beta: float | None = None, kl: float | None = None) -> Optimum:
    """`ascend` on the COARSE cells. Raises OutOfReach where the optimum is a spike.

    Cached for the procedures that have a name; a user's function may have changed meanwhile.
    """
    named = isinstance(getattr(T, "__self__", None), Procedure)
    return (_solve if named else _solve.__wrapped__)(T, n, beta, kl)


@lru_cache(maxsize=512)
def _solve(T: MassMap, n: int, beta: float | None, kl: float | None) -> Optimum:
    best = ascend(T, n, cells.grid(COARSE), beta=beta, kl=kl)
    rise = max(
        best.log_ratio[0] - best.log_ratio[1], best.log_ratio[-1] - best.log_ratio[-2]
    ).item()
    if beta is not None and rise > 0.05:  # the density should be flat across a cell of 2e-9
        raise OutOfReach(
            f"beta {beta:g}, n {n}: the optimum is a spike narrower than 1e-9; use a larger "
            "beta or a smaller KL"
        )
    return best


def frontier(T: MassMap, n: int, kl: float) -> Optimum:
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


def is_fixed_point(transform) -> bool:
    """Whether a transform, a name or a function, is one of FIXED_POINTS."""
    return isinstance(transform, str) and transform in FIXED_POINTS


def solved_for(name: str, procedure: str | MassMap) -> MassMap:
    """What the fixed point of a name is solved for."""
    return mass_map(FIXED_POINTS[name] or procedure)


def fixed_point(
    name: str, procedure: str | MassMap, n: int, beta: float
) -> Callable[[Tensor], Tensor]:
    """Phi of bon_fp, won_fp or optimal at this N and beta, as a function on tensors in [0, 1]."""
    T = solved_for(name, procedure)
    return interpolated(solve(T, whole("n", n), beta=positive("beta", beta)))


def interpolated(best: Optimum) -> Callable[[Tensor], Tensor]:
    """Phi between the cells' centres."""
    ref = cells.grid(COARSE)
    # rewind's u = .85 belongs to the cell above
    edges, centres = cdf(ref) - 1e-13, cells.centres(ref)
    slope = cells.slopes(best.Phi, centres)

    def Phi(u: Tensor) -> Tensor:
        x = u.detach().double().cpu().contiguous()
        i = torch.searchsorted(edges, x, right=True).sub(1).clamp(0, len(ref) - 1)
        Phi_u = best.Phi[i] + slope[i] * (x - centres[i])
        return Phi_u.to(u.device, torch.promote_types(u.dtype, torch.float32))

    return Phi
