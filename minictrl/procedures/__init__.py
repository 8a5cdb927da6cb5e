"""Inference-time procedures, one file each: how a procedure maps a density, how it weighs samples.

A new procedure is one file with two functions, and its name in PROCEDURES:

    mass_after(mass (..., G), edges (..., G + 1), n) -> (..., G)    the mass of each cell after it
    weights(select (P, M), n, threshold (P,)) -> (P, M)             how often each sample is kept

The first serves the theory, where [0, 1] is cut into cells and a policy is the mass of each
(`masses.py`, `cells.py`); the solver for a procedure's optimum (`optimum.py`) needs nothing else.
The second serves the evaluation (`winrate.py`). Both are for N (in signatures `n`) draws.
"""

from importlib import import_module
from types import ModuleType

PROCEDURES = ("standard", "bon", "won", "rewind")


def get_procedure(name: str) -> ModuleType:
    """The module of a procedure. Raises ValueError on an unknown name."""
    if name not in PROCEDURES:
        raise ValueError(f"unknown procedure {name!r}; known: {', '.join(PROCEDURES)}")
    return import_module(f"minictrl.procedures.{name}")
