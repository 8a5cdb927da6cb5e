"""[0, 1] cut into cells: pi_ref's mass in each, a policy's log-ratio to it, KL. The arithmetic
under theory.py.

Shapes: (G,) for one policy, (prompts, G) where every prompt has cells of its own; `ref` is pi_ref's
mass in each cell.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from minictrl.checks import OutOfReach

REWIND_QUANTILE = 0.85  # of pi_ref: the threshold of rewind-and-repeat (App. G)
CELLS_TO_QUANTILE = 0.0435  # share of a grid's cells between 0.5 and that quantile


@lru_cache
def grid(cells: int) -> Tensor:
    """Widths (cells,) of cells that get narrow at both ends of [0, 1]: equal steps of
    log(u / (1 - u)), to 2e-9 from either end, where one cell takes the rest.

    Sharp policies live there. REWIND_QUANTILE is an edge, so that no cell straddles the jump.
    Errors fall as 1/cells^2.
    """
    step = math.log(REWIND_QUANTILE / (1 - REWIND_QUANTILE)) / round(CELLS_TO_QUANTILE * cells)
    lower = torch.sigmoid(step * torch.arange(-(cells // 2), 1, dtype=torch.float64))
    widths = pad(lower[1:], (1, 0)).diff()
    return torch.cat([widths, widths.flip(0)])


@lru_cache(maxsize=8)
def spacings(K: int) -> Tensor:
    """(prompts, K + 1) gaps between K sorted uniform draws: what each C_hat = k / K covers, per
    prompt.

    The theory of K samples is the mean over these simulated prompts, from a fixed seed: 2,000, or
    fewer where K is large and they differ less. Their error is 0.2 points of a win rate at K = 5,
    less than 0.05 at K = 100.
    """
    prompts = min(2000, max(10, 4_000_000 // K))
    gaps = -torch.log1p(
        -torch.rand(prompts, K + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    return gaps / gaps.sum(-1, keepdim=True)


def midpoints(points: int) -> Tensor:
    """The midpoint grid u = (i + 1/2) / points."""
    return (torch.arange(points, dtype=torch.float64) + 0.5) / points


def cdf(mass: Tensor) -> Tensor:
    """The cdf at the cells' edges, from 0 to 1: mass (..., G) -> (..., G + 1)."""
    return pad(mass.cumsum(-1), (1, 0)).clamp(max=1)


def centres(ref: Tensor) -> Tensor:
    """u in the middle of each cell, (..., G)."""
    return cdf(ref)[..., :-1] + ref / 2


def slopes(values: Tensor, centres: Tensor) -> Tensor:
    """(G,) slope inside each cell, no steeper than to either neighbour, 0 at a peak: a jump between
    cells stays a jump.
    """
    rise = values.diff() / centres.diff()
    left, right = torch.cat([rise[:1], rise]), torch.cat([rise, rise[-1:]])
    return torch.where(left * right > 0, torch.where(left.abs() < right.abs(), left, right), 0.0)


def kl(log_ratio: Tensor, ref: Tensor) -> float:
    """KL(pi || pi_ref) in nats, the mean over prompts."""
    return (ref * log_ratio.exp() * log_ratio).sum(-1).mean().item()


def tilt(Phi: Tensor, scale: float, ref: Tensor, base: Tensor | float = 0.0) -> Tensor:
    """log pi/pi_ref of pi = pi_ref e^{base + scale Phi} / Z (Eq. 5, scale = 1/beta); never
    overflows.
    """
    log_ratio = base + scale * (Phi - Phi.max())
    return log_ratio - torch.logsumexp(log_ratio + ref.log(), -1, keepdim=True)


def largest_kl(Phi: Tensor, ref: Tensor) -> float:
    """KL in nats of a policy that has nothing but the best cells, the mean over prompts. A cell
    where pi_ref has no mass is none.
    """
    Phi = Phi.expand_as(ref).masked_fill(ref == 0, -math.inf)
    return -(ref * (Phi == Phi.amax(-1, keepdim=True))).sum(-1).log().mean().item()


def tilt_to_kl(
    Phi: Tensor, kl: float, ref: Tensor, base: Tensor | float = 0.0, scale: float | None = None
) -> tuple[Tensor, float]:
    """(log pi/pi_ref, scale) of the tilt at this KL, scale being 1/beta: Newton's method in a
    bracket, because KL rises with scale.

    Raises OutOfReach: a Phi that is largest on a part of [0, 1] has no KL above -log of that part.
    """
    most = largest_kl(Phi, ref)
    if kl >= most:
        raise OutOfReach(
            f"kl {kl:g} is out of reach: the largest of this transform is {abs(most):.4g} nats; "
            "ask for less, or of a fixed point for a smaller n"
        )
    shifted = Phi - Phi.max()  # not by the mean: e^{-50 u} would lose its top to rounding
    if scale is None:  # KL = scale^2 Var[Phi] / 2 where both are small
        variance = (ref * shifted**2).sum(-1) - (ref * shifted).sum(-1) ** 2
        scale = math.sqrt(2 * kl / variance.mean().item())
    low, high = 0.0, math.inf
    for _ in range(200):
        log_ratio = tilt(Phi, scale, ref, base)
        mass = ref * log_ratio.exp()
        now = (mass * log_ratio).sum(-1, keepdim=True)
        missing = kl - now.mean().item()
        if abs(missing) <= 1e-11 * kl + 1e-15:
            break
        low, high = (scale, high) if missing > 0 else (low, scale)
        slope = (mass * (log_ratio - now) * shifted).sum(-1).mean().item()
        newton = scale + missing / slope if slope > 0 else math.nan
        if low < newton < high:
            scale = newton
        elif high == math.inf:
            scale *= 2
        else:
            scale = (low + high) / 2
    return log_ratio, scale
