"""Inference-time procedures as maps of masses, and the win rate after one: the paper's T and
Definition 4.

[0, 1] is cut into cells; a policy is the mass of each, and a procedure maps masses to masses, with
a tie inside a cell. A continuous policy has many narrow cells, an empirical calibration K + 1 wide
ones, a tabular problem one for each distinct reward. A new procedure is one function below and its
name in PROCEDURES.
"""

from collections.abc import Callable
from operator import index

import torch
from torch import Tensor

from minictrl.procedures.cells import REWIND_QUANTILE, cdf

Procedure = Callable[[Tensor, Tensor, int], Tensor]


# ---- mass (..., G) of each cell, the cells' edges u (..., G + 1), N -> mass after the procedure
# ----


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
    # share of each cell above the threshold
    above = ((u[..., 1:] - REWIND_QUANTILE) / u.diff()).clamp(0, 1)
    q = (mass * (1 - above)).sum(-1, keepdim=True)  # a draw falls below it
    # how many are made on average, (1 - q^N) / (1 - q)
    draws = (q ** torch.arange(n)).sum(-1, keepdim=True)
    return mass * (above * draws + (1 - above) * q ** (n - 1))


PROCEDURES: dict[str, Procedure] = {"standard": standard, "bon": bon, "won": won, "rewind": rewind}


def get_procedure(procedure: str | Procedure) -> Procedure:
    """The function behind a name; a function stays as it is. Raises ValueError on an unknown
    name.
    """
    if not callable(procedure) and procedure not in PROCEDURES:
        known = ", ".join(PROCEDURES)
        raise ValueError(
            f"unknown procedure {procedure!r}; known: {known}, or a function (mass, u, n) -> mass"
        )
    return procedure if callable(procedure) else PROCEDURES[procedure]


def mass_win_rate(mass: Tensor, ref: Tensor, procedure: str | Procedure, n: int) -> Tensor:
    """W^T(pi > pi_ref) of Definition 4, from the masses of pi and pi_ref on the same ordered cells;
    differentiable.

    mass, ref: (..., G), each summing to 1 over the cells. Within a cell all tie, and a tie counts
    one half. Returns a scalar, the mean over any leading dimensions: prompts, or the procedures of
    a mix.
    """
    T, u = get_procedure(procedure), cdf(ref)
    ref_after = T(ref, u, n)
    return (T(mass, u, n) * (ref_after.cumsum(-1) - ref_after / 2)).sum(-1).mean()


def at_least_1(name: str, n: int) -> int:
    """n as an int. Raises ValueError unless it is a whole number of at least 1."""
    if isinstance(n, bool) or not hasattr(n, "__index__") or index(n) < 1:
        raise ValueError(
            f"{name} {n!r}: must be a whole number of at least 1; use 1 for a single draw"
        )
    return index(n)
