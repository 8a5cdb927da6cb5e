"""The theory of InfAlign on one axis: win rates of any procedure, KL, the beta for a KL.

With a continuous reward (Theorems 2 to 4) a policy is, for each prompt, a density f on the
calibrated reward u = C(x, y), and pi_ref is the uniform one. CTRL's policy is f = e^{Phi(u)/beta} /
Z. All in float64 on the CPU. What a procedure does is in `procedures/`, with the solver for its
optimum.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from minictrl.calibration import ranks
from minictrl.checks import OutOfReach, number, positive, real, samples_rewards, whole
from minictrl.procedures import cells
from minictrl.procedures.cells import cdf, midpoints
from minictrl.procedures.masses import MassMap, mass_map, mass_win_rate
from minictrl.procedures.optimum import (
    COARSE,
    CONVERGED,
    Optimum,
    fixed_point,
    frontier,
    interpolated,
    is_fixed_point,
    solve,
    solved_for,
)
from minictrl.transforms import get_transform

TransformLike = str | Callable[[Tensor], Tensor]

FINE = 32_000  # cells for a Phi in closed form: KL and win rate to 1e-7
# midpoints of optimal_transform: for large N the optimum has a spike at u = 1, 1e-4 wide and less
POINTS = 400_000
TIED = 0.005  # how often two kept responses of pi_ref may tie, where the reward is continuous
CUT = 64  # cells of a value that only one sample has
MAX_KL = 16.0  # nats; a policy beyond it lives on the last 1e-7 of [0, 1], where the cells end


# ---- win rate and KL of a density ----


def win_rate(density: Tensor, procedure: str | MassMap, n: int) -> float:
    """Win rate over pi_ref, after the procedure, of a policy with this density of u (Theorem 3).

    density: (G,) values on the midpoint grid u = (i + 1/2) / G, mean 1. n: draws N of the
    procedure. Raises ValueError on a density that is negative or does not integrate to 1, an
    unknown procedure, n < 1.
    """
    mass, n = _mass(density), whole("n", n)
    G = len(mass)
    # linear inside its cells, nowhere negative
    slope = cells.slopes(mass, torch.arange(G)).clamp(-2 * mass, 2 * mass)
    # on cells so narrow that ties weigh nothing, for any n
    edges = torch.linspace(0, 1, G + 1, dtype=torch.float64)
    u = torch.cat([edges, cdf(cells.grid(FINE))]).unique()
    i = (u * G).long().clamp(max=G - 1)
    t = u * G - i
    F = cdf(mass)[i] + t * (mass[i] + (t - 1) * slope[i] / 2)
    return mass_win_rate(F.diff().clamp(min=0), u.diff(), procedure, n).item()


def kl(density: Tensor) -> float:
    """KL(pi || pi_ref) in nats of a density (G,) on the midpoint grid (Eq. 10).

    Raises ValueError as `win_rate` does.
    """
    mass = _mass(density)
    return torch.special.xlogy(mass, mass * len(mass)).sum().item()


# ---- trade-off of a transform ----


def tradeoff(
    transform: TransformLike,
    procedure: str | MassMap,
    n: int,
    betas: Iterable[float],
    *,
    K: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """KL [nats] and win rate of f = e^{Phi/beta} / Z for each beta (Theorem 3).

    transform: a name of the command line, or Phi itself, a function on tensors in [0, 1]. bon_fp,
    won_fp and optimal are solved anew for each beta and this n. K: the empirical calibration with
    K samples (Eq. 12), mean over prompts. Returns float64 arrays of len(betas). Beyond MAX_KL the
    KL is a lower bound and the win rate 1 for all purposes.
    """
    T, n, betas, points = mass_map(procedure), whole("n", n), real("betas", betas), []
    if betas.dim() != 1:
        raise ValueError(f"betas {tuple(betas.shape)}: must be (B,); give a list, of one point too")
    for beta in betas.tolist():
        positive("beta", beta)
        best = solve(solved_for(transform, T), n, beta=beta) if is_fixed_point(transform) else None
        policy = _policy(transform, best, K, scale=1 / beta)
        points.append((cells.kl(*policy), mass_win_rate(*_masses(*policy, K, n), T, n).item()))
    return tuple(np.array(points, dtype=np.float64).reshape(-1, 2).T)


def beta_for_kl(
    transform: TransformLike, kl: float, *, procedure: str | MassMap = "bon", n: int = 4
) -> float:
    """The beta at which the policy of `transform` is `kl` nats from pi_ref, to a relative 1e-7 (of
    a fixed point at less than 1e-4 nats 1e-4).

    bon_fp, won_fp and optimal depend on beta themselves: both are solved for together, for this
    procedure and n. Raises ValueError on a KL that is not positive, OutOfReach on one that is too
    large (of a closed form the largest is named).
    """
    T, n, kl = mass_map(procedure), whole("n", n), positive("kl", kl)
    if kl > MAX_KL:
        raise OutOfReach(
            f"kl {kl:g} is out of reach: the largest that is resolved is {MAX_KL:g} nats; "
            "ask for less"
        )
    if not is_fixed_point(transform):
        Phi, ref = _on_cells(transform)
        return 1 / cells.tilt_to_kl(Phi, kl, ref)[1]
    best = solve(solved_for(transform, T), n, kl=kl)
    if not best.residual < CONVERGED:
        missing = f"the win rate misses 1 by {max(0, 1 - best.win_rate):.0e} there"
        raise OutOfReach(
            f"kl {kl:g} is out of reach of {transform} at n {n}: {missing}; ask for less"
        )
    return best.beta


def at_kl(
    transform: TransformLike,
    kl: float,
    procedure: str | MassMap,
    n: int,
    *,
    K: int | None = None,
    levels: Tensor | None = None,
) -> float:
    """The win rate that theory gives this transform at a (measured) KL in nats.

    A KL of 0, or below it by noise, is pi_ref: 1/2. Above MAX_KL it is the win rate at MAX_KL, 1
    for all purposes. For a fixed point under another procedure or n than it was solved for, pass
    its Phi. K: as in `tradeoff`. levels: of a reward with ties (`levels_of`).
    """
    policy = policy_at_kl(transform, kl, procedure, n, K=K, levels=levels)
    return mass_win_rate(*policy, procedure, n).item()


def optimal_win_rate(kl: float, procedure: str | MassMap, n: int) -> float:
    """The best win rate that any policy has at this KL in nats. 1/2 at a KL of 0 or below."""
    return at_kl("optimal", kl, procedure, n)


def policy_at_kl(
    transform: TransformLike,
    kl: float,
    procedure: str | MassMap,
    n: int,
    *,
    K: int | None = None,
    levels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(mass, ref): the mass of each cell under this transform's policy at this KL, and pi_ref's.

    (G,) each, or (prompts, G) with K or levels. ref is also the cells' width. procedure, n: what a
    fixed point is solved for. Other arguments as in `at_kl`. With K or levels the reward takes few
    values, and the largest KL is that of a policy on the best value alone: a larger kl gives that
    policy.
    """
    T, n, kl = mass_map(procedure), whole("n", n), min(number("kl", kl), MAX_KL)
    if kl < 1e-9:
        return cells.grid(COARSE), cells.grid(COARSE)
    best = frontier(solved_for(transform, T), n, kl) if is_fixed_point(transform) else None
    return _masses(*_policy(transform, best, K, levels, kl=kl), K, n)


