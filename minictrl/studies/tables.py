"""What the studies do with their rows: columns, means over seeds, methods at one KL.

A row is a dict, as in eval.json: a method and its KL, a procedure and its n, a scorer, a win rate;
and by prompt, which `plain` leaves out, the win rates `wins` and KLs `kls`, an array (P,) each.
Errors are over seeds and prompts (`errors.py`).
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean

import numpy as np
from torch import Tensor

from minictrl import theory
from minictrl.studies.errors import Estimate, crossed

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


def plain(rows: Iterable[dict]) -> Rows:
    """The rows as a CSV holds them: without arrays, nor where they come from."""
    left_out = ("run", "made_from", "commit", "wins", "kls")
    return [{name: x for name, x in row.items() if name not in left_out} for row in rows]


def points(rows: Rows) -> Rows:
    """One row for each method, budget, procedure, n and scorer: means over seeds."""
    names = ("method", "budget", "procedure", "n", "scorer")
    found = []
    for key, group in grouped(rows, *names).items():
        kl, win_rate = crossed(column(group, "kls")), crossed(column(group, "wins"))
        expected = column(group, "theory")
        means = {
            "kl": kl.mean,
            "kl_stderr": kl.stderr,
            "win_rate": win_rate.mean,
            "stderr": win_rate.stderr,
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


def comparable(rows: Rows, kl: float, **case) -> Rows:
    """The rows of one method and case between 0.4 and 2.5 times a KL, so that the budgets of half
    and twice that are among them; none where the KL is more than a fifth beyond all of them, or
    the nearest of them is 1.5 times away.
    """
    mine = [row for row in where(rows, **case) if kl / 2.5 <= row["kl"] <= 2.5 * kl]
    if not mine:
        return []
    away = np.log(column(mine, "kl")) - math.log(kl)
    within = away.min() <= 0.2 and away.max() >= -0.2
    near = abs(away).min() <= math.log(1.5)
    return mine if within and near else []


def common_slope(rows: Rows, kl: float, **case) -> float:
    """How the share of the optimum's gain over 0.5 rises with log KL around a KL in nats.

    case: procedure, n, scorer. One slope for all methods, so that none is carried further than
    another because it has more runs: regressed within each method whose comparable runs are more
    than a fifth apart; 0 if none has such runs.
    """
    rise = spread = 0.0
    for runs in grouped(where(rows, **case), "method").values():
        mine = comparable(runs, kl)
        log_kl = np.log(column(mine, "kl"))
        if not mine or np.ptp(log_kl) <= 0.2:
            continue
        gain, best = (np.array(column(mine, name)) - 0.5 for name in ("win_rate", "optimal"))
        away = log_kl - log_kl.mean()
        rise += away @ (gain / best)
        spread += away @ away
    return rise / spread if spread else 0.0


def wins_at(rows: Rows, kl: float, method: str, **case) -> dict[int, np.ndarray]:
    """seed -> (P,) win rates of a method at a KL in nats; none where it has no `comparable` runs.

    case: procedure, n, scorer. They are those of the budget nearest to the KL, carried to it along
    `common_slope`. A run's KL is a mean over these prompts and has an error: so each prompt is
    corrected by its own KL, and that error is part of ±. The slope's own error is left out: the way
    to the KL is short.
    """
    mine = comparable(rows, kl, method=method, **case)
    if not mine:
        return {}
    slope = common_slope(rows, kl, **case)
    below, at, above = (
        theory.optimal_win_rate(kl * by, case["procedure"], case["n"]) - 0.5
        for by in (1 / 1.1, 1, 1.1)
    )
    rise = (above - below) / (2 * math.log(1.1))  # of the optimum's gain, in log KL
    budgets = grouped(mine, "budget").values()
    nearest = min(budgets, key=lambda runs: abs(fmean(column(runs, "kl")) - kl))
    found = {}
    for row in nearest:
        gain = (row["wins"] - 0.5) / (row["optimal"] - 0.5)  # (P,)
        steep = gain.mean() * rise + slope * at  # d win rate / d log KL of the method
        away = slope * at * math.log(row["kl"] / kl) + steep * (row["kls"] / row["kl"] - 1)
        found[row["seed"]] = 0.5 + at * gain - away
    return found


def ahead(mine: dict[int, np.ndarray], others: dict[int, np.ndarray]) -> Estimate:
    """How far one method is ahead of another, seed by seed and prompt by prompt, where both are
    (`wins_at`).
    """
    return crossed([mine[seed] - others[seed] for seed in mine.keys() & others.keys()])


def measured_at_kl(rows: Rows, kl: float, method: str, procedure: str, n: int) -> Rows:
    """A method at this KL, as rows of a study: one by reward and one by judge."""
    case = {"method": method, "procedure": procedure, "n": n}
    found = []
    for scorer in SCORERS:
        win_rate = crossed(list(wins_at(rows, kl, **case, scorer=scorer).values()))
        row = {"scorer": scorer, "kl": kl, "win_rate": win_rate.mean, "stderr": win_rate.stderr}
        found.append(row)
    return found


def common_kl(rows: Rows, methods: Iterable[str] | None = None) -> float:
    """The KL, of 0.1 to 2 nats, at which most of the methods (default: all) have runs to compare;
    of several such KLs the nearest to all runs.
    """
    rows = where(rows, **{name: rows[0][name] for name in ("procedure", "n", "scorer")})
    methods = methods or set(column(rows, "method"))

    def compared(kl: float) -> tuple[int, float]:
        distance = fmean(abs(math.log(row["kl"] / kl)) for row in rows)
        found = [name for name in methods if comparable(rows, kl, method=name)]
        return len(found), -distance

    return max((step / 20 for step in range(2, 41)), key=compared)
