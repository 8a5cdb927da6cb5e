"""What the studies do with their rows: columns, means over seeds, methods at one KL.

A row is a dict, as in eval.json: a method and its KL, a procedure and its n, a scorer, a win rate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, stdev

import numpy as np
from torch import Tensor

from minictrl import theory

SCORERS = ("reward", "judge")


Rows = list[dict]


def where(rows: Rows, **values) -> Rows:
    """The rows that have these values in these columns."""
    return [row for row in rows if values.items() <= row.items()]


def column(rows: Rows, name: str, **values) -> list:
    """A column of the rows that have these values in these other columns."""
    return [row[name] for row in where(rows, **values)]


def zipped(columns: dict[str, Tensor]) -> Rows:
    """The rows of a table from its columns."""
    lists = [values.tolist() for values in columns.values()]
    return [dict(zip(columns, row)) for row in zip(*lists)]


def grouped(rows: Rows, *names: str) -> dict[tuple, Rows]:
    """The rows for each combination of values in these columns."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


# --- means over seeds ---


def mean_stderr(values: list[float], alone: float = math.nan) -> tuple[float, float]:
    """Mean and its standard error; that of a single value is `alone`."""
    if len(values) == 1:
        return values[0], alone
    return fmean(values), stdev(values) / math.sqrt(len(values))


def points(rows: Rows) -> Rows:
    """One row for each method, budget, procedure, n and scorer: means over seeds.

    stderr, kl_stderr: over seeds (of one seed: over prompts). stderr_prompts: over prompts, which
    all runs share.
    """
    names = ("method", "budget", "procedure", "n", "scorer")
    found = []
    for key, group in grouped(rows, *names).items():
        kl, kl_stderr = mean_stderr(column(group, "kl"), group[0]["kl_stderr"])
        win_rate, stderr = mean_stderr(column(group, "win_rate"), group[0]["stderr"])
        expected = column(group, "theory")
        means = {
            "kl": kl,
            "kl_stderr": kl_stderr,
            "win_rate": win_rate,
            "stderr": stderr,
            "stderr_prompts": fmean(column(group, "stderr")),
            "theory": None if None in expected else fmean(expected),
            "optimal": fmean(column(group, "optimal")),
            "seeds": len(group),
        }
        case = dict(zip(names, key))
        found.append(case | means)
    return found


# --- methods at one KL ---


def below_optimum(win_rate: float, kl: float, procedure, n: int) -> float:
    """How far a win rate is below the best at its KL, in points."""
    return 100 * (theory.optimal_win_rate(kl, procedure, n) - win_rate)


def near(rows: Rows, kl: float) -> Rows:
    """The rows of runs between half and twice a KL."""
    return [row for row in rows if kl / 2 <= row["kl"] <= 2 * kl]


def comparable(rows: Rows, kl: float, **case) -> Rows:
    """The rows near a KL of one method and case; none where the KL is more than a tenth beyond all
    of them.
    """
    mine = where(near(rows, kl), **case)
    kls = column(mine, "kl")
    tenth = math.exp(0.1)
    if mine and min(kls) / tenth <= kl <= max(kls) * tenth:
        return mine
    return []


def win_rate_at(rows: Rows, kl: float, **case) -> tuple[float, float]:
    """(win rate, standard error) of a method at this KL in nats, from its runs, of all seeds,
    between half and twice the KL.

    case: method, procedure, n, scorer. The gain over 0.5, as a share of the optimum's at the same
    KL, changes slowly: it is regressed on log KL, or averaged where the runs' KLs are within a
    fifth of each other. The error is that of the regression, so the scatter of the seeds; of one
    run or two, that over prompts. nan more than a tenth beyond the runs.
    """
    mine = comparable(rows, kl, **case)
    if not mine:
        return math.nan, math.nan
    x = np.log(column(mine, "kl")) - math.log(kl)  # 0 at the KL asked for
    win_rates = np.array(column(mine, "win_rate"))
    optimal = np.array(column(mine, "optimal"))
    share = (win_rates - 0.5) / (optimal - 0.5)
    dx = x - x.mean()
    spread = dx @ dx if np.ptp(x) > 0.2 else math.inf
    slope = dx @ share / spread
    gain = theory.optimal_win_rate(kl, case["procedure"], case["n"]) - 0.5
    at_this_kl = share.mean() - slope * x.mean()
    win_rate = 0.5 + gain * at_this_kl.item()
    if len(mine) <= 2:
        return win_rate, fmean(column(mine, "stderr"))
    left = share - share.mean() - slope * dx
    variance = left @ left / (len(mine) - 2)
    of_mean = variance / len(mine)
    of_slope = variance / spread * x.mean() ** 2
    return win_rate, gain * (of_mean + of_slope).item() ** 0.5


def at_kl(rows: Rows, kl: float, method: str, procedure: str, n: int) -> Rows:
    """A method at this KL, as rows of a study: one by reward and one by judge."""
    case = {"method": method, "procedure": procedure, "n": n}
    found = []
    for scorer in SCORERS:
        win_rate, stderr = win_rate_at(rows, kl, **case, scorer=scorer)
        found.append({"scorer": scorer, "kl": kl, "win_rate": win_rate, "stderr": stderr})
    return found


def common_kl(rows: Rows, methods: Iterable[str] | None = None) -> float:
    """Of 0.1 to 2 nats, the KL at which most of the methods (default: all) have runs to compare; of
    several the nearest to all runs.
    """
    rows = where(rows, **{name: rows[0][name] for name in ("procedure", "n", "scorer")})
    methods = methods or set(column(rows, "method"))

    def compared(kl: float) -> tuple[int, float]:
        distance = fmean(abs(math.log(row["kl"] / kl)) for row in rows)
        found = [name for name in methods if comparable(rows, kl, method=name)]
        return len(found), -distance

    return max((step / 20 for step in range(2, 41)), key=compared)
