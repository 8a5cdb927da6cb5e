"""The paper's figures that need trained policies. All read the runs of one sweep (`sweep.py`).

Win rates are by reward model and by judge on held-out prompts, error bars one standard error over
seeds and prompts. Beside the measured curves: the theory of each transform (dashed, same colour)
and the optimum for the procedure (black).
"""

import math
from itertools import product
from pathlib import Path
from statistics import fmean

import numpy as np
from torch import Tensor

from minictrl import theory, winrate
from minictrl.figures import KL, WIN_RATE, draw_tradeoff, errorbars, panels, title
from minictrl.procedures import get_procedure, rewind
from minictrl.procedures.base import by_rank
from minictrl.procedures.optimum import FIXED_POINTS
from minictrl.results import read_samples
from minictrl.studies.curves import best_of_kl
from minictrl.studies.sweep import AWARE, OTHERS, VARIANTS, judged, redrawn, reference, sweep
from minictrl.studies.tables import (
    SCORERS,
    Rows,
    column,
    common_kl,
    grouped,
    measured_at_kl,
    plain,
    points,
    where,
)

# --- win rate against KL ---


def fig4(out: Path, quick: bool):
    """Standard, Best-of-4 and Worst-of-4 win rate against KL, every method (Fig. 4).

    Paper: Identity is above IPO, BoNBoN and BoND on helpfulness and harmlessness, on par on
    summarisation; exp10 gains up to 3 % (helpfulness) and 8 % (summarisation) on Best-of-4, exp-10
    up to 5 % on Worst-of-4 over the best other method.
    """
    return against_kl(sweep(out, quick, VARIANTS), [("standard", 1), ("bon", 4), ("won", 4)])


def fig5(out: Path, quick: bool):
    """Best-of-2 and 32, Worst-of-2 (Fig. 5).

    Paper: exp5 is better for N = 2, exp10 for N = 4, as the analysis says, and both are above all
    others for all N.
    """
    return against_kl(sweep(out, quick, VARIANTS), [("bon", 2), ("bon", 32), ("won", 2)])


def fig8(out: Path, quick: bool):
    """Best-of-32 and Worst-of-32 (Fig. 8).

    Paper: The gains on Best-of-N are larger than at N = 4.
    """
    return against_kl(sweep(out, quick, VARIANTS), [("bon", 32), ("won", 32)])


def fig6(out: Path, quick: bool):
    """CTRL with identity, GRPO, and Best-of-n itself: standard win rate (Fig. 6).

    Paper: CTRL is similar to GRPO and closes the gap to Best-of-n.
    """
    return against_best_of(out, quick, [("standard", 1)], ["identity", "grpo", "none"])


def fig10(out: Path, quick: bool):
    """CTRL, GRPO, BoND and Best-of-n: standard and Best-of-4 (Fig. 10).

    GRPO online and, as in the paper (App. E.1), on the fixed K rollouts of pi_ref.

    Paper: CTRL is above GRPO on Best-of-4 and comparable on the standard win rate.
    """
    methods = ["identity", "exp10", "grpo", "grpo_fixed", "bond"]
    return against_best_of(out, quick, [("standard", 1), ("bon", 4)], methods)


def against_kl(rows: Rows, cases: list[tuple[str, int]], methods: list[str] | None = None):
    """A column for each (procedure, n), a row for each scorer, with means over seeds; the table has
    every run.

    methods: those drawn (default: those made for the procedure, and those made for none).
    """
    figure, axes = panels(2, len(cases))
    table = points(rows)
    for axis, (scorer, (procedure, n)) in zip(axes, product(SCORERS, cases)):
        drawn = methods or [*AWARE[procedure], "identity", *OTHERS]
        draw_measured(axis, table, drawn, procedure, n, scorer)
    return plain(row for row in rows if (row["procedure"], row["n"]) in cases), figure


def draw_measured(axis, table: Rows, methods: list[str], procedure: str, n: int, scorer: str):
    """Measured curves of these methods, the theory of their transforms, and the optimum."""
    rows = where(table, procedure=procedure, n=n, scorer=scorer)
    rows = [row for row in rows if row["method"] in methods]
    rows.sort(key=lambda row: (methods.index(row["method"]), row["kl"]))
    no_curve = {"none", *FIXED_POINTS}  # none's is not known; the others' is the optimum
    expected = {}
    for name in methods:
        transform = VARIANTS.get(name, {}).get("transform", "none")
        if transform not in no_curve:
            expected[name] = transform
    draw_tradeoff(axis, rows, procedure, n, by="method", expected=expected)
    axis.set_title(f"{title(procedure, n)}, by {scorer}")
    axis.legend()


