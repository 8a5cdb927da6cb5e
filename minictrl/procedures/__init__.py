"""Inference-time procedures, one file each: how a procedure maps a density, how it weighs samples.

A new procedure is one file with a class `Procedure`, of a parent in `base.py`, and its name in
PROCEDURES. All are for N (in signatures `n`) draws; of one draw, every procedure keeps that one.

| procedure | what it keeps of N draws | source |
|---|---|---|
| standard | the first | |
| bon | the best: Best-of-N | Lemma 5 |
| won | the worst: Worst-of-N | Lemma 5 |
| rewind | the first above pi_ref's 85th percentile, else the last | App. G |
| second | the second best | |
| median | the median, for an even N either of the two | |
| trimmed | any but the best and the worst quarter | |
| soft | one at random, in proportion to exp(C / temperature): soft Best-of-N | arXiv 2505.03156 |
| poisson | the best of 1 + Poisson(N - 1): Best-of-Poisson, N draws on average | arXiv 2506.19248 |

`soft` has temperature 0.1, `soft<t>` (soft0.05, ...) another.
"""

import re
from functools import lru_cache
from importlib import import_module

PROCEDURES = (
    "standard", "bon", "won", "rewind", "second", "median", "trimmed", "soft", "poisson"
)  # fmt: skip


SHARPEST = 0.01  # temperature; below it the quadrature of soft.py needs too many points


def parse_procedure(name: str) -> tuple[str, list[float]]:
    """(file, arguments) of a procedure's name. Raises ValueError on one that is unknown."""
    given, name = name, str(name)
    if name in PROCEDURES:
        return name, []
    soft = re.fullmatch(r"soft(\d+\.?\d*|\.\d+)", name)
    if not soft:
        known = ", ".join(PROCEDURES)
        raise ValueError(f"unknown procedure {given!r}; known: {known}, soft<t> (soft0.05, ...)")
    if float(soft[1]) < SHARPEST:
        raise ValueError(f"procedure {name!r}: use a temperature of at least {SHARPEST}, or bon")
    return "soft", [float(soft[1])]


def get_procedure(name: str):
    """The `base.Procedure` of a name, always the same object. Raises ValueError on a bad name."""
    file, arguments = parse_procedure(name)
    return procedure_of(file, *arguments)


@lru_cache
def procedure_of(file: str, *arguments: float):
    return import_module(f"minictrl.procedures.{file}").Procedure(*arguments)
