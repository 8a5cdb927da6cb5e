"""The win rate after a procedure, from masses of cells: the paper's T and Definition 4.

A continuous policy has many narrow cells, an empirical calibration K + 1 wide ones, a tabular
problem one for each distinct reward. Within a cell all responses tie.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minictrl.procedures import get_procedure
from minictrl.procedures.cells import cdf

# mass (..., G) of each cell, the cells' edges (..., G + 1), N -> mass after the procedure
MassMap = Callable[[Tensor, Tensor, int], Tensor]


def mass_map(procedure: str | MassMap) -> MassMap:
    """The map of masses behind a name; a function stays as it is. ValueError on an unknown name."""
    return procedure if callable(procedure) else get_procedure(procedure).mass_after


def mass_win_rate(mass: Tensor, ref: Tensor, procedure: str | MassMap, n: int) -> Tensor:
    """W^T(pi > pi_ref) of Definition 4, from the masses of pi and pi_ref on the same ordered cells.

    mass, ref: (..., G), each summing to 1 over the cells. A tie counts one half. Differentiable.
    Returns a scalar, the mean over any leading dimensions: prompts, or the procedures of a mix.
    Raises ValueError if the procedure gives no masses.
    """
    T, edges = mass_map(procedure), cdf(ref)
    after, ref_after = (masses_after(T, each, edges, n) for each in (mass, ref))
    return (after * (ref_after.cumsum(-1) - ref_after / 2)).sum(-1).mean()


def masses_after(T: MassMap, mass: Tensor, edges: Tensor, n: int) -> Tensor:
    """T(mass, edges, n). Raises ValueError unless that is a mass for each cell, of 1 in all, and
    depends on a `mass` whose gradient is asked for.
    """
    after = T(mass.clone(), edges.clone(), n)  # which a user's function may write into
    shape = tuple(getattr(after, "shape", ()))
    asked = mass.requires_grad and torch.is_grad_enabled()
    if asked and not getattr(after, "requires_grad", True):
        raise ValueError("a procedure's result does not depend on `mass`: make it differentiable")
    if shape[-1:] == mass.shape[-1:] and after.dtype == mass.dtype:
        known = after.detach()
        if known.min() >= -1e-6 and (known.sum(-1) - 1).abs().max() <= 1e-3:
            return after
    raise ValueError(
        f"a procedure gave {shape or type(after).__name__} for masses {tuple(mass.shape)}: return "
        f"as many, nowhere negative, that sum to 1, in {mass.dtype}"
    )