def levels_of(r_ref: Tensor, spread: bool = True) -> Tensor:
    """(P, G) the levels of a reward with ties, in rising order: pi_ref's mass on each.

    r_ref: (P, M) rewards of pi_ref's samples. What M samples show of P prompts: a level has the
    share of the samples on it; a prompt with fewer than M levels has empty ones. A value that
    occurs once among all P M rewards counts as continuous: its share is spread over CUT cells, and
    G is M CUT instead of M; without `spread` it is a level too.
    """
    counts, once = _levels(r_ref)
    shares = counts / counts.shape[1]
    if not (spread and once.any()):
        return shares
    one_cell = torch.eye(CUT, dtype=torch.float64)[-1]
    parts = torch.where(once[..., None], torch.full_like(one_cell, 1 / CUT), one_cell)
    return (shares[..., None] * parts).flatten(1)  # of (P, M, CUT)


def _levels(r_ref: Tensor) -> tuple[Tensor, Tensor]:
    """(counts, once), (P, M) each, the samples in rising order: at the last sample of each level
    how many the level has, elsewhere 0; whether its value occurs only once among all P M rewards.
    """
    order = samples_rewards(r_ref).sort(1).values
    below, up_to = ranks(order, order)
    last = up_to == 1 + torch.arange(order.shape[1])
    _, which, everywhere = order.unique(return_inverse=True, return_counts=True)
    return (up_to - below).double() * last, everywhere[which] == 1


def tied(r_ref: Tensor, procedure: str | MassMap, n: int) -> bool:
    """Whether ties decide what the procedure keeps: two responses of pi_ref, each kept by it, share
    a reward in more than TIED of the cases, beyond two standard errors over prompts.

    r_ref: (P, M). It depends on the procedure: a reward that is capped ties after Best-of-N, one
    with many refusals after Worst-of-N. False, too, where most levels hold a single sample, as
    with whole numbers of many values: M samples are too few to know such levels.
    """
    counts, once = _levels(r_ref)
    ref = counts / counts.shape[1]
    ties = mass_map(procedure)(ref, cdf(ref), n).square()  # of two draws, by level
    share = (ties * (counts > 1)).sum(1)  # (P,)
    total = (ties / torch.where(once, CUT, 1)).sum(1)  # as they are in `levels_of`
    error = share.std() / len(share) ** 0.5 if len(share) > 1 else 0.0
    return bool(share.mean() - 2 * error > TIED and share.mean() > total.mean() / 2)