# --- Best-of-n of pi_ref, which trains nothing ---


def against_best_of(out: Path, quick: bool, cases: list[tuple[str, int]], methods: list[str]):
    rows = sweep(out, quick, {name: VARIANTS[name] for name in methods})
    rows += best_of(out, quick)
    return against_kl(rows, cases, [*methods, "Best-of-n"])


def best_of(out: Path, quick: bool) -> Rows:
    """Best-of-n itself as rows of a sweep: fresh samples of pi_ref, an exact U-statistic, the KL
    that a continuous reward has (an upper bound with ties)."""
    P, M, fresh = (24, 32, 64) if quick else (200, 64, 256)
    task, r, texts = reference(out, P, M + fresh)
    both = {"reward": r, "judge": judged(task, texts)}
    scores = {name: (x[:, M:].double(), x[:, :M].double()) for name, x in both.items()}
    select, select_ref = scores["reward"]
    rows = []
    for size, (procedure, n) in product((2, 4, 8), (("standard", 1), ("bon", 4), ("won", 4))):
        kl = best_of_kl(size)
        weight = best_of_weights(select, size, procedure, n)
        weight_ref = get_procedure(procedure).weights(select_ref, n)
        for scorer, (x, x_ref) in scores.items():
            wins = (weight * winrate.beaten(x, x_ref, weight_ref)).sum(1)  # (P,)
            win_rate, stderr = winrate.mean_stderr(wins)
            row = {
                "method": "Best-of-n",
                "budget": size,
                "seed": 0,
                "procedure": procedure,
                "n": n,
                "scorer": scorer,
                "win_rate": win_rate,
                "stderr": stderr,
                "kl": kl,
                "kl_stderr": 0.0,
                "theory": theory.at_kl("log", kl, procedure, n),
                "optimal": theory.optimal_win_rate(kl, procedure, n),
                "wins": wins.numpy(),
                "kls": np.full(P, kl),
            }
            rows.append(row)
    return rows


def best_of_weights(select: Tensor, size: int, procedure: str, n: int) -> Tensor:
    """(P, M) the probability that each of M responses is the one kept, when the procedure draws n
    from Best-of-`size`.

    Over all ways to fill n groups of `size` without repetition. Worst-of-n: it is above the m
    lowest if every group has one above them, by inclusion and exclusion.
    """
    M = select.shape[1]
    if procedure != "won":
        return get_procedure("bon").weights(select.double(), n * size)

    def among_lowest(m: int) -> float:
        none_below = 0.0
        for j in range(n + 1):
            below = math.comb(m, j * size) / math.comb(M, j * size)  # j groups lie below
            none_below += (-1) ** j * math.comb(n, j) * below
        return 1 - none_below

    return by_rank(select.double(), [among_lowest(m) for m in range(M + 1)])


# --- other pictures of the sweep ---


def which_t(out: Path, quick: bool):
    """Which t of exp_t is best at which N, at equal KL: measured, and by theory, which trains
    nothing (Sec. 5.6).

    Paper: exp5 for Best-of-2, exp10 for Best-of-4, as theory says without training.
    """
    figure, axes = panels(1, 2)
    rows, table = sweep(out, quick, VARIANTS), []
    families = {"bon": ("identity", "exp5", "exp10"), "won": ("identity", "exp-5", "exp-10")}
    for axis, (procedure, names) in zip(axes, families.items()):
        kl = common_kl(rows, names)
        for name, n in product(names, (2, 4, 32)):
            row = {"procedure": procedure, "n": n, "transform": name}
            expected = {"theory": theory.at_kl(name, kl, procedure, n)}
            measured = measured_at_kl(rows, kl, name, procedure, n)
            table += [row | each | expected for each in measured]
        drawn = where(table, procedure=procedure, scorer="reward")
        draw_over_n(axis, drawn, "n", by="transform", dashed="theory")
        axis.set_title(f"{title(procedure, 'N')} at {kl:g} nats, by reward; dashed: theory")
    return table, figure


def draw_over_n(axis, rows: Rows, n: str, *, by: str, dashed: str | None = None):
    """Win rates against the N of column `n`, and those of column `dashed` beside them."""
    errorbars(axis, rows, n, "win_rate", by=by, yerr="stderr", dashed=dashed)
    axis.set_xscale("log", base=2)
    sizes = sorted(set(column(rows, n)))
    axis.set_xticks(sizes, sizes)
    axis.set(xlabel="N", ylabel=WIN_RATE)
    axis.legend()


def fig9(out: Path, quick: bool):
    """Raw judge and reward of a response minus those of pi_ref's, against KL (Fig. 9): one a prompt
    and run.

    Paper: CTRL is above the other methods in expected raw judge reward too.
    """
    figure, axes = panels(1, 2)
    rows, table = sweep(out, quick, VARIANTS), []
    for (run,), group in grouped(rows, "run").items():
        row = {name: group[0][name] for name in ("method", "budget", "seed", "kl")}
        samples = read_samples(Path(run))
        for scorer in SCORERS:
            row[scorer] = fmean(x[scorer] - x[f"{scorer}_reference"] for x in samples)
        table.append(row)
    for axis, scorer in zip(axes, SCORERS[::-1]):
        drawn = [
            row for name in ("identity", "exp10", *OTHERS) for row in where(table, method=name)
        ]
        errorbars(axis, drawn, "kl", scorer, by="method", fmt="o")
        axis.set(title=f"raw {scorer}", xlabel=KL, ylabel="mean score minus pi_ref's")
        axis.legend()
    return table, figure


# --- rewind-and-repeat ---


def fig12(out: Path, quick: bool):
    """Rewind-and-repeat, 85th percentile, at most 32 draws: win rate and how many draws were made
    (Fig. 12).

    Paper: exp transforms are above the baselines; aligned policies need fewer draws.
    """
    methods = {name: VARIANTS[name] for name in ("none", "identity", "exp5", "exp10")}
    methods["rewind"] = {"transform": "optimal", "procedure": "rewind"}
    rows, (figure, axes) = [], panels(1, 3)
    for (run,), group in grouped(sweep(out, quick, methods), "run").items():
        rows += rewound(Path(run), group[0])
    table = points(rows)
    for point in table:
        run_of = {name: point[name] for name in ("method", "budget")}
        point["draws"] = fmean(column(rows, "draws", **run_of))
    for axis, scorer in zip(axes, SCORERS):
        draw_measured(axis, table, list(methods), "rewind", 32, scorer)
    errorbars(axes[2], where(rows, scorer="reward"), "kl", "draws", by="method", fmt="o")
    axes[2].set(title="draws needed (32 at most)", xlabel=KL, ylabel="mean number of draws")
    axes[2].set_ylim(0)
    axes[2].legend()
    return table, figure


def rewound(run: Path, row: dict) -> Rows:
    """Rows of rewind-and-repeat, by reward and by judge, for the run that `row` is of."""
    pi, pi_ref = redrawn(run, row)
    r, r_ref = pi["reward"], pi_ref["reward"]
    rows = []
    for scorer in SCORERS:
        wins = winrate.win_rates(r, pi[scorer], r_ref, pi_ref[scorer], "rewind", 32)
        win_rate, stderr = winrate.mean_stderr(wins)
        measured = {
            "procedure": "rewind",
            "n": 32,
            "scorer": scorer,
            "win_rate": win_rate,
            "stderr": stderr,
            "wins": wins.numpy(),
            "theory": None,
            "optimal": theory.optimal_win_rate(row["kl"], "rewind", 32),
            "draws": mean_draws(r, rewind.threshold_of(r_ref), 32),
        }
        rows.append(row | measured)
    return rows


def mean_draws(select: Tensor, threshold: Tensor, n: int) -> float:
    """Draws of rewind-and-repeat on average, unbiased: the sum over m < n of the chance that m of M
    (P, M) all fail.
    """
    M = select.shape[1]

    def expected(fails: int) -> float:
        return sum(math.comb(fails, m) / math.comb(M, m) for m in range(n))

    fails = (select < threshold[:, None]).sum(1)
    return fmean(expected(count) for count in fails.tolist())


STUDIES = (fig4, fig5, fig6, fig8, fig9, fig10, fig12, which_t)