def tied_levels(r_ref: Tensor, procedure: str | MassMap, n: int) -> Tensor | None:
    """`levels_of` a reward that is `tied`; None of one that counts as continuous."""
    return levels_of(r_ref) if tied(r_ref, procedure, n) else None


# ---- the optimum of any procedure (Theorem 1) ----


def optimal_transform(procedure: str | MassMap, n: int, beta: float) -> tuple[Tensor, Tensor]:
    """(u, Phi) of the policy that maximises W^T - beta KL (Definition 5, Theorem 1, Corollary 2).

    procedure: a name, or any differentiable function (mass, edges, n) -> mass as in `procedures/`.
    Returns the midpoint grid u (POINTS,) and Phi on it with Phi(1) = 0, float64: the policy is
    f = e^{Phi/beta} / Z. Raises ValueError where the ascent does not converge or the policy is too
    narrow: never a Phi that is not optimal.
    """
    u = midpoints(POINTS)
    return u, fixed_point("optimal", procedure, n, beta)(u)


# ---- a policy on cells ----


def _masses(log_ratio: Tensor, ref: Tensor, K: int | None, n: int) -> tuple[Tensor, Tensor]:
    """(mass, ref) of a `_policy`. With K samples a cell is wide, and the true C spreads over it
    uniformly, so draws that meet in it don't tie: it is cut into parts, more where more draws fall.
    """
    mass = ref * log_ratio.exp()
    if K is None:
        return mass, ref
    heavy = n * (mass + ref).mean(0)  # (K + 1,) draws of both policies in a cell
    parts = (512 / (K + 1) + 16 * heavy).ceil().long()
    return tuple((x / parts).repeat_interleave(parts, -1) for x in (mass, ref))


def _policy(
    transform: TransformLike,
    best: Optimum | None,
    K: int | None,
    levels: Tensor | None = None,
    *,
    scale: float | None = None,
    kl: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log pi/pi_ref and pi_ref's mass of each cell, (G,), or (prompts, K + 1) with K samples: of a
    transform, or of a fixed point's solution `best`, at 1/beta or at a KL.
    """
    continuous = K is None and levels is None
    if best is not None and continuous:
        return best.log_ratio, cells.grid(COARSE)
    Phi, ref = _on_cells(transform if best is None else interpolated(best), K, levels)
    if kl is None and not (Phi * scale).isfinite().all():
        raise ValueError(f"beta {1 / scale:g}: Phi / beta is not finite; use a larger beta")
    if kl is None:
        return cells.tilt(Phi, scale, ref), ref
    if not continuous:  # a few values of the reward have a largest KL
        kl = min(kl, (1 - 1e-9) * cells.largest_kl(Phi, ref))
    log_ratio = cells.tilt_to_kl(Phi, kl, ref)[0] if kl >= 1e-9 else torch.zeros_like(ref)
    return log_ratio, ref


def _on_cells(
    transform: TransformLike, K: int | None = None, levels: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(Phi, ref): Phi of each cell and its mass under pi_ref. Raises ValueError on K and levels at
    once, and on levels that are no masses.

    Continuous: both (G,). K: Phi (K + 1,), one for each C_hat = k / K; ref (prompts, K + 1).
    levels: both (prompts, G), and ref is `levels`.
    """
    if levels is not None:
        levels = real("levels", levels).double()
        sums = levels.sum(-1)
        masses = not (levels < 0).any() and torch.allclose(sums, torch.ones_like(sums))
        if K is not None or levels.dim() != 2 or not masses:
            raise ValueError(
                f"levels {tuple(levels.shape)}, K {K}: levels are (prompts, G) masses, none below "
                "0, that sum to 1 per prompt (levels_of), and stand in place of K"
            )
    if K is None:
        ref = cells.grid(FINE) if levels is None else levels
        # an empty level below the first is at 0, where log is not finite
        u = cells.centres(ref) if levels is None else cells.centres(ref).clamp(min=1e-12)
    else:
        ref = cells.spacings(whole("K", K))
        u = torch.arange(K + 1, dtype=torch.float64) / K
    Phi = transform if callable(transform) else get_transform(transform, K=K)
    values = torch.as_tensor(Phi(u), dtype=torch.float64)
    if values.shape != u.shape or not values.isfinite().all():
        raise ValueError(
            f"Phi must map u {tuple(u.shape)} to as many finite values; bound it near 0 and 1"
        )
    return values, ref


def _mass(density: Tensor) -> Tensor:
    f = real("density", density).double()
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
